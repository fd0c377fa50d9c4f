"""What a decode step reads under ``Plan(select=TopK(...))``: summaries of pages, and the choice among them.

Page p of a cache holds the slots from ``p * page_size`` on. The summary of a page is computed from the keys that the
cache holds, after a prompt for all of them and after a step for the page that was written, so that it follows from the
cache alone: a state that is rolled back to fewer tokens makes it anew with the next token of the page. Slots that hold
no key (``fill="mask"``) are left out. A choice follows from the scores of this step, or from remembered ones
(:mod:`dyninf.kv.choice`).

Layers read everything, and hold no summary, where the budget covers the whole cache or ``dense_layers`` says so.
Stacked caches have the same arrays in all layers; there the first ``dense_layers`` have summaries that nobody reads.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dyninf.cache import CacheSpec, KVCache, LayerCache
from dyninf.kv.base import PageScorer, PromptKV, ReadAll
from dyninf.kv.top_k import TopK
from dyninf.own_cache import OwnCache
from pallas_kernels import KVIndex, summarize_page, summarize_pages, topk_pages

TILE = 8  # kernels take pages by so many


def layer_budgets(select: TopK, num_layers: int) -> tuple[int, ...]:
    """Return the tokens that a step reads of each layer at most."""
    return select.budget if isinstance(select.budget, tuple) else (select.budget,) * num_layers


def summary_sizes(
    select: TopK | ReadAll, num_layers: int, capacity: int, head_dim: int
) -> tuple[tuple[int, int] | None, ...]:
    """Return the pages and numbers ``(P, X)`` of each layer's summary, ``None`` for layers that have none."""
    if isinstance(select, ReadAll) or select.scorer.owns_cache:
        return (None,) * num_layers
    pages = -(-capacity // (select.scorer.page_size * TILE)) * TILE
    size = (pages, head_dim if select.scorer.kind == "mean" else 2 * head_dim)
    budgets = enumerate(layer_budgets(select, num_layers))
    return tuple(size if layer >= select.dense_layers and budget < capacity else None for layer, budget in budgets)


def own_reads(select: TopK | ReadAll, sizes: Sequence[tuple[int, int] | None]) -> tuple[int | None, ...]:
    """Return the tokens that a step reads of each layer that selects by a budget of its own, ``None`` for the others.

    Args:
        sizes: of the summaries, as :func:`summary_sizes` returns them.
    """
    if isinstance(select, ReadAll) or not isinstance(select.budget, tuple):
        return (None,) * len(sizes)
    return tuple(None if size is None else budget for size, budget in zip(sizes, select.budget, strict=True))


def own_layers(select: TopK | ReadAll, num_layers: int, capacity: int) -> tuple[bool, ...]:
    """Return which layers have a cache of the scorer's own."""
    if isinstance(select, ReadAll) or not select.scorer.owns_cache or select.budget >= capacity:
        return (False,) * num_layers
    return tuple(layer >= select.dense_layers for layer in range(num_layers))


def own_caches(
    select: TopK | ReadAll, num_layers: int, entry: jax.ShapeDtypeStruct, batch: int, length: int, spec: CacheSpec
) -> list[OwnCache | None]:
    """Return the empty caches of layers that have one of the scorer's own, ``None`` for the others.

    Args:
        entry: keys of one token ``[1, 1, K, H]`` and their dtype.
        length: tokens of the prompts, padding included.
    """
    owning = own_layers(select, num_layers, spec.capacity)
    return [select.scorer.own_cache(select, entry, batch, length, spec) if owns else None for owns in owning]


def made_for(cache: KVCache, select: TopK | ReadAll) -> bool:
    """Return whether the caches of all layers hold what these settings need."""
    num_layers, capacity = len(cache.slots), cache.capacity
    sizes = summary_sizes(select, num_layers, capacity, cache.head_dim)
    if cache.summary_sizes != sizes or cache.reads != own_reads(select, sizes):
        return False
    owning = own_layers(select, num_layers, capacity)
    if cache.stacked:
        return not any(owning)
    own = tuple(isinstance(layer, OwnCache) for layer in cache.layers)
    return own == owning and all(layer.fits(select) for layer in cache.own)


def arranges(select: TopK | ReadAll) -> bool:
    """Return whether layers that select hold a prompt in another form or order than that of the text."""
    return isinstance(select, TopK) and (
        select.scorer.owns_cache or type(select.scorer).arrange is not PageScorer.arrange
    )


def arrange_prompt(cache: LayerCache, select: TopK | ReadAll, obs: PromptKV) -> PromptKV:
    """Return a prompt with its keys and values in the order of their slots in a layer; ``obs`` itself for the text's.

    Attention does not ask for the order of keys. Once they are arranged, a state may be rolled back to the end of the
    prompt, never into it.
    """
    if cache is None or cache.summary is None:
        return obs
    order_BTK = select.scorer.arrange(obs, select.sinks, select.recent)
    if order_BTK is None:
        return obs
    k, v = (jnp.take_along_axis(part, order_BTK[..., None], axis=1) for part in (obs.k_BTKH, obs.v_BTKH))
    return dataclasses.replace(obs, k_BTKH=k, v_BTKH=v)


def summarize_prompt(cache: LayerCache, select: TopK | ReadAll, length: int, lengths_B: jax.Array) -> LayerCache:
    """Return the cache of a layer with the summaries of prompts of ``lengths_B``, at most ``length`` tokens."""
    if cache.summary is None:
        return cache
    scorer = select.scorer
    made_BPKX = summarize_pages(cache.k[:, :length], lengths_B, page_size=scorer.page_size, kind=scorer.kind)
    summary_BPKX = jax.lax.dynamic_update_slice(cache.summary, made_BPKX, (0, 0, 0, 0))
    return dataclasses.replace(cache, summary=summary_BPKX)


def summarize_written(
    cache: LayerCache, select: TopK | ReadAll, positions_BT: jax.Array, written_BT: jax.Array
) -> LayerCache:
    """Return the cache of a layer with the summaries of the pages to which a step wrote.

    Args:
        positions_BT: position of each new token; none that is written comes after one that is not.
        written_BT: tokens whose keys were written.
    """
    if cache.summary is None:
        return cache
    size, (slots, pages) = select.scorer.page_size, (cache.k.shape[1], cache.summary.shape[1])
    rows, length = jnp.arange(len(positions_BT))[:, None], positions_BT.shape[1]
    newest_B = jnp.max(jnp.where(written_BT, positions_BT, -1), axis=1)
    page_BT = positions_BT // size
    slot_BTS = page_BT[:, :, None] * size + jnp.arange(size)[None, None]
    at_BTS = jnp.clip(slot_BTS, 0, slots - 1)
    live_BTS = slot_BTS <= newest_B[:, None, None]
    if cache.valid is not None:
        live_BTS &= cache.valid[rows[:, :, None], at_BTS]
    made_BTKX = summarize_page(cache.k[rows[:, :, None], at_BTS], live_BTS, kind=select.scorer.kind)
    # Tokens of one page make the same summary; a page beyond the last one is dropped.
    page_BT = jnp.where(written_BT, page_BT, pages + jnp.arange(length)[None])
    summary_BPKX = cache.summary.at[rows, page_BT].set(made_BTKX, mode="drop", unique_indices=length == 1)
    return dataclasses.replace(cache, summary=summary_BPKX)


def choose_pages(
    cache: LayerCache,
    select: TopK | ReadAll,
    q_BTNH: jax.Array,
    positions_BT: jax.Array,
    window: int | None = None,
    scores_BKP: jax.Array | None = None,
) -> KVIndex | None:
    """Return the pages that a step reads in a layer, ``None`` for all.

    The page of the new token is read whatever it is worth, and not scored.

    Args:
        q_BTNH: queries of the new token of each sequence, whose key the cache holds.
        window: of the layer; pages before it are worth nothing.
        scores_BKP: the scores of the pages before that of the new token, if they are there already.

    Raises:
        ValueError: for more than one token of a sequence.
    """
    if cache.summary is None:
        return None
    if q_BTNH.shape[1] != 1:
        raise ValueError(f"expected one new token of each sequence for a plan that selects, got {q_BTNH.shape[1]}")
    size = select.scorer.page_size
    whole_B = positions_BT[:, 0] // size
    if cache.choice is not None:
        scores_BKP = cache.choice.scores
    elif scores_BKP is None:
        scores_BKP = select.scorer.score(q_BTNH, cache.summary, whole_B)
    if window is not None:
        last_P = jnp.arange(cache.summary.shape[1]) * size + size - 1
        seen_BP = last_P[None] > positions_BT - window
        scores_BKP = jnp.where(seen_BP[:, None], scores_BKP, -jnp.inf)
    return topk_pages(
        scores_BKP,
        whole_B + 1,
        k=(select.budget if cache.reads is None else cache.reads) // size,
        page_size=size,
        sinks=select.sink_pages,
        recent=select.recent_pages,
    )


def slots_read(index: KVIndex, num_slots: int) -> jax.Array:
    """Return which slots lie in the pages of an index ``[B, K, S]``, whether or not they hold a key."""
    batch, num_kv, entries = index.pages.shape
    num_pages = -(-num_slots // index.page_size)
    rows, heads = jnp.arange(batch)[:, None, None], jnp.arange(num_kv)[None, :, None]
    real_BKM = jnp.arange(entries)[None, None] < index.counts[:, :, None]
    at_BKM = jnp.where(real_BKM, index.pages, num_pages)  # dropped
    read_BKP = jnp.zeros((batch, num_kv, num_pages), bool).at[rows, heads, at_BKM].set(True, mode="drop")
    return jnp.repeat(read_BKP, index.page_size, axis=2)[:, :, :num_slots]


def mean_read(select: TopK | ReadAll, sizes: Sequence[tuple[int, int] | None], live_B: jax.Array) -> jax.Array:
    """Return the entries that a layer reads of ``live_B`` ones if it runs, a mean over the layers ``[B]``, float32.

    The last page is always read, so that the count does not depend on the choice.

    Args:
        sizes: of the summaries, as :func:`summary_sizes` returns them.
    """
    if all(size is None for size in sizes):
        return live_B
    page_size = select.scorer.page_size
    held_B, left_out_B = jnp.ceil(live_B / page_size) * page_size, jnp.zeros(live_B.shape)
    for size, budget in zip(sizes, layer_budgets(select, len(sizes)), strict=True):
        left_out_B += 0.0 if size is None else jnp.maximum(held_B - budget, 0)
    return live_B - left_out_B / len(sizes)


def mean_left_out(select: TopK | ReadAll, cache: KVCache) -> jax.Array:
    """Return the entries that caches of the scorer's own do not read, a mean over all layers ``[B]``, float32."""
    return sum((own.left_out(select) for own in cache.own), jnp.zeros(cache.length.shape)) / len(cache.slots)
