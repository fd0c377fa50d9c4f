"""What the pages that a selection reads catch, and what finding and reading them takes."""

import dataclasses

import jax
import jax.numpy as jnp

from dyninf.cache import LayerCache, write_prompt
from dyninf.kv.base import PromptKV
from dyninf.kv.mass import attention_mass
from dyninf.kv.pages import arrange_prompt, choose_pages, layer_budgets, slots_read, summarize_prompt, summary_sizes
from dyninf.kv.top_k import TopK
from dyninf.pytree import pytree


@pytree()
class PageRecall:
    """What lies in the chosen pages.

    Attributes:
        mass: share of the attention of each query that the keys of these pages receive ``[B, Q, K]``, averaged over the
            query heads of a key/value head.
        top: share of the keys of the largest dot products with the query ``[B, Q, K]``, averaged likewise.
        scanned: numbers that a step reads, of summaries and of the keys and values in these pages, over those of all
            keys and values ``[B]``.
    """

    mass: jax.Array
    top: jax.Array
    scanned: jax.Array


def page_recall(select: TopK, obs: PromptKV, q_BQNH: jax.Array, *, top: int = 32) -> PageRecall:
    """Return what a selecting layer reads of a prompt for queries that each come as its last token's.

    The prompt is stored as :func:`dyninf.prefill` stores it, arranged if the scorer says so.

    Args:
        select: budgets and scorer; ``dense_layers`` is ignored.
        q_BQNH: Q queries of each sequence, rotated.
        top: keys that count as the best ones (at least 1).

    Raises:
        ValueError: if the selection is out of range or its budget covers the whole prompt.
    """
    select = dataclasses.replace(select, dense_layers=0)
    select.validate_selection(1)
    select = dataclasses.replace(select, budget=layer_budgets(select, 1)[0])
    if not isinstance(top, int) or top < 1:
        raise ValueError(f"expected top to be a whole number of at least 1 key, got {top!r}")
    batch, length, num_kv, dim = obs.k_BTKH.shape
    (size,) = summary_sizes(select, 1, length, dim)
    if size is None:
        raise ValueError(f"expected a budget below the {length} tokens of the prompts, got {select.budget}; lower it")
    pages, width = size
    live_BT = jnp.arange(length)[None] < obs.lengths_B[:, None]
    cache = LayerCache(
        k=jnp.zeros_like(obs.k_BTKH),
        v=jnp.zeros_like(obs.v_BTKH),
        summary=jnp.zeros((batch, pages, num_kv, width), obs.k_BTKH.dtype),
    )
    stored = arrange_prompt(cache, select, obs)
    cache = write_prompt(cache, stored.k_BTKH, stored.v_BTKH, live_BT)
    cache = summarize_prompt(cache, select, length, obs.lengths_B)
    page_size, last_B1 = select.scorer.page_size, obs.lengths_B[:, None] - 1

    def ask(q_BNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q_B1NH = q_BNH[:, None]
        index = choose_pages(cache, select, q_B1NH, last_B1)
        read_BKT = slots_read(index, length) & live_BT[:, None]
        mass_BTK = attention_mass(q_B1NH, cache.k, live_BT[:, None, :, None])
        mass_BK = jnp.sum(jnp.where(jnp.moveaxis(read_BKT, 1, 2), mass_BTK, 0.0), axis=1)
        groups = q_BNH.reshape(batch, num_kv, -1, dim)
        scores_BKGT = jnp.einsum("bkgh,btkh->bkgt", groups, cache.k, preferred_element_type=jnp.float32)
        scores_BKGT = jnp.where(live_BT[:, None, None], scores_BKGT, -jnp.inf)
        best, slot_BKGM = jax.lax.top_k(scores_BKGT, min(top, length))
        hit_BKGM = jnp.take_along_axis(jnp.broadcast_to(read_BKT[:, :, None], scores_BKGT.shape), slot_BKGM, axis=3)
        count_BKG = jnp.sum(best > -jnp.inf, axis=-1)
        top_BK = jnp.mean(jnp.sum(hit_BKGM & (best > -jnp.inf), axis=-1) / count_BKG, axis=-1)
        return mass_BK, top_BK, jnp.mean(jnp.sum(read_BKT, axis=2), axis=1)

    mass_QBK, top_QBK, read_QB = jax.lax.map(ask, jnp.moveaxis(q_BQNH, 1, 0))
    whole_B = 2 * dim * obs.lengths_B
    summaries_B = width * (last_B1[:, 0] // page_size + 1)
    scanned_B = (summaries_B + 2 * dim * jnp.mean(read_QB, axis=0)) / whole_B
    return PageRecall(mass=jnp.moveaxis(mass_QBK, 0, 1), top=jnp.moveaxis(top_QBK, 0, 1), scanned=scanned_B)
