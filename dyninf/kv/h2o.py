"""Keep the heavy hitters: tokens that have received most attention so far (Zhang et al. 2023, "H2O: Heavy-Hitter Oracle
for Efficient Generative Inference of Large Language Models").

Probabilities are summed over all queries since the token came, which favours older tokens, as in the paper's code. Half
of the budget is for the newest tokens there: ``TopK(recent=budget // 2)``. Scoring a prompt takes time quadratic in its
length; a decode step costs a second pass over the keys. Under grouped queries the paper's code has no rule; the query
heads of a key/value head are averaged here.
"""

import jax
import jax.numpy as jnp

from dyninf.kv.base import KVScorer, PromptKV, StepKV
from dyninf.kv.mass import prompt_mass
from dyninf.pytree import pytree


@pytree()
class H2O(KVScorer):
    """Score a token by the attention it has received."""

    def prompt(self, obs: PromptKV) -> jax.Array:
        """Return the attention of all queries of the prompt."""
        return prompt_mass(obs.q_BTNH, obs.k_BTKH, obs.lengths_B)

    def arrive(self, k_BKH: jax.Array, position_B: jax.Array) -> jax.Array:
        """Return nothing yet; :meth:`update` adds what it receives in the same step."""
        return jnp.zeros(k_BKH.shape[:2], jnp.float32)

    def update(self, scores_BSK: jax.Array, obs: StepKV) -> jax.Array:
        """Return the scores with this step's attention added."""
        return scores_BSK + obs.mass()
