"""The best tokens by their scores: what every method shares, and the cache of a fixed number of slots that evicts.

:mod:`dyninf.kv.pages` has what selection does with the same settings.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dyninf.cache import LayerCache, write_prompt
from dyninf.depth.base import require_number
from dyninf.kv.base import KVScorer, PageScorer, PromptKV, StepKV
from dyninf.kv.mass import attention_mass
from dyninf.kv.merging import merge_prompt, merge_victim
from dyninf.pytree import pytree

LOWEST = -3e38  # of scores that are not a number; above that of slots which hold nothing


@pytree(static=("budget", "sinks", "recent", "dense_layers", "share"))
class TopK:
    """Keep, or read, ``budget`` tokens in every layer: the first and the newest ones, the rest by their scores.

    Each key/value head has its own, and a sequence that is not longer than the budget is exact.

    As ``Plan(evict=...)`` the cache has that many slots. A prompt is attended to in full and evicted layer by layer, so
    that the full cache of all layers never exists; every later token takes the slot of the lowest score before it
    attends.

    As ``Plan(select=...)`` the cache keeps everything, with a summary of each page of keys, and a decode step reads
    the pages of the highest scores. Sinks and recent tokens take whole pages. A step reads the summaries and the
    budget; writing a token costs one page of keys.

    Args:
        scorer: the method; a :class:`KVScorer` evicts, a :class:`PageScorer` selects.
        budget: tokens of a layer that are kept or read at most, the current one included, or one number for each layer.
            For selection multiples of the page size.
        sinks: first tokens of a sequence that are always kept or read.
        recent: newest tokens that are always kept or read, the current one included (at least 1).
        dense_layers: first layers that read everything; for selection only.
        reuse: how alike queries must be to those of the last scoring for its scores to serve again, a cosine (-1 to 1);
            ``None`` to score at every step. For selection only; see :mod:`dyninf.kv.choice`.
        share: layers in a row that share the scores of the first of them (at least 1); for selection only.

    Raises:
        ValueError: from :func:`dyninf.plan.check`, if the budget has no room for sinks and recent tokens.
    """

    scorer: KVScorer | PageScorer
    budget: int | tuple[int, ...]
    sinks: int = 4
    recent: int = 1
    dense_layers: int = 0
    reuse: float | None = None
    share: int = 1

    def validate(self, num_layers: int | None = None) -> None:
        """Raise ValueError if a parameter is out of its range for eviction, from a model of so many layers."""
        if not isinstance(self.scorer, KVScorer):
            raise ValueError(f"expected a KVScorer for TopK that evicts, got {self.scorer!r}")
        budgets = self._validate_budgets(num_layers)
        if self.dense_layers:
            raise ValueError(f"expected dense_layers=0 for TopK that evicts, got {self.dense_layers}")
        if self.reuse is not None or self.share != 1:
            raise ValueError(
                f"expected reuse=None and share=1 for TopK that evicts, got {self.reuse!r} and {self.share!r}"
            )
        if min(budgets) < self.sinks + self.recent:
            raise ValueError(
                f"expected a budget of at least sinks + recent = {self.sinks + self.recent} tokens, got {self.budget}; "
                "raise it, or keep fewer of these"
            )
        self.scorer.validate()

    def validate_selection(self, num_layers: int | None = None) -> None:
        """Raise ValueError if a parameter is out of its range for selection, from a model of so many layers."""
        if not isinstance(self.scorer, PageScorer):
            raise ValueError(f"expected a PageScorer for TopK that selects, got {self.scorer!r}")
        budgets = self._validate_budgets(num_layers)
        if isinstance(self.budget, tuple) and self.scorer.owns_cache:
            raise ValueError(f"expected one budget for all layers for {type(self.scorer).__name__}, got {self.budget}")
        _require_whole("page_size", self.scorer.page_size, 1)
        _require_whole("share", self.share, 1)
        if self.reuse is not None:
            require_number("reuse", self.reuse, -1.0, 1.0)
        size = self.scorer.page_size
        least = size * (self.sink_pages + self.recent_pages)
        fixed = tuple(max(least, -(-budget // size) * size) for budget in budgets)
        if budgets != fixed:
            raise ValueError(
                f"expected a budget that is a multiple of page_size={size} and at least {least} tokens, the pages of "
                f"sinks={self.sinks} and recent={self.recent}, got {self.budget}; use {self._as_given(fixed)}"
            )
        self.scorer.validate()

    @property
    def sink_pages(self) -> int:
        """First pages that are always read."""
        return -(-self.sinks // self.scorer.page_size)

    @property
    def recent_pages(self) -> int:
        """Last pages that are always read: as many as hold the recent tokens wherever in its page the last one is."""
        return 1 + -(-(self.recent - 1) // self.scorer.page_size)

    def compress(self, cache: LayerCache, obs: PromptKV, active_BT: jax.Array) -> LayerCache:
        """Return the empty ``cache`` of a layer with what is kept of a prompt, in the order of the text."""
        _, length, num_heads, _ = obs.k_BTKH.shape
        slots = cache.k.shape[1]
        scores_BTK = jnp.where(active_BT[:, :, None], _sound(self.scorer.prompt(obs)), -jnp.inf)
        position_T = jnp.arange(length)
        if length <= slots:
            filled = write_prompt(cache, obs.k_BTKH, obs.v_BTKH, active_BT)
            put = lambda array, values: jax.lax.dynamic_update_slice(array, values, (0, 0, 0))  # noqa: E731
            positions_BTK = jnp.where(active_BT[:, :, None], position_T[None, :, None], -1)
            positions_BTK = jnp.broadcast_to(positions_BTK, scores_BTK.shape).astype(jnp.int32)
            return dataclasses.replace(
                filled, positions=put(cache.positions, positions_BTK), scores=put(cache.scores, scores_BTK)
            )
        forced_BT = self._forced(position_T[None], obs.lengths_B[:, None]) & active_BT
        last_B11 = (obs.lengths_B - 1)[:, None, None, None]
        last_BKH = jnp.take_along_axis(obs.k_BTKH, last_B11, axis=1)[:, 0]
        ranks_BTK = jnp.where(active_BT[:, :, None], _sound(self.scorer.rank(scores_BTK, last_BKH)), -jnp.inf)
        ranks_BTK = jnp.where(forced_BT[:, :, None], jnp.inf, ranks_BTK)
        _, chosen_BKS = jax.lax.top_k(jnp.moveaxis(ranks_BTK, 1, 2), slots)
        active_BKT = jnp.broadcast_to(active_BT[:, None], (active_BT.shape[0], num_heads, length))
        exists_BKS = jnp.take_along_axis(active_BKT, chosen_BKS, axis=2)
        chosen_BKS = jnp.sort(jnp.where(exists_BKS, chosen_BKS, length), axis=2)
        chosen_BSK = jnp.moveaxis(chosen_BKS, 2, 1)
        exists_BSK = chosen_BSK < length

        def take(array, empty):
            index = jnp.minimum(chosen_BSK, length - 1).reshape(chosen_BSK.shape + (1,) * (array.ndim - 3))
            exists = exists_BSK.reshape(index.shape)
            return jnp.where(exists, jnp.take_along_axis(array, index, axis=1), empty)

        kept = dataclasses.replace(
            cache,
            k=take(obs.k_BTKH.astype(cache.k.dtype), jnp.zeros((), cache.k.dtype)),
            v=take(obs.v_BTKH.astype(cache.v.dtype), jnp.zeros((), cache.v.dtype)),
            positions=jnp.where(exists_BSK, chosen_BSK, -1).astype(jnp.int32),
            scores=take(scores_BTK, -jnp.inf),
        )
        if not self.scorer.merges:
            return kept
        batch, heads = jnp.arange(len(active_BT))[:, None, None], jnp.arange(num_heads)[None, :, None]
        evicted_BKT = active_BKT.at[batch, heads, chosen_BKS].set(False, mode="drop")
        evicted_BKE = jnp.sort(jnp.where(evicted_BKT, position_T[None, None], length), axis=2)[:, :, : length - slots]
        return merge_prompt(kept, obs.k_BTKH, obs.v_BTKH, evicted_BKE, self.scorer.momentum)

    def store(
        self, cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array, written_BT: jax.Array
    ) -> LayerCache:
        """Put one new token of each sequence into the first free slot, or into that of the lowest score.

        Raises:
            ValueError: for more than one token of a sequence.
        """
        if k_BTKH.shape[1] != 1:
            raise ValueError(f"expected one new token of each sequence for a cache that evicts, got {k_BTKH.shape[1]}")
        k_BKH, v_BKH, position_B = k_BTKH[:, 0], v_BTKH[:, 0], positions_BT[:, 0]
        slots, rows = cache.k.shape[1], jnp.arange(k_BKH.shape[0])[:, None]
        forced_BSK = self._forced(cache.positions, position_B[:, None, None] + 1)
        ranks_BSK = _sound(self.scorer.rank(cache.scores, k_BKH))
        victim_BK = jnp.argmin(jnp.where(forced_BSK, jnp.inf, ranks_BSK), axis=1)
        heads = jnp.arange(k_BKH.shape[1])[None]
        if self.scorer.merges:
            evicted_B = written_BT[:, 0] & (position_B >= slots) & (cache.positions[rows, victim_BK, heads][:, 0] >= 0)
            cache = merge_victim(cache, victim_BK, evicted_B, self.scorer.momentum)
        slot_BK = jnp.where((position_B < slots)[:, None], position_B[:, None], victim_BK)
        slot_BK = jnp.where(written_BT, slot_BK, slots)

        def put(array, values):
            return array.at[rows, slot_BK, heads].set(values, mode="drop", unique_indices=True)

        arrived_BK = _sound(self.scorer.arrive(k_BKH, position_B))
        return dataclasses.replace(
            cache,
            k=put(cache.k, k_BKH.astype(cache.k.dtype)),
            v=put(cache.v, v_BKH.astype(cache.v.dtype)),
            positions=put(cache.positions, jnp.broadcast_to(position_B[:, None], slot_BK.shape)),
            scores=put(cache.scores, arrived_BK),
        )

    def observe(
        self, cache: LayerCache, q_BTNH: jax.Array, positions_BT: jax.Array, active_BT: jax.Array
    ) -> LayerCache:
        """Return the cache with the scores after a decode step; sequences that did not attend keep theirs."""
        held_BSK = cache.positions >= 0
        obs = StepKV(
            q_BNH=q_BTNH[:, 0],
            k_BSKH=cache.k,
            positions_BSK=cache.positions,
            position_B=positions_BT[:, 0],
            mass=lambda: attention_mass(q_BTNH, cache.k, held_BSK[:, None]),
        )
        scores_BSK = _sound(self.scorer.update(cache.scores, obs))
        changed_BSK = held_BSK & active_BT[:, :, None]
        return dataclasses.replace(cache, scores=jnp.where(changed_BSK, scores_BSK, cache.scores))

    def _validate_budgets(self, num_layers: int | None) -> tuple[int, ...]:
        """Return the budgets; raise ValueError if they or the other sizes are no whole numbers in their range."""
        budgets = self.budget if isinstance(self.budget, tuple) else (self.budget,)
        for budget in budgets:
            _require_whole("budget", budget, 1)
        for name, least in (("sinks", 0), ("recent", 1), ("dense_layers", 0)):
            _require_whole(name, getattr(self, name), least)
        if isinstance(self.budget, tuple) and num_layers not in (None, len(budgets)):
            raise ValueError(f"expected one budget for each of {num_layers} layers, got {len(budgets)}: {budgets}")
        return budgets

    def _as_given(self, budgets: tuple[int, ...]) -> int | tuple[int, ...]:
        return budgets if isinstance(self.budget, tuple) else budgets[0]

    def _forced(self, positions: jax.Array, length: jax.Array) -> jax.Array:
        """Return which positions of sequences of this length are kept whatever their score."""
        return (positions >= 0) & ((positions < self.sinks) | (positions >= length - self.recent))


def layer_slots(evict: object, num_layers: int, capacity: int) -> tuple[int, ...]:
    """Return the slots of each layer for sequences of ``capacity`` tokens."""
    budget = evict.budget if isinstance(evict, TopK) else capacity
    budgets = budget if isinstance(budget, tuple) else (budget,) * num_layers
    return tuple(min(capacity, one) for one in budgets)


def merges(evict: object) -> bool:
    """Return whether evicted tokens are merged into others."""
    return isinstance(evict, TopK) and evict.scorer.merges


def _require_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"expected {name} to be a whole number of at least {least}, got {value!r}")


def _sound(scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(scores), LOWEST, scores.astype(jnp.float32))
