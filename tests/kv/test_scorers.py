"""Scores against NumPy loops, and the choices of the papers' own code on the same numbers.

The numbers below were printed by FMInference/H2O's ``H2OKVCache_LayerWise`` (0ee6a85), KVCache-Factory's
``SnapKVCluster`` (5fb995d) and ``PyramidKVCluster`` (c97f9d7), kvpress's ``ExpectedAttentionPress`` (8bb29b9) and
cold-compress's ``KVCacheLSH`` (minghui-liu/cold-compress, b2ae9f0), run with torch on ``draw`` of the same seeds.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan
from dyninf.cache import LayerCache
from dyninf.kv import (
    H2O,
    TOVA,
    Critic,
    ExpectedAttention,
    HashEvict,
    KeyNorm,
    PromptKV,
    Recency,
    SnapKV,
    TopK,
    pyramid_budgets,
)
from dyninf.plan import check
from dyninf.pytree import pytree


@pytree(static=("bits", "seed"))
class Signs(HashEvict):
    """Hashes of the signs of the features themselves."""

    def directions(self, head_dim):
        return jnp.eye(head_dim)


# Compiled as one program each: op by op, every shape would compile a dozen.
store = jax.jit(lambda evict, *arguments: evict.store(*arguments))
observe = jax.jit(lambda evict, *arguments: evict.observe(*arguments))
_compress = jax.jit(lambda evict, cache, seen, active: evict.compress(cache, PromptKV(**seen), active))
_prompt_scores = jax.jit(lambda scorer, seen: scorer.prompt(PromptKV(**seen)))


def compress(evict, cache, obs, active):
    return _compress(evict, cache, vars(obs), active)


def prompt_scores(scorer, obs):
    return _prompt_scores(scorer, vars(obs))


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
    obs = prompt_obs(q, k, lengths)
    got = {
        "h2o": prompt_scores(H2O(), obs),
        "tova": prompt_scores(TOVA(), obs),
        "snap": prompt_scores(SnapKV(window=7, kernel=5), obs),
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
    cache = compress(evict, empty_cache(6, heads, 8), prompt_obs(q[:length], k[:length]), jnp.ones((1, length), bool))
    yes = jnp.ones((1, 1), bool)
    for position in range(length, length + steps):
        at = jnp.array([[position]])
        new = jnp.asarray(k[None, None, position])
        cache = store(evict, cache, new, new, at, yes)
        cache = observe(evict, cache, jnp.asarray(q[None, None, position]), at, yes)
        if position in official:
            kept = [sorted(cache.positions[0, :, head].tolist()) for head in range(heads)]
            assert kept == [[*rest, position] for rest in official[position]]


def test_snap_kv_chooses_as_the_papers_code():
    q, k = draw(3, 40, 4, 8) * 2, draw(4, 40, 2, 8)
    evict = TopK(scorer=SnapKV(window=6, kernel=3), budget=14, sinks=0, recent=6)
    cache = compress(evict, empty_cache(14, 2, 8), prompt_obs(q, k), jnp.ones((1, 40), bool))
    assert cache.positions[0].T.tolist() == [
        [3, 22, 23, 24, 25, 27, 28, 29, 34, 35, 36, 37, 38, 39],
        [5, 6, 7, 8, 18, 28, 29, 30, 34, 35, 36, 37, 38, 39],
    ]


def test_generated_tokens_push_the_lowest_votes_out_of_snap_kv():
    q, k = draw(3, 40, 4, 8) * 2, draw(4, 60, 2, 8)
    evict = TopK(scorer=SnapKV(window=6, kernel=3), budget=14, sinks=0, recent=6)
    cache = compress(evict, empty_cache(14, 2, 8), prompt_obs(q, k[:40]), jnp.ones((1, 40), bool))
    for position in range(40, 60):
        new = jnp.asarray(k[None, None, position])
        before = np.asarray(cache.scores[0])
        held = np.asarray(cache.positions[0])
        cache = store(evict, cache, new, new, jnp.array([[position]]), jnp.ones((1, 1), bool))
        for head in range(2):
            gone = set(held[:, head]) - set(np.asarray(cache.positions[0, :, head]).tolist())
            free = held[:, head] < position + 1 - 6
            assert gone == {int(held[free, head][before[free, head].argmin()])}
    assert sorted(cache.positions[0, :, 0].tolist()) == list(range(46, 60)), "the oldest generated tokens go last"


def test_tova_forgets_what_the_newest_query_attends_to_least(rng):
    q, k = rng.normal(size=(12, 4, 8)).astype(np.float32), rng.normal(size=(12, 2, 8)).astype(np.float32)
    evict = TopK(scorer=TOVA(), budget=5, sinks=0)
    cache = compress(evict, empty_cache(5, 2, 8), prompt_obs(q[:8], k[:8]), jnp.ones((1, 8), bool))
    weights = dict(enumerate(probabilities(q[7], k[:8]).mean(-1)))
    kept = [7, *sorted(range(7), key=lambda p: -weights[p])[:4]]
    for position in range(8, 12):
        assert [sorted(head) for head in cache.positions[0].T.tolist()] == [sorted(kept)] * 2
        kept.remove(min(kept, key=lambda p: weights[p]))
        kept.append(position)
        new = jnp.asarray(k[None, None, position])
        at, yes = jnp.array([[position]]), jnp.ones((1, 1), bool)
        cache = observe(evict, store(evict, cache, new, new, at, yes), jnp.asarray(q[None, None, position]), at, yes)
        weights = dict(zip(kept, probabilities(q[position], k[kept]).mean(-1), strict=True))


def test_key_norm_and_recency_score_without_queries(rng):
    k = rng.normal(size=(2, 9, 2, 8)).astype(np.float32)
    obs = dataclasses.replace(prompt_obs(k, k), q_BTNH=None)
    np.testing.assert_allclose(KeyNorm().prompt(obs), -np.linalg.norm(k, axis=-1), rtol=1e-5)
    norms = -np.linalg.norm(k[:, 3], axis=-1)
    np.testing.assert_allclose(KeyNorm().arrive(jnp.asarray(k[:, 3]), None), norms, rtol=1e-5)
    np.testing.assert_array_equal(Recency().prompt(obs)[1, :, 1], np.arange(9))
    np.testing.assert_array_equal(Recency().arrive(jnp.asarray(k[:, 3]), jnp.array([5, 7])), [[5, 5], [7, 7]])


def test_pyramid_kv_has_the_budgets_and_the_choices_of_the_papers_code():
    """Layers of 60 tokens; the last window is 6, the mean budget 20, and the top layer chooses a quarter of 14."""
    assert pyramid_budgets(128, 8, recent=8) == (242, 210, 178, 146, 114, 82, 50, 18)
    budgets = pyramid_budgets(20, 6, recent=6, beta=4)
    official = {
        3: [[1, 3, 4, 5, 14, 22, 23, 24, 25, 26, 34, 35, 36], [4, 5, 6, 11, 12, 13, 15, 42, 43, 44, 51, 52, 53]],
        5: [[23, 24, 25, 26, 35], [11, 43, 51, 52, 53]],
    }
    q, k = draw(3, 60, 4, 8) * 2, draw(4, 60, 2, 8)
    for layer, chosen in official.items():
        evict = TopK(scorer=SnapKV(window=6, kernel=3), budget=budgets[layer], sinks=0, recent=6)
        cache = compress(evict, empty_cache(budgets[layer], 2, 8), prompt_obs(q, k), jnp.ones((1, 60), bool))
        assert cache.positions[0].T.tolist() == [[*rest, *range(54, 60)] for rest in chosen]


@pytest.mark.parametrize("sizes", [(6, 8, 6, 20), (20, 1, 6, 20), (20, 8, 0, 20), (20, 8, 6, 0)])
def test_a_pyramid_of_nothing_is_refused(sizes):
    with pytest.raises(ValueError, match="a mean budget above recent"):
        pyramid_budgets(*sizes[:2], recent=sizes[2], beta=sizes[3])


def test_expected_attention_is_that_of_kvpress():
    theta, (q, k, v) = 100.0, (draw(23, 20, 4, 8) + draw(26, 1, 4, 8), draw(24, 20, 2, 8) * 2, draw(25, 20, 2, 8))
    angles = np.arange(20)[:, None, None] / theta ** (np.arange(0, 8, 2) / 8)
    one, two = np.split(q, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    rotated = np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1).astype(np.float32)
    # A second prompt with padding, and values of another size: alone, it has the same scores.
    pad = lambda part: jnp.asarray(np.stack([part, np.concatenate([part[:14], 9 + part[14:]])]))  # noqa: E731
    obs = PromptKV(q_BTNH=pad(rotated), k_BTKH=pad(k), v_BTKH=pad(v), lengths_B=jnp.array([20, 14]))
    scorer = ExpectedAttention(theta=theta, future=16)
    scores = prompt_scores(scorer, obs)
    first = [0.04749, 0.09529, 0.14984, 0.06753, 0.68492, 0.11553, 0.03427, 0.10179]
    first += [0.0684, 0.07762, 0.01618, 0.23513, 0.30947, 0.0577, 0.0122, 0.67757]
    second = [0.68176, 0.09364, 0.00727, 0.01989, 0.35004, 0.07795, 0.03041, 0.00788]
    second += [0.3997, 0.58204, 0.07085, 0.0569, 0.24692, 0.07025, 0.01226, 0.00848]
    np.testing.assert_allclose(scores[0, 4:].T, [first, second], atol=2e-5)
    assert (scores[:, :4] > 1e3).all(), "sinks stay"
    short = prompt_obs(rotated[:14], k[:14])
    alone = prompt_scores(scorer, dataclasses.replace(short, v_BTKH=jnp.asarray(v[None, :14])))
    np.testing.assert_allclose(scores[1, :14], alone[0], rtol=1e-4, atol=1e-6)


def test_critic_is_what_loops_give(rng):
    """Two prompts, one of them padded, longer than a chunk of queries; entropies add up from single probabilities."""
    q, k = rng.normal(size=(2, 140, 4, 8)).astype(np.float32), rng.normal(size=(2, 140, 2, 8)).astype(np.float32)
    lengths = np.array([140, 33])
    scores = prompt_scores(Critic(attention=0.7, entropy=0.2), prompt_obs(q, k, lengths))
    spread = lambda part: (part - part.min()) / (part.max() - part.min())  # noqa: E731
    for row, length in enumerate(lengths):
        received, entropy = np.zeros(length), np.zeros(length)
        for query in range(length):
            for head in range(4):
                weights = np.exp(k[row, : query + 1, head // 2] @ q[row, query, head] / math.sqrt(8))
                weights /= weights.sum()
                received[: query + 1] += weights
                entropy[query] -= (weights * np.log(weights)).sum()
        want = 0.7 * spread(received) + 0.2 * spread(entropy)
        np.testing.assert_allclose(scores[row, :length], np.repeat(want[:, None], 2, axis=1), atol=1e-5)


def test_critic_of_two_tokens_by_hand():
    """Zero queries attend evenly: received 1 + 1/2 and 1/2, entropies 0 and log 2."""
    zeros = np.zeros((2, 2, 8), np.float32)
    # Both spread to 1 and 0, and 0 and 1; half of each.
    np.testing.assert_allclose(prompt_scores(Critic(), prompt_obs(zeros, zeros)), np.full((1, 2, 2), 0.5))
    np.testing.assert_allclose(prompt_scores(Critic(entropy=0.1), prompt_obs(zeros, zeros))[0, :, 0], [0.5, 0.1])


def test_hashes_evict_as_the_papers_code(monkeypatch):
    """Its window of 2 leaves out the new token: here 3."""
    monkeypatch.setattr(HashEvict, "directions", lambda self, head_dim: jnp.asarray(draw(21, 8, 12)))
    official = {
        7: ([2, 3, 4, 5], [2, 3, 4, 5]),
        8: ([2, 4, 5], [2, 4, 5]),
        12: ([2, 4, 7], [4, 6, 8]),
        20: ([13, 14, 17], [10, 14, 17]),
        29: ([17, 22, 26], [21, 25, 26]),
    }
    k = draw(22, 30, 2, 8)
    evict = TopK(scorer=HashEvict(bits=12), budget=8, sinks=2, recent=3)
    cache = compress(evict, empty_cache(8, 2, 8), prompt_obs(k[:6], k[:6]), jnp.ones((1, 6), bool))
    for position in range(6, 30):
        new = jnp.asarray(k[None, None, position])
        cache = store(evict, cache, new, new, jnp.array([[position]]), jnp.ones((1, 1), bool))
        if position in official:
            kept = [{0, 1, *rest, *range(max(position - 2, 6), position + 1)} for rest in official[position]]
            assert [set(head) for head in cache.positions[0].T.tolist()] == kept
    np.testing.assert_array_equal(cache.k[0, :, 0], k[np.asarray(cache.positions[0, :, 0]), 0])


def test_hashes_keep_what_is_most_like_the_end_of_a_long_prompt():
    """By hand, with two bits, the signs of both features: they differ from those of the last key, (+, +), in 0 to 2."""
    signs = np.array([[-1, -1], [1, 1], [1, -1], [-1, 1], [-1, -1], [1, 1]], np.float32)
    HashEvict(bits=2).validate()
    evict = TopK(scorer=Signs(bits=2), budget=4, sinks=0)
    cache = compress(evict, empty_cache(4, 1, 2), prompt_obs(signs[:, None], signs[:, None]), jnp.ones((1, 6), bool))
    assert cache.positions[0, :, 0].tolist() == [1, 2, 3, 5]


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (SnapKV(window=0), "a window of at least 1 query"),
        (SnapKV(kernel=4), "an odd kernel"),
        (SnapKV(kernel=0), "an odd kernel"),
        (ExpectedAttention(future=0), "future of at least 1"),
        (HashEvict(bits=25), "1 to 24 bits"),
    ],
)
def test_parameters_out_of_range_are_refused(tiny_model, scorer, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(evict=TopK(scorer=scorer, budget=64)), tiny_model)
