"""Merging what is evicted, and budgets by layer, against the paper's own code.

Numbers of tokens were printed by D2O's ``D2O_LayerKVCache`` (AIoT-MLSys-Lab/D2O, 12c99d8, its numbers of heads and
features replaced), run with torch on ``draw`` of the same seeds.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, check
from dyninf.cache import LayerCache
from dyninf.kv import D2O, H2O, PromptKV, Recency, TopK, variance_budgets
from dyninf.kv.d2o import head_spread, shares_of
from dyninf.pytree import pytree
from pallas_kernels.merge_tokens import reference

N, HEADS, DIM = 24, 3, 8


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def empty_cache(budget, heads, dim, batch=1):
    shape = (batch, budget, heads)
    zeros, low = jnp.zeros((*shape, dim)), jnp.full(batch, -jnp.inf)
    positions = jnp.full(shape, -1, jnp.int32)
    return LayerCache(k=zeros, v=zeros, positions=positions, scores=jnp.full(shape, -jnp.inf), threshold=low)


def compress(evict, q, k, v, lengths):
    return _compress(evict, q, k, v, jnp.asarray(lengths))


@jax.jit
def _compress(evict, q, k, v, lengths):
    obs = PromptKV(q_BTNH=q, k_BTKH=k, v_BTKH=v, lengths_B=lengths)
    active = jnp.arange(k.shape[1])[None] < lengths[:, None]
    return evict.compress(empty_cache(evict.budget, k.shape[2], k.shape[3], len(k)), obs, active)


@jax.jit
def store(evict, *arrays):
    return evict.store(*arrays)


@jax.jit
def observe(evict, *arrays):
    return evict.observe(*arrays)


def by_position(cache, below):
    """First features of keys and second ones of values of the tokens before a position, in their order, per head."""
    found = []
    for head in range(HEADS):
        positions = np.asarray(cache.positions)[0, :, head]
        slots = [slot for slot in np.argsort(positions) if 0 <= positions[slot] < below]
        found.append([np.asarray(cache.k)[0, slots, head, 0], np.asarray(cache.v)[0, slots, head, 1]])
    return np.moveaxis(np.array(found), 1, 0)


def test_d2o_merges_as_the_papers_code():
    """Its 7 heavy hitters and 3 recent tokens after a step are 11 with a step's own token before it attends."""
    q, k, v = draw(31, 30, 3, 8) * 2, draw(32, 30, 3, 8) + 2 * draw(34, 1, 3, 8), draw(33, 30, 3, 8)
    evict = TopK(scorer=D2O(), budget=10, sinks=4, recent=3)
    cache = compress(evict, q[None, :N], k[None, :N], v[None, :N], [N])
    np.testing.assert_allclose(cache.threshold, [0.8889286], rtol=1e-5)
    keys = [
        [0.8293, -1.2695, -0.61148, -0.40969, 0.10145, -1.19969, 2.04143, 0.64819, 0.07401, -0.5282],
        [-1.29238, 0.54271, 0.84637, 0.00164, -0.42325, 0.6979, 1.11884, 0.18912, 0.59725, 1.21148],
        [0.8296, 0.9771, -0.62141, 1.22968, 0.6924, 0.50407, -0.00432, 0.33322, 1.93666, 0.98286],
    ]
    values = [
        [-0.56282, -0.36897, 0.43247, -0.43059, -0.48233, 0.62579, -0.89301, 1.35149, 0.7572, -0.46755],
        [0.1997, 0.35132, 1.3927, 0.00961, -0.4876, -1.68304, -0.5793, -0.14972, 0.70714, 0.37514],
        [0.44956, 0.3527, -0.19321, -0.13755, -0.45204, 0.70939, 1.0721, -0.25096, 0.51648, -0.57433],
    ]
    np.testing.assert_allclose(by_position(cache, N), [keys, values], atol=2e-5)
    plain = compress(TopK(scorer=Score(), budget=10), q[None, :N], k[None, :N], v[None, :N], [N])
    assert not np.allclose(plain.k, cache.k)

    bigger = empty_cache(11, HEADS, DIM)
    parts = {
        name: getattr(bigger, name).at[:, :10].set(getattr(cache, name)) for name in ("k", "v", "positions", "scores")
    }
    cache = dataclasses.replace(bigger, threshold=cache.threshold, **parts)
    evict, thresholds = TopK(scorer=D2O(), budget=11, sinks=4, recent=4), []
    for position in range(N, N + 6):
        at, yes = jnp.array([[position]]), jnp.ones((1, 1), bool)
        cache = store(evict, cache, k[None, None, position], v[None, None, position], at, yes)
        thresholds.append(float(cache.threshold[0]))
        last = by_position(cache, position)
        cache = observe(evict, cache, q[None, None, position], at, yes)
    np.testing.assert_allclose(thresholds, [0.888929, 0.863793, 0.907831, 0.905243, 0.872498, 0.833182], atol=1e-5)
    keys = [
        [0.8293, -1.2695, -0.2708, -0.4097, 0.1014, -1.1997, 2.0414, 0.6174, 0.467, 2.2463],
        [-1.2924, 0.5427, 0.7073, 0.0016, -0.4233, 0.6979, 1.1188, 0.4345, 0.753, 1.1245],
        [0.8296, 0.9771, -0.6214, 1.2297, 0.6924, 0.5041, -0.0043, 1.1756, 1.2831, -0.0078],
    ]
    values = [
        [-0.5628, -0.369, 0.5738, -0.4306, -0.4823, 0.6258, -0.893, 0.6169, 1.865, 0.9465],
        [0.1997, 0.3513, 1.0327, 0.0096, -0.4876, -1.683, -0.5793, 0.9173, 1.0987, -0.7272],
        [0.4496, 0.3527, -0.1932, -0.1376, -0.452, 0.7094, 1.0721, -2.3404, 0.5859, -0.6899],
    ]
    np.testing.assert_allclose(last, [keys, values], atol=1e-4)


@pytree()
class Score(H2O):
    """The scores of D2O without its merging."""


@pytree()
class Newest(Recency):
    """Keep the newest tokens and merge the others."""

    merges = True
    momentum: float = 0.5


def test_a_prompt_is_merged_as_loops_merge_it(rng, monkeypatch):
    """A ragged batch, longer than a chunk of evicted tokens, one prompt that fits."""
    monkeypatch.setattr(reference, "CHUNK_BYTES", 0)
    longest = reference.LEAST_CHUNK + 30
    k, v = (rng.normal(size=(3, longest, 2, 4)).astype(np.float32) for _ in "kv")
    lengths, budget = np.array([longest, 20, 7]), 9
    cache = compress(TopK(scorer=Newest(), budget=budget, sinks=0), k, k, v, lengths)
    assert np.isneginf(cache.threshold[2]) and (np.asarray(cache.k)[2, :7] == k[2, :7]).all()
    for row in range(2):
        first = lengths[row] - budget
        unit = k[row] / np.linalg.norm(k[row], axis=-1, keepdims=True)
        like = np.einsum("ekh,skh->eks", unit[:first], unit[first : lengths[row]])
        best, best_like = like.argmax(-1), like.max(-1)
        level = best_like.mean()
        np.testing.assert_allclose(cache.threshold[row], level, rtol=1e-5)
        for got, part in ((cache.k, k), (cache.v, v)):
            want, count = part[row, first : lengths[row]].astype(np.float64), np.ones((budget, 2))
            for token in np.flatnonzero(best_like.mean(-1) >= level):
                for head in range(2):
                    want[best[token, head], head] += best_like[token, head] * part[row, token, head]
                    count[best[token, head], head] += 1
            np.testing.assert_allclose(got[row], want / count[..., None], rtol=1e-4, atol=1e-5)


def test_one_merge_by_hand():
    """Keys of one head: (2, 0) goes into (0, 3) or (1, 1), whose cosines with it are 0 and 1 / sqrt 2."""
    k = jnp.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])[None, :, None]
    evict = TopK(scorer=Newest(), budget=3, sinks=0)
    cache = compress(evict, k, np.asarray(k), 10 * np.asarray(k), [3])
    new, at, yes = jnp.full((1, 1, 1, 2), 7.0), jnp.array([[3]]), jnp.ones((1, 1), bool)
    waiting = store(evict, cache, new, new, at, ~yes)
    np.testing.assert_array_equal(waiting.k, cache.k)
    after = store(evict, cache, new, new, at, yes)
    # ((1, 1) + 0.7071 (2, 0)) / 2
    np.testing.assert_allclose(after.k[0, :, 0], [[7, 7], [0, 3], [1.2071068, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(after.v[0, 2, 0], [12.071068, 5], rtol=1e-6)
    np.testing.assert_allclose(after.threshold, [0.70710678], rtol=1e-6)


def test_budgets_follow_the_variance_as_the_papers_formula_says():
    """Softmax of minus the spreads, by hand: e**0, e**-1 and e**-1 over 1.7358 are 0.5761, 0.2119 and 0.2119."""
    assert shares_of([0.0, 1.0, 1.0], 100, least=10, most=1000) == (172, 63, 63)
    assert shares_of([0.0, 1.0, 1.0], 100, least=70, most=150) == (150, 70, 70)
    assert shares_of([0.0, 1.0, 1.0], 100, least=10, most=1000, whole=(0, -1), capacity=512) == (512, 63, 512)
    # Heads of variances 0, 1 and 4, by the unbiased formula, are spread to 0, 1/4 and 1.
    mass = np.stack([np.zeros(3), np.array([-1.0, 0.0, 1.0]), np.array([-2.0, 0.0, 2.0])], axis=-1)[None]
    assert head_spread(mass) == pytest.approx(5 / 12, rel=1e-5)


def test_budgets_measured_on_a_text_make_a_plan(tiny_model, rng):
    budgets = variance_budgets(
        tiny_model, jnp.asarray(rng.integers(0, 61, (2, 20))), 10, least=6, whole=(0,), capacity=20
    )
    assert budgets[0] == 20 and len(set(budgets[1:])) > 1 and 6 <= min(budgets) and sum(budgets[1:]) <= 60
    check(Plan(evict=TopK(scorer=D2O(), budget=budgets)), tiny_model)


def test_a_state_that_does_not_merge_is_refused(shallow_roll):
    plan, merging = (Plan(evict=TopK(scorer=scorer, budget=7)) for scorer in (H2O(), D2O()))
    shallow_roll.step_of_shapes(plan)
    with pytest.raises(ValueError, match="a state that was made for this plan"):
        shallow_roll.step_of_shapes(plan, used=merging)
