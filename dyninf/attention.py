"""Build the ``attend`` functions that layers call; the only caller of the kernels.

Each builder returns a function of one layer's cache and of the tokens that run this layer; it returns the ``Attend``
that the layer is handed. What is written and what may be read is decided here, so that a layer and a depth policy
know nothing of caches.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from dyninf.cache import LayerCache, write, write_prompt
from dyninf.kv.base import KeepAll, PromptKV, ReadAll
from dyninf.kv.choice import remember_scores
from dyninf.kv.pages import arrange_prompt, choose_pages, summarize_prompt, summarize_written
from dyninf.kv.top_k import TopK
from dyninf.model import Attend
from dyninf.own_cache import OwnCache
from dyninf.sparsity.base import Dense, PromptObs, Selected, SparsityPolicy
from pallas_kernels import (
    append_and_score,
    append_tokens,
    block_sparse_attention,
    decode_attention,
    prefill_attention,
)

KEEP_ALL, READ_ALL, DENSE = KeepAll(), ReadAll(), Dense()


class LayerAttend(Protocol):
    """Build the ``attend`` function of a layer."""

    def __call__(self, cache: LayerCache | None, active_BT: jax.Array, layer: int | None = None) -> Attend:
        """Return it for the cache of the layer, the tokens that run it, and its number, ``None`` if it is traced."""


def attend_prompt(
    lengths_B: jax.Array,
    evict: TopK | KeepAll = KEEP_ALL,
    select: TopK | ReadAll = READ_ALL,
    sparsity: SparsityPolicy = DENSE,
    positions_BT: jax.Array | None = None,
) -> LayerAttend:
    """Attend among the T tokens of a prompt and store their keys and values, or what is kept, in an empty cache.

    Args:
        lengths_B: how many of the tokens at hand exist.
        positions_BT: where the tokens stand in their prompts, ascending, if some were dropped; ``None`` for 0 to T - 1.
    """

    def for_layer(cache: LayerCache | None, active_BT: jax.Array, layer: int | None = None) -> Attend:
        def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None):
            if positions_BT is not None:
                _refuse_narrow(window, cache.k.shape[1])
            o_BTNH = _attend_selected(sparsity, layer, q_BTNH, k_BTKH, v_BTKH, lengths_B, window=window)
            if positions_BT is not None:
                return o_BTNH, write(cache, k_BTKH, v_BTKH, slots_of(cache, positions_BT, active_BT))
            if isinstance(cache, OwnCache):
                _refuse_window(window)
                return o_BTNH, cache.fill(k_BTKH, v_BTKH, lengths_B, select)
            obs = PromptKV(q_BTNH=q_BTNH, k_BTKH=k_BTKH, v_BTKH=v_BTKH, lengths_B=lengths_B)
            if isinstance(evict, KeepAll):
                stored = arrange_prompt(cache, select, obs)
                if stored is not obs:
                    _refuse_window(window)
                filled = write_prompt(cache, stored.k_BTKH, stored.v_BTKH, active_BT)
                return o_BTNH, summarize_prompt(filled, select, k_BTKH.shape[1], lengths_B)
            _refuse_window(window)
            return o_BTNH, evict.compress(cache, obs, active_BT)

        return attend

    return for_layer


def attend_chunk(lengths_B: jax.Array, offset: jax.Array, sparsity: SparsityPolicy = DENSE) -> LayerAttend:
    """Attend from a chunk of prompts over the cache, to which its keys and values are added.

    Args:
        lengths_B: tokens of the whole prompts; the rest is padding and leaves zeros behind.
        offset: position of the chunk's first token.
        sparsity: which blocks of the cache the chunk attends to.
    """

    def for_layer(cache: LayerCache, active_BT: jax.Array, layer: int | None = None) -> Attend:
        def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None):
            filled = write_prompt(cache, k_BTKH, v_BTKH, active_BT, offset)
            about = {"offset": offset, "window": window}
            return _attend_selected(sparsity, layer, q_BTNH, filled.k, filled.v, lengths_B, **about), filled

        return attend

    return for_layer


def attend_cached(
    positions_BT: jax.Array,
    live_BT: jax.Array,
    evict: TopK | KeepAll = KEEP_ALL,
    select: TopK | ReadAll = READ_ALL,
    *,
    write_inactive: bool,
) -> LayerAttend:
    """Attend from new tokens over the cache, to which their keys and values are added.

    Args:
        positions_BT: position of each new token.
        live_BT: tokens that exist; others write nothing and their output is meaningless.
        evict: what the cache keeps.
        select: what a step reads of it.
        write_inactive: whether tokens that do not run this layer still write their keys and values.
    """

    def for_layer(cache: LayerCache, active_BT: jax.Array, layer: int | None = None) -> Attend:
        written_BT = live_BT if write_inactive else live_BT & active_BT

        def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None):
            stored = (cache, k_BTKH, v_BTKH, positions_BT, written_BT)
            if not isinstance(cache, OwnCache) and isinstance(evict, KeepAll):
                updated, scores_BKP = store_and_score(*stored, select, q_BTNH)
                updated = remember_scores(updated, select, q_BTNH, positions_BT, live_BT & active_BT)
                index = choose_pages(updated, select, q_BTNH, positions_BT, window, scores_BKP)
                return decode_attention(
                    q_BTNH, updated.k, updated.v, positions_BT, index=index, window=window, valid_BS=updated.valid
                ), updated
            _refuse_window(window)
            updated = store(*stored, evict, select)
            if isinstance(updated, OwnCache):
                return updated.attend(q_BTNH, positions_BT, select), updated
            # Slots fill in order and the order of keys does not matter: a full cache is read to its last slot.
            last_BT = jnp.minimum(positions_BT, cache.k.shape[1] - 1)
            o_BTNH = decode_attention(q_BTNH, updated.k, updated.v, last_BT)
            return o_BTNH, evict.observe(updated, q_BTNH, positions_BT, live_BT & active_BT)

        return attend

    return for_layer


def attend_uncached(
    lengths_B: jax.Array,
    *,
    keep_inactive: bool,
    prompt_lengths_B: jax.Array | None = None,
    sparsity: SparsityPolicy = DENSE,
) -> LayerAttend:
    """Attend causally among all tokens without a cache (teacher forcing).

    Args:
        keep_inactive: whether keys of tokens that do not run this layer may be attended.
        prompt_lengths_B: first tokens of each sequence that attend as ``sparsity`` says, by which all run this layer.
        sparsity: which blocks these attend to.
    """

    def for_layer(cache: None, active_BT: jax.Array, layer: int | None = None) -> Attend:
        keep_BT = None if keep_inactive else active_BT

        def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None):
            o_BTNH = prefill_attention(q_BTNH, k_BTKH, v_BTKH, lengths_B, window=window, keep_BT=keep_BT)
            if isinstance(sparsity, Dense):
                return o_BTNH, None
            sparse_BTNH = _attend_selected(sparsity, layer, q_BTNH, k_BTKH, v_BTKH, prompt_lengths_B, window=window)
            prompt_BT = jnp.arange(q_BTNH.shape[1])[None] < prompt_lengths_B[:, None]
            return jnp.where(prompt_BT[:, :, None, None], sparse_BTNH, o_BTNH), None

        return attend

    return for_layer


def store(
    cache: LayerCache,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    written_BT: jax.Array,
    evict: TopK | KeepAll = KEEP_ALL,
    select: TopK | ReadAll = READ_ALL,
) -> LayerCache:
    """Return the cache with the keys and values of new tokens, where ``written_BT`` says so."""
    if isinstance(cache, OwnCache):
        return cache.store(k_BTKH, v_BTKH, positions_BT, written_BT)
    if isinstance(evict, TopK):
        return evict.store(cache, k_BTKH, v_BTKH, positions_BT, written_BT)
    slots_BT = slots_of(cache, positions_BT, written_BT)
    if cache.summary is None or cache.valid is not None:
        return summarize_written(write(cache, k_BTKH, v_BTKH, slots_BT), select, positions_BT, written_BT)
    about = {"kind": select.scorer.kind, "page_size": select.scorer.page_size}
    k, v, summary = append_tokens(cache.k, cache.v, cache.summary, k_BTKH, v_BTKH, slots_BT, **about)
    return dataclasses.replace(cache, k=k, v=v, summary=summary)


def store_and_score(
    cache: LayerCache,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    written_BT: jax.Array,
    select: TopK | ReadAll,
    q_BTNH: jax.Array,
) -> tuple[LayerCache, jax.Array | None]:
    """Return the cache with the new token of each sequence, and the scores of its pages where one kernel makes both."""
    plain = cache.summary is not None and cache.valid is None and cache.choice is None
    if not plain or select.scorer.reduce is None:
        return store(cache, k_BTKH, v_BTKH, positions_BT, written_BT, select=select), None
    scorer, slots_BT = select.scorer, slots_of(cache, positions_BT, written_BT)
    arrays = (cache.k, cache.v, cache.summary, k_BTKH, v_BTKH, slots_BT, q_BTNH)
    about = {"kind": scorer.kind, "page_size": scorer.page_size, "reduce": scorer.reduce}
    k, v, summary, scores_BKP = append_and_score(*arrays, **about)
    return dataclasses.replace(cache, k=k, v=v, summary=summary), scorer.combine(scores_BKP)


def _attend_selected(
    sparsity: SparsityPolicy,
    layer: int | None,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    lengths_B: jax.Array,
    *,
    offset: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Attend from a prompt, or the chunk of one that begins at ``offset``, to the blocks that the policy names."""
    first = 0 if offset is None else offset
    obs = PromptObs(layer=layer, q_BTNH=q_BTNH, k_BSKH=k_BSKH, lengths_B=lengths_B, offset=first)
    selected = sparsity.select(obs)
    if selected is None:
        return prefill_attention(q_BTNH, k_BSKH, v_BSKH, lengths_B, window=window, offset=offset)
    if offset is not None and q_BTNH.shape[1] % selected.index.block_size:
        raise ValueError(
            f"expected a chunk of a multiple of {selected.index.block_size} tokens, the blocks of "
            f"{type(sparsity).__name__}, got {q_BTNH.shape[1]}"
        )
    if offset is not None and selected.order is not None:
        raise NotImplementedError(
            f"expected prompts that are read at once for {type(sparsity).__name__}, which takes tokens in its own "
            "order; leave the chunk out"
        )
    window, sinks = _within(window, selected, k_BSKH.shape[1])
    about = {"offset": first, "window": window, "sinks": sinks, "order_BNT": selected.order}
    return block_sparse_attention(q_BTNH, k_BSKH, v_BSKH, selected.index, lengths_B, **about)


def _within(window: int | None, selected: Selected, num_keys: int) -> tuple[int | None, int]:
    """Return the window and the sinks of what is seen in the window of a layer among what a policy sees."""
    if window is None or window >= num_keys:
        return selected.window, selected.sinks
    if selected.window is None or window <= selected.window or not selected.sinks:
        return (window if selected.window is None else min(window, selected.window)), 0
    raise NotImplementedError(
        f"expected layers of full attention, or of a window of at most {selected.window} tokens, for a sparsity policy "
        f"with sinks beside that window, got a layer with a window of {window}, which would hide them"
    )


def _refuse_narrow(window: int | None, num_slots: int) -> None:
    """Refuse a window that dropped tokens would widen, since keys are counted to see how far away they are."""
    if window is not None and window < num_slots:
        raise NotImplementedError(
            f"expected full attention in layers above dropped tokens, got a window of {window} tokens; drop them above "
            "the last such layer"
        )


def _refuse_window(window: int | None) -> None:
    """Slots of a cache that is not by position are in no order, so a window would have to be looked up."""
    if window is not None:
        raise NotImplementedError(
            "expected full attention in every layer for a plan that evicts, arranges what it selects from or holds "
            f"keys in a form of its own, got a window of {window} tokens; such layers keep no more than that anyway"
        )


def slots_of(cache: LayerCache, positions_BT: jax.Array, written_BT: jax.Array) -> jax.Array:
    """Return the slot of each token, one beyond the capacity (a dropped write) where nothing is to be written.

    All slots of a sequence differ, so that the write need not be atomic.
    """
    dropped_T = cache.k.shape[1] + jnp.arange(positions_BT.shape[1])
    return jnp.where(written_BT, positions_BT, dropped_T[None])
