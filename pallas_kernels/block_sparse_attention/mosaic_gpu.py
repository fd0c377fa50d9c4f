"""Causal prefill as one warp-specialised Mosaic GPU kernel for Hopper, over all blocks of keys or those of an index.

One block of threads a multiprocessor takes row after row of 128 queries of a head. A *loader* warpgroup streams steps
of 128 keys and values by TMA into two stages, and goes on with the next row while the last one is being written. Two
*reader* warpgroups fold them into an online softmax for 64 queries each and take turns at the tensor cores: while one
computes exponentials, the other multiplies. Masks are applied at the ends of a row only, unless an index asks for more.
Long rows start first, and the heads of a group run together, so that they find their keys in the second-level cache.

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

from pallas_kernels.dispatch import refuse_dtypes, refuse_unless_hopper

HEAD_DIMS = (64, 128, 256)
ROW = 128  # queries of a block of threads, and keys of a block of an index
HALF = ROW // 2  # queries of a reader
UNEVEN = 256  # rows of all keys: at 128 of them a block of threads a tile is 12 % faster, at 256 it is 2 % slower
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
        cores: multiprocessors of the device.
        interpreted: whether an interpreter runs the kernel. It takes the left side of products from shared memory only,
            and wants every barrier waited for.
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
    cores: int
    interpreted: bool = False

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

    @property
    def tiles(self) -> int:
        """Rows of all heads."""
        return self.batch * self.heads * self.rows

    @property
    def blocks(self) -> int:
        """Blocks of threads: one a tile where rows of all keys are so few that they do not even out among fewer."""
        return self.tiles if self.entries is None and self.rows < UNEVEN else min(self.cores, self.tiles)

    @property
    def staged(self) -> bool:
        """Whether outputs have shared memory of their own, so that the next queries can arrive meanwhile."""
        return self.head_dim <= 128


def refuse(
    *,
    platform: str,
    capability: str | None,
    dtype: Any,
    kv_dtype: Any,
    head_dim: int,
    block_size: int = ROW,
    masked: bool = False,
    ordered: bool = False,
    **_: Any,
) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if reason := refuse_unless_hopper(platform, capability):
        return reason
    if reason := refuse_dtypes({"queries": dtype, "keys": kv_dtype}, ("bfloat16", "float16")):
        return reason
    if head_dim not in HEAD_DIMS:
        return f"needs head_dim {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if block_size != ROW:
        return f"needs blocks of {ROW} tokens, got {block_size}"
    if masked:
        return "takes lengths, a window and an index only, not a mask of tokens"
    if ordered:
        return "takes tokens in the order of the text only"
    return None


def block_sparse_attention(
    q_BTNH, k_BSKH, v_BSKH, index, lengths_B, *, offset, window=None, sinks=0, with_lse=False, **how
):
    """See :func:`pallas_kernels.block_sparse_attention.block_sparse_attention`.

    Args:
        how: ``cores``, multiprocessors to divide the work for in place of those of the device, and ``interpreted``,
            whether an interpreter runs the kernel.
    """
    about = {"offset": offset, "window": window, "sinks": sinks, "with_lse": with_lse}
    return _attend(q_BTNH, k_BSKH, v_BSKH, index, lengths_B, **about, **how)


def prefill_attention(
    q_BTNH, k_BSKH, v_BSKH, lengths_B, *, window=None, keep_BT=None, offset=None, with_lse=False, **how
):
    """See :func:`pallas_kernels.attention.prefill_attention`; ``how`` as above."""
    about = {"offset": jnp.int32(0) if offset is None else offset, "window": window, "sinks": 0, "with_lse": with_lse}
    return _attend(q_BTNH, k_BSKH, v_BSKH, None, lengths_B, **about, **how)


def _attend(
    q_BTNH, k_BSKH, v_BSKH, index, lengths_B, *, offset, window, sinks, with_lse, cores=None, interpreted=False
):
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
        cores=jax.local_devices()[0].core_count if cores is None else cores,
        interpreted=interpreted,
    )
    lengths_B = jnp.clip(lengths_B, 0, keys)
    lists = [] if index is None else [_spans(g, index, lengths_B, offset), index.blocks]
    found = _kernel(g)(offset.reshape(1), lengths_B, *lists, q_BTNH, k_BSKH, v_BSKH)
    o_BTNH = found[0][:, :tokens]
    return (o_BTNH, found[1][:, :, :tokens]) if with_lse else o_BTNH


def _whole_tiles(array_BTNH):
    """Pad the tokens to a multiple of 8, which is what one TMA tile holds."""
    return jnp.pad(array_BTNH, ((0, 0), (0, -array_BTNH.shape[1] % 8), (0, 0), (0, 0)))


def _spans(g, index, lengths_B, offset):
    """Return where the longest run of steps without masks of a row begins and ends, and its steps ``[B, N, R, 3]``."""
    entries_M = jnp.arange(g.entries)[None, None, None]
    counts_BNR1 = jnp.clip(index.counts, 0, g.entries)[..., None]
    position_R1 = (offset + jnp.arange(g.rows) * ROW)[None, None, :, None]
    begin_BNRM = index.blocks * ROW
    masked_BNRM = (begin_BNRM < 0) | (entries_M >= counts_BNR1)
    masked_BNRM |= begin_BNRM > jnp.minimum(position_R1 + 1, lengths_B[:, None, None, None]) - ROW
    if g.window is not None:
        masked_BNRM |= (begin_BNRM <= position_R1 + (ROW - 1 - g.window)) & (begin_BNRM > g.sinks - ROW)
    begins_BNRM = lax.cummax(jnp.where(masked_BNRM, entries_M, -1), axis=3) + 1
    end_BNR = jnp.argmax(entries_M - begins_BNRM, axis=3)
    begin_BNR = jnp.take_along_axis(begins_BNRM, end_BNR[..., None], axis=3)[..., 0]
    return (jnp.stack([begin_BNR, end_BNR + 1, counts_BNR1[..., 0]], axis=-1) * g.steps).astype(I32)


@functools.cache
def _kernel(g: Geometry):
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    halves = plgpu.SMEM((2, HALF, g.head_dim), g.dtype, transforms=tiled)
    stages = plgpu.SMEM((STAGES, g.step, g.head_dim), g.dtype, transforms=tiled)
    out = [jax.ShapeDtypeStruct((g.batch, g.tokens, g.heads, g.head_dim), g.dtype)]
    scratch = {
        "queries": halves,
        "keys": stages,
        "values": stages,
        "queries_full": plgpu.Barrier(num_barriers=2),
        "queries_free": plgpu.Barrier(num_barriers=2),
        "keys_full": plgpu.Barrier(num_barriers=STAGES),
        "keys_free": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "values_full": plgpu.Barrier(num_barriers=STAGES),
        "values_free": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "turn": plgpu.Barrier(num_barriers=2),
    }
    if g.staged:
        scratch["staged"] = halves
    if g.interpreted:
        scratch["weights"] = plgpu.SMEM((2, HALF, g.step), g.dtype, transforms=tiled)
    if g.with_lse:
        out.append(jax.ShapeDtypeStruct((g.batch, g.heads, g.rows * ROW), F32))
        scratch["sums"] = plgpu.SMEM((2, HALF), F32)
    return plgpu.kernel(
        functools.partial(_body, g),
        out_type=out,
        grid=(g.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _body(g: Geometry, *refs, **scratch):
    names = ["offset", "length", *(["spans", "blocks"] if g.entries is not None else []), "q", "k", "v", "out"]
    names += ["lse"] if g.with_lse else []
    r = SimpleNamespace(**dict(zip(names, refs, strict=True)), **scratch)
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")

    def number(turn):  # forth and back, as tiles get shorter: all blocks of threads get as much to do
        return turn * g.blocks + jnp.where(lax.rem(turn, I32(2)) == 0, block, g.blocks - 1 - block)

    turns = g.tiles // g.blocks + (number(I32(g.tiles // g.blocks)) < g.tiles).astype(I32)
    where = lambda turn: _where(g, r, jnp.minimum(number(turn), g.tiles - 1))  # noqa: E731
    pl.when(warpgroup == LOADER)(lambda: _load(g, r, turns, where))
    pl.when(warpgroup < LOADER)(lambda: _read(g, r, turns, where, warpgroup))


def _where(g, r, number):
    """Return the place of a tile: all rows of a key/value head, the longest first, before those of the next head."""
    group = g.heads // g.kv_heads
    rest, member = lax.div(number, I32(group)), lax.rem(number, I32(group))
    batch_head, row = lax.div(rest, I32(g.rows)), g.rows - 1 - lax.rem(rest, I32(g.rows))
    batch, kv_head = lax.div(batch_head, I32(g.kv_heads)), lax.rem(batch_head, I32(g.kv_heads))
    position = r.offset[0] + row * ROW
    reach = I32(0) if g.window is None else position - g.window + 1  # the first key that its first query sees
    first = lax.div(jnp.maximum(reach, 0), I32(g.step)) if g.entries is None else I32(0)
    return SimpleNamespace(
        batch=batch, head=kv_head * group + member, kv_head=kv_head, row=row, position=position, length=r.length[batch],
        reach=reach, first=first,
    )  # fmt: skip


def _steps(g, r, at):
    """Return which steps of a tile need no mask, from a first one to before a last one, and how many it takes."""
    if g.entries is None:
        count = lax.div(jnp.minimum(at.position + ROW, at.length) + (g.step - 1), I32(g.step)) - at.first
        count = jnp.where(at.position < at.length, count, 1)  # rows of padding only write something
        edge = I32(0) if g.window is None else lax.div(jnp.maximum(at.reach + ROW + g.step - 2, 0), I32(g.step))
        begin, end = edge - at.first, lax.div(jnp.minimum(at.position + 1, at.length), I32(g.step)) - at.first
    else:
        begin, end, count = (r.spans[at.batch, at.head, at.row, i] for i in range(3))
    count = jnp.maximum(count, 1)
    begin = jnp.clip(begin, 0, count)
    return begin, jnp.clip(end, begin, count), count


def _first_key(g, r, at, step):
    """Return the first key of a step, and whether it has any."""
    if g.entries is None:
        return (at.first + step) * g.step, True
    entry = jnp.minimum(lax.div(step, I32(g.steps)), g.entries - 1)
    block = r.blocks[at.batch, at.head, at.row, entry]
    there = (block >= 0) & (block < -(-g.keys // ROW))
    return jnp.where(there, block, 0) * ROW + lax.rem(step, I32(g.steps)) * g.step, there


def _load(g, r, turns, where):
    """Bring the queries, keys and values of all tiles, a step at a time."""
    plgpu.set_max_registers(40, action="decrease")

    def ahead(turn):  # asked for a tile before it is needed
        at = where(turn)
        return _steps(g, r, at)[2], _first_key(g, r, at, I32(0))[0]

    def bring_tile(turn, carry):
        done, count, key = carry
        at, following = where(turn), ahead(turn + 1)

        def bring_queries(half):
            pl.when(turn > 0)(lambda: plgpu.barrier_wait(r.queries_free.at[half]))
            mine = pl.ds(at.row * ROW + half * HALF, HALF)
            plgpu.copy_gmem_to_smem(r.q.at[at.batch, mine, at.head], r.queries.at[half], r.queries_full.at[half])

        def bring(step, key):
            following, _ = _first_key(g, r, at, step + 1)
            stage, again = lax.rem(done + step, I32(STAGES)), done + step >= STAGES
            rows = (at.batch, pl.ds(pl.multiple_of(key, g.step), g.step), at.kv_head)
            pl.when(again)(lambda: plgpu.barrier_wait(r.keys_free.at[stage]))
            plgpu.copy_gmem_to_smem(r.k.at[rows], r.keys.at[stage], r.keys_full.at[stage])
            pl.when(step == 0)(lambda: bring_queries(1))
            pl.when(again)(lambda: plgpu.barrier_wait(r.values_free.at[stage]))
            plgpu.copy_gmem_to_smem(r.v.at[rows], r.values.at[stage], r.values_full.at[stage])
            return following

        bring_queries(0)
        lax.fori_loop(0, count, bring, key)
        return done + count, *following

    done, *_ = lax.fori_loop(0, turns, bring_tile, (I32(0), *ahead(I32(0))))
    if g.interpreted:
        for half in range(2):
            plgpu.barrier_wait(r.queries_free.at[half])
        for i in range(STAGES):
            stage = lax.rem(done + i, I32(STAGES))
            used = done + i >= STAGES
            pl.when(used)(lambda stage=stage: plgpu.barrier_wait(r.keys_free.at[stage]))
            pl.when(used)(lambda stage=stage: plgpu.barrier_wait(r.values_free.at[stage]))


def _read(g, r, turns, where, warpgroup):
    """Fold the keys and values of all tiles into the outputs of this warpgroup's 64 queries of each."""
    plgpu.set_max_registers(232, action="increase")
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(r.turn.at[0]))

    def read(turn, carry):
        done, *steps = carry
        following = _steps(g, r, where(turn + 1))
        _read_tile(g, r, where(turn), steps, done, warpgroup)
        return done + steps[2], *following

    lax.fori_loop(0, turns, read, (I32(0), *_steps(g, r, where(I32(0)))))
    if g.interpreted:
        pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(r.turn.at[0]))
    plgpu.wait_smem_to_gmem(0)


def _read_tile(g, r, at, steps, done, warpgroup):
    begin, end, count = steps
    first = at.position + warpgroup * HALF
    last = count - 1

    def stage_of(step):
        return lax.rem(done + step, I32(STAGES))

    def multiply(step, sums, weights):
        """Return the scores of a step, and the sums with the values of the step before, if there is one."""
        keys, values = stage_of(step), None if weights is None else stage_of(step - 1)
        plgpu.barrier_wait(r.keys_full.at[keys])
        if weights is not None:
            plgpu.barrier_wait(r.values_full.at[values])
        found = _products(g, r, warpgroup, keys, weights, values, sums)
        plgpu.barrier_arrive(r.keys_free.at[keys])
        if weights is not None:
            plgpu.barrier_arrive(r.values_free.at[values])
        if g.staged:
            pl.when(step == last)(lambda: plgpu.barrier_arrive(r.queries_free.at[warpgroup]))
        return found

    def fold(step, state, *, masked):
        scores, *state = state
        sums, top, total, weights = _weigh(g, r, at, first, step if masked else None, scores, state)
        scores, sums = multiply(step + 1, sums, weights)
        return scores, sums, top, total

    plgpu.barrier_wait(r.queries_full.at[warpgroup])
    state = (
        *multiply(I32(0), None, None),
        plgpu.layout_cast(jnp.zeros((HALF, g.head_dim), F32), TILE),
        plgpu.layout_cast(jnp.full((HALF,), FLOOR, F32), ROWS),
        plgpu.layout_cast(jnp.zeros((HALF,), F32), ROWS),
    )
    begin, end = jnp.minimum(begin, last), jnp.minimum(end, last)
    if g.entries is not None or g.window is not None:
        state = lax.fori_loop(0, begin, functools.partial(fold, masked=True), state)
    state = lax.fori_loop(begin, end, functools.partial(fold, masked=False), state)
    scores, *state = lax.fori_loop(end, last, functools.partial(fold, masked=True), state)
    sums, top, total, weights = _weigh(g, r, at, first, last, scores, state)
    values = stage_of(last)
    plgpu.barrier_wait(r.values_full.at[values])
    (sums,) = _products(g, r, warpgroup, None, weights, values, sums)
    plgpu.barrier_arrive(r.values_free.at[values])
    _write(g, r, at, warpgroup, sums, top, total)


def _products(g, r, warpgroup, keys, weights, values, sums):
    """Return scores of a stage of keys, and sums with a stage of values, both or one of them.

    One after the other without waiting in between, in a turn at the tensor cores.
    """

    def issue(refs):
        plgpu.barrier_wait(r.turn.at[warpgroup])
        if weights is not None:
            plgpu.wgmma(refs[-1], weights, r.values.at[values])
        if keys is not None:
            plgpu.wgmma(refs[0], r.queries.at[warpgroup], r.keys.at[keys].T)
        plgpu.barrier_arrive(r.turn.at[1 - warpgroup])

    if g.interpreted:
        return _products_apart(g, r, warpgroup, keys, weights, values, sums)
    refs = [] if keys is None else [plgpu.ACC.init(plgpu.layout_cast(jnp.zeros((HALF, g.step), F32), TILE))]
    refs += [] if weights is None else [plgpu.ACC.init(sums)]
    return pl.run_state(issue)(tuple(refs))


def _products_apart(g, r, warpgroup, keys, weights, values, sums):
    """Return what :func:`_products` does, one product after the other and from shared memory."""

    def multiply(left, right):
        def issue(acc):
            plgpu.wgmma(acc, left, right)
            return acc[...]

        return pl.run_scoped(issue, plgpu.ACC((HALF, right.shape[1]), F32))

    found = []
    plgpu.barrier_wait(r.turn.at[warpgroup])
    if keys is not None:
        found.append(multiply(r.queries.at[warpgroup], r.keys.at[keys].T))
    if weights is not None:
        r.weights.at[warpgroup][...] = weights
        plgpu.commit_smem()
        found.append(sums + multiply(r.weights.at[warpgroup], r.values.at[values]))
    plgpu.barrier_arrive(r.turn.at[1 - warpgroup])
    return found


def _weigh(g, r, at, first, masked_step, scores, state):
    """Return the sums so far, as they decay, the new maximum in base 2 and total of weights, and those of a step."""
    sums, top, total = state
    if masked_step is not None:
        scores = _mask(g, r, at, first, masked_step, scores)
    scale = LOG2E / math.sqrt(g.head_dim)
    new_top = jnp.maximum(top, scores.max(axis=1) * scale)
    decay = jnp.exp2(top - new_top)
    probs = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_top, scores.shape, [0]))
    sums = sums * lax.broadcast_in_dim(decay, sums.shape, [0])
    total = total * decay + probs.sum(axis=1)
    return lax.optimization_barrier((sums, new_top, total, probs.astype(g.dtype)))


def _write(g, r, at, warpgroup, sums, top, total):
    """Write the outputs of 64 queries; zeros where they saw nothing."""
    share = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    staged = (r.staged if g.staged else r.queries).at[warpgroup]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staged[...] = (sums * lax.broadcast_in_dim(share, sums.shape, [0])).astype(g.dtype)
    mine = pl.ds(at.row * ROW + warpgroup * HALF, HALF)
    if g.with_lse:
        lse = top / LOG2E + jnp.log(jnp.where(total > 0, total, 1.0))
        r.sums[warpgroup] = jnp.where(total > 0, lse, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, r.out.at[at.batch, mine, at.head])
    if g.with_lse:
        plgpu.copy_smem_to_gmem(r.sums.at[warpgroup], r.lse.at[at.batch, at.head, mine])
    if not g.staged:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(r.queries_free.at[warpgroup])


def _mask(g, r, at, first, step, scores):
    """Return the scores of a step, -inf where a query may not see a key."""
    begin, there = _first_key(g, r, at, step)
    if g.entries is not None:  # a row that names nothing takes a step all the same
        there &= step < r.spans[at.batch, at.head, at.row, 2]
    end = jnp.where(there, at.length, 0)
    query = first + plgpu.broadcasted_iota(I32, scores.shape, 0, layout=TILE)
    key = begin + plgpu.broadcasted_iota(I32, scores.shape, 1, layout=TILE)
    seen = (key <= query) & (key < end)
    if g.window is not None:
        seen &= (key > query - g.window) | (key < g.sinks)
    return jnp.where(seen, scores, -jnp.inf)
