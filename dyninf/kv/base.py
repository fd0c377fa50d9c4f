"""The protocol of cache policies: what the cache keeps (eviction), and what a decode step reads of it (selection).

A method that evicts is one :class:`KVScorer`: a score for every key of every key/value head. Under ``Plan(evict=...)``
a cache has a fixed number of slots and forgets the lowest scores for good; what is scored, and when, is the scorer's
affair. A method that selects is one :class:`PageScorer`: a score for every page of a cache that keeps everything. Under
``Plan(select=...)`` a decode step leaves the pages of the lowest scores unread; the next one chooses anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax

from dyninf.cache import CacheSpec
from dyninf.own_cache import OwnCache
from dyninf.pytree import pytree
from pallas_kernels import page_scores


@pytree()
class KeepAll:
    """Evict nothing: exact."""


@pytree()
class ReadAll:
    """Read every live cache entry at every step: exact."""


@dataclass(frozen=True, kw_only=True)
class PromptKV:
    """What a scorer may look at after a layer has attended among the tokens of a prompt.

    Attributes:
        q_BTNH: queries, rotated.
        k_BTKH, v_BTKH: keys (rotated) and values.
        lengths_B: tokens of each prompt; the rest is padding.
    """

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    lengths_B: jax.Array


@dataclass(frozen=True, kw_only=True)
class StepKV:
    """What a scorer may look at after a layer has attended from one new token of each sequence to its cache.

    Attributes:
        q_BNH: queries, rotated.
        k_BSKH: keys in their slots, the new one's too.
        positions_BSK: position of the token in each slot, -1 where there is none.
        position_B: position of the new token.
        mass: call it for the attention that each slot received ``[B, S, K]``, float32: probabilities, averaged over
            the query heads of a key/value head. Costs a second pass over the keys.
    """

    q_BNH: jax.Array
    k_BSKH: jax.Array
    positions_BSK: jax.Array
    position_B: jax.Array
    mass: Callable[[], jax.Array]


class KVScorer:
    """Base of scorers: higher scores are kept longer. Scores are float32; NaN counts as the lowest.

    A score is what the cache holds for a slot, whatever :meth:`rank` makes of it. Evicted tokens of a scorer that
    ``merges`` are merged into others (:mod:`dyninf.kv.merging`), with its ``momentum``.
    """

    merges: ClassVar[bool] = False

    def prompt(self, obs: PromptKV) -> jax.Array:
        """Return the score of every token of the prompts ``[B, T, K]``; those of padding are ignored."""
        raise NotImplementedError(f"expected {type(self).__name__} to define prompt")

    def arrive(self, k_BKH: jax.Array, position_B: jax.Array) -> jax.Array:
        """Return the score ``[B, K]`` with which a new token enters the cache."""
        raise NotImplementedError(f"expected {type(self).__name__} to define arrive")

    def rank(self, scores_BSK: jax.Array, k_BKH: jax.Array) -> jax.Array:
        """Return what decides between slots when a key comes; their scores unless the scorer says otherwise."""
        return scores_BSK

    def update(self, scores_BSK: jax.Array, obs: StepKV) -> jax.Array:
        """Return the scores of all slots after a decode step; unchanged unless the scorer says otherwise."""
        return scores_BSK

    def validate(self) -> None:
        """Raise ValueError if a parameter is out of its range."""


class PageScorer:
    """Base of scorers of pages, which see the queries of a step and a summary of the keys of each page.

    Attributes:
        page_size: slots of a page (at least 1), static.
        kind: what summaries hold, see :func:`pallas_kernels.summarize_pages`.
        reduce: how :func:`pallas_kernels.page_scores` makes the scores, in the kernel that stores the new token;
            ``None`` for a scorer that defines :meth:`score`.
        owns_cache: whether the layers that select have caches of the scorer's own, made by :meth:`own_cache`.
    """

    page_size: int
    kind: ClassVar[Literal["mean", "bounds"]]
    reduce: ClassVar[Literal["max", "sum", "vote"] | None] = None
    owns_cache: ClassVar[bool] = False

    def score(self, q_BTNH: jax.Array, summary_BPKX: jax.Array, num_pages_B: jax.Array) -> jax.Array:
        """Return the score of every page and key/value head ``[B, K, P]``, float32; those of unused pages are ignored.

        Args:
            q_BTNH: queries, rotated.
            num_pages_B: pages to score, from the first on.
        """
        if self.reduce is None:
            raise NotImplementedError(f"expected {type(self).__name__} to define score or reduce")
        return self.combine(page_scores(q_BTNH, summary_BPKX, num_pages_B, reduce=self.reduce))

    def combine(self, scores_BKP: jax.Array) -> jax.Array:
        """Return the scores that decide from those of each key/value head: the same, unless the scorer says so."""
        return scores_BKP

    def own_cache(self, select: Any, entry: jax.ShapeDtypeStruct, batch: int, length: int, spec: CacheSpec) -> OwnCache:
        """Return the empty cache of a layer for prompts of at most ``length`` tokens, of a scorer that owns caches.

        Args:
            select: the :class:`dyninf.kv.TopK` that holds the scorer.
            entry: keys of one token ``[1, 1, K, H]`` and their dtype.
        """
        raise NotImplementedError(f"expected {type(self).__name__} to define own_cache")

    def arrange(self, obs: PromptKV, sinks: int, recent: int) -> jax.Array | None:
        """Return which token of the prompt each slot holds ``[B, T, K]``, ``None`` for the order of the text.

        Each head's is a permutation that leaves in their places the first ``sinks`` tokens of a prompt, its last
        ``recent`` ones and the padding behind them.
        """
        return None

    def validate(self) -> None:
        """Raise ValueError if a parameter is out of its range."""
