"""Compaction as one Mosaic GPU kernel for Hopper, in place: a block for the keys or values of each head of a sequence.

A *loader* warpgroup brings slots to shared memory one by one, a unit of 64 ahead of the other ones; a *writer* puts
each unit where it belongs with one copy. A slot never moves back, so that what a unit overwrites has been read: unit u
goes to slots below ``64 (u + 1)``, and the slots of later units are not below that.
"""

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import refuse_keys, refuse_unless_hopper

UNIT, STAGES = 64, 3
I32 = jnp.int32


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of one call."""

    layers: int
    batch: int
    slots: int
    kv_heads: int
    head_dim: int
    kept: int
    dtype: Any

    @property
    def units(self) -> int:
        """Units that are moved."""
        return self.kept // UNIT


def refuse(*, platform: str, capability: str | None, dtype: Any, head_dim: int, kept: int, **_: Any) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if reason := refuse_unless_hopper(platform, capability) or refuse_keys(dtype, head_dim):
        return reason
    if kept % UNIT:
        return f"needs a multiple of {UNIT} slots to keep, got {kept}"
    return None


def compact_cache(k, v, slots_BKM, layer):
    """See :func:`pallas_kernels.compact_cache.compact_cache`; the arrays are stacked."""
    layers, batch, slots, kv_heads, head_dim = k.shape
    g = Geometry(
        layers=layers,
        batch=batch,
        slots=slots,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kept=slots_BKM.shape[2],
        dtype=k.dtype,
    )
    refs = [jax.new_ref(array) for array in (k, v)]
    _kernel(g)(layer.reshape(1).astype(I32), slots_BKM, *refs)
    return tuple(jax.freeze(ref) for ref in refs)


@functools.cache
def _kernel(g: Geometry):
    return plgpu.kernel(
        functools.partial(_body, g),
        out_type=(),
        grid=(g.batch * g.kv_heads, 2),
        grid_names=("block", "array"),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types={
            "ring": plgpu.SMEM((STAGES, UNIT, g.head_dim), g.dtype),
            "full": plgpu.Barrier(num_arrivals=UNIT, num_barriers=STAGES),
            "free": plgpu.Barrier(num_barriers=STAGES),
        },
    )


def _body(g: Geometry, *refs, **scratch):
    r = SimpleNamespace(**dict(zip(("layer", "slots", "k", "v"), refs, strict=True)), **scratch)
    block = lax.axis_index("block")
    at = SimpleNamespace(
        batch=lax.div(block, I32(g.kv_heads)),
        head=lax.rem(block, I32(g.kv_heads)),
        layer=jnp.clip(r.layer[0], 0, g.layers - 1),
    )
    for number, cache in enumerate((r.k, r.v)):

        @pl.when(lax.axis_index("array") == number)
        def _(cache=cache):
            warpgroup = lax.axis_index("warpgroup")
            pl.when(warpgroup == 1)(lambda: _load(g, r, at, cache))
            pl.when(warpgroup == 0)(lambda: _write(g, r, at, cache))


def _load(g, r, at, cache):
    """Bring the slots to keep to the ring."""

    def unit(unit, _):
        stage = lax.rem(unit, I32(STAGES))
        plgpu.barrier_wait(r.free.at[stage])

        def row(row, _):
            slot = jnp.clip(r.slots[at.batch, at.head, unit * UNIT + row], 0, g.slots - 1)
            plgpu.copy_gmem_to_smem(
                cache.at[at.layer, at.batch, slot, at.head], r.ring.at[stage, row], r.full.at[stage]
            )

        lax.fori_loop(0, UNIT, row, None)

    lax.fori_loop(0, g.units, unit, None)
    for i in range(STAGES):  # a block may not end before its writer is done with the ring
        plgpu.barrier_wait(r.free.at[(g.units + i) % STAGES])


def _write(g, r, at, cache):
    """Put the units where they belong."""
    for i in range(STAGES):
        plgpu.barrier_arrive(r.free.at[i])

    def unit(unit, _):
        stage = lax.rem(unit, I32(STAGES))
        plgpu.barrier_wait(r.full.at[stage])
        plgpu.copy_smem_to_gmem(r.ring.at[stage], cache.at[at.layer, at.batch, pl.ds(unit * UNIT, UNIT), at.head])
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(r.free.at[stage])

    lax.fori_loop(0, g.units, unit, None)
