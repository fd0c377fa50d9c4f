"""Keep what the end of the prompt attends to (Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before
Generation").

The last ``window`` queries of the prompt vote: their probabilities are added up for each earlier token and smoothed
over ``kernel`` neighbours, so that what surrounds a find stays too. The window itself is kept: give
``TopK(recent=window)``. The paper evicts once, after the prompt; here, where the cache has a fixed size, each generated
token then takes the place of the lowest score of the prompt, and of the oldest generated token when none is left. Votes
of the query heads that share a key/value head are averaged; the paper's code has a cache for each query head.
"""

import jax
import jax.numpy as jnp

from dyninf.kv.base import KVScorer, PromptKV
from dyninf.kv.mass import prompt_mass
from dyninf.pytree import pytree

GENERATED = 1e4  # above every vote, which is at most the window; exact with positions up to 2**24


@pytree(static=("window", "kernel"))
class SnapKV(KVScorer):
    """Score the tokens of a prompt by the attention of its last queries.

    Args:
        window: queries that vote (at least 1).
        kernel: neighbours over which votes are averaged (odd); beyond the first and the last voted token there are
            zeros.

    Raises:
        ValueError: from :func:`dyninf.plan.check`, if a parameter is out of its range.
    """

    window: int = 32
    kernel: int = 5

    def prompt(self, obs: PromptKV) -> jax.Array:
        """Return the smoothed votes."""
        votes_BTK = prompt_mass(obs.q_BTNH, obs.k_BTKH, obs.lengths_B, last=self.window)
        before_BT = jnp.arange(votes_BTK.shape[1])[None] < (obs.lengths_B - self.window)[:, None]
        votes_BTK = jnp.where(before_BT[:, :, None], votes_BTK, 0.0)
        side = self.kernel // 2
        sums = jax.lax.reduce_window(
            votes_BTK, 0.0, jax.lax.add, (1, self.kernel, 1), (1, 1, 1), ((0, 0), (side, side), (0, 0))
        )
        return sums / self.kernel

    def arrive(self, k_BKH: jax.Array, position_B: jax.Array) -> jax.Array:
        """Return a score above those of the prompt, higher for later tokens."""
        return jnp.broadcast_to(GENERATED + position_B.astype(jnp.float32)[:, None], k_BKH.shape[:2])

    def validate(self) -> None:
        """Raise ValueError if a parameter is out of its range."""
        if not (isinstance(self.window, int) and self.window >= 1):
            raise ValueError(f"expected a window of at least 1 query for SnapKV, got {self.window!r}")
        if not (isinstance(self.kernel, int) and self.kernel >= 1 and self.kernel % 2):
            raise ValueError(f"expected an odd kernel of at least 1 for SnapKV, got {self.kernel!r}")
