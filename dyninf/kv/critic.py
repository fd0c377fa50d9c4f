"""Keep tokens that are attended to, and that attend to many (CRITIC, in the paper on PORAG and ATLAS, arXiv 2504.01281,
appendix A).

A token's score is a weighted sum of two numbers, each brought to 0 to 1 over the prompt: the attention that it receives
from all queries and heads, and the entropy of what it attends to itself, a mean over the heads. All heads of a layer
keep the same tokens. Scoring a prompt takes time quadratic in its length.

There is no code; these are the paper's formulas, of which the printed sum for the first runs over the keys of a query,
where it is always 1: the sum over queries must be meant. The third term, the gradient of a loss by keys and values, is
left out: it costs a backward pass. The paper scores anew as text is generated; here generated tokens are dealt with as
in :mod:`dyninf.kv.snap_kv`.
"""

import jax
import jax.numpy as jnp

from dyninf.kv.base import KVScorer, PromptKV
from dyninf.kv.mass import prompt_entropy, prompt_mass
from dyninf.kv.snap_kv import GENERATED
from dyninf.pytree import pytree


@pytree()
class Critic(KVScorer):
    """Score the tokens of a prompt by the attention they receive and the entropy of that which they pay.

    Args:
        attention: weight of the attention received (at least 0).
        entropy: weight of the entropy (at least 0).
    """

    attention: float = 0.5
    entropy: float = 0.5

    def prompt(self, obs: PromptKV) -> jax.Array:
        """Return the weighted sums."""
        real_BT = jnp.arange(obs.k_BTKH.shape[1])[None] < obs.lengths_B[:, None]
        received_BT = jnp.sum(prompt_mass(obs.q_BTNH, obs.k_BTKH, obs.lengths_B), axis=-1)
        entropy_BT = prompt_entropy(obs.q_BTNH, obs.k_BTKH)
        scores_BT = self.attention * _spread(received_BT, real_BT) + self.entropy * _spread(entropy_BT, real_BT)
        return jnp.broadcast_to(scores_BT[:, :, None], obs.k_BTKH.shape[:3])

    def arrive(self, k_BKH: jax.Array, position_B: jax.Array) -> jax.Array:
        """Return a score above those of the prompt, higher for later tokens."""
        return jnp.broadcast_to(GENERATED + position_B.astype(jnp.float32)[:, None], k_BKH.shape[:2])


def _spread(values_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
    """Return the values of each prompt moved to 0 to 1; zeros where all are alike."""
    least_B1 = jnp.min(jnp.where(real_BT, values_BT, jnp.inf), axis=1, keepdims=True)
    range_B1 = jnp.max(jnp.where(real_BT, values_BT, -jnp.inf), axis=1, keepdims=True) - least_B1
    return (values_BT - least_B1) / jnp.where(range_B1 > 0, range_B1, 1.0)
