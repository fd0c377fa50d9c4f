"""Read clusters in two levels of fineness, and keep what the end of a prompt looked at (Zeng et al. 2025, "MPCache:
MPC-Friendly KV Cache Eviction for Efficient Private Large Language Model Inference"; the part without encryption).

:class:`MPCache` selects. A cluster is worth the dot product of the query with a point between the bounds of its keys,
``q . (alpha high + (1 - alpha) low)``, which takes no maximum over features as Quest's bound does. Clusters of two
pages are scored first; the pages of those that lose are worth nothing, whatever they hold, and the others are scored
by themselves. The paper shares a choice between neighbouring layers: ``TopK(share=2)``.

:class:`LookOnce` evicts, once: a token of the prompt is worth the largest attention that any of the last queries pays
to it. The paper keeps tokens above a threshold, as many as there are; a cache has a fixed size here, so the best fill
it.

Its code attends without the scale of attention and without a causal mask in this look, and lets all heads keep the same
tokens; here attention is the model's, and every key/value head keeps its own. It evicts and selects in one run, which
:func:`dyninf.plan.check` refuses. Its second level counts from all clusters (a fifth), here the budget says how many.
"""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from dyninf.depth.base import require_number
from dyninf.kv.base import KVScorer, PageScorer, PromptKV
from dyninf.kv.mass import prompt_peak
from dyninf.kv.snap_kv import GENERATED
from dyninf.pytree import pytree

LONG = 24000  # tokens above which half as many queries look


@pytree(static=("page_size",))
class MPCache(PageScorer):
    """Score a page by a point between the bounds of its keys, if the two pages of its cluster are among the best.

    Reads all summaries; written in plain JAX.

    Args:
        page_size: tokens of a page, half a cluster (at least 1).
        alpha: where between the lower (0) and the upper bounds (1) the point is.
        kept: share of the clusters that are looked into (0 to 1); the first and the last one always are.
    """

    kind: ClassVar[str] = "bounds"

    page_size: int = 16
    alpha: float = 0.6
    kept: float = 0.5

    def score(self, q_BTNH: jax.Array, summary_BPKX: jax.Array, num_pages_B: jax.Array) -> jax.Array:
        """Return the dot products, -inf for pages of clusters that are not looked into."""
        pages = summary_BPKX.shape[1]
        live_BP = jnp.arange(pages)[None] < num_pages_B[:, None]
        summary_BPKX = jnp.where(live_BP[:, :, None, None], summary_BPKX.astype(jnp.float32), 0.0)
        padded_BPKX = jnp.pad(summary_BPKX, ((0, 0), (0, pages % 2), (0, 0), (0, 0)))
        (high, low), (other_high, other_low) = (jnp.split(padded_BPKX[:, i::2], 2, axis=-1) for i in (0, 1))
        place_C = jnp.arange(high.shape[1])
        both = (2 * place_C[None] + 1 < num_pages_B[:, None])[:, :, None, None]
        high = jnp.where(both, jnp.maximum(high, other_high), high)
        low = jnp.where(both, jnp.minimum(low, other_low), low)
        clusters_B = (num_pages_B + 1) // 2
        worth_BKC = self._worth(q_BTNH, jnp.concatenate([high, low], axis=-1))
        worth_BKC = jnp.where((place_C[None] < clusters_B[:, None])[:, None], worth_BKC, -jnp.inf)
        rank_BKC = jnp.argsort(jnp.argsort(-worth_BKC, axis=2), axis=2)
        count_B = (clusters_B * self.kept).astype(jnp.int32)
        open_BKC = rank_BKC < count_B[:, None, None]
        open_BKC |= (place_C[None] == 0)[:, None] | (place_C[None] == clusters_B[:, None] - 1)[:, None]
        open_BKP = jnp.repeat(open_BKC, 2, axis=2)[:, :, :pages]
        return jnp.where(open_BKP & live_BP[:, None], self._worth(q_BTNH, summary_BPKX), -jnp.inf)

    def validate(self) -> None:
        """Raise ValueError if a parameter is out of its range."""
        for name in ("alpha", "kept"):
            require_number(name, getattr(self, name), 0.0, 1.0)

    def _worth(self, q_BTNH: jax.Array, bounds_BPKX: jax.Array) -> jax.Array:
        """Return the largest dot product that a query of each head's group has with the points ``[B, K, P]``."""
        high, low = jnp.split(bounds_BPKX, 2, axis=-1)
        points_BPKH = self.alpha * high + (1.0 - self.alpha) * low
        batch, length, _, dim = q_BTNH.shape
        q_BTKGH = q_BTNH.astype(jnp.float32).reshape(batch, length, bounds_BPKX.shape[2], -1, dim)
        return jnp.max(jnp.einsum("btkgh,bpkh->btgkp", q_BTKGH, points_BPKH), axis=(1, 2))


@pytree()
class LookOnce(KVScorer):
    """Score a token of the prompt by the most that one of the last queries attends to it; later tokens stay.

    Costs attention of these queries to the whole prompt, written out in parts.

    Args:
        share: of the prompt's queries, from its end, that look (above 0, to 1); half of it for prompts of more than
            24000 tokens.
    """

    share: float = 0.2

    def prompt(self, obs: PromptKV) -> jax.Array:
        """Return the largest attention."""
        share_B = jnp.where(obs.lengths_B > LONG, self.share / 2, self.share)
        last_B = jnp.ceil(obs.lengths_B * share_B).astype(jnp.int32)
        return prompt_peak(obs.q_BTNH, obs.k_BTKH, obs.lengths_B, last_B)

    def arrive(self, k_BKH: jax.Array, position_B: jax.Array) -> jax.Array:
        """Return a score above those of the prompt, higher for later tokens."""
        return jnp.broadcast_to(GENERATED + position_B.astype(jnp.float32)[:, None], k_BKH.shape[:2])

    def validate(self) -> None:
        """Raise ValueError if a parameter is out of its range."""
        require_number("share", self.share, math.nextafter(0.0, 1.0), 1.0)
