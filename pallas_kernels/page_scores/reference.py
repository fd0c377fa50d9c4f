"""Scores of pages in plain JAX: the definition, and what runs where nothing faster can."""

from typing import Any

import jax
import jax.numpy as jnp


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def page_scores(q_BRKX, summary_BPKX, num_pages_B, *, reduce, scale):
    """See :func:`pallas_kernels.page_scores.page_scores`; ``q [B, R, K, X]`` has the rows of each key/value head."""
    live_BP = jnp.arange(summary_BPKX.shape[1])[None] < num_pages_B[:, None]
    # Whatever dead pages hold (NaN included) must not reach a product.
    summary_BPKX = jnp.where(live_BP[:, :, None, None], summary_BPKX, jnp.zeros((), summary_BPKX.dtype))
    scores_BRKP = jnp.einsum("brkx,bpkx->brkp", q_BRKX, summary_BPKX, preferred_element_type=jnp.float32) * scale
    live_B11P = live_BP[:, None, None]
    if reduce == "vote":
        votes_BRKP = jax.nn.softmax(jnp.where(live_B11P, scores_BRKP, -jnp.inf), axis=-1)
        return jnp.where(live_BP[:, None], jnp.sum(votes_BRKP, axis=1), -jnp.inf)
    combined_BKP = jnp.max(scores_BRKP, axis=1) if reduce == "max" else jnp.sum(scores_BRKP, axis=1)
    return jnp.where(live_BP[:, None], combined_BKP, -jnp.inf)
