"""Scores of hashes as one Mosaic GPU kernel for Hopper that reads the codes of the slots in use once and in place.

The slots of every key/value head are split among blocks of one warpgroup, of which neighbouring threads take
neighbouring slots: a thread loads each word of a few slots, counts the bits that differ from the head's queries, which
it keeps in registers, and writes their scores; nothing goes through shared memory. Many blocks share a multiprocessor,
so that some load while others count. The last tile is moved back to end with the slots; what it shares with the one
before is written twice alike.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir.dialects import math as mlir_math

from pallas_kernels.dispatch import refuse_unless_hopper

LANES = 128  # threads of a block
BLOCKS_PER_CORE = 8
MOST_QUERY_WORDS = 64  # of a head, in registers
F32, I32 = jnp.float32, jnp.int32


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How one call is divided; ``cores`` are the multiprocessors of the device."""

    layers: int
    batch: int
    words: int
    kv_heads: int
    group: int
    slots: int
    reduce: Literal["max", "sum"]
    cores: int

    @property
    def tile(self) -> int:
        """Slots of a tile: so many that a thread has 8 loads in flight at least, or as many as there are slots."""
        most = LANES * (8 if self.words == 1 else 4)
        return next(size for size in (most, most // 2, most // 4, LANES) if size <= max(self.slots, LANES))

    @property
    def tiles(self) -> int:
        return -(-self.slots // self.tile)

    @property
    def splits(self) -> int:
        """Blocks of a key/value head."""
        return max(1, min(self.tiles, self.cores * BLOCKS_PER_CORE // (self.batch * self.kv_heads)))

    @property
    def layout(self):
        return plgpu.Layout.WG_STRIDED((self.tile,), vec_size=1)


def refuse(*, platform: str, capability: str | None, words: int, group: int, num_slots: int, **_: Any) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if reason := refuse_unless_hopper(platform, capability):
        return reason
    if words * group > MOST_QUERY_WORDS:
        return f"holds {MOST_QUERY_WORDS} words of a group's queries, got {group} queries of {words} words"
    if num_slots < LANES:
        return f"needs {LANES} slots at least, got {num_slots}"
    return None


def hamming_scores(codes_LBWKS, queries_BNW, num_slots_B, layer, *, reduce, cores: int | None = None):
    """See :func:`pallas_kernels.hamming_scores.hamming_scores`.

    Args:
        cores: multiprocessors to divide the work for; ``None`` for those of the device.
    """
    layers, batch, words, kv_heads, slots = codes_LBWKS.shape
    g = Geometry(
        layers=layers,
        batch=batch,
        words=words,
        kv_heads=kv_heads,
        group=queries_BNW.shape[1] // kv_heads,
        slots=slots,
        reduce=reduce,
        cores=jax.local_devices()[0].core_count if cores is None else cores,
    )
    return plgpu.kernel(
        functools.partial(_body, g),
        out_type=jax.ShapeDtypeStruct((batch, kv_heads, slots), F32),
        grid=(batch * kv_heads * g.splits,),
        grid_names=("block",),
    )(layer.reshape(1).astype(I32), jnp.clip(num_slots_B, 0, slots).astype(I32), queries_BNW, codes_LBWKS)


def _body(g: Geometry, layer_ref, live_ref, queries, codes, out):
    block = lax.axis_index("block")
    head, split = lax.div(block, I32(g.splits)), lax.rem(block, I32(g.splits))
    batch, kv_head = lax.div(head, I32(g.kv_heads)), lax.rem(head, I32(g.kv_heads))
    layer, live = jnp.clip(layer_ref[0], 0, g.layers - 1), live_ref[batch]
    asked = [[queries[batch, kv_head * g.group + i, w] for w in range(g.words)] for i in range(g.group)]
    best = jnp.minimum if g.reduce == "max" else jnp.add

    def tile(step, _):
        start = jnp.minimum((step * g.splits + split) * g.tile, g.slots - g.tile)
        slots = pl.ds(start, g.tile)

        def score():
            held = [
                plgpu.load(codes.at[layer, batch, word, kv_head, slots], layout=g.layout, optimized=False)
                for word in range(g.words)
            ]
            found = [
                functools.reduce(jnp.add, [ones(g, words ^ query) for words, query in zip(held, one, strict=True)])
                for one in asked
            ]
            bits = functools.reduce(best, found)
            slot = plgpu.broadcasted_iota(I32, (g.tile,), 0, layout=g.layout) + start
            out[batch, kv_head, slots] = jnp.where(slot < live, (0 - bits).astype(F32), -jnp.inf)

        def nothing():
            out[batch, kv_head, slots] = plgpu.layout_cast(jnp.full((g.tile,), -jnp.inf, F32), g.layout)

        pl.when(start < live)(score)
        pl.when(start >= live)(nothing)

    lax.fori_loop(0, lax.div(g.tiles - 1 - split, I32(g.splits)) + 1, tile, None)


def ones(g: Geometry, words):
    """Return how many bits of each word are set, by the instruction that Pallas lacks."""

    @plgpu.inline_mgpu(
        arg_types=(g.layout,), return_type=plgpu.ShapeDtypeStruct((g.tile,), words.dtype, layout=g.layout)
    )
    def count(ctx, words):
        del ctx
        return words._pointwise(mlir_math.ctpop)

    return count(words).astype(I32)
