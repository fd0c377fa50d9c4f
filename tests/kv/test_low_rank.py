"""Factors against NumPy's SVD, and what plans with a cache of factors hold, generate and refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Compact, Plan, check, decode_step, generate, prefill
from dyninf.depth import Confidence, ExitAt, TokenHalting, after_layer, every
from dyninf.kv import Quest, ShadowKV, TopK
from dyninf.kv.low_rank import factors
from dyninf.models import ModelConfig, Transformer

EXITS = every(Confidence(threshold=0.6), step=1)
read_prompt, read_token = jax.jit(prefill, static_argnames="spec"), jax.jit(decode_step)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def selection(budget, recent=1, sinks=0, **scorer):
    return TopK(scorer=ShadowKV(**scorer), budget=budget, sinks=sinks, recent=recent)


@pytest.mark.parametrize("rank", [1, 5, 12, 30])
def test_factors_are_the_truncated_svd(rank):
    """Of ragged rows of zeros at the end, more and fewer than directions; 12 directions at most."""
    x = draw(1, 3, 40, 3, 4) * np.linspace(3, 0.1, 12).reshape(3, 4).astype(np.float32)
    for row, length in enumerate((40, 17, 7)):
        x[row, length:] = 0
    u, sv = factors(jnp.asarray(x), rank)
    assert u.shape == (3, 40, min(rank, 12)) and sv.shape == (3, 3, min(rank, 12), 4)
    made = np.einsum("btr,bkrh->btkh", u, sv)
    for row in range(3):
        left, values, right = np.linalg.svd(x[row].reshape(40, 12).astype(np.float64), full_matrices=False)
        want = (left[:, :rank] * values[:rank]) @ right[:rank]
        np.testing.assert_allclose(made[row].reshape(40, 12), want, atol=2e-5)
    gram = np.einsum("bkrh,bksh->brs", sv, sv)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(min(rank, 12)), gram.shape), atol=1e-5)


def test_the_cache_is_smaller_by_what_factors_save():
    """Llama-3-8B's layer in bfloat16, the paper's settings, 131072 tokens of prompt and 1024 after it."""
    config = ModelConfig(
        vocab_size=64, num_layers=2, d_model=64, d_ff=64, num_heads=8, num_kv_heads=8, head_dim=128, max_length=2**18
    )
    prompt, extra = 2**17, 1024
    spec, select = CacheSpec(capacity=prompt + extra), selection(2048, recent=32)

    def sizes(**plan):
        model = Transformer(config, jax.random.key(0), dtype=jnp.bfloat16)
        tokens = jnp.zeros((1, prompt), jnp.int32)
        return prefill(model, tokens, jnp.array([prompt]), Plan(**plan), spec, jax.random.key(0))[1].cache

    def nbytes(cache):
        return jax.eval_shape(lambda: cache).nbytes

    dense, small = jax.eval_shape(sizes), jax.eval_shape(lambda: sizes(select=select))
    key = 2 * 8 * 128  # bytes of a key, or of a value
    assert dense.nbytes == 2 * 2 * spec.capacity * key
    pages = prompt // 8 - 4
    exact = 48 * 8 + 5 * 8 - 1 + extra
    layer = key * (spec.capacity + exact + pages) + pages * 8 * 160 * 2 + 160 * key + pages * 8 + 8 * 48 * 4 + 4
    assert small.nbytes == 2 * layer
    assert 0.64 < small.nbytes / dense.nbytes < 0.66


@pytest.mark.slow
def test_generating_with_all_directions_is_exact_and_ends_with_its_slots(tiny_model):
    """A text whose short row could go on, had the cache slots for it."""
    prompts, lengths = np.random.default_rng(4).integers(0, 61, (2, 24)), np.array([24, 9])
    select = selection(24, rank=16, outliers=2, page_size=2)
    plan = Plan(select=select)
    want = generate(tiny_model, prompts, max_new_tokens=8, lengths=lengths)
    got = generate(tiny_model, prompts, plan, max_new_tokens=8, lengths=lengths)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    spec = CacheSpec(capacity=32)
    _, state = read_prompt(tiny_model, jnp.asarray(prompts), jnp.asarray(lengths), plan, spec, jax.random.key(0))
    # The first of a whole number of pages; the second has nine tokens, one of which is not in a whole page.
    assert state.cache.layers[0].limit_B.tolist() == [24 + 1 + 8, 8 + 1 + 8] and state.cache.own == state.cache.layers
    done = []
    for _ in range(9):
        state, _ = read_token(tiny_model, state, plan)
        done.append(state.done.tolist())
    assert done[6:] == [[False, False], [True, True], [True, True]] and state.cache.length.tolist() == [32, 17]


@pytest.mark.slow
def test_an_exiting_plan_may_hold_factors(roll):
    """Layers that do not run project exact keys, and so do dense first layers beside factors."""
    prompts, lengths = np.random.default_rng(2).integers(0, 61, (3, 7)), np.array([7, 4, 5])
    select = dataclasses.replace(selection(2, rank=4, outliers=1, page_size=2), dense_layers=1)
    plan = Plan(depth=EXITS, select=select)
    got = roll(plan, prompts, lengths)
    assert got.stats.needed.min() < 6 and (got.stats.kv_read < got.stats.kv_live).any()
    assert len(got.state.cache.own) == 5 and got.state.cache.layers[0].k.shape[1] == roll.capacity
    for driver in ("masked", Compact(capacity=2)):
        np.testing.assert_array_equal(got.tokens, roll(plan, prompts, lengths, driver=driver).tokens)
    exact = dataclasses.replace(select, budget=14, scorer=dataclasses.replace(select.scorer, rank=16))
    np.testing.assert_array_equal(
        roll(dataclasses.replace(plan, select=exact), prompts, lengths).tokens,
        roll(Plan(depth=EXITS), prompts, lengths).tokens,
    )


def test_bfloat16_is_kept(shallow_model):
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), shallow_model)
    select = selection(8, rank=9, outliers=2, page_size=2)
    prompts = jnp.asarray(np.random.default_rng(4).integers(0, 61, (1, 30)))
    plan, spec = Plan(select=select), CacheSpec(capacity=34)
    _, state = read_prompt(model, prompts, jnp.array([30]), plan, spec, jax.random.key(0))
    cache = state.cache.layers[0]
    assert {leaf.dtype for leaf in (cache.k, cache.v, cache.u, cache.sv, cache.landmarks)} == {jnp.dtype("bfloat16")}
    after, stats = read_token(model, state, plan)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert stats.kv_read.tolist() == [pytest.approx(31 - (30 - 2 * 2 - 8))]


def test_a_state_of_other_settings_is_refused(shallow_model):
    prompts, spec = jnp.zeros((1, 12), jnp.int32), CacheSpec(capacity=20)
    select = selection(4, rank=4, outliers=1, page_size=2)
    start, arguments = functools.partial(prefill, spec=spec), (prompts, jnp.array([12]), Plan(select=select))
    _, state = jax.eval_shape(start, shallow_model, *arguments, key=jax.random.key(0))
    changes = ({"rank": 5}, {"outliers": 2}, {"page_size": 4})
    others = [dataclasses.replace(select, scorer=dataclasses.replace(select.scorer, **change)) for change in changes]
    others += [dataclasses.replace(select, budget=20), dataclasses.replace(select, dense_layers=1)]
    others += [TopK(scorer=Quest(page_size=2), budget=4, sinks=0)]
    for other in others:
        with pytest.raises(ValueError, match="made for this plan"):
            jax.eval_shape(decode_step, shallow_model, state, Plan(select=other))
    jax.eval_shape(decode_step, shallow_model, state, Plan(select=dataclasses.replace(select, budget=6)))


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (Plan(select=selection(2048), depth=EXITS, fill="mask"), NotImplementedError, "ShadowKV, got 'mask'"),
        (
            Plan(select=selection(2048), depth=after_layer(TokenHalting(threshold=0.2), layer=3), fill="mask"),
            NotImplementedError,
            "fill='propagate' for a plan with ShadowKV",
        ),
        (Plan(select=selection(2048), depth=EXITS, fill="catch_up"), NotImplementedError, "got 'catch_up'"),
        (Plan(select=selection(2044)), ValueError, "multiple of page_size=8"),
        (Plan(select=selection(2048, rank=0)), ValueError, "rank of at least 1 for ShadowKV, got 0"),
        (Plan(select=selection(2048, outliers=-1)), ValueError, "outliers of at least 0 for ShadowKV, got -1"),
    ],
)
def test_what_cannot_be_had_together_is_refused(tiny_model, plan, error, message):
    with pytest.raises(error, match=message):
        check(plan, tiny_model)


def test_a_window_is_refused_and_nested_layers_are_not():
    sizes = {"d_model": 24, "d_ff": 40, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "max_length": 64}
    model = Transformer(ModelConfig(vocab_size=61, num_layers=2, windows=(4, None), **sizes), jax.random.key(0))
    prompts = np.zeros((1, 12), np.int32)
    plan = Plan(select=selection(4, outliers=1, page_size=2))
    with pytest.raises(NotImplementedError, match="got a window of 4 tokens"):
        generate(model, prompts, plan, max_new_tokens=3)
    model = Transformer(ModelConfig(vocab_size=61, num_layers=2, **sizes), jax.random.key(0))
    check(dataclasses.replace(plan, depth=ExitAt(layer=1), fill="mask"), model)
    assert generate(model, prompts, plan, max_new_tokens=3).lengths.tolist() == [3]
