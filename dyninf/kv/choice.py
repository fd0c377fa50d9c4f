"""Remember the scores of pages: from step to step while queries stay alike, and from layer to layer.

Scores are what is remembered, not pages, so that sinks and recent tokens are chosen anew at every step.

*Reuse* (``TopK(reuse=...)``). A layer scores its pages when its queries have turned: the cosine with those of the last
scoring, all heads as one vector, falls below ``reuse``. It also does when a page that has no score, since it began
later, is not among the recent ones any more, so that scores serve about as many steps as there are recent tokens at
most. What a page took in since its scoring does not count. Each sequence decides for itself; the summaries are read
under a ``lax.cond`` if any of the batch has turned. Source: the selection cache of TokenSelect (Wu et al. 2024), whose
paper has 0.9 and whose code switches it off; there the chosen tokens are kept.

*Sharing* (``TopK(share=n)``). Of every ``n`` layers that select, one after the other, the first scores and the others
take its scores, head by head, with pages outside their own window left out. A layer that reads everything ends a group
and never leads one. If the leader did not run for a token (it was skipped), the others use its last scores; before its
first ones they read the first pages. Source: MPCache (Zeng et al. 2025, "MPCache: MPC-Friendly KV Cache Eviction for
Efficient Private Large Language Model Inference"), which shares indices between adjacent layers. Head i of one layer
and head i of the next need not want the same; scores that are those of all heads (TokenSelect) do not depend on it.

Cost: ``K * P`` float32 numbers of a layer and sequence, for reuse also the queries. A state that is rolled back goes on
with the scores of the steps that it lost.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dyninf.cache import Choice, LayerCache
from dyninf.kv.base import ReadAll
from dyninf.kv.top_k import TopK
from dyninf.model import CausalLM, kv_shape, query_shape

Kinds = tuple[tuple[bool, bool] | None, ...]


def choice_kinds(select: TopK | ReadAll, sizes: Sequence[tuple[int, int] | None]) -> Kinds:
    """Return whether each layer leads and whether it keeps queries, ``None`` for layers that remember nothing.

    Args:
        sizes: of the summaries, as :func:`dyninf.kv.pages.summary_sizes` returns them.
    """
    if isinstance(select, ReadAll) or (select.share == 1 and select.reuse is None):
        return (None,) * len(sizes)
    kinds, place = [], 0
    for size in sizes:
        leads = place % select.share == 0
        kinds.append(None if size is None else (leads, leads and select.reuse is not None))
        place = 0 if size is None else place + 1
    return tuple(kinds)


def first_choices(
    select: TopK | ReadAll, sizes: Sequence[tuple[int, int] | None], model: CausalLM, batch: int
) -> tuple[Choice | None, ...]:
    """Return what each layer remembers before its first step: no page has a score, no query was asked."""

    def first(size: tuple[int, int], leads: bool, keeps_query: bool) -> Choice:
        asked = query_shape(model) if keeps_query else None
        return Choice(
            scores=jnp.full((batch, kv_shape(model).shape[2], size[0]), -jnp.inf, jnp.float32),
            q=None if asked is None else jnp.zeros((batch, *asked.shape[2:]), asked.dtype),
            leads=leads,
        )

    kinds = choice_kinds(select, sizes)
    return tuple(None if kind is None else first(size, *kind) for size, kind in zip(sizes, kinds, strict=True))


def remember_scores(
    cache: LayerCache, select: TopK | ReadAll, q_BTNH: jax.Array, positions_BT: jax.Array, asking_BT: jax.Array
) -> LayerCache:
    """Return the cache of a layer with the scores of its pages for a step, new ones where they are asked for.

    Args:
        q_BTNH: queries of the new token of each sequence, whose key the cache holds.
        asking_BT: tokens that run the layer; other sequences keep what they have.
    """
    choice = cache.choice
    if choice is None or not choice.leads:
        return cache
    num_pages_B, turned_B = positions_BT[:, 0] // select.scorer.page_size + 1, asking_BT[:, 0]
    if choice.q is not None:
        turned_B &= _cosine(q_BTNH[:, 0], choice.q) < select.reuse
        turned_B |= asking_BT[:, 0] & _lacks_score(choice, num_pages_B - select.recent_pages - 1)

    def score() -> jax.Array:
        scores_BKP = select.scorer.score(q_BTNH, cache.summary, num_pages_B)
        used_BP = jnp.arange(scores_BKP.shape[2])[None] < num_pages_B[:, None]
        scores_BKP = jnp.where(used_BP[:, None], scores_BKP, -jnp.inf)
        return jnp.where(turned_B[:, None, None], scores_BKP, choice.scores)

    if choice.q is None:
        return dataclasses.replace(cache, choice=dataclasses.replace(choice, scores=score()))
    scores_BKP = jax.lax.cond(jnp.any(turned_B), score, lambda: choice.scores)
    q_BNH = jnp.where(turned_B[:, None, None], q_BTNH[:, 0].astype(choice.q.dtype), choice.q)
    return dataclasses.replace(cache, choice=dataclasses.replace(choice, scores=scores_BKP, q=q_BNH))


def lend(before: Sequence[LayerCache | None], cache: LayerCache | None) -> LayerCache | None:
    """Return the cache of a layer with the scores of the layer before it, if it takes them from there.

    Args:
        before: caches of the layers before; the last one counts.
    """
    if cache is None or cache.choice is None or cache.choice.leads or not before:
        return cache
    return dataclasses.replace(cache, choice=dataclasses.replace(cache.choice, scores=before[-1].choice.scores))


def _cosine(a_BNH: jax.Array, b_BNH: jax.Array) -> jax.Array:
    """Return the cosines of the queries of all heads ``[B]``; 0 where one of them is nothing."""
    a, b = (part.astype(jnp.float32).reshape(len(part), -1) for part in (a_BNH, b_BNH))
    norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
    return jnp.sum(a * b, axis=1) / jnp.maximum(norms, 1e-20)


def _lacks_score(choice: Choice, page_B: jax.Array) -> jax.Array:
    """Return the sequences ``[B]`` in which this page has no score."""
    worth_BK = jnp.take_along_axis(choice.scores, jnp.maximum(page_B, 0)[:, None, None], axis=2)[:, :, 0]
    return (page_B >= 0) & jnp.any(worth_BK == -jnp.inf, axis=1)
