"""Merging of one entry a head as two Mosaic GPU kernels for Hopper: one finds the nearest keys, one merges in place.

The slots of every head of a sequence that loses an entry are split among blocks. A *loader* warpgroup streams tiles of
64 keys by TMA into a ring of buffers; a *reader* multiplies them with the victim's key and with themselves in
registers, which hides behind the reads, and keeps the best cosine of each of a tile's 64 rows with its slot. The heads
of a sequence decide together, so that these few numbers are combined by XLA; the second kernel, a block for the keys or
values of each head, reads two entries and writes one.
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

from pallas_kernels.dispatch import refuse_keys, refuse_unless_hopper
from pallas_kernels.merge_tokens.reference import decide

TILE_SLOTS = 64
STAGES = 4
BLOCKS_PER_CORE = 2
SMALLEST_NORM = 1e-20
F32, I32 = jnp.float32, jnp.int32
TILE = plgpu.Layout.WGMMA  # [64 slots, 64 features]
FEATURES = TILE.reduce(0)
SLOTS = TILE.reduce(1)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How one call is divided; ``cores`` are the multiprocessors of the device."""

    layers: int
    batch: int
    slots: int
    kv_heads: int
    head_dim: int
    dtype: Any
    cores: int

    @property
    def parts(self) -> int:
        """Parts of a key, of 64 features."""
        return self.head_dim // 64

    @property
    def tiles(self) -> int:
        """Tiles of a head; what the last one has beyond its end is read as zeros and left out."""
        return -(-self.slots // TILE_SLOTS)

    @property
    def splits(self) -> int:
        """Blocks of a head: as many as run at once, but no more than it takes to give each as many tiles."""
        most = max(1, min(self.tiles, self.cores * BLOCKS_PER_CORE // (self.batch * self.kv_heads)))
        return -(-self.tiles // -(-self.tiles // most))


def refuse(*, platform: str, capability: str | None, dtype: Any, head_dim: int, num_slots: int) -> str | None:
    """Return why the kernels cannot serve, or ``None``."""
    if reason := refuse_unless_hopper(platform, capability) or refuse_keys(dtype, head_dim):
        return reason
    if num_slots % 8:
        return f"needs a multiple of 8 slots, got {num_slots}"
    return None


def merge_victims(k, v, victims_BK, evicted_B, num_slots_B, threshold_B, layer, *, momentum, cores: int | None = None):
    """See :func:`pallas_kernels.merge_tokens.merge_victims`; the arrays are stacked.

    Args:
        cores: multiprocessors to divide the work for; ``None`` for those of the device.
    """
    layers, batch, slots, kv_heads, head_dim = k.shape
    g = Geometry(
        layers=layers,
        batch=batch,
        slots=slots,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=k.dtype,
        cores=jax.local_devices()[0].core_count if cores is None else cores,
    )
    layer_1 = layer.reshape(1).astype(I32)
    read_B = jnp.where(evicted_B, jnp.clip(num_slots_B, 0, slots), 0).astype(I32)
    like_BKX, slot_BKX = (found.reshape(batch, kv_heads, -1) for found in _nearest(g)(layer_1, victims_BK, read_B, k))
    like_BK = jnp.max(like_BKX, axis=2)
    best_BK = jnp.min(jnp.where(like_BKX == like_BK[..., None], slot_BKX, slots - 1), axis=2)
    merged_B, threshold_B = decide(like_BK, evicted_B, threshold_B, momentum)
    target_BK = jnp.where(merged_B[:, None], best_BK, -1)
    refs = [jax.new_ref(array) for array in (k, v)]
    _update(g)(layer_1, victims_BK, target_BK, like_BK, *refs)
    return *(jax.freeze(ref) for ref in refs), threshold_B


def _nearest(g: Geometry):
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    rows = (g.batch * g.kv_heads, g.splits, TILE_SLOTS)
    return plgpu.kernel(
        functools.partial(_nearest_body, g),
        out_type=[jax.ShapeDtypeStruct(rows, F32), jax.ShapeDtypeStruct(rows, I32)],
        grid=(g.batch * g.kv_heads * g.splits,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types={
            "ring": plgpu.SMEM((STAGES, TILE_SLOTS, g.head_dim), g.dtype, transforms=tiled),
            "victim": plgpu.SMEM((g.head_dim,), g.dtype),
            "full": plgpu.Barrier(num_barriers=STAGES),
            "free": plgpu.Barrier(num_barriers=STAGES),
            "came": plgpu.Barrier(),
        },
    )


def _nearest_body(g: Geometry, layer, victims, num_slots, k, like, slot, **scratch):
    r = SimpleNamespace(k=k, like=like, slot=slot, **scratch)
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    head, split = lax.div(block, I32(g.splits)), lax.rem(block, I32(g.splits))
    at = SimpleNamespace(
        head=head, split=split, batch=lax.div(head, I32(g.kv_heads)), kv_head=lax.rem(head, I32(g.kv_heads)),
        start=lax.div(split * g.tiles, I32(g.splits)), stop=lax.div((split + 1) * g.tiles, I32(g.splits)),
        layer=jnp.clip(layer[0], 0, g.layers - 1),
    )  # fmt: skip
    at.live = num_slots[at.batch]
    at.victim = jnp.clip(victims[at.batch, at.kv_head], 0, g.slots - 1)
    at.stop = jnp.minimum(at.stop, lax.div(at.live + TILE_SLOTS - 1, I32(TILE_SLOTS)))
    pl.when(warpgroup == 1)(lambda: _load(g, r, at))
    pl.when(warpgroup == 0)(lambda: _compare(g, r, at))


def _load(g, r, at):
    """Read tiles of keys into the ring."""

    def tile(tile, count):
        stage = lax.rem(count, I32(STAGES))
        plgpu.barrier_wait(r.free.at[stage])
        source = r.k.at[at.layer, at.batch, pl.ds(tile * TILE_SLOTS, TILE_SLOTS), at.kv_head]
        plgpu.copy_gmem_to_smem(source, r.ring.at[stage], r.full.at[stage])
        return count + 1

    count = lax.fori_loop(at.start, at.stop, tile, I32(0))
    for i in range(STAGES):  # a block may not end before its reader is done with the ring
        plgpu.barrier_wait(r.free.at[lax.rem(count + i, I32(STAGES))])


def _compare(g, r, at):
    """Find the nearest key of each row of this split's tiles."""
    for i in range(STAGES):
        plgpu.barrier_arrive(r.free.at[i])
    plgpu.copy_gmem_to_smem(r.k.at[at.layer, at.batch, at.victim, at.kv_head], r.victim, r.came)
    plgpu.barrier_wait(r.came)

    def part(i):
        """Return 64 features of the victim's key for every slot."""
        features = plgpu.load(r.victim.at[pl.ds(i * 64, 64)], layout=FEATURES, optimized=False).astype(F32)
        return lax.broadcast_in_dim(features, (TILE_SLOTS, 64), [1])

    def norm(squares):
        return jnp.maximum(jnp.sqrt(jnp.sum(squares, axis=1)), SMALLEST_NORM)

    victim_norm = norm(functools.reduce(jnp.add, [part(i) * part(i) for i in range(g.parts)]))

    def tile(tile, carry):
        count, best, where = carry
        stage = lax.rem(count, I32(STAGES))
        plgpu.barrier_wait(r.full.at[stage])
        dot = square = None
        for i in range(g.parts):
            keys = plgpu.load(r.ring.at[stage, :, pl.ds(i * 64, 64)], layout=TILE, optimized=False).astype(F32)
            dot = keys * part(i) if dot is None else dot + keys * part(i)
            square = keys * keys if square is None else square + keys * keys
        plgpu.barrier_arrive(r.free.at[stage])
        cosine = jnp.sum(dot, axis=1) / (norm(square) * victim_norm)
        slot = plgpu.broadcasted_iota(I32, (TILE_SLOTS,), 0, layout=SLOTS) + tile * TILE_SLOTS
        better = (slot < at.live) & (slot != at.victim) & (cosine > best)
        return count + 1, jnp.where(better, cosine, best), jnp.where(better, slot, where)

    nothing = plgpu.layout_cast(jnp.full((TILE_SLOTS,), -math.inf, F32), SLOTS)
    zeros = plgpu.layout_cast(jnp.full((TILE_SLOTS,), 0, I32), SLOTS)
    _, best, where = lax.fori_loop(at.start, at.stop, tile, (I32(0), nothing, zeros))
    r.like[at.head, at.split] = best
    r.slot[at.head, at.split] = where


def _update(g: Geometry):
    return plgpu.kernel(
        functools.partial(_update_body, g),
        out_type=(),
        grid=(g.batch * g.kv_heads, 2),
        grid_names=("block", "array"),
        scratch_types={
            "entries": plgpu.SMEM((2, g.head_dim), g.dtype),
            "merged": plgpu.SMEM((g.head_dim,), g.dtype),
            "came": plgpu.Barrier(num_arrivals=2),
        },
    )


def _update_body(g: Geometry, layer, victims, targets, like, k, v, *, entries, merged, came):
    block = lax.axis_index("block")
    batch, head = lax.div(block, I32(g.kv_heads)), lax.rem(block, I32(g.kv_heads))
    at, target = jnp.clip(layer[0], 0, g.layers - 1), targets[batch, head]
    victim = jnp.clip(victims[batch, head], 0, g.slots - 1)
    for number, cache in enumerate((k, v)):

        @pl.when((lax.axis_index("array") == number) & (target >= 0))
        def _(cache=cache):
            for i, slot in enumerate((target, victim)):
                plgpu.copy_gmem_to_smem(cache.at[at, batch, slot, head], entries.at[i], came)
            plgpu.barrier_wait(came)
            for i in range(g.parts):
                features = pl.ds(i * 64, 64)
                kept, gone = (
                    plgpu.load(entries.at[which, features], layout=SLOTS, optimized=False).astype(F32)
                    for which in range(2)
                )
                merged[features] = ((kept + like[batch, head] * gone) * 0.5).astype(g.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(merged, cache.at[at, batch, target, head])
            plgpu.wait_smem_to_gmem(0)
