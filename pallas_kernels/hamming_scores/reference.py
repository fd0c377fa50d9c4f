"""Scores of hashes in plain JAX: the definition, and what runs where nothing faster can."""

from typing import Any

import jax
import jax.numpy as jnp


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def hamming_scores(codes_LBWKS, queries_BNW, num_slots_B, layer, *, reduce):
    """See :func:`pallas_kernels.hamming_scores.hamming_scores`."""
    codes_BWKS = jnp.take(codes_LBWKS, layer, axis=0, mode="clip")
    batch, words, num_kv, slots = codes_BWKS.shape
    queries_BKGW = queries_BNW.reshape(batch, num_kv, -1, words)
    queries_BGWK1 = jnp.transpose(queries_BKGW, (0, 2, 3, 1))[..., None]
    differ_BGWKS = jax.lax.population_count(codes_BWKS[:, None] ^ queries_BGWK1).astype(jnp.int32)
    bits_BGKS = jnp.sum(differ_BGWKS, axis=2)
    bits_BKS = jnp.min(bits_BGKS, axis=1) if reduce == "max" else jnp.sum(bits_BGKS, axis=1)
    live_B1S = (jnp.arange(slots)[None] < num_slots_B[:, None])[:, None]
    return jnp.where(live_B1S, (-bits_BKS).astype(jnp.float32), -jnp.inf)
