"""Forget the token that the newest one attends to least (Oren et al. 2024, "Transformers are Multi-State RNNs").

Attention is averaged over all heads of a layer, which therefore keep the same tokens. A decode step costs a second pass
over the keys.
"""

import jax
import jax.numpy as jnp

from dyninf.kv.base import KVScorer, PromptKV, StepKV
from dyninf.kv.mass import prompt_mass
from dyninf.pytree import pytree


@pytree()
class TOVA(KVScorer):
    """Score a token by the attention of the newest query."""

    def prompt(self, obs: PromptKV) -> jax.Array:
        """Return the attention of the last query."""
        return _over_heads(prompt_mass(obs.q_BTNH, obs.k_BTKH, obs.lengths_B, last=1))

    def arrive(self, k_BKH: jax.Array, position_B: jax.Array) -> jax.Array:
        """Return a score that :meth:`update` replaces in the same step."""
        return jnp.ones(k_BKH.shape[:2], jnp.float32)

    def update(self, scores_BSK: jax.Array, obs: StepKV) -> jax.Array:
        """Return the attention of this step's query."""
        return _over_heads(obs.mass())


def _over_heads(mass_BSK: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.mean(mass_BSK, axis=-1, keepdims=True), mass_BSK.shape)
