"""The driver ``indexed`` on a stacked model against the drivers over a list of layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Plan, decode_step, generate, prefill
from dyninf.configs.plans import plans
from dyninf.depth import Confidence, DepthDecay, Recorded, Saturation, every, first_of
from dyninf.indexed import refuse_indexed
from dyninf.kv import Quest, Recency, TopK
from dyninf.models import Transformer, stack_for_decoding

NUM_LAYERS = 6
NAMED = plans(NUM_LAYERS)
SERVED = ("dense", "unified_skip", "exit_patience", "exit_calm")  # each compiles for seconds
OWN = {
    # Thresholds that make the tiny model exit at different layers.
    "cosine": Plan(depth=Saturation(threshold=0.75)),
    "cosine_at_some_layers": Plan(depth=every(Saturation(threshold=0.7), step=2)),
    "asked_in_groups": Plan(depth=every(first_of(Confidence(threshold=0.3), Saturation(threshold=0.8)), step=2)),
    "recorded": Plan(depth=Recorded(depths=jnp.array([[6, 2, 3], [1, 6, 4], [5, 5, 1]]))),
    "recorded_alike": Plan(depth=Recorded(depths=jnp.array([9, 0, 2]))),
}
# Run as plans beside them do, with other questions or depths: in slow runs.
ALIKE = {"exit_calm", "exit_patience", "recorded_alike", "asked_in_groups", "unified_skip", "cosine_at_some_layers"}
ALIKE |= {"dense"}  # texts of "recorded" run all layers too
PROMPTS, LENGTHS = np.array([[3, 14, 15, 9, 2], [6, 5, 35, 0, 0], [8, 0, 0, 0, 0]]), np.array([5, 3, 1])


fill = jax.jit(prefill, static_argnames="spec")


@pytest.fixture(scope="module")
def stacked(tiny_model):
    return stack_for_decoding(tiny_model)


@pytest.fixture(scope="module")
def shallow(tiny_model):
    """A model of half as many layers, which compiles in half the time, and its stack."""
    model = Transformer(dataclasses.replace(tiny_model.config, num_layers=3), jax.random.key(3))
    model = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, model)
    return model, stack_for_decoding(model)


def test_most_named_plans_can_be_indexed():
    refused = {name for name, plan in NAMED.items() if refuse_indexed(plan, range(NUM_LAYERS)) is not None}
    caches = {name for name in NAMED if name.startswith(("evict_", "select_"))}
    caches -= {"select_quest", "select_page_mean", "select_long"}
    dropping = {"sparse_lazy", "sparse_lazy_revive"}
    assert refused == {"decay_power", "decay_linear", "exit_confidence_masked", "halt_tokens"} | dropping | caches


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in (*SERVED, *OWN)])
def test_tokens_and_depths_are_those_of_the_list(tiny_model, stacked, name):
    plan = OWN.get(name) or NAMED[name]
    options = {"lengths": LENGTHS, "max_new_tokens": 7}
    one, other = (generate(model, PROMPTS, plan, **options) for model in (tiny_model, stacked))
    assert np.array_equal(one.tokens, other.tokens)
    assert np.array_equal(one.stats.needed, other.stats.needed)
    assert np.array_equal(one.stats.run, other.stats.run)
    if name in OWN:
        assert len(np.unique(one.stats.needed)) > 1, "the depths must differ for this to say anything"


def test_the_cache_holds_what_the_list_holds(tiny_model, stacked):
    plan = OWN["recorded"]
    states, step = [], jax.jit(decode_step)
    for model in (tiny_model, stacked):
        state = fill(model, PROMPTS, LENGTHS, plan, CacheSpec(capacity=16), jax.random.key(0))[1]
        for _ in range(3):
            state, _ = step(model, state, plan)
        states.append(state)
    listed, stack = states
    assert stack.cache.stacked and stack.cache.capacity == 16 and np.array_equal(stack.cache.length, [8, 6, 4])
    for layer, cache in enumerate(listed.cache.layers):
        for name in ("k", "v"):
            assert np.allclose(getattr(cache, name), getattr(stack.cache.layers, name)[layer], atol=1e-5)


def test_other_drivers_run_stacked_layers_too(tiny_model, stacked):
    plan = OWN["cosine"]
    want = generate(tiny_model, PROMPTS, plan, lengths=LENGTHS, max_new_tokens=7)
    got = generate(stacked, PROMPTS, plan, lengths=LENGTHS, max_new_tokens=7, driver="segments")
    assert np.array_equal(got.tokens, want.tokens)


REFUSED = {
    "skips": (Plan(depth=DepthDecay()), "cannot be skipped by token"),
    "mask": (Plan(depth=Saturation(threshold=0.9), fill="mask"), "fill='mask' does not"),
    "catch_up": (Plan(depth=Saturation(threshold=0.9), fill="catch_up"), "fill='catch_up' does not"),
    "evicts": (Plan(evict=TopK(scorer=Recency(), budget=6)), "which a cache that evicts does not"),
    "selects": (
        Plan(select=TopK(scorer=Quest(page_size=2), budget=6, dense_layers=2, share=2)),
        "score pages in every layer and at every step, which share=2 does not",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_it_cannot_run_is_refused(shallow, name):
    plan, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        generate(shallow[1], [1, 2], plan, max_new_tokens=2, driver="indexed")


# Others are chosen by what the refusal above returns, whatever it says: one for depths and one for caches by default.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("mask", "selects"))) for n in REFUSED]
)
def test_a_plan_that_it_cannot_run_is_left_to_others(shallow, name):
    model, stacked = shallow
    plan, _ = REFUSED[name]
    want = generate(model, PROMPTS[:1], plan, max_new_tokens=4)
    np.testing.assert_array_equal(generate(stacked, PROMPTS[:1], plan, max_new_tokens=4).tokens, want.tokens)


def test_a_list_of_layers_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"expected stacked layers.*stack_for_decoding"):
        generate(tiny_model, [1, 2], max_new_tokens=2, driver="indexed")


def test_a_new_threshold_or_table_needs_no_second_program(shallow):
    stacked = shallow[1]
    step = jax.jit(lambda *arguments: decode_step(*arguments))  # a cache of its own: jit's goes by function
    state = fill(stacked, PROMPTS, LENGTHS, Plan(), CacheSpec(capacity=16), jax.random.key(0))[1]
    for threshold in (0.1, 0.5, 0.9):
        step(stacked, state, Plan(depth=Saturation(threshold=threshold)))
    for depths in ([1, 2], [3, 4]):
        step(stacked, state, Plan(depth=Recorded(depths=jnp.array(depths))))
    assert step._cache_size() == 2


@pytest.mark.parametrize("depths", [jnp.ones((2, 3)), jnp.int32(3), jnp.zeros((0,), jnp.int32)])
def test_a_table_of_depths_must_be_whole_numbers(tiny_model, depths):
    with pytest.raises(ValueError, match=r"integers \[S\] or \[S, B\]"):
        generate(tiny_model, [1, 2], Plan(depth=Recorded(depths=depths)), max_new_tokens=2)
