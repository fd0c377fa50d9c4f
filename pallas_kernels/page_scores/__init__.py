"""Score the pages of a cache for the current queries from a summary of each page's keys.

A summary is a row of X numbers for each page and key/value head. Means have X = H and the score is ``q . mean``. Bounds
hold the largest and the smallest entry of each feature, ``[high, low]`` with X = 2H, and the score is the largest dot
product that any key within them could have, ``sum_d max(q_d high_d, q_d low_d)``: that is ``q+ . high + q- . low`` with
the positive and the negative part of the query, one product over 2H.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, capability, choose, kernel, platform
from pallas_kernels.page_scores import reference
from pallas_kernels.partition import per_device

Reduce = Literal["max", "sum", "vote"]
PAGE_SCORES = (
    kernel("page_scores", "mosaic_gpu", "page_scores"),
    kernel("page_scores", "mosaic_tpu", "page_scores"),
    Implementation(name="xla", refuse=reference.refuse, run=reference.page_scores),
)


@per_device("BKP")
def page_scores(
    q_BTNH: jax.Array,
    summary_BPKX: jax.Array,
    num_pages_B: jax.Array,
    *,
    reduce: Reduce = "max",
    scale: float = 1.0,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Return a score for every page and key/value head, float32 ``[B, K, P]``, -inf for pages not in use.

    Cost: reads the summaries once, ``P * K * X`` entries a sequence.

    Args:
        q_BTNH: queries of T tokens; query head n asks key/value head ``n // G``.
        summary_BPKX: means (X = H) or bounds ``[high, low]`` (X = 2H) of the keys of each page, or the stacked
            summaries of all layers ``[L, B, P, K, X]`` with ``layer``.
        num_pages_B: pages in use of each sequence, 0 to P.
        reduce: how the scores of the T * G queries of a key/value head become one: their largest, their sum, or a soft
            vote, the sum of each one's softmax over the pages (TokenSelect's rule within a group).
        scale: multiplies dot products; matters for ``vote``.
        layer: which layer of stacked summaries, an int32 scalar.
        implementation: by name; ``None`` takes the fastest that can serve.

    Raises:
        ValueError: if shapes do not match or ``reduce`` is unknown.
        NotImplementedError: if the requested implementation cannot serve.

    Source: Tang et al. 2024 (Quest), section 3 for bounds; the rewriting as one product is ours.
    """
    check(q_BTNH, summary_BPKX, num_pages_B, layer, reduce)
    stacked, layer = (summary_BPKX[None], jnp.int32(0)) if layer is None else (summary_BPKX, layer)
    chosen = choose("page_scores", PAGE_SCORES, implementation, **facts(q_BTNH, stacked, reduce))
    return chosen.run(q_BTNH, stacked, num_pages_B, layer, reduce=reduce, scale=scale)


def summarize_pages(k_BSKH: jax.Array, lengths_B: jax.Array, *, page_size: int, kind: Literal["mean", "bounds"]):
    """Return the summaries of all pages of a cache ``[B, P, K, X]`` in its dtype; zeros for pages not in use.

    Args:
        k_BSKH: keys; slots from ``lengths_B`` on are ignored, whatever they hold.
        lengths_B: filled slots of each sequence.
        page_size: slots of a page; the last page may be cut off by the end of the cache.
        kind: ``mean``, or ``bounds`` for the largest and the smallest entries ``[high, low]``.
    """
    batch, slots, num_kv, dim = k_BSKH.shape
    num_pages = -(-slots // page_size)
    pad = ((0, 0), (0, num_pages * page_size - slots), (0, 0), (0, 0))
    k_BPSKH = jnp.pad(k_BSKH, pad).reshape(batch, num_pages, page_size, num_kv, dim)
    live_BPS = (jnp.arange(num_pages * page_size)[None] < lengths_B[:, None]).reshape(batch, num_pages, page_size)
    return summarize_page(k_BPSKH, live_BPS, kind=kind)


def summarize_page(k_xSKH: jax.Array, live_xS: jax.Array, *, kind: Literal["mean", "bounds"]) -> jax.Array:
    """Return the summary of pages of keys ``[..., S, K, H]``, of which ``live [..., S]`` count: ``[..., K, X]``."""
    live = live_xS[..., None, None]
    some = jnp.any(live, axis=-3)
    if kind == "mean":
        total = jnp.sum(jnp.where(live, k_xSKH.astype(jnp.float32), 0.0), axis=-3)
        return (total / jnp.maximum(jnp.sum(live, axis=-3), 1)).astype(k_xSKH.dtype)
    if kind != "bounds":
        raise ValueError(f"expected kind 'mean' or 'bounds', got {kind!r}")
    high = jnp.max(jnp.where(live, k_xSKH, -jnp.inf), axis=-3)
    low = jnp.min(jnp.where(live, k_xSKH, jnp.inf), axis=-3)
    return jnp.where(some, jnp.concatenate([high, low], axis=-1), 0.0).astype(k_xSKH.dtype)


def facts(q_BTNH: jax.Array, summary_LBPKX: jax.Array, reduce: Reduce) -> dict[str, Any]:
    """Return what implementations look at to say whether they can serve."""
    return {
        "platform": platform(),
        "capability": capability(),
        "dtype": q_BTNH.dtype,
        "summary_dtype": summary_LBPKX.dtype,
        "num_queries": q_BTNH.shape[1],
        "group": q_BTNH.shape[2] // summary_LBPKX.shape[3],
        "num_kv": summary_LBPKX.shape[3],
        "head_dim": q_BTNH.shape[3],
        "width": summary_LBPKX.shape[4],
        "num_pages": summary_LBPKX.shape[2],
        "reduce": reduce,
    }


def check(
    q_BTNH: jax.Array, summary: jax.Array, num_pages_B: jax.Array, layer: jax.Array | None, reduce: Reduce
) -> None:
    """Raise ValueError if the arguments of :func:`page_scores` do not fit each other."""
    if reduce not in ("max", "sum", "vote"):
        raise ValueError(f"expected reduce 'max', 'sum' or 'vote', got {reduce!r}")
    shapes = f"got q {q_BTNH.shape} and summaries {summary.shape}"
    if (
        summary.ndim != (4 if layer is None else 5)
        or q_BTNH.ndim != 4
        or (layer is not None and jnp.shape(layer) != ())
    ):
        raise ValueError(f"expected q [B, T, N, H] and summaries [B, P, K, X], with a layer [L, B, P, K, X], {shapes}")
    batch, _, num_kv, width = summary.shape[-4:]
    dim = q_BTNH.shape[3]
    if q_BTNH.shape[0] != batch or q_BTNH.shape[2] % num_kv or width not in (dim, 2 * dim):
        raise ValueError(f"expected one batch, query heads a multiple of K and X = H or 2H, {shapes}")
    if num_pages_B.shape != (batch,):
        raise ValueError(f"expected num_pages [B] = {(batch,)}, got {num_pages_B.shape}")
