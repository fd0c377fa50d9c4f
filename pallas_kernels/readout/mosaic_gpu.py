"""The readout as one persistent Mosaic GPU kernel for Hopper that reads the vocabulary matrix once.

Every multiprocessor holds one block that takes whole tiles of tokens in turn. A *loader* warpgroup streams the tile's
weights, and the states that they meet, by TMA into a ring of buffers. A *reader* warpgroup multiplies, with 64 tokens
as the left side of the tensor cores' product and the few states as its right side, so that one state costs what eight
cost. Logits exist only as the accumulators of a tile: each tile is folded into the largest, the second, the token, the
sum of exponentials and their moment of every state, which stay in registers until the last tile. What the readers found
is merged in plain JAX. There is one reader only: reductions of several warpgroups would share one scratch memory.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import refuse_dtypes, refuse_unless_hopper
from pallas_kernels.readout.reference import Readout, merge, refuse_rows

SHARED_BYTES = 216 * 1024  # of the 227 KiB that a block can have, less barriers and the scratch of reductions
REDUCTION_BYTES = 4096
TILE_TOKENS = 128  # in two accumulators of 64
LOG2E = math.log2(math.e)
NO_TOKEN = 2**31 - 1
TILE = plgpu.Layout.WGMMA  # [64 tokens, rows]
ROWS = TILE.reduce(0)  # [rows]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How one call is divided.

    Args:
        rows: states, padded to a multiple of 8.
        blocks: blocks that run at once, one a multiprocessor.
    """

    rows: int
    d_model: int
    num_tokens: int
    blocks: int
    dtype: Any
    transposed: bool

    @property
    def num_tiles(self) -> int:
        """Tiles of the vocabulary; what the last one has beyond its end is read as zeros and left out."""
        return -(-self.num_tokens // TILE_TOKENS)

    @property
    def step(self) -> int:
        """Entries of D that one stage of the ring holds."""
        return 64 if self.d_model % 128 else 128

    @property
    def stages(self) -> int:
        """Stages of the ring."""
        return SHARED_BYTES // ((TILE_TOKENS + self.rows) * self.step * 2)


def refuse(
    *,
    rows: int,
    d_model: int,
    num_tokens: int,
    dtype: Any,
    weights_dtype: Any,
    transposed: bool,
    capability: str | None,
    **_: Any,
) -> str | None:
    """Return why the kernel cannot serve on an NVIDIA GPU, or ``None``."""
    if reason := refuse_rows(rows):
        return reason
    if reason := refuse_unless_hopper("gpu", capability):
        return reason
    if reason := refuse_dtypes({"states": dtype, "weights": weights_dtype}, ("bfloat16", "float16")):
        return reason
    if d_model % 64:
        return f"needs d_model to be a multiple of 64, got {d_model}"
    multiple = 64 if transposed else 8
    if num_tokens < 64 or num_tokens % multiple:
        return f"needs at least 64 tokens, a multiple of {multiple} with {transposed=}, got {num_tokens}"
    return None


def exit_readout(h_BD: jax.Array, weights: jax.Array, *, transposed: bool, blocks: int | None = None) -> Readout:
    """See :func:`pallas_kernels.readout.exit_readout`; the states are normed already.

    Args:
        blocks: blocks that run at once; ``None`` for one on every multiprocessor.
    """
    batch, d_model = h_BD.shape
    g = Geometry(
        rows=-(-batch // 8) * 8,
        d_model=d_model,
        num_tokens=weights.shape[1 if transposed else 0],
        blocks=jax.local_devices()[0].core_count if blocks is None else blocks,
        dtype=h_BD.dtype,
        transposed=transposed,
    )
    h_RD = jnp.pad(h_BD, ((0, g.rows - batch), (0, 0)))
    numbers_C4R, token_CR = _kernel(g)(h_RD, weights)
    top_CB, second_CB, total_CB, moment_CB = (numbers_C4R[:, i, :batch] for i in range(4))
    return merge(top_CB, second_CB, token_CR[:, :batch], total_CB, moment_CB, g.num_tokens)


def _kernel(g: Geometry):
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    piece = (g.step, 64) if g.transposed else (64, g.step)
    return plgpu.kernel(
        lambda *refs, **scratch: _body(g, *refs, **scratch),
        out_type=[
            jax.ShapeDtypeStruct((g.blocks, 4, g.rows), jnp.float32),
            jax.ShapeDtypeStruct((g.blocks, g.rows), jnp.int32),
        ],
        grid=(g.blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="group",
        scratch_types={
            "ring": plgpu.SMEM((g.stages, 2, *piece), g.dtype, transforms=tiled),
            "states": plgpu.SMEM((g.stages, g.rows, g.step), g.dtype, transforms=tiled),
            "full": plgpu.Barrier(num_arrivals=3, num_barriers=g.stages),
            "free": plgpu.Barrier(num_barriers=g.stages),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=REDUCTION_BYTES),
    )


def _body(g, h_ref, weights_ref, numbers_ref, token_ref, *, ring, states, full, free):
    block, group = lax.axis_index("block"), lax.axis_index("group")
    mine = lax.div(jnp.int32(g.num_tiles - 1 + g.blocks) - block, jnp.int32(g.blocks))
    steps = g.d_model // g.step

    def begin(number):
        return (block + number * g.blocks) * TILE_TOKENS

    @pl.when(group == 1)
    def _load():

        def load_tile(number, count):
            def load_step(step, count):
                slot, entries = lax.rem(count, jnp.int32(g.stages)), pl.ds(step * g.step, g.step)
                plgpu.barrier_wait(free.at[slot])
                plgpu.copy_gmem_to_smem(h_ref.at[:, entries], states.at[slot], full.at[slot])
                for i in range(2):
                    tokens = pl.ds(begin(number) + 64 * i, 64)
                    source = weights_ref.at[entries, tokens] if g.transposed else weights_ref.at[tokens, entries]
                    plgpu.copy_gmem_to_smem(source, ring.at[slot, i], full.at[slot])
                return count + 1

            return lax.fori_loop(0, steps, load_step, count)

        count = lax.fori_loop(0, mine, load_tile, jnp.int32(0))
        for i in range(g.stages):  # a block may not end before its readers are done with the ring
            plgpu.barrier_wait(free.at[lax.rem(count + i, jnp.int32(g.stages))])

    @pl.when(group == 0)
    def _read():
        for i in range(g.stages):
            plgpu.barrier_arrive(free.at[i])

        def read_tile(number, carry):
            count, found = carry

            def multiply(low, high):
                def read_step(_, count):
                    slot = lax.rem(count, jnp.int32(g.stages))
                    plgpu.barrier_wait(full.at[slot])
                    for i, accumulator in enumerate((low, high)):
                        piece = ring.at[slot, i]
                        plgpu.wgmma(accumulator, piece.T if g.transposed else piece, states.at[slot].T)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])
                    return count + 1

                count_after = lax.fori_loop(0, steps, read_step, count)
                return low[...], high[...], count_after

            accumulator = plgpu.ACC((64, g.rows), jnp.float32)
            *logits, count = pl.run_scoped(multiply, accumulator, accumulator)
            for i, part in enumerate(logits):
                found = _fold(g, found, part, begin(number) + 64 * i)
            return count, found

        rows = lambda value, dtype: plgpu.layout_cast(jnp.full((g.rows,), value, dtype), ROWS)  # noqa: E731
        nothing = tuple(rows(value, jnp.float32) for value in (-math.inf, -math.inf, 0.0, 0.0))
        _, found = lax.fori_loop(0, mine, read_tile, (jnp.int32(0), (*nothing, rows(0, jnp.int32))))
        for i, numbers in enumerate(found[:4]):
            numbers_ref[block, i] = numbers
        token_ref[block] = found[4]


def _fold(g, found, logits, first):
    """Return what was found so far, with the logits of the tokens from ``first`` on, ``[64, rows]``."""
    top, second, total, moment, token = found
    spread = lambda vector: lax.broadcast_in_dim(vector, (64, g.rows), [1])  # noqa: E731
    numbers = plgpu.broadcasted_iota(jnp.int32, (64, g.rows), 0, layout=TILE) + first
    logits = jnp.where(numbers < g.num_tokens, logits, -math.inf)
    tile_top = jnp.max(logits, axis=0)
    tile_token = jnp.min(jnp.where(logits == spread(tile_top), numbers, NO_TOKEN), axis=0)
    tile_second = jnp.max(jnp.where(numbers == spread(tile_token), -math.inf, logits), axis=0)

    new_top = jnp.maximum(top, tile_top)
    peak = jnp.where(new_top == -math.inf, 0.0, new_top)
    below = logits - spread(peak)
    weight = jnp.exp2(below * LOG2E)
    # An impossible token has weight 0 and distance -inf, whose product would be NaN.
    moments = jnp.where(logits == -math.inf, 0.0, weight * below)
    sunk = jnp.where(top == -math.inf, 0.0, top - peak)
    scale = jnp.exp2(sunk * LOG2E)
    higher = tile_top > top
    return (
        new_top,
        jnp.where(higher, jnp.maximum(top, tile_second), jnp.maximum(second, tile_top)),
        scale * total + jnp.sum(weight, axis=0),
        scale * (moment + total * sunk) + jnp.sum(moments, axis=0),
        jnp.where(higher, tile_token, token),
    )
