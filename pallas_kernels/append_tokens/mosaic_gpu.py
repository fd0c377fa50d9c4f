"""Storing new tokens as one Mosaic GPU kernel for Hopper, a block for each sequence and key/value head.

Keys and values go through shared memory into their slots; then the page that they fell into comes back, and its summary
is reduced in registers, 64 features by the page's slots at a time.
"""

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import refuse_dtypes, refuse_unless_hopper

PAGE_SIZES = (8, 16, 32, 64, 128)
F32, I32 = jnp.float32, jnp.int32
TILE = plgpu.Layout.WGMMA  # [64 features, slots]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of one call."""

    layers: int
    batch: int
    tokens: int
    kv_heads: int
    head_dim: int
    slots: int
    pages: int
    width: int
    page_size: int
    dtype: Any


def refuse(
    *,
    platform: str,
    capability: str | None,
    dtype: Any,
    summary_dtype: Any,
    head_dim: int,
    num_slots: int,
    page_size: int,
    num_new: int,
    **_: Any,
) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if reason := refuse_unless_hopper(platform, capability):
        return reason
    if reason := refuse_dtypes({"keys": dtype, "summaries": summary_dtype}, ("bfloat16", "float16")):
        return reason
    if head_dim % 64 or head_dim > 256:
        return f"needs head_dim to be a multiple of 64 up to 256, got {head_dim}"
    if page_size not in PAGE_SIZES or num_slots % page_size:
        sizes = ", ".join(map(str, PAGE_SIZES))
        return f"needs whole pages of {sizes} slots, got {num_slots} slots in pages of {page_size}"
    if num_new > 8:
        return f"stores up to 8 tokens at a time, got {num_new}"
    return None


def geometry(k, summary, slots_BT, page_size: int) -> Geometry:
    """Return the sizes of a call."""
    layers, batch, slots, kv_heads, head_dim = k.shape
    return Geometry(
        layers=layers,
        batch=batch,
        tokens=slots_BT.shape[1],
        kv_heads=kv_heads,
        head_dim=head_dim,
        slots=slots,
        pages=summary.shape[2],
        width=summary.shape[4],
        page_size=page_size,
        dtype=k.dtype,
    )


def append_tokens(k, v, summary, k_BTKH, v_BTKH, slots_BT, layer, *, kind, page_size):
    """See :func:`pallas_kernels.append_tokens.append_tokens`; the arrays are stacked."""
    g = geometry(k, summary, slots_BT, page_size)
    refs = [jax.new_ref(array) for array in (k, v, summary)]
    _kernel(g)(layer.reshape(1).astype(I32), slots_BT.astype(I32), join(k_BTKH, v_BTKH), *refs)
    return tuple(jax.freeze(ref) for ref in refs)


@functools.cache
def _kernel(g: Geometry):
    return plgpu.kernel(
        functools.partial(_body, g),
        out_type=(),
        grid=(g.batch * g.kv_heads,),
        grid_names=("block",),
        scratch_types=scratch_types(g),
    )


def join(k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """Return new keys and values as one array, which XLA computes by one kernel instead of two."""
    return jnp.stack([k_BTKH, v_BTKH])


def scratch_types(g: Geometry) -> dict[str, Any]:
    """Return what :func:`append` needs of a block."""
    return {
        "new": plgpu.SMEM((2, g.tokens, g.head_dim), g.dtype),
        "page": plgpu.SMEM((g.page_size, g.head_dim), g.dtype),
        "came": plgpu.Barrier(num_arrivals=2),
        "read": plgpu.Barrier(),
    }


def _body(g: Geometry, *refs, **scratch):
    names = ("layer", "slots", "new_tokens", "k", "v", "summary")
    append(g, SimpleNamespace(**dict(zip(names, refs, strict=True)), **scratch), lax.axis_index("block"))


def append(g: Geometry, r: SimpleNamespace, block: jax.Array) -> None:
    """Store the tokens of the ``block``-th sequence and head; one warpgroup does it."""
    batch, head = lax.div(block, I32(g.kv_heads)), lax.rem(block, I32(g.kv_heads))
    layer = jnp.clip(r.layer[0], 0, g.layers - 1)
    for i in (0, 1):
        plgpu.copy_gmem_to_smem(r.new_tokens.at[i, batch, :, head], r.new.at[i], r.came)
    plgpu.barrier_wait(r.came)
    slots = [r.slots[batch, token] for token in range(g.tokens)]
    inside = [(slot >= 0) & (slot < g.slots) for slot in slots]
    for token, (slot, stored) in enumerate(zip(slots, inside, strict=True)):

        @pl.when(stored)
        def _(token=token, slot=slot):
            for i, cache in enumerate((r.k, r.v)):
                plgpu.copy_smem_to_gmem(r.new.at[i, token], cache.at[layer, batch, slot, head])

    plgpu.wait_smem_to_gmem(0)
    newest = functools.reduce(
        jnp.maximum, [jnp.where(stored, slot, -1) for slot, stored in zip(slots, inside, strict=True)]
    )
    oldest = functools.reduce(
        jnp.minimum, [jnp.where(stored, slot, g.slots) for slot, stored in zip(slots, inside, strict=True)]
    )
    last, first = lax.div(newest, I32(g.page_size)), lax.div(oldest, I32(g.page_size))
    pl.when(newest >= 0)(lambda: _summarize(g, r, layer, batch, head, last, newest))
    if g.tokens > 1:
        pl.when((newest >= 0) & (first < last))(lambda: _summarize(g, r, layer, batch, head, first, newest))


def _summarize(g, r, layer, batch, head, page, newest):
    """Write the summary of a page from its keys up to the slot ``newest``."""
    begin = page * g.page_size
    plgpu.copy_gmem_to_smem(r.k.at[layer, batch, pl.ds(begin, g.page_size), head], r.page, r.read)
    plgpu.barrier_wait(r.read)
    live = plgpu.broadcasted_iota(I32, (64, g.page_size), 1, layout=TILE) <= newest - begin
    count = jnp.minimum(newest - begin + 1, g.page_size).astype(F32)
    for i in range(g.head_dim // 64):
        features = pl.ds(i * 64, 64)
        keys = plgpu.load(r.page.at[:, features].T, layout=TILE, optimized=False).astype(F32)
        if g.width == g.head_dim:
            found = jnp.sum(jnp.where(live, keys, 0.0), axis=1) / count
            r.summary[layer, batch, page, head, features] = found.astype(g.dtype)
        else:
            high = jnp.max(jnp.where(live, keys, -math.inf), axis=1)
            low = jnp.min(jnp.where(live, keys, math.inf), axis=1)
            r.summary[layer, batch, page, head, features] = high.astype(g.dtype)
            r.summary[layer, batch, page, head, pl.ds(g.head_dim + i * 64, 64)] = low.astype(g.dtype)
