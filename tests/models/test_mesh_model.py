"""Computation on a mesh: generation from end to end, other axes, stacked layers, and what a step sends to others."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Compact, Plan, decode_step, forward, generate, prefill, stream
from dyninf.configs.plans import plans
from dyninf.depth import Confidence, every
from dyninf.kv import TokenSelect, TopK
from dyninf.models import Transformer, cache_shardings, make_mesh, on_mesh, place, stack_for_decoding

B, T, V, L = 8, 7, 64, 6
LENGTHS = np.array([7, 4, 5, 6, 1, 3, 2, 7])
EXITS = Plan(depth=every(Confidence(threshold=0.9), step=1))
COLLECTIVE = re.compile(
    r"= \(?(\w+\[[\d,]*\])\S* (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\b"
)


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(0, V, (B, T))


def laid_out(model, **axes):
    mesh = make_mesh(axes)
    return on_mesh(place(model, mesh), mesh)


def collectives(model, state, plan):
    """What one decode step sends between devices: how many of which kind and shape."""
    compiled = jax.jit(decode_step).lower(model, state, plan).compile()
    return collections.Counter((kind, shape) for shape, kind in COLLECTIVE.findall(compiled.as_text()))


def start(model, prompts, plan):
    tokens, lengths, keys = jnp.asarray(prompts), jnp.asarray(LENGTHS), jax.random.split(jax.random.key(1), B)
    return jax.jit(prefill, static_argnames=("spec",))(model, tokens, lengths, plan, CacheSpec(capacity=20), keys)[1]


@pytest.mark.parametrize("data", [1, 2])
def test_a_dense_step_sends_states_and_never_the_cache(data, even_model, prompts):
    """By hand: an all-reduce for the embedding and two a layer, 2 * 6 + 1, of the states [B, 1, D]; then the largest
    logit of each part of the vocabulary and its token. With four key/value heads on eight devices the cache is whole
    on each, and nothing else is sent either.
    """
    tensor = 8 // data
    model = laid_out(even_model, data=data, tensor=tensor)
    state = start(model, prompts, Plan())
    best = f"[{B // data},{tensor}]"
    assert collectives(model, state, Plan()) == {
        ("all-reduce", f"f32[{B // data},1,24]"): 2 * L + 1,
        ("all-gather", f"f32{best}"): 1,
        ("all-gather", f"s32{best}"): 1,
    }


def test_scores_that_heads_share_are_sent_once_a_layer(even_model, prompts):
    """The votes of all heads for the sixteen pages there is room for, beside what a dense step sends."""
    model = laid_out(Transformer(dataclasses.replace(even_model.config, num_layers=2), jax.random.key(0)), tensor=4)
    plan = Plan(select=TopK(scorer=TokenSelect(page_size=2), budget=8, sinks=2, recent=2))
    sent = collectives(model, start(model, prompts, plan), plan)
    assert sent.pop(("all-reduce", f"f32[{B},16]")) == 2
    assert sent == {("all-reduce", f"f32[{B},1,24]"): 5, ("all-gather", "f32[8,4]"): 1, ("all-gather", "s32[8,4]"): 1}


def test_sequences_on_different_devices_send_nothing(even_model, prompts):
    model = laid_out(even_model, data=8)
    assert collectives(model, start(model, prompts, Plan()), Plan()) == {}


@pytest.mark.parametrize("plan", [pytest.param(Plan(), marks=pytest.mark.slow), EXITS], ids=["dense", "exits"])
def test_generation_is_that_of_one_device(plan, even_model, prompts):
    options = {"max_new_tokens": 8, "lengths": LENGTHS, "stop": [3, [5, 9]]}
    want = generate(even_model, prompts, plan, **options)
    model = laid_out(even_model, data=2, tensor=4)
    got = generate(model, prompts, plan, **options)
    jax.tree.map(
        np.testing.assert_array_equal, (got.tokens, got.lengths, got.stopped), (want.tokens, want.lengths, want.stopped)
    )
    np.testing.assert_array_equal(got.stats.needed, want.stats.needed)
    tokens = np.stack([token for token, _ in stream(model, prompts, plan, **options)], axis=1)
    np.testing.assert_array_equal(tokens, np.asarray(want.tokens)[:, : tokens.shape[1]])


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_batches_that_do_not_divide_are_computed_all_the_same(batch, even_model, prompts):
    want = generate(even_model, prompts[:batch], max_new_tokens=4)
    got = generate(laid_out(even_model, data=2, tensor=4), prompts[:batch], max_new_tokens=4)
    np.testing.assert_array_equal(got.tokens, want.tokens)


@pytest.mark.slow
def test_gathered_rows_are_those_of_one_device(even_model, prompts):
    want = generate(even_model, prompts, EXITS, max_new_tokens=4, driver=Compact(capacity=3))
    got = generate(laid_out(even_model, data=2, tensor=4), prompts, EXITS, max_new_tokens=4, driver=Compact(capacity=3))
    np.testing.assert_array_equal(got.tokens, want.tokens)


@pytest.mark.slow
def test_weights_and_prompts_are_split_over_all_axes(even_model, prompts):
    """Eight tokens of each prompt over two devices of ``sequence``, in one chunk and in two."""
    prompts = np.pad(prompts, ((0, 0), (0, 1)))
    options = {"max_new_tokens": 4, "lengths": LENGTHS}
    want = generate(even_model, prompts, **options)
    model = laid_out(even_model, fsdp=2, sequence=2, tensor=2)
    for chunk in (None, 4):
        np.testing.assert_array_equal(generate(model, prompts, prefill_chunk=chunk, **options).tokens, want.tokens)


@pytest.mark.parametrize(
    "name",
    [
        "exit_confidence",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("dense", "select_quest", "sparse_a_shape")),
    ],
)
def test_a_text_is_read_as_on_one_device(name, even_model, prompts):
    run = jax.jit(forward)
    want, model = run(even_model, prompts, plans(L)[name]), laid_out(even_model, data=2, tensor=4)
    got = run(model, prompts, plans(L)[name])
    np.testing.assert_allclose(got.logits, want.logits, rtol=1e-4, atol=1e-4)  # as the laws of plans
    np.testing.assert_array_equal(got.needed, want.needed)
    assert got.logits.addressable_shards[0].data.shape == (B // 2, T, V // 4)


@pytest.mark.parametrize("plan", [pytest.param(Plan(), marks=pytest.mark.slow), EXITS], ids=["dense", "exits"])
def test_stacked_layers_decode_by_index(plan, even_model, prompts):
    stacked = stack_for_decoding(even_model)
    want = generate(stacked, prompts, plan, max_new_tokens=4, driver="indexed")
    model = laid_out(stacked, data=2, tensor=4)
    got = generate(model, prompts, plan, max_new_tokens=4, driver="indexed")
    np.testing.assert_array_equal(got.tokens, want.tokens)
    state = start(model, prompts, plan)
    assert state.cache.stacked
    state, _ = jax.jit(decode_step)(model, state, plan)
    meant = cache_shardings(state.cache, model.where.mesh)
    assert state.cache.layers.k.sharding.is_equivalent_to(meant.layers.k, 5)
    assert len(model.layers) == L and len(model.layers[1:3]) == 2 and len(list(model.layers)) == L


def test_another_mesh_is_another_program(even_model):
    two, four = laid_out(even_model, tensor=2), laid_out(even_model, tensor=4)
    assert jax.tree.structure(two) != jax.tree.structure(four)
    assert jax.tree.structure(two) == jax.tree.structure(laid_out(even_model, tensor=2))
    assert two.config == even_model.config


def test_a_mesh_that_the_rules_do_not_use_is_refused(even_model):
    with pytest.raises(ValueError, match="a rule for every axis of the mesh, got none for model"):
        on_mesh(even_model, make_mesh({"model": 2}))
