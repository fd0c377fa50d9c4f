"""Causal prefill as one warp-specialised Mosaic GPU kernel for Hopper, over all blocks of keys or those of an index.

A block of threads owns 128 queries of a head. A *loader* warpgroup streams steps of 128 keys and values by TMA into two
stages; two *reader* warpgroups fold them into an online softmax for 64 queries each, and take turns at the tensor
cores: while one computes its exponentials, the other multiplies. Masks are applied only in steps that need one. Long
rows start first, and the heads of a group start together, so that they find their keys in the second-level cache.

Source: Shah et al. 2024 (FlashAttention-3) for the division of labour; JAX's example of it for Mosaic GPU.
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

from pallas_kernels.dispatch import refuse_unless_hopper

HEAD_DIMS = (64, 128, 256)
ROW = 128  # queries of a block of threads, and keys of a block of an index
HALF = ROW // 2  # queries of a warpgroup
STAGES = 2
LOADER = 2  # its warpgroup
FLOOR = -1e30  # below every score in base 2, and finite: rows that see nothing stay free of NaN
LOG2E = math.log2(math.e)
F32, I32 = jnp.float32, jnp.int32
TILE = plgpu.Layout.WGMMA
ROWS = TILE.reduce(1)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What one kernel is compiled for.

    Args:
        tokens, keys: in multiples of 8.
        entries: blocks that an index lists for a row; ``None`` to attend to all.
    """

    batch: int
    tokens: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: Any
    entries: int | None
    window: int | None
    sinks: int
    with_lse: bool

    @property
    def rows(self) -> int:
        """Rows of 128 queries."""
        return -(-self.tokens // ROW)

    @property
    def step(self) -> int:
        """Keys of a step, as shared memory and registers allow."""
        return ROW if self.head_dim <= 128 else ROW // 2

    @property
    def steps(self) -> int:
        """Steps of a block of an index."""
        return ROW // self.step


def refuse(
    *,
    platform: str,
    capability: str | None,
    dtype: Any,
    kv_dtype: Any,
    head_dim: int,
    block_size: int = ROW,
    masked: bool = False,
    **_: Any,
) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if reason := refuse_unless_hopper(platform, capability):
        return reason
    if dtype not in (jnp.bfloat16, jnp.float16) or kv_dtype != dtype:
        names = f"{jnp.dtype(dtype).name} queries and {jnp.dtype(kv_dtype).name} keys"
        return f"needs bfloat16 or float16 everywhere, got {names}"
    if head_dim not in HEAD_DIMS:
        return f"needs head_dim {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if block_size != ROW:
        return f"needs blocks of {ROW} tokens, got {block_size}"
    if masked:
        return "takes lengths, a window and an index only, not a mask of tokens"
    return None


def block_sparse_attention(q_BTNH, k_BSKH, v_BSKH, index, lengths_B, *, offset, window=None, sinks=0, with_lse=False):
    """See :func:`pallas_kernels.block_sparse_attention.block_sparse_attention`."""
    return _attend(q_BTNH, k_BSKH, v_BSKH, index, lengths_B, offset, window, sinks, with_lse)


def prefill_attention(q_BTNH, k_BSKH, v_BSKH, lengths_B, *, window=None, keep_BT=None, offset=None, with_lse=False):
    """See :func:`pallas_kernels.attention.prefill_attention`."""
    offset = jnp.int32(0) if offset is None else offset
    return _attend(q_BTNH, k_BSKH, v_BSKH, None, lengths_B, offset, window, 0, with_lse)


def _attend(q_BTNH, k_BSKH, v_BSKH, index, lengths_B, offset, window, sinks, with_lse):
    batch, tokens, heads, head_dim = q_BTNH.shape
    keys, kv_heads = k_BSKH.shape[1:3]
    if lengths_B is None:
        lengths_B = jnp.full(batch, keys, I32)
    else:  # values that no query sees are multiplied by zero: they must be finite
        there_BS = jnp.arange(keys)[None] < lengths_B[:, None]
        v_BSKH = jnp.where(there_BS[..., None, None], v_BSKH, jnp.zeros((), v_BSKH.dtype))
    q_BTNH, k_BSKH, v_BSKH = (_whole_tiles(array) for array in (q_BTNH, k_BSKH, v_BSKH))
    g = Geometry(
        batch=batch,
        tokens=q_BTNH.shape[1],
        keys=k_BSKH.shape[1],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=q_BTNH.dtype,
        entries=None if index is None else index.blocks.shape[3],
        window=window,
        sinks=sinks,
        with_lse=with_lse,
    )
    lists = [] if index is None else [index.counts, index.blocks]
    found = _kernel(g)(offset.reshape(1), jnp.clip(lengths_B, 0, keys), *lists, q_BTNH, k_BSKH, v_BSKH)
    o_BTNH = found[0][:, :tokens]
    return (o_BTNH, found[1][:, :, :tokens]) if with_lse else o_BTNH


def _whole_tiles(array_BTNH):
    """Pad the tokens to a multiple of 8, which is what one TMA tile holds."""
    return jnp.pad(array_BTNH, ((0, 0), (0, -array_BTNH.shape[1] % 8), (0, 0), (0, 0)))


@functools.cache
def _kernel(g: Geometry):
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    out = [jax.ShapeDtypeStruct((g.batch, g.tokens, g.heads, g.head_dim), g.dtype)]
    scratch = {
        "queries": plgpu.SMEM((2, HALF, g.head_dim), g.dtype, transforms=tiled),
        "keys": plgpu.SMEM((STAGES, g.step, g.head_dim), g.dtype, transforms=tiled),
        "values": plgpu.SMEM((STAGES, g.step, g.head_dim), g.dtype, transforms=tiled),
        "asked": plgpu.Barrier(num_barriers=2),
        "keys_full": plgpu.Barrier(num_barriers=STAGES),
        "values_full": plgpu.Barrier(num_barriers=STAGES),
        "keys_free": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "values_free": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "turn": plgpu.Barrier(num_arrivals=2),
    }
    if g.with_lse:
        out.append(jax.ShapeDtypeStruct((g.batch, g.heads, g.rows * ROW), F32))
        scratch["sums"] = plgpu.SMEM((2, HALF), F32)
    return plgpu.kernel(
        functools.partial(_body, g),
        out_type=out,
        grid=(g.batch * g.heads * g.rows,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _body(g: Geometry, *refs, **scratch):
    names = ["offset", "length", *(["counts", "blocks"] if g.entries is not None else []), "q", "k", "v", "out"]
    names += ["lse"] if g.with_lse else []
    r = SimpleNamespace(**dict(zip(names, refs, strict=True)), **scratch)
    warpgroup = lax.axis_index("warpgroup")
    at = _share(g, r, lax.axis_index("block"))
    pl.when(warpgroup == LOADER)(lambda: _load(g, r, at))
    pl.when(warpgroup < LOADER)(lambda: _read(g, r, at, warpgroup))


def _share(g, r, block):
    """Return the head and row of a block of threads, and the steps that it takes."""
    head, rest = lax.rem(block, I32(g.heads)), lax.div(block, I32(g.heads))
    batch, row = lax.rem(rest, I32(g.batch)), g.rows - 1 - lax.div(rest, I32(g.batch))
    position, length = r.offset[0] + row * ROW, r.length[batch]
    if g.entries is None:
        end = jnp.minimum(position + ROW, length)
        first = I32(0) if g.window is None else lax.div(jnp.maximum(position - g.window + 1, 0), I32(g.step))
        count = jnp.maximum(lax.div(end + (g.step - 1), I32(g.step)) - first, 0)
    else:
        first, count = None, jnp.clip(r.counts[batch, head, row], 0, g.entries) * g.steps
    kv_head = lax.div(head, I32(g.heads // g.kv_heads))
    return SimpleNamespace(
        batch=batch, head=head, kv_head=kv_head, row=row, position=position, length=length, first=first, count=count
    )


def _begin(g, r, at, step):
    """Return the first key of a step, and whether there are any keys."""
    if g.entries is None:
        return (at.first + step) * g.step, True
    entry = jnp.minimum(lax.div(step, I32(g.steps)), g.entries - 1)
    block = r.blocks[at.batch, at.head, at.row, entry]
    there = (block >= 0) & (block < -(-g.keys // ROW))
    return jnp.where(there, block, 0) * ROW + lax.rem(step, I32(g.steps)) * g.step, there


def _load(g, r, at):
    """Bring keys and values, a step at a time."""
    plgpu.set_max_registers(40, action="decrease")

    def bring(step, begin):
        following, _ = _begin(g, r, at, step + 1)  # asked for before it is needed
        stage = lax.rem(step, I32(STAGES))
        where = (at.batch, pl.ds(pl.multiple_of(begin, g.step), g.step), at.kv_head)
        pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(r.keys_free.at[stage]))
        plgpu.copy_gmem_to_smem(r.k.at[where], r.keys.at[stage], r.keys_full.at[stage])
        pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(r.values_free.at[stage]))
        plgpu.copy_gmem_to_smem(r.v.at[where], r.values.at[stage], r.values_full.at[stage])
        return following

    lax.fori_loop(0, at.count, bring, _begin(g, r, at, I32(0))[0])


def _read(g, r, at, warpgroup):
    """Fold the keys and values of all steps into the output of 64 queries."""
    plgpu.set_max_registers(232, action="increase")
    queries = r.queries.at[warpgroup]
    mine = pl.ds(at.row * ROW + warpgroup * HALF, HALF)
    plgpu.copy_gmem_to_smem(r.q.at[at.batch, mine, at.head], queries, r.asked.at[warpgroup])
    plgpu.barrier_wait(r.asked.at[warpgroup])
    first = at.position + warpgroup * HALF
    scale = LOG2E / math.sqrt(g.head_dim)

    def take_turns():
        plgpu.barrier_arrive(r.turn)
        plgpu.barrier_wait(r.turn)

    def fold(step, state):
        sums, top, total = state
        stage = lax.rem(step, I32(STAGES))

        def multiply_keys(acc):
            plgpu.wgmma(acc, queries, r.keys.at[stage].T)
            take_turns()
            return acc[...]

        scores = pl.run_scoped(multiply_keys, plgpu.ACC((HALF, g.step), F32))
        plgpu.barrier_arrive(r.keys_free.at[stage])
        begin, there = _begin(g, r, at, step)
        scores = lax.cond(
            _needs_mask(g, at, first, begin, there), lambda s: _mask(g, at, first, begin, there, s), lambda s: s, scores
        )
        new_top = jnp.maximum(top, scores.max(axis=1) * scale)
        decay = jnp.exp2(top - new_top)
        probs = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_top, scores.shape, [0]))
        sums *= lax.broadcast_in_dim(decay, sums.shape, [0])
        total *= decay
        weights = probs.astype(g.dtype)

        def wait_for_values():
            plgpu.barrier_arrive(r.turn)
            plgpu.barrier_wait(r.values_full.at[stage])
            plgpu.barrier_wait(r.turn)

        if g.head_dim <= 128:  # which order is faster was found by measuring
            total += probs.sum(axis=1)
            sums, total, new_top, weights = lax.optimization_barrier((sums, total, new_top, weights))
            wait_for_values()
        else:
            wait_for_values()
            total += probs.sum(axis=1)

        def multiply_values(acc):
            plgpu.wgmma(acc, weights, r.values.at[stage])
            following = step + 1
            pl.when(following < at.count)(lambda: plgpu.barrier_wait(r.keys_full.at[lax.rem(following, I32(STAGES))]))

        sums = pl.run_state(multiply_values)(plgpu.ACC.init(sums))
        plgpu.barrier_arrive(r.values_free.at[stage])
        return sums, new_top, total

    state = (
        plgpu.layout_cast(jnp.zeros((HALF, g.head_dim), F32), TILE),
        plgpu.layout_cast(jnp.full((HALF,), FLOOR, F32), ROWS),
        plgpu.layout_cast(jnp.zeros((HALF,), F32), ROWS),
    )
    pl.when(at.count > 0)(lambda: plgpu.barrier_wait(r.keys_full.at[0]))
    pl.when(warpgroup == 1)(take_turns)
    sums, top, total = lax.fori_loop(0, at.count, fold, state)
    pl.when(warpgroup == 0)(take_turns)

    share = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    queries[...] = (sums * lax.broadcast_in_dim(share, sums.shape, [0])).astype(g.dtype)
    if g.with_lse:
        lse = top / LOG2E + jnp.log(jnp.where(total > 0, total, 1.0))
        r.sums[warpgroup] = jnp.where(total > 0, lse, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, r.out.at[at.batch, mine, at.head])
    if g.with_lse:
        plgpu.copy_smem_to_gmem(r.sums.at[warpgroup], r.lse.at[at.batch, at.head, mine])
    plgpu.wait_smem_to_gmem(0)


def _needs_mask(g, at, first, begin, there):
    """Return whether any of 64 queries may not see some key of a step."""
    end = begin + g.step
    masked = (end > first + 1) | (end > at.length) | ~jnp.asarray(there)
    if g.window is not None:
        masked |= (begin <= first + (HALF - 1) - g.window) & (end > g.sinks)
    return masked


def _mask(g, at, first, begin, there, scores):
    """Return the scores of a step, -inf where a query may not see a key."""
    query = first + plgpu.broadcasted_iota(I32, scores.shape, 0, layout=TILE)
    key = begin + plgpu.broadcasted_iota(I32, scores.shape, 1, layout=TILE)
    end = jnp.where(there, at.length, 0)
    seen = (key <= query) & (key < end)
    if g.window is not None:
        seen &= (key > query - g.window) | (key < g.sinks)
    return jnp.where(seen, scores, -jnp.inf)
