"""Scores against NumPy loops, and the choices of the papers' own code on the same numbers.

The positions below were printed by FMInference/H2O's ``H2OKVCache_LayerWise`` (0ee6a85) and KVCache-Factory's
``SnapKVCluster`` (5fb995d), run with torch on ``draw`` of the same seeds.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan
from dyninf.cache import LayerCache
from dyninf.kv import H2O, TOVA, KeyNorm, PromptKV, Recency, SnapKV, TopK
from dyninf.plan import check


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def empty_cache(budget, heads, head_dim, batch=1):
    shape = (batch, budget, heads)
    zeros = jnp.zeros((*shape, head_dim))
    return LayerCache(k=zeros, v=zeros, positions=jnp.full(shape, -1, jnp.int32), scores=jnp.full(shape, -jnp.inf))


def prompt_obs(q, k, lengths=None):
    """Return what a scorer sees of a prompt given as ``[T, N, H]`` or ``[B, T, N, H]``."""
    q, k = (part if part.ndim == 4 else part[None] for part in (q, k))
    lengths = np.array([k.shape[1]] * len(k)) if lengths is None else lengths
    return PromptKV(q_BTNH=jnp.asarray(q), k_BTKH=jnp.asarray(k), v_BTKH=jnp.asarray(k), lengths_B=jnp.asarray(lengths))


def probabilities(q_NH, k_SKH):
    """Attention of one query to keys, ``[S, K]``, averaged over the heads of a group."""
    groups = q_NH.reshape(k_SKH.shape[1], -1, q_NH.shape[-1])
    out = np.zeros(k_SKH.shape[:2])
    for head, group in enumerate(groups):
        for query in group:
            weights = np.exp(k_SKH[:, head].astype(np.float64) @ query / math.sqrt(len(query)))
            out[:, head] += weights / weights.sum() / len(group)
    return out


def test_mass_of_a_prompt_is_what_loops_give(rng):
    """Two prompts of different lengths; longer than a chunk, so that the sum over chunks is seen."""
    q, k = rng.normal(size=(2, 150, 4, 8)).astype(np.float32), rng.normal(size=(2, 150, 2, 8)).astype(np.float32)
    lengths = np.array([150, 131])
    got = {
        "h2o": H2O().prompt(prompt_obs(q, k, lengths)),
        "tova": TOVA().prompt(prompt_obs(q, k, lengths)),
        "snap": SnapKV(window=7, kernel=5).prompt(prompt_obs(q, k, lengths)),
    }
    for b, length in enumerate(lengths):
        rows = np.zeros((length, length, 2))
        for t in range(length):
            rows[t, : t + 1] = probabilities(q[b, t], k[b, : t + 1])
        np.testing.assert_allclose(got["h2o"][b, :length], rows.sum(0), rtol=2e-4, atol=1e-5)
        last = np.repeat(rows[-1].mean(-1, keepdims=True), 2, axis=1)
        np.testing.assert_allclose(got["tova"][b, :length], last, rtol=2e-4, atol=1e-6)
        votes = np.zeros((length + 4, 2))
        votes[2 : length - 5] = rows[-7:].sum(0)[: length - 7]
        smooth = sum(votes[i : i + length] for i in range(5)) / 5
        np.testing.assert_allclose(got["snap"][b, :length], smooth, rtol=2e-4, atol=1e-5)


def test_h2o_decodes_as_the_papers_code(rng):
    """Its cache holds hh + recent = 5 tokens beside the new one, ours 6 with it: the sets agree at every step."""
    length, heads, steps = 4, 3, 16
    q, k = draw(1, length + steps, heads, 8) * 3, draw(2, length + steps, heads, 8)
    official = {
        7: ([0, 1, 4, 5, 6], [0, 1, 2, 5, 6], [0, 1, 4, 5, 6]),
        8: ([0, 1, 5, 6, 7], [0, 1, 2, 6, 7], [0, 1, 4, 6, 7]),
        9: ([0, 1, 6, 7, 8], [0, 1, 2, 7, 8], [0, 1, 4, 7, 8]),
        19: ([0, 1, 6, 17, 18], [0, 1, 2, 17, 18], [0, 1, 4, 17, 18]),
    }
    evict = TopK(scorer=H2O(), budget=6, sinks=0, recent=3)
    cache = evict.compress(empty_cache(6, heads, 8), prompt_obs(q[:length], k[:length]), jnp.ones((1, length), bool))
    yes = jnp.ones((1, 1), bool)
    for position in range(length, length + steps):
        at = jnp.array([[position]])
        new = jnp.asarray(k[None, None, position])
        cache = evict.store(cache, new, new, at, yes)
        cache = evict.observe(cache, jnp.asarray(q[None, None, position]), at, yes)
        if position in official:
            kept = [sorted(cache.positions[0, :, head].tolist()) for head in range(heads)]
            assert kept == [[*rest, position] for rest in official[position]]


def test_snap_kv_chooses_as_the_papers_code():
    q, k = draw(3, 40, 4, 8) * 2, draw(4, 40, 2, 8)
    evict = TopK(scorer=SnapKV(window=6, kernel=3), budget=14, sinks=0, recent=6)
    cache = evict.compress(empty_cache(14, 2, 8), prompt_obs(q, k), jnp.ones((1, 40), bool))
    assert cache.positions[0].T.tolist() == [
        [3, 22, 23, 24, 25, 27, 28, 29, 34, 35, 36, 37, 38, 39],
        [5, 6, 7, 8, 18, 28, 29, 30, 34, 35, 36, 37, 38, 39],
    ]


def test_generated_tokens_push_the_lowest_votes_out_of_snap_kv():
    q, k = draw(3, 40, 4, 8) * 2, draw(4, 60, 2, 8)
    evict = TopK(scorer=SnapKV(window=6, kernel=3), budget=14, sinks=0, recent=6)
    cache = evict.compress(empty_cache(14, 2, 8), prompt_obs(q, k[:40]), jnp.ones((1, 40), bool))
    for position in range(40, 60):
        new = jnp.asarray(k[None, None, position])
        before = np.asarray(cache.scores[0])
        held = np.asarray(cache.positions[0])
        cache = evict.store(cache, new, new, jnp.array([[position]]), jnp.ones((1, 1), bool))
        for head in range(2):
            gone = set(held[:, head]) - set(np.asarray(cache.positions[0, :, head]).tolist())
            free = held[:, head] < position + 1 - 6
            assert gone == {int(held[free, head][before[free, head].argmin()])}
    assert sorted(cache.positions[0, :, 0].tolist()) == list(range(46, 60)), "the oldest generated tokens go last"


def test_tova_forgets_what_the_newest_query_attends_to_least(rng):
    q, k = rng.normal(size=(12, 4, 8)).astype(np.float32), rng.normal(size=(12, 2, 8)).astype(np.float32)
    evict = TopK(scorer=TOVA(), budget=5, sinks=0)
    cache = evict.compress(empty_cache(5, 2, 8), prompt_obs(q[:8], k[:8]), jnp.ones((1, 8), bool))
    weights = dict(enumerate(probabilities(q[7], k[:8]).mean(-1)))
    kept = [7, *sorted(range(7), key=lambda p: -weights[p])[:4]]
    for position in range(8, 12):
        assert [sorted(head) for head in cache.positions[0].T.tolist()] == [sorted(kept)] * 2
        kept.remove(min(kept, key=lambda p: weights[p]))
        kept.append(position)
        new = jnp.asarray(k[None, None, position])
        at, yes = jnp.array([[position]]), jnp.ones((1, 1), bool)
        cache = evict.observe(evict.store(cache, new, new, at, yes), jnp.asarray(q[None, None, position]), at, yes)
        weights = dict(zip(kept, probabilities(q[position], k[kept]).mean(-1), strict=True))


def test_key_norm_and_recency_score_without_queries(rng):
    k = rng.normal(size=(2, 9, 2, 8)).astype(np.float32)
    obs = dataclasses.replace(prompt_obs(k, k), q_BTNH=None)
    np.testing.assert_allclose(KeyNorm().prompt(obs), -np.linalg.norm(k, axis=-1), rtol=1e-5)
    norms = -np.linalg.norm(k[:, 3], axis=-1)
    np.testing.assert_allclose(KeyNorm().arrive(jnp.asarray(k[:, 3]), None), norms, rtol=1e-5)
    np.testing.assert_array_equal(Recency().prompt(obs)[1, :, 1], np.arange(9))
    np.testing.assert_array_equal(Recency().arrive(jnp.asarray(k[:, 3]), jnp.array([5, 7])), [[5, 5], [7, 7]])


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (SnapKV(window=0), "a window of at least 1 query"),
        (SnapKV(kernel=4), "an odd kernel"),
        (SnapKV(kernel=0), "an odd kernel"),
    ],
)
def test_parameters_out_of_range_are_refused(tiny_model, scorer, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(evict=TopK(scorer=scorer, budget=64)), tiny_model)
