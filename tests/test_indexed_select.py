"""Plans that select pages, on stacked layers by the driver ``indexed`` against lists of layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Plan, decode_step, generate, prefill
from dyninf.cache import list_caches, stack_caches
from dyninf.cli.decoding import random_state, summary_bytes
from dyninf.depth import Confidence, ExitAt, Recorded, Saturation, SkipLayers, every
from dyninf.depth_loop import default_driver
from dyninf.indexed import refuse_indexed, refuse_selection
from dyninf.kv import MPCache, PageMean, Quest, RetrievalAttention, ShadowKV, TokenSelect, TopK
from dyninf.models import Transformer, cache_shardings, make_mesh, on_mesh, place, stack_for_decoding

NUM_LAYERS, NEW = 6, 7
PROMPTS = np.random.default_rng(0).integers(0, 61, (4, 14))
LENGTHS = np.array([14, 3, 9, 12])
QUEST = TopK(scorer=Quest(page_size=2), budget=6, sinks=1, recent=1)
DENSE_FIRST = dataclasses.replace(QUEST, dense_layers=2)
MEAN = TopK(scorer=PageMean(page_size=4), budget=8, sinks=0, recent=2, dense_layers=2)
RECORDED = Recorded(depths=jnp.array([[6, 2, 3, 6], [1, 6, 4, 2], [5, 5, 1, 6]]))
PLANS = {
    "quest": Plan(select=QUEST),
    "dense_first": Plan(select=DENSE_FIRST),
    "mean": Plan(select=MEAN),
    "exit": Plan(select=DENSE_FIRST, depth=ExitAt(layer=4)),
    "skips": Plan(select=DENSE_FIRST, depth=SkipLayers(layers=(1, 3))),
    "recorded": Plan(select=DENSE_FIRST, depth=RECORDED),
    "cosine": Plan(select=QUEST, depth=Saturation(threshold=0.75)),
    "asked_in_groups": Plan(select=DENSE_FIRST, depth=every(Confidence(threshold=0.6), step=2)),
}
# Run as plans beside them do, with fewer or other layers: in slow runs.
ALIKE = {"quest", "dense_first", "exit", "skips"}
MAY_BE_SLOW = [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in PLANS]


@pytest.fixture(scope="module")
def stacked(tiny_model):
    return stack_for_decoding(tiny_model)


def both(one, other, plan, **options):
    """Generate on a list of layers and on stacked ones; what both have, but for the prompt, is asserted to be equal."""
    options = {"lengths": LENGTHS, "max_new_tokens": NEW} | options
    want, got = generate(one, PROMPTS, plan, **options), generate(other, PROMPTS, plan, **options)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    for name in ("active", "needed", "run", "kv_live", "kv_read"):
        np.testing.assert_array_equal(getattr(got.stats, name), getattr(want.stats, name), err_msg=name)
    return got


@pytest.mark.parametrize("name", MAY_BE_SLOW)
def test_tokens_and_what_is_read_are_those_of_the_list(tiny_model, stacked, name):
    plan = PLANS[name]
    assert default_driver(stacked.layers, plan) == "indexed"
    got = both(tiny_model, stacked, plan)
    assert np.all(got.stats.kv_read[:, 0] < got.stats.kv_live[:, 0]), "pages must be left out for this to say anything"
    if name in ("recorded", "cosine", "asked_in_groups"):
        assert len(np.unique(got.stats.needed)) > 1, "the depths must differ for this to say anything"


def test_what_is_left_out_matters(stacked):
    few, all_ = (
        generate(stacked, PROMPTS, plan, lengths=LENGTHS, max_new_tokens=NEW) for plan in (PLANS["mean"], Plan())
    )
    assert not np.array_equal(few.tokens, all_.tokens)


def test_prompts_in_chunks_and_texts_that_stop(tiny_model, stacked):
    plan = PLANS["dense_first"]
    free = generate(stacked, PROMPTS, plan, lengths=LENGTHS, max_new_tokens=NEW)
    stop = int(free.tokens[0, 2])
    got = both(tiny_model, stacked, plan, prefill_chunk=5, stop=[stop])
    assert got.lengths[0] <= 3 and got.stopped[0] and np.max(got.lengths) > 3


@pytest.mark.parametrize(
    "driver", ["masked", *(pytest.param(driver, marks=pytest.mark.slow) for driver in ("segments", "unrolled"))]
)
def test_other_drivers_read_stacked_caches_too(tiny_model, stacked, driver):
    plan = PLANS["dense_first"]
    options = {"lengths": LENGTHS, "max_new_tokens": 4}
    want = generate(tiny_model, PROMPTS, plan, **options)
    got = generate(stacked, PROMPTS, plan, **options, driver=driver)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.stats.kv_read, want.stats.kv_read)


@pytest.mark.slow
def test_a_plan_that_also_hides_keys_is_left_to_others(tiny_model, stacked):
    plan = Plan(select=DENSE_FIRST, depth=Saturation(threshold=0.75), fill="mask")
    assert default_driver(stacked.layers, plan) == "segments"
    both(tiny_model, stacked, plan)


def test_the_cache_holds_what_the_list_holds(tiny_model, stacked):
    """By hand: 16 slots are 8 pages of 2, whose bounds are 2 * 8 numbers; the first two layers of six read none."""
    plan, states, step = PLANS["recorded"], [], jax.jit(decode_step)
    for model in (tiny_model, stacked):
        fill = jax.jit(prefill, static_argnames="spec")
        state = fill(model, PROMPTS[:, :10], np.minimum(LENGTHS, 10), plan, CacheSpec(capacity=16), jax.random.key(0))[
            1
        ]
        for _ in range(4):
            state, _ = step(model, state, plan)
        states.append(state.cache)
    listed, cache = states
    assert cache.stacked and cache.layers.dense_layers == 2 and cache.layers.summary.shape == (6, 4, 8, 2, 16)
    assert cache.summary_sizes == listed.summary_sizes == (None, None, *[(8, 16)] * 4)
    whole_BP = np.arange(8)[None] < np.asarray(cache.length)[:, None] // 2
    for one, other in zip(list_caches(cache.layers), listed.layers, strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        np.testing.assert_allclose(one.k, other.k, atol=1e-4)
        if one.summary is not None:
            np.testing.assert_allclose(one.summary[whole_BP], other.summary[whole_BP], atol=1e-4)
    assert summary_bytes(cache) == summary_bytes(listed) == 4 * 4 * 8 * 2 * 16 * 4
    again = stack_caches(list_caches(cache.layers))
    assert jax.tree.structure(again) == jax.tree.structure(cache.layers)
    assert not np.any(again.summary[:2]) and np.array_equal(again.summary[2:], cache.layers.summary[2:])


def test_a_state_of_another_selection_is_refused(stacked):
    fill = jax.jit(prefill, static_argnames="spec")
    state = fill(stacked, PROMPTS, LENGTHS, PLANS["dense_first"], CacheSpec(capacity=24), jax.random.key(0))[1]
    for plan in (PLANS["quest"], PLANS["mean"], Plan()):
        with pytest.raises(ValueError, match="a state that was made for this plan"):
            jax.eval_shape(lambda state, plan=plan: decode_step(stacked, state, plan), state)


@pytest.mark.parametrize(
    "select",
    [dataclasses.replace(QUEST, budget=32), dataclasses.replace(QUEST, dense_layers=6)],
    ids=["budget", "dense"],
)
def test_nothing_is_summarized_where_everything_is_read(stacked, select):
    plan = Plan(select=select)
    state = jax.eval_shape(lambda: random_state(stacked, plan, batch=2, length=9, capacity=32, key=jax.random.key(0)))
    assert state.cache.stacked and state.cache.layers.summary is None and summary_bytes(state.cache) == 0
    assert default_driver(stacked.layers, plan) == "indexed"


def test_a_random_state_is_decoded(stacked):
    plan = PLANS["dense_first"]
    state = random_state(stacked, plan, batch=2, length=9, capacity=24, key=jax.random.key(0))
    assert state.cache.layers.summary.shape == (6, 2, 16, 2, 16) and np.any(state.cache.layers.summary[2:])
    state, stats = jax.jit(decode_step)(stacked, state, plan)
    assert np.all(stats.kv_read < stats.kv_live) and state.cache.length.tolist() == [10, 10]


@pytest.mark.parametrize(
    ("axes", "name"),
    [
        pytest.param({"tensor": 2}, "dense_first", marks=pytest.mark.slow),
        ({"data": 2, "tensor": 2}, "recorded"),
        pytest.param({"tensor": 2}, "asked_in_groups", marks=pytest.mark.slow),
        pytest.param({"data": 2, "tensor": 2}, "mean", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_selection_on_a_mesh(even_model, axes, name):
    plan, stacked, mesh = PLANS[name], stack_for_decoding(even_model), make_mesh(axes)
    model = on_mesh(place(stacked, mesh), mesh)
    got = both(even_model, model, plan)
    assert np.all(got.stats.kv_read[:, 0] < got.stats.kv_live[:, 0])
    state = jax.jit(prefill, static_argnames="spec")(
        model, PROMPTS, LENGTHS, plan, CacheSpec(capacity=24), jax.random.key(0)
    )[1]
    state, _ = jax.jit(decode_step)(model, state, plan)
    meant = cache_shardings(state.cache, mesh)
    for part in ("k", "summary"):
        array = getattr(state.cache.layers, part)
        assert array.sharding.is_equivalent_to(getattr(meant.layers, part), 5), part


REFUSED = {
    "votes": (
        TopK(scorer=TokenSelect(page_size=2), budget=6),
        "the best score of the query heads .* which TokenSelect does not",
    ),
    "own_score": (TopK(scorer=MPCache(page_size=2), budget=6), "which MPCache does not"),
    "own_cache": (TopK(scorer=ShadowKV(), budget=64), "keep keys and values as they are, which ShadowKV does not"),
    "arranges": (TopK(scorer=RetrievalAttention(), budget=64), "in the order of the text, which RetrievalAttention"),
    "reuse": (dataclasses.replace(QUEST, reuse=0.9), "at every step, which reuse=0.9 does not"),
    "share": (dataclasses.replace(QUEST, share=2), "in every layer .* which share=2 does not"),
    "budgets": (
        dataclasses.replace(QUEST, budget=(6,) * 6),
        r"by one budget, which budget=\(6, 6, 6, 6, 6, 6\) is not",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_selections_that_it_cannot_run_are_refused(stacked, name):
    select, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"another driver than 'indexed' for .*{message}.*use 'segments'"):
        generate(stacked, [1, 2], Plan(select=select), max_new_tokens=2, driver="indexed")
    assert default_driver(stacked.layers, Plan(select=select)) == "unrolled"


def test_a_window_is_refused_and_left_to_others(tiny_model):
    config = dataclasses.replace(tiny_model.config, num_layers=2, windows=(8, 8))
    model = Transformer(config, jax.random.key(0))
    stacked, plan = stack_for_decoding(model), Plan(select=QUEST)
    assert refuse_indexed(plan, range(2)) is None and refuse_selection(QUEST, 8) is not None
    with pytest.raises(ValueError, match="attend to the whole text, which those with a window of 8 do not"):
        generate(stacked, [1, 2], plan, max_new_tokens=2, driver="indexed")
    mesh = make_mesh({"tensor": 1})
    assert default_driver(on_mesh(stacked, mesh).layers, plan) == default_driver(stacked.layers, plan) == "unrolled"
    both(model, stacked, plan, max_new_tokens=3)
