"""Keep the keys of the smallest norm (Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache
Compression").

Needs no query, so it costs one pass over the keys. Whether small keys are those that are attended to depends on the
model; the paper leaves the first two layers of its models alone, which this does not.
"""

import jax
import jax.numpy as jnp

from dyninf.kv.base import KVScorer, PromptKV
from dyninf.pytree import pytree


@pytree()
class KeyNorm(KVScorer):
    """Score a token by minus the Euclidean norm of its key."""

    def prompt(self, obs: PromptKV) -> jax.Array:
        """Return minus the norms."""
        return -_norm(obs.k_BTKH)

    def arrive(self, k_BKH: jax.Array, position_B: jax.Array) -> jax.Array:
        """Return minus the norm."""
        return -_norm(k_BKH)


def _norm(keys: jax.Array) -> jax.Array:
    wide = keys.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(wide * wide, axis=-1))
