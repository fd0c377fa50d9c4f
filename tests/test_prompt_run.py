"""Sparse prompts through a whole model against masked attention, and prompts in chunks against prompts read at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Plan, forward, generate, prefill, pytree, stream
from dyninf.depth import Confidence, ExitAt, SkipLayers, every
from dyninf.kv import H2O, Quest, RetrievalAttention, ShadowKV, TopK
from dyninf.models import ModelConfig, Transformer
from dyninf.sparsity import AShape, PowerAttention, SparsityPolicy, TriShape

T, LENGTHS = 22, np.array([22, 13, 3])
TOKENS = np.random.default_rng(0).integers(0, 61, (3, T))
A_SHAPE = AShape(sinks=3, window=5, block_size=4)
TRI_SHAPE = TriShape(sinks=3, window=5, block_size=4, last=2)
POWER = PowerAttention(window=1, unit=4, block_size=4, dense_layers=1, period=3)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits reach 30; the same sums in another order


def run(model, plan, *, tokens=TOKENS, lengths=LENGTHS, capacity=32, chunk=None):
    fill = jax.jit(prefill, static_argnames=("spec", "chunk"))
    key, spec = jax.random.key(0), CacheSpec(capacity=capacity)
    return fill(model, jnp.asarray(tokens), jnp.asarray(lengths), plan, spec, key, chunk=chunk)


def masked_logits(model, seen):
    """The logits of every position where a query of layer l sees the keys ``seen(l, query, key)`` up to its own."""
    query, key = np.arange(T)[:, None], np.arange(T)[None]
    masks = [np.broadcast_to((key <= query) & seen(layer, query, key), (T, T)) for layer in range(len(model.layers))]
    return np.asarray(_masked_logits(model, np.stack(masks)))


@jax.jit
def _masked_logits(model, masks_LTS):
    query, key = np.arange(T)[:, None], np.arange(T)[None]
    positions_BT, x_BTD = jnp.broadcast_to(jnp.arange(T), TOKENS.shape), model.embed(jnp.asarray(TOKENS))
    for layer, mask_TS in zip(model.layers, masks_LTS, strict=True):

        def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None, mask_TS=mask_TS):
            k, v = (jnp.repeat(part, q_BTNH.shape[2] // part.shape[2], axis=2) for part in (k_BTKH, v_BTKH))
            if window is not None:
                mask_TS = mask_TS & (key > query - window)
            scores = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k) * q_BTNH.shape[3] ** -0.5
            weights = jax.nn.softmax(jnp.where(mask_TS[None, None], scores, -jnp.inf), axis=-1)
            return jnp.einsum("bnts,bsnh->btnh", weights, v), None

        x_BTD, _ = layer(x_BTD, positions_BT, attend)
    return model.unembed(x_BTD)


def a_shape_seen(layer, query, key):
    return (key < 3) | (key > query - 5)


def power_seen(layer, query, key):
    distance = query // 4 - key // 4
    return (layer % 3 < 1) | (key < 4) | np.isin(distance, [0, 1, 2, 4])


# The mask of power is also held to prompts with windows, below.
@pytest.mark.parametrize(
    ("policy", "seen"),
    [(A_SHAPE, a_shape_seen), pytest.param(POWER, power_seen, marks=pytest.mark.slow)],
    ids=["a_shape", "power"],
)
def test_a_sparse_prompt_is_masked_attention(tiny_model, policy, seen):
    want = masked_logits(tiny_model, seen)
    logits, _ = run(tiny_model, Plan(sparsity=policy))
    np.testing.assert_allclose(logits, want[np.arange(3), LENGTHS - 1], **CLOSE)
    assert not np.allclose(logits[0], masked_logits(tiny_model, lambda *_: True)[0, -1], **CLOSE)
    # The whole text counts as the prompt where nothing is said; else what follows the prompt attends to everything.
    whole = jax.jit(forward)(tiny_model, jnp.asarray(TOKENS), Plan(sparsity=policy)).logits
    np.testing.assert_allclose(whole, want, **CLOSE)
    later = masked_logits(tiny_model, lambda layer, query, key: seen(layer, query, key) | (query >= 13))
    sizes = {"prompt_lengths": jnp.full(3, 13)}
    got = jax.jit(forward)(tiny_model, jnp.asarray(TOKENS), Plan(sparsity=policy), **sizes).logits
    np.testing.assert_allclose(got, later, **CLOSE)


@pytest.mark.parametrize("window", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 40))])
def test_a_window_of_the_layer_and_of_the_policy_are_both_kept(window):
    model = windowed(window)
    logits, _ = run(model, Plan(sparsity=A_SHAPE))
    np.testing.assert_allclose(logits, masked_logits(model, a_shape_seen)[np.arange(3), LENGTHS - 1], **CLOSE)
    logits, _ = run(model, Plan(sparsity=POWER), chunk=8)
    np.testing.assert_allclose(logits, masked_logits(model, power_seen)[np.arange(3), LENGTHS - 1], **CLOSE)


def test_a_window_that_would_hide_sinks_is_refused():
    with pytest.raises(NotImplementedError, match=r"a window of at most 5 tokens, .* got a layer with a window of 6"):
        run(windowed(6), Plan(sparsity=A_SHAPE))
    run(windowed(6), Plan(sparsity=dataclasses.replace(A_SHAPE, sinks=0)))


def windowed(window):
    config = ModelConfig(
        vocab_size=61, num_layers=4, d_model=24, d_ff=40, num_heads=6, num_kv_heads=2, head_dim=8, max_length=64,
        windows=(None, window) * 2,
    )  # fmt: skip
    model = Transformer(config, jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, model)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(Plan(), marks=pytest.mark.slow),  # queries of "quest" and of one layer of "power" see everything
        pytest.param(Plan(sparsity=A_SHAPE), marks=pytest.mark.slow),  # as "mask", and part of "tri_shape"
        Plan(sparsity=TRI_SHAPE),
        Plan(sparsity=POWER, depth=ExitAt(layer=2)),
        pytest.param(Plan(depth=SkipLayers(layers=(1,), prompt=True)), marks=pytest.mark.slow),  # as "power" skips
        Plan(sparsity=A_SHAPE, depth=every(Confidence(threshold=0.5), step=2), fill="mask"),
        Plan(select=TopK(scorer=Quest(page_size=2), budget=8, sinks=0)),
    ],
    ids=["dense", "a_shape", "tri_shape", "power", "skip", "mask", "quest"],
)
@pytest.mark.parametrize("chunk", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_chunks_are_the_prompt_read_at_once(shallow_model, plan, chunk):
    logits, state = run(shallow_model, plan)
    got, chunked = run(shallow_model, plan, chunk=chunk)
    np.testing.assert_allclose(got, logits, **CLOSE)
    assert jax.tree.structure(chunked) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(chunked.cache), jax.tree.leaves(state.cache), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, **CLOSE)


def test_one_program_serves_all_lengths_and_runs_no_chunk_beyond_them(tiny_model):
    offsets, traced = [], []

    @pytree()
    class Noting(SparsityPolicy):
        def select(self, obs):
            traced.append(obs.layer)
            jax.debug.callback(lambda layer, offset: offsets.append((int(layer), int(offset))), obs.layer, obs.offset)
            return A_SHAPE.select(obs)

    for lengths, chunks in (([22, 13, 3], 3), ([9, 1, 16], 2), ([5, 8, 1], 1)):
        logits, state = run(tiny_model, Plan(sparsity=Noting()), lengths=lengths, chunk=8)
        jax.effects_barrier()
        assert sorted(offsets) == [(layer, 8 * chunk) for layer in range(6) for chunk in range(chunks)]
        alone, _ = run(tiny_model, Plan(sparsity=A_SHAPE), lengths=lengths)
        np.testing.assert_allclose(logits, alone, **CLOSE)
        for cache in state.cache.layers:
            assert not np.asarray(cache.k)[np.arange(32)[None] >= np.array(lengths)[:, None]].any()
        offsets.clear()
    assert sorted(set(traced)) == list(range(6)) and len(traced) <= 12  # a loop's body may be traced twice


@pytest.mark.slow
def test_generation_reads_prompts_in_chunks(tiny_model):
    plan = Plan(sparsity=POWER)
    want = generate(tiny_model, TOKENS, plan, max_new_tokens=5, lengths=LENGTHS)
    got = generate(tiny_model, TOKENS, plan, max_new_tokens=5, lengths=LENGTHS, prefill_chunk=8)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    # One new token, fewer slots than whole chunks take; and a chunk that holds the whole prompt.
    for chunk in (16, 64):
        streamed = list(stream(tiny_model, TOKENS, plan, max_new_tokens=1, lengths=LENGTHS, prefill_chunk=chunk))
        np.testing.assert_array_equal(streamed[0][0], want.tokens[:, 0])


@pytest.mark.parametrize(
    ("plan", "chunk", "error", "message"),
    [
        (Plan(), 0, ValueError, "expected the chunk of a prompt to be an integer between 1 and inf, got 0"),
        (Plan(), 8.0, ValueError, "got 8.0"),
        (Plan(sparsity=A_SHAPE), 6, ValueError, "a multiple of 4 tokens, the blocks of AShape, got 6"),
        (Plan(evict=TopK(scorer=H2O(), budget=8)), 8, NotImplementedError, r"expected evict=KeepAll\(\) .* got TopK"),
        (Plan(select=TopK(scorer=RetrievalAttention(page_size=2), budget=8, sinks=0)), 8, NotImplementedError,
         "in the order of the text .* got RetrievalAttention"),
        (Plan(select=TopK(scorer=ShadowKV(rank=4), budget=64, sinks=0)), 8, NotImplementedError, "got ShadowKV"),
    ],
    ids=lambda value: None,
)  # fmt: skip
def test_what_cannot_be_read_in_chunks_is_refused(tiny_model, plan, chunk, error, message):
    with pytest.raises(error, match=message):
        generate(tiny_model, TOKENS, plan, max_new_tokens=3, prefill_chunk=chunk)


def test_a_cache_without_room_for_whole_chunks_is_refused(tiny_model):
    with pytest.raises(ValueError, match="at least 24 slots for chunks of 8, got 23"):
        run(tiny_model, Plan(), capacity=23, chunk=8)


def test_policies_are_asked_with_the_number_of_the_layer(tiny_model):
    with pytest.raises(ValueError, match="another driver than 'scan' for a sparsity policy"):
        forward(tiny_model, jnp.asarray(TOKENS), Plan(sparsity=POWER), driver="scan")
    with pytest.raises(ValueError, match="expected sparsity to be a pytree"):
        generate(tiny_model, TOKENS, Plan(sparsity=SparsityPolicy()), max_new_tokens=1)
