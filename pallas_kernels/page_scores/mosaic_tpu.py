"""Scores of pages as a Pallas TPU kernel that reads the summaries of the pages in use once and in place.

A step of the grid takes a tile of pages with the summaries of all key/value heads. Each head's part is multiplied with
its queries and reduced over them, so that scores of single queries never leave VMEM. Tiles beyond the pages in use are
not read. What ``pallas_kernels.attention.mosaic_tpu`` says of the order of a cache holds for summaries too.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.mosaic_tpu import paired, split_pair
from pallas_kernels.dispatch import refuse_dtypes

LANES = 128
MAX_ROWS = 128
BLOCK_BYTES = 2**20  # of summaries; two blocks are in VMEM at a time
MOST_BYTES = 4 * 2**20  # of the least block, 128 pages
F32, I32, U32 = jnp.float32, jnp.int32, jnp.uint32


def refuse(
    *,
    platform: str,
    dtype: Any,
    summary_dtype: Any,
    num_queries: int,
    group: int,
    num_kv: int,
    width: int,
    reduce: str,
    **_: Any,
) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if platform != "tpu":
        return f"needs a TPU, got platform {platform!r}"
    if reason := refuse_dtypes({"queries": dtype, "summaries": summary_dtype}, ("bfloat16", "float32")):
        return reason
    if reduce == "vote":
        return "reduces by max or sum; a vote needs every page before it can score one"
    if width != 64 and width % LANES:
        return f"needs summaries of 64 numbers or a multiple of {LANES}, got {width}"
    if dtype == jnp.bfloat16 and num_kv > 1 and num_kv % 2:
        return f"needs an even number of key/value heads in bfloat16, or one, as two share words; got {num_kv}"
    if num_queries * group > MAX_ROWS:
        return f"needs at most {MAX_ROWS} rows (tokens times the group's queries), got {num_queries * group}"
    least = LANES * num_kv * width * jnp.dtype(dtype).itemsize
    if least > MOST_BYTES:
        return f"holds {MOST_BYTES} bytes of summaries, got {least} for {LANES} pages of {num_kv} heads of {width}"
    return None


def page_scores(
    q_BTNH, summary_LBPKX, num_pages_B, layer, *, reduce, scale, tile: int | None = None, interpret: Any = False
):
    """See :func:`pallas_kernels.page_scores.page_scores`.

    Args:
        tile: pages of a step, a multiple of 128; ``None`` for what fits.
        interpret: ``pltpu.InterpretParams(...)`` to run without a TPU.
    """
    layers, batch, pages, heads, width = summary_LBPKX.shape
    dtype, itemsize = summary_LBPKX.dtype, summary_LBPKX.dtype.itemsize
    if tile is None:
        tile = max(LANES, BLOCK_BYTES // (heads * width * itemsize) // LANES * LANES)
    tile = min(tile, pl.cdiv(pages, LANES) * LANES)
    q_BKRX, asking = _queries(q_BTNH, heads, bounds=width != q_BTNH.shape[3])
    summary = summary_LBPKX
    if interpret and paired(heads, dtype):  # an interpreted kernel cannot take words from a block of bfloat16
        summary = pltpu.bitcast(summary, U32)
    elif heads == 1 and itemsize == 2:
        summary = summary[:, :, :, 0]
    rest = summary.shape[3:]

    def block(b, step, layer_ref, live_ref):
        # Past the last page in use the index stays, so that nothing is read again.
        at = jnp.minimum(step, jnp.maximum(lax.div(live_ref[b] + tile - 1, I32(tile)) - 1, 0))
        return (layer_ref[0], b, at, *(0 for _ in rest))

    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, asking=asking, reduce=reduce, scale=scale),
        out_shape=jax.ShapeDtypeStruct((batch, heads, pages), F32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, pl.cdiv(pages, tile)),
            in_specs=[
                pl.BlockSpec((None, *q_BKRX.shape[1:]), lambda b, step, *_: (b, 0, 0, 0)),
                pl.BlockSpec((1, 1, tile, *rest), block),
            ],
            out_specs=pl.BlockSpec((None, heads, tile), lambda b, step, *_: (b, 0, step)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="page_scores",
        interpret=interpret,
    )(
        jnp.clip(layer, 0, layers - 1).reshape(1).astype(I32),
        jnp.clip(num_pages_B, 0, pages).astype(I32),
        q_BKRX.astype(dtype),
        summary,
    )


def _queries(q_BTNH, heads, *, bounds):
    """Return the rows that meet each head's summaries ``[B, K, R, X]``, and how many of the R there are."""
    batch, tokens, _, dim = q_BTNH.shape
    q_BKTGH = jnp.swapaxes(q_BTNH.reshape(batch, tokens, heads, -1, dim), 1, 2)
    q_BKRH = q_BKTGH.reshape(batch, heads, -1, dim)
    asking, rows = q_BKRH.shape[2], 32 // q_BTNH.dtype.itemsize
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, -asking % rows), (0, 0)))
    if bounds:
        q_BKRH = jnp.concatenate([jnp.maximum(q_BKRH, 0), jnp.minimum(q_BKRH, 0)], axis=-1)
    return q_BKRH, asking


def _kernel(layer_ref, live_ref, q_ref, summary_ref, out_ref, *, tile, asking, reduce, scale):
    heads = q_ref.shape[0]
    first, live = pl.program_id(1) * tile, live_ref[pl.program_id(0)]
    pairs = paired(heads, q_ref.dtype)
    words = summary_ref.bitcast(U32) if pairs and summary_ref.dtype != U32 else summary_ref
    out_ref[...] = jnp.full(out_ref.shape, -math.inf, F32)

    def score(step, _):
        pages = pl.ds(pl.multiple_of(step * LANES, LANES), LANES)
        for head in range(heads):
            if pairs:
                summary = split_pair(words[0, 0, pages, head // 2], head % 2)
            else:
                summary = words[0, 0, pages] if words.ndim == 4 else words[0, 0, pages, head]
            scores = _product(q_ref[head], summary) * scale
            asks = lax.broadcasted_iota(I32, scores.shape, 0) < asking
            if reduce == "sum":
                found = jnp.sum(jnp.where(asks, scores, 0.0), axis=0, keepdims=True)
            else:
                found = jnp.max(jnp.where(asks, scores, -math.inf), axis=0, keepdims=True)
            page = first + step * LANES + lax.broadcasted_iota(I32, found.shape, 1)
            out_ref[head : head + 1, pages] = jnp.where(page < live, found, -math.inf)
        return 0

    lax.fori_loop(0, lax.div(jnp.clip(live - first, 0, tile) + LANES - 1, I32(LANES)), score, 0)


def _product(q_RX, summary_PX):
    precision = lax.Precision.HIGHEST if q_RX.dtype == F32 else lax.Precision.DEFAULT
    contract = (((1,), (1,)), ((), ()))
    return lax.dot_general(q_RX, summary_PX, contract, precision=precision, preferred_element_type=F32)
