"""Choose the pages of a cache with the highest scores, without sorting them all."""

import jax

from pallas_kernels.dispatch import Implementation, capability, choose, kernel, platform
from pallas_kernels.index import KVIndex
from pallas_kernels.partition import per_device
from pallas_kernels.topk_pages import reference

TOPK_PAGES = (
    kernel("topk_pages", "mosaic_gpu", "topk_pages"),
    kernel("topk_pages", "mosaic_tpu", "topk_pages"),
    Implementation(name="xla", refuse=reference.refuse, run=reference.topk_pages),
)


@per_device("BK BKM")
def topk_pages(
    scores_BKP: jax.Array,
    num_pages_B: jax.Array,
    *,
    k: int,
    page_size: int,
    sinks: int = 0,
    recent: int = 0,
    implementation: str | None = None,
) -> KVIndex:
    """Return the ``k`` best pages of every key/value head, in ascending order.

    The first ``sinks`` and the last ``recent`` pages are taken first, whatever their scores. Of equal scores the lower
    page is taken; NaN counts as the lowest score. Cost: reads the scores once, the GPU kernel twice above 16384 pages.
    Exact; no gradient flows through the choice.

    Args:
        scores_BKP: float32; those of pages beyond ``num_pages_B`` are ignored, whatever they hold.
        num_pages_B: pages in use of each sequence, the last one perhaps in part; 0 to P.
        k: pages to choose, sinks and recent ones among them.
        page_size: slots of a page, for the index.
        sinks: first pages that are always chosen.
        recent: last pages in use that are always chosen.
        implementation: ``"mosaic_gpu"``, ``"mosaic_tpu"`` or ``"xla"``; ``None`` takes the fastest that can serve.

    Returns:
        An index of ``min(k, num_pages_B)`` pages; padding entries are page 0.

    Raises:
        ValueError: if shapes do not match, ``k`` is not from 1 to P, or the forced pages exceed ``k``.
        NotImplementedError: if the requested implementation cannot serve.
    """
    if scores_BKP.ndim != 3 or scores_BKP.dtype != "float32":
        raise ValueError(f"expected scores [B, K, P] of float32, got {scores_BKP.shape} of {scores_BKP.dtype}")
    if num_pages_B.shape != scores_BKP.shape[:1]:
        raise ValueError(f"expected num_pages [B] = {scores_BKP.shape[:1]}, got {num_pages_B.shape}")
    if not 1 <= k <= scores_BKP.shape[2]:
        raise ValueError(f"expected k from 1 to the {scores_BKP.shape[2]} pages that there are, got {k}")
    if sinks < 0 or recent < 0 or sinks + recent > k:
        raise ValueError(f"expected sinks + recent of 0 to k={k} pages, got {sinks} + {recent}; raise k")
    facts = {
        "platform": platform(),
        "capability": capability(),
        "num_pages": scores_BKP.shape[2],
        "k": k,
    }
    chosen = choose("topk_pages", TOPK_PAGES, implementation, **facts)
    fixed_BKP = jax.lax.stop_gradient(scores_BKP)
    return chosen.run(fixed_BKP, num_pages_B, k=k, page_size=page_size, sinks=sinks, recent=recent)
