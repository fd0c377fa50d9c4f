"""Keep the newest tokens (Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks").

With ``TopK(sinks=4)`` this is StreamingLLM, but for positions: keys keep those they had in the text, where the paper
numbers them anew inside the cache. Reads no key; what lies between the sinks and the newest tokens is lost, so that a
model retrieves nothing from there.
"""

import jax
import jax.numpy as jnp

from dyninf.kv.base import KVScorer, PromptKV
from dyninf.pytree import pytree


@pytree()
class Recency(KVScorer):
    """Score a token by its position."""

    def prompt(self, obs: PromptKV) -> jax.Array:
        """Return the positions."""
        positions_T = jnp.arange(obs.k_BTKH.shape[1], dtype=jnp.float32)
        return jnp.broadcast_to(positions_T[None, :, None], obs.k_BTKH.shape[:3])

    def arrive(self, k_BKH: jax.Array, position_B: jax.Array) -> jax.Array:
        """Return the position."""
        return jnp.broadcast_to(position_B.astype(jnp.float32)[:, None], k_BKH.shape[:2])
