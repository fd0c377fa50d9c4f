"""Scores of pages in plain JAX: the definition, and what runs where nothing faster can."""

from typing import Any

import jax
import jax.numpy as jnp


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def page_scores(q_BTNH, summary_LBPKX, num_pages_B, layer, *, reduce, scale):
    """See :func:`pallas_kernels.page_scores.page_scores`."""
    summary_BPKX = jnp.take(summary_LBPKX, layer, axis=0, mode="clip")
    live_BP = jnp.arange(summary_BPKX.shape[1])[None] < num_pages_B[:, None]
    # Whatever dead pages hold (NaN included) must not reach a product.
    summary_BPKX = jnp.where(live_BP[:, :, None, None], summary_BPKX, jnp.zeros((), summary_BPKX.dtype))
    q_BRKX = _queries(q_BTNH, num_kv=summary_BPKX.shape[2], bounds=summary_BPKX.shape[3] != q_BTNH.shape[3])
    scores_BRKP = jnp.einsum("brkx,bpkx->brkp", q_BRKX, summary_BPKX, preferred_element_type=jnp.float32) * scale
    live_B11P = live_BP[:, None, None]
    if reduce == "vote":
        votes_BRKP = jax.nn.softmax(jnp.where(live_B11P, scores_BRKP, -jnp.inf), axis=-1)
        return jnp.where(live_BP[:, None], jnp.sum(votes_BRKP, axis=1), -jnp.inf)
    combined_BKP = jnp.max(scores_BRKP, axis=1) if reduce == "max" else jnp.sum(scores_BRKP, axis=1)
    return jnp.where(live_BP[:, None], combined_BKP, -jnp.inf)


def _queries(q_BTNH, *, num_kv, bounds):
    """Return the rows that meet each key/value head's summaries ``[B, T * G, K, X]``."""
    batch, length, _, dim = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(batch, length, num_kv, -1, dim)
    q_BRKH = jnp.moveaxis(q_BTKGH, 3, 2).reshape(batch, -1, num_kv, dim)
    return jnp.concatenate([jnp.maximum(q_BRKH, 0), jnp.minimum(q_BRKH, 0)], axis=-1) if bounds else q_BRKH
