"""Storing new tokens and scoring pages as one Mosaic GPU kernel for Hopper.

The first blocks store, one for each sequence and key/value head; the others score. The page that a token falls into is
the only one whose summary changes, and it is not scored: whatever its summary is seen to hold counts for nothing.
"""

import functools
from types import SimpleNamespace
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.append_tokens import mosaic_gpu as storing
from pallas_kernels.page_scores import mosaic_gpu as scoring

I32 = scoring.I32


def refuse(*, scores: dict[str, Any], **facts: Any) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    return storing.refuse(**facts) or scoring.refuse(**scores)


def append_and_score(
    k,
    v,
    summary,
    k_BTKH,
    v_BTKH,
    slots_BT,
    q_BTNH,
    num_pages_B,
    layer,
    *,
    kind,
    page_size,
    reduce,
    cores: int | None = None,
):
    """See :func:`pallas_kernels.append_and_score.append_and_score`; the arrays are stacked.

    Args:
        cores: multiprocessors to divide the work for; ``None`` for those of the device.
    """
    stores = storing.geometry(k, summary, slots_BT, page_size)
    scores = scoring.geometry(q_BTNH, summary, reduce=reduce, scale=1.0, cores=cores)
    layer, num_pages_B = layer.reshape(1).astype(I32), num_pages_B.astype(I32)
    refs = [jax.new_ref(array) for array in (k, v, summary)]
    new = storing.join(k_BTKH, v_BTKH)
    found = _kernel(stores, scores)(layer, slots_BT.astype(I32), num_pages_B, new, q_BTNH, *refs)
    k, v, summary = (jax.freeze(ref) for ref in refs)
    if reduce == "vote":
        found = scoring.votes(scores, found, layer, num_pages_B, q_BTNH, summary)
    return k, v, summary, found[:, :, : scores.pages]


@functools.cache
def _kernel(stores: storing.Geometry, scores: scoring.Geometry):
    return plgpu.kernel(
        functools.partial(_body, stores, scores),
        out_type=scoring.out_type(scores),
        grid=(stores.batch * stores.kv_heads * (1 + scores.splits),),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types={**storing.scratch_types(stores), **scoring.scratch_types(scores)},
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=scoring.REDUCTION_BYTES),
    )


def _body(stores, scores, *refs, **scratch):
    names = ("layer", "slots", "num_pages", "new_tokens", "q", "k", "v", "summary", "out")
    r = SimpleNamespace(**dict(zip(names, refs, strict=True)), **scratch)
    block, count = lax.axis_index("block"), stores.batch * stores.kv_heads
    warpgroup = lax.axis_index("warpgroup")
    pl.when((block < count) & (warpgroup == 0))(lambda: storing.append(stores, r, block))
    pl.when(block >= count)(lambda: scoring.score(scores, r, block - count))
