"""The best pages by ``lax.top_k``: the definition, and what runs where nothing faster can."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.index import KVIndex


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def topk_pages(scores_BKP, num_pages_B, *, k, page_size, sinks, recent):
    """See :func:`pallas_kernels.topk_pages.topk_pages`."""
    num_pages = scores_BKP.shape[2]
    page_11P = jnp.arange(num_pages, dtype=jnp.int32)[None, None]
    live_B11 = jnp.clip(num_pages_B, 0, num_pages)[:, None, None]
    lowest, highest = jnp.finfo(jnp.float32).min, jnp.finfo(jnp.float32).max
    ranks_BKP = jnp.clip(jnp.where(jnp.isnan(scores_BKP), lowest, scores_BKP), lowest, highest)
    ranks_BKP = jnp.where((page_11P < sinks) | (page_11P >= live_B11 - recent), jnp.inf, ranks_BKP)
    ranks_BKP = jnp.where(page_11P < live_B11, ranks_BKP, -jnp.inf)
    _, order_BKM = jax.lax.top_k(ranks_BKP, k)
    counts_BK = jnp.broadcast_to(jnp.minimum(live_B11[..., 0], k), scores_BKP.shape[:2]).astype(jnp.int32)
    filled_BKM = jnp.arange(k)[None, None] < counts_BK[..., None]
    chosen_BKM = jnp.where(filled_BKM, order_BKM, num_pages)
    pages_BKM = jnp.sort(chosen_BKM, axis=-1)
    return KVIndex(counts=counts_BK, pages=jnp.where(filled_BKM, pages_BKM, 0), page_size=page_size)
