"""A cache of fixed size against a list of positions kept in NumPy, one key/value head at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Plan, generate
from dyninf.cache import init_cache
from dyninf.depth import Confidence, every
from dyninf.kv import KVScorer, PromptKV, Recency, TopK
from dyninf.plan import check
from dyninf.pytree import pytree

# Compiled as one program each: op by op, every shape would compile a dozen.
compress = jax.jit(lambda evict, cache, seen, active: evict.compress(cache, PromptKV(**seen), active))
store = jax.jit(lambda evict, *arguments: evict.store(*arguments))

B, T, K, H, STEPS = 3, 11, 2, 4, 9
LENGTHS = np.array([11, 3, 8])


@pytree()
class Given(KVScorer):
    """Scores out of a table ``[B, T + STEPS, K]``."""

    table: np.ndarray

    def prompt(self, obs):
        return jnp.asarray(self.table)[:, : obs.k_BTKH.shape[1]]

    def arrive(self, k_BKH, position_B):
        return jnp.asarray(self.table)[jnp.arange(k_BKH.shape[0]), position_B]


class Head:
    """The positions that one head of one sequence keeps."""

    def __init__(self, evict, scores):
        self.evict, self.scores, self.kept = evict, np.where(np.isnan(scores), -np.inf, scores), []

    def forced(self, position, length):
        return position < self.evict.sinks or position >= length - self.evict.recent

    def prompt(self, length):
        order = sorted(range(length), key=lambda p: (not self.forced(p, length), -self.scores[p], p))
        self.kept = sorted(order[: self.evict.budget])

    def take(self, position):
        if len(self.kept) == self.evict.budget:
            free = [p for p in self.kept if not self.forced(p, position + 1)]
            self.kept.remove(min(free, key=lambda p: self.scores[p]))
        self.kept.append(position)


@pytest.mark.parametrize(
    ("budget", "sinks", "recent"),
    [
        (5, 2, 3),
        (1, 0, 1),
        (40, 4, 1),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((6, 0, 1), (6, 2, 2), (15, 1, 1))),
    ],
)
def test_what_is_kept_is_what_numpy_keeps(rng, tiny_model, budget, sinks, recent):
    table = rng.permutation(B * (T + STEPS) * K).reshape(B, T + STEPS, K).astype(np.float32)
    table[0, 4, 0] = np.nan  # the lowest score there is, not the highest
    evict = TopK(scorer=Given(table=table), budget=budget, sinks=sinks, recent=recent)
    evict.validate()
    keys = rng.normal(size=(B, T + STEPS, K, H)).astype(np.float32)
    values = rng.normal(size=keys.shape).astype(np.float32)
    heads = {(b, h): Head(evict, table[b, :, h]) for b in range(B) for h in range(K)}

    def compare(cache):
        cache = jax.tree.map(np.asarray, cache)
        for (b, h), head in heads.items():
            positions = cache.positions[b, :, h]
            assert sorted(positions[positions >= 0].tolist()) == sorted(head.kept)
            for slot in np.flatnonzero(positions >= 0):
                np.testing.assert_array_equal(cache.k[b, slot, h], keys[b, positions[slot], h])
                np.testing.assert_array_equal(cache.v[b, slot, h], values[b, positions[slot], h])
            assert (positions[len(head.kept) :] == -1).all(), "the filled slots are the first ones"

    cache = init_cache(tiny_model, B, CacheSpec(capacity=budget), evicts=True).layers[0]
    cache = dataclasses.replace(cache, k=cache.k[..., :H], v=cache.v[..., :H])
    active_BT = jnp.arange(T)[None] < jnp.asarray(LENGTHS)[:, None]
    for b, h in heads:
        heads[b, h].prompt(LENGTHS[b])
    seen = {"q_BTNH": None, "k_BTKH": keys[:, :T], "v_BTKH": values[:, :T], "lengths_B": jnp.asarray(LENGTHS)}
    cache = compress(evict, cache, seen, active_BT)
    compare(cache)
    for step in range(STEPS):
        positions = LENGTHS + step
        written = np.array([[True], [step != 2], [True]])
        positions[1] -= step > 2  # the token that was not written is written a step later
        rows = np.arange(B)
        new = (jnp.asarray(part[rows, positions][:, None]) for part in (keys, values))
        cache = store(evict, cache, *new, jnp.asarray(positions)[:, None], jnp.asarray(written))
        for b, h in heads:
            if written[b, 0]:
                heads[b, h].take(positions[b])
        compare(cache)


def test_recency_keeps_sinks_and_the_newest(shallow_model, rng):
    """End to end: a cache of 8 slots takes 30 tokens, and each layer and head holds the same ones."""
    plan = Plan(evict=TopK(scorer=Recency(), budget=8, sinks=3))
    prompts = rng.integers(0, 61, (2, 20))
    generation = generate(shallow_model, prompts, plan, max_new_tokens=12, lengths=np.array([20, 5]))
    np.testing.assert_array_equal(generation.stats.kv_live[:, 0], [8] * 11)
    np.testing.assert_array_equal(generation.stats.kv_live[:, 1], [6, 7] + [8] * 9)
    assert (generation.stats.kv_read <= 8).all()


@pytest.mark.slow
def test_an_exiting_plan_may_evict(tiny_model, rng):
    """Keys of layers that did not run are projected into evicting caches as into others."""
    prompts = rng.integers(0, 61, (2, 9))
    depth = every(Confidence(threshold=0.6), step=1)
    evicting = Plan(depth=depth, evict=TopK(scorer=Recency(), budget=64))
    got, want = (generate(tiny_model, prompts, plan, max_new_tokens=8) for plan in (evicting, Plan(depth=depth)))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.stats.needed, want.stats.needed)
    assert got.stats.needed.min() < 6
    scarce = generate(
        tiny_model, prompts, dataclasses.replace(evicting, evict=TopK(scorer=Recency(), budget=6)), max_new_tokens=8
    )
    assert scarce.stats.kv_live.max() == 6 and scarce.stats.needed.min() < 6


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (Plan(evict=TopK(scorer=Recency(), budget=4)), ValueError, "at least sinks . recent = 5 tokens, got 4"),
        (
            Plan(evict=TopK(scorer=Recency(), budget=0, sinks=0)),
            ValueError,
            "budget to be a whole number of at least 1",
        ),
        (
            Plan(evict=TopK(scorer=Recency(), budget=8, recent=0)),
            ValueError,
            "recent to be a whole number of at least 1",
        ),
        (Plan(evict=TopK(scorer=Recency(), budget=(8,) * 5)), ValueError, "one budget for each of 6 layers, got 5"),
        (Plan(evict=TopK(scorer=Recency(), budget=(8, 8, 8, 4, 8, 8))), ValueError, "at least sinks . recent = 5"),
        (Plan(evict=TopK(scorer=Recency(), budget=8.0)), ValueError, "budget to be a whole number"),
        (Plan(evict=TopK(scorer=Recency, budget=8)), ValueError, "expected a KVScorer"),
        (Plan(evict=Recency()), ValueError, "expected evict to be TopK"),
        (
            Plan(evict=TopK(scorer=Recency(), budget=8), depth=every(Confidence(threshold=0.5), step=1), fill="mask"),
            NotImplementedError,
            "fill='propagate' for a plan that evicts",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tiny_model, plan, error, message):
    with pytest.raises(error, match=message):
        check(plan, tiny_model)


def test_a_state_of_another_budget_is_refused(shallow_roll):
    small, large, uneven = (Plan(evict=TopK(scorer=Recency(), budget=budget)) for budget in (7, 12, (12, 11, 12)))
    shallow_roll.step_of_shapes(large)
    for plan in (small, uneven, Plan()):
        with pytest.raises(ValueError, match="a state that was made for this plan"):
            shallow_roll.step_of_shapes(large, used=plan)
