"""The best pages without sorting, as a Pallas TPU kernel that takes eight rows of scores at a time.

Scores become integers of the same order. The ``k``-th largest is found bit by bit, by counting how many reach a bound;
of those equal to it the first are taken. A row lies in VMEM as chunks of 128 pages, ``[C, 128]``, so that running
counts are products with triangles of ones, which are exact. Entry s of the result lies in the chunk whose counts before
and after enclose s; a product with that mark fetches the chunk's own counts, and those up to s say how far into it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.index import KVIndex

MOST_PAGES = 65536
MOST_CHOSEN = 512
ROWS, LANES = 8, 128
SIGN, MAGNITUDE = -(2**31), 2**31 - 1
INFINITE = 0x7F800000
HIGHEST, LOWEST = 0x7F7FFFFF, 0x7F7FFFFF ^ -1  # ordered integers of the finite float32


def refuse(*, num_pages: int, k: int, **_: Any) -> str | None:
    """Return why the kernel cannot serve on a TPU, or ``None``."""
    if num_pages > MOST_PAGES:
        return f"chooses from at most {MOST_PAGES} pages, got {num_pages}; use larger pages"
    if k > MOST_CHOSEN:
        return f"chooses at most {MOST_CHOSEN} pages, got k={k}"
    return None


def topk_pages(scores_BKP, num_pages_B, *, k, page_size, sinks, recent, interpret: Any = False):
    """See :func:`pallas_kernels.topk_pages.topk_pages`.

    Args:
        interpret: ``pltpu.InterpretParams(...)`` to run without a TPU.
    """
    batch, heads, num_pages = scores_BKP.shape
    live_BK = jnp.broadcast_to(jnp.clip(num_pages_B, 0, num_pages).astype(jnp.int32)[:, None], (batch, heads))
    counts_BK = jnp.minimum(live_BK, k)
    if not batch * heads:
        pages_BKM = jnp.zeros((batch, heads, k), jnp.int32)
        return KVIndex(counts=counts_BK, pages=pages_BKM, page_size=page_size)
    rows, chunks = (-(-size // 8) * 8 for size in (batch * heads, pl.cdiv(num_pages, LANES)))
    width = pl.cdiv(k, LANES) * LANES
    live_R = jnp.pad(live_BK.reshape(-1), (0, rows - batch * heads))
    padding = ((0, rows - batch * heads), (0, chunks * LANES - num_pages))
    scores_RCI = jnp.pad(scores_BKP.reshape(-1, num_pages), padding).reshape(rows, chunks, LANES)
    pages_RM = pl.pallas_call(
        functools.partial(_kernel, k=k, sinks=sinks, recent=recent),
        grid=(rows // ROWS,),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((ROWS, chunks, LANES), lambda step: (step, 0, 0)),
        ],
        out_specs=pl.BlockSpec((ROWS, width), lambda step: (step, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, width), jnp.int32),
        scratch_shapes=[
            pltpu.VMEM((ROWS, chunks, LANES), jnp.int32),
            pltpu.VMEM((ROWS, 1, LANES), jnp.int32),
            pltpu.VMEM((ROWS, 1, width), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )(live_R, scores_RCI)
    pages_BKM = pages_RM[: batch * heads, :k].reshape(batch, heads, k)
    return KVIndex(counts=counts_BK, pages=pages_BKM, page_size=page_size)


def _kernel(live_ref, scores_ref, pages_ref, keys_ref, bound_ref, found_ref, *, k, sinks, recent):
    first = pl.program_id(0) * ROWS

    def order(row, _):
        keys_ref[row] = _keys(scores_ref[row], live_ref[first + row], sinks, recent)
        return 0

    def add_bit(i, bound):
        trial = bound | lax.shift_right_logical(jnp.int32(SIGN), i)
        reached = jnp.where(keys_ref[...] >= (trial ^ SIGN), 1.0, 0.0)
        enough = jnp.sum(jnp.sum(reached, axis=1, keepdims=True), axis=2, keepdims=True) >= k
        return jnp.where(enough, trial, bound)

    def emit(row, _):
        pages = _pages(keys_ref[row], bound_ref[row][:, :1], found_ref.shape[2], k)
        slots = lax.broadcasted_iota(jnp.int32, pages.shape, 1)
        found_ref[row] = jnp.where(slots < jnp.minimum(live_ref[first + row], k), pages, 0)
        return 0

    lax.fori_loop(0, ROWS, order, 0)
    bound = lax.fori_loop(0, 32, add_bit, jnp.zeros((ROWS, 1, 1), jnp.int32)) ^ SIGN
    bound_ref[...] = jnp.broadcast_to(bound, bound_ref.shape)
    lax.fori_loop(0, ROWS, emit, 0)
    for row in range(ROWS):
        pages_ref[row : row + 1] = found_ref[row]


def _keys(scores_CI, live, sinks, recent):
    """Return integers in the order of the scores: forced pages highest, NaN as the lowest number, then dead pages."""
    bits_CI = lax.bitcast_convert_type(scores_CI, jnp.int32)
    keys_CI = bits_CI ^ (lax.shift_right_arithmetic(bits_CI, 31) & MAGNITUDE)
    keys_CI = jnp.where((bits_CI & MAGNITUDE) > INFINITE, LOWEST, jnp.clip(keys_CI, LOWEST, HIGHEST))
    page_CI = _iota(scores_CI.shape, 0) * LANES + _iota(scores_CI.shape, 1)
    keys_CI = jnp.where((page_CI < sinks) | (page_CI >= live - recent), MAGNITUDE, keys_CI)
    return jnp.where(page_CI < live, keys_CI, SIGN)


def _pages(keys_CI, bound_11, width, k):
    """Return the pages of the ``k`` best keys, the last being ``bound_11``, as ``[1, width]``; beyond k undefined."""
    chunks = keys_CI.shape[0]
    above_CI, equal_CI = _ones(keys_CI > bound_11), _ones(keys_CI == bound_11)
    within_CI = _product(equal_CI, _ones(_iota((LANES, LANES), 0) <= _iota((LANES, LANES), 1)))
    earlier_CI = _product(_ones(_iota((chunks, chunks), 1) < _iota((chunks, chunks), 0)), equal_CI)
    running_CI = within_CI + jnp.sum(earlier_CI, axis=1, keepdims=True)
    num_above = jnp.sum(jnp.sum(above_CI, axis=1, keepdims=True), axis=0, keepdims=True)
    chosen_CI = above_CI + jnp.where(running_CI <= k - num_above, equal_CI, 0.0)

    within_CI = _product(chosen_CI, _ones(_iota((LANES, LANES), 0) <= _iota((LANES, LANES), 1)))
    totals_8C = _product(jnp.ones((8, LANES), jnp.float32), chosen_CI, transposed=True)
    before_8C = _product(totals_8C, _ones(_iota((chunks, chunks), 0) < _iota((chunks, chunks), 1)))
    before_1C, after_1C = before_8C[:1], (before_8C + totals_8C)[:1]
    slot_MC = _iota((width, chunks), 0).astype(jnp.float32)
    chunk_MC = jnp.where((before_1C <= slot_MC) & (slot_MC < after_1C), 1.0, 0.0)  # the chunk of each slot

    counts_MI = _product(chunk_MC, within_CI)
    into_M1 = slot_MC[:, :1] - jnp.sum(chunk_MC * before_1C, axis=1, keepdims=True)
    offset_8M = _product(jnp.ones((8, LANES), jnp.float32), _ones(counts_MI <= into_M1), transposed=True)
    # The numbers of chunks are split, so that the parts are exact in the bfloat16 of a product.
    number_8C = _iota((8, chunks), 1)
    low_8M = _product((number_8C & 255).astype(jnp.float32), chunk_MC, transposed=True)
    high_8M = _product((number_8C & ~255).astype(jnp.float32), chunk_MC, transposed=True)
    return ((low_8M + high_8M) * LANES + offset_8M)[:1].astype(jnp.int32)


def _product(a, b, *, transposed=False):
    """Multiply whole numbers that are exact in bfloat16; exact."""
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return lax.dot_general(a, b, contract, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32)


def _ones(condition):
    return jnp.where(condition, 1.0, 0.0)


def _iota(shape, axis):
    return lax.broadcasted_iota(jnp.int32, shape, axis)
