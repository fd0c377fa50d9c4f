"""Evict what the end of a prompt never looks at, then read clusters of the rest (Zeng et al. 2025, "MPCache:
MPC-Friendly KV Cache Eviction for Efficient Private Large Language Model Inference").

:class:`MPCache` selects. A page is worth ``sum_d q_d (alpha high_d + (1 - alpha) low_d)`` with the bounds of its keys,
Quest's score without its comparison of signs. It chooses twice: of the clusters of two pages, whose bounds are those of
both, half stay, the first and the last ones always; pages of the others score minus infinity and are read only if the
budget has room for all that stayed. A step reads the summaries twice, once halved. The paper's code reads a fifth of
the text, with the first page always; here the budget is fixed. Query heads that share a key/value head share pages, by
the largest of their scores, and clusters likewise. The paper also shares choices between adjacent layers:
``TopK(share=2)``.

:class:`LookOnce` evicts. A token is worth the largest weight that any query in the last fifth of the prompt gives it (a
tenth above 24000 tokens), averaged over the query heads of its key/value head. The paper's code averages over all heads
and keeps what reaches a threshold that is chosen for each data set; here a fixed number is kept, and each generated
token, of which the code keeps all, takes the place of the lowest score of the prompt. Its weights lack the scale of
attention and the causal mask; here they are those of attention. Where a fifth of the prompt is no whole token the code
asks every query, here the last one. The paper does both; a plan here evicts or selects.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.kv.base import KVScorer, PageScorer, PromptKV
from dyninf.kv.mass import prompt_peak
from dyninf.kv.snap_kv import GENERATED
from dyninf.pytree import pytree
from pallas_kernels import page_scores


@pytree(static=("page_size",))
class MPCache(PageScorer):
    """Score a page by a fixed mix of its bounds, if the pair of pages it belongs to is among the best.

    Args:
        page_size: tokens of a page (at least 1); clusters have twice as many.
        alpha: weight of the upper bounds (0 to 1).
        keep: share of the clusters that stay (above 0, at most 1), rounded down, beside the first and the last one.
    """

    kind: ClassVar[str] = "bounds"

    page_size: int = 16
    alpha: float = 0.6
    keep: float = 0.5

    def score(self, q_BTNH: jax.Array, summary_BPKX: jax.Array, num_pages_B: jax.Array) -> jax.Array:
        """Return the scores, minus infinity for pages of clusters that lost."""
        # Both products are one with the bounds as means of twice the features.
        mixed_BTNX = jnp.concatenate([self.alpha * q_BTNH, (1 - self.alpha) * q_BTNH], axis=-1).astype(q_BTNH.dtype)
        clusters_B = (num_pages_B + 1) // 2
        coarse_BKC = page_scores(mixed_BTNX, _pairs(summary_BPKX, num_pages_B), clusters_B, reduce="max")
        best_BKC = -jnp.sort(-coarse_BKC, axis=-1)
        count_B = jnp.floor(self.keep * clusters_B).astype(jnp.int32)
        least_BK1 = jnp.take_along_axis(best_BKC, jnp.maximum(count_B - 1, 0)[:, None, None], axis=-1)
        cluster_C = jnp.arange(coarse_BKC.shape[-1])
        ends_BC = (cluster_C == 0)[None] | (cluster_C[None] == (clusters_B - 1)[:, None])
        stays_BKC = (coarse_BKC >= least_BK1) & (count_B > 0)[:, None, None] | ends_BC[:, None]
        scores_BKP = page_scores(mixed_BTNX, summary_BPKX, num_pages_B, reduce="max")
        stays_BKP = jnp.repeat(stays_BKC, 2, axis=-1)[..., : scores_BKP.shape[-1]]
        return jnp.where(stays_BKP, scores_BKP, -jnp.inf)

    def validate(self) -> None:
        """Raise ValueError if a parameter is out of its range."""
        if isinstance(self.alpha, float | int) and not 0 <= self.alpha <= 1:
            raise ValueError(f"expected alpha from 0 to 1 for MPCache, got {self.alpha}; 0.6 is the paper's")
        if isinstance(self.keep, float | int) and not 0 < self.keep <= 1:
            raise ValueError(f"expected keep above 0 and at most 1 for MPCache, got {self.keep}; 0.5 is the paper's")


@pytree(static=("share", "long_share", "long"))
class LookOnce(KVScorer):
    """Score the tokens of a prompt by the largest weight that one of its last queries gives them.

    Args:
        share: share of a prompt's queries that look (above 0, at most 1), rounded down, at least one query.
        long_share: the same for prompts of more than ``long`` tokens.
        long: tokens.
    """

    share: float = 0.2
    long_share: float = 0.1
    long: int = 24000

    def prompt(self, obs: PromptKV) -> jax.Array:
        """Return the largest weights."""
        lengths = np.arange(obs.k_BTKH.shape[1] + 1)
        looking = np.maximum(1, (lengths * np.where(lengths > self.long, self.long_share, self.share)).astype(np.int32))
        last_B = jnp.asarray(looking)[obs.lengths_B]
        return prompt_peak(obs.q_BTNH, obs.k_BTKH, obs.lengths_B, last_B, most=int(looking.max()))

    def arrive(self, k_BKH: jax.Array, position_B: jax.Array) -> jax.Array:
        """Return a score above those of the prompt, higher for later tokens."""
        return jnp.broadcast_to(GENERATED + position_B.astype(jnp.float32)[:, None], k_BKH.shape[:2])

    def validate(self) -> None:
        """Raise ValueError if a parameter is out of its range."""
        for name, share in (("share", self.share), ("long_share", self.long_share)):
            if not (isinstance(share, float | int) and 0 < share <= 1):
                raise ValueError(f"expected {name} above 0 and at most 1 for LookOnce, got {share!r}; give a fraction")


def _pairs(bounds_BPKX: jax.Array, num_pages_B: jax.Array) -> jax.Array:
    """Return the bounds of pages 2c and 2c + 1 together ``[B, C, K, X]``; of those in use alone."""
    batch, pages, heads, width = bounds_BPKX.shape
    even_BPKX = jnp.pad(bounds_BPKX, ((0, 0), (0, pages % 2), (0, 0), (0, 0)))
    pairs = even_BPKX.reshape(batch, -1, 2, heads, 2, width // 2)
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    both_BC = jnp.arange(pairs.shape[1])[None] * 2 + 1 < num_pages_B[:, None]
    high, low = jnp.maximum(first[..., 0, :], second[..., 0, :]), jnp.minimum(first[..., 1, :], second[..., 1, :])
    joined = jnp.where(both_BC[:, :, None, None, None], jnp.stack([high, low], axis=-2), first)
    return joined.reshape(batch, -1, heads, width)
