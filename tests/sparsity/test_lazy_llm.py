"""Tokens dropped on the way up: by hand, against a stack that drops them one prompt at a time, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Plan, forward, generate, prefill
from dyninf.depth import Confidence, ExitAt, SkipLayers, every
from dyninf.generate import advance_step
from dyninf.indexed import refuse_indexed
from dyninf.kv import H2O, Quest, TopK
from dyninf.models import ModelConfig, Transformer, stack_for_decoding
from dyninf.sparsity import AShape, LazyLLM, PerHead, SparsityPolicy
from tests.sparsity.test_vertical_slash import observe

T, STEPS, LENGTHS = 14, 3, np.array([14, 9, 3])
TOKENS = np.random.default_rng(0).integers(0, 61, (3, T))
FED = np.random.default_rng(1).integers(0, 61, (3, STEPS))
LAZY = LazyLLM(layers=(2, 4, 5), budgets=(9, 5, 3))  # few different widths: each is compiled anew
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits reach 30; the same sums in another order
QUICK = {"xla_backend_optimization_level": 0}

fill = jax.jit(prefill, static_argnames=("spec", "chunk"), compiler_options=QUICK)
step = jax.jit(advance_step, compiler_options=QUICK)


def run(model, plan, *, lengths=LENGTHS, tokens=TOKENS):
    return fill(model, jnp.asarray(tokens), jnp.asarray(lengths), plan, CacheSpec(capacity=32), jax.random.key(0))


def paid(q, k):
    """Softmax of one sequence's queries over the keys up to each, the last T of S, ``[N, T, S]``."""
    length, keys = len(q), len(k)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scores = np.einsum("tnh,snh->nts", q, k) * q.shape[2] ** -0.5
    scores = np.where(np.arange(keys)[None] <= np.arange(keys - length, keys)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return weights / weights.sum(axis=2, keepdims=True)


attends = []  # the last one is what the program below calls: one program for all layers that see as many tokens


@jax.jit
def through(layer, x, positions):
    def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None):
        same = jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype)
        return jax.pure_callback(lambda *parts: attends[-1](*parts), same, q_BTNH, k_BTKH, v_BTKH), None

    return layer(x, positions, attend)[0]


class Stack:
    """One prompt through the layers of a model, by the definition: lists of what is left, no padding, no budget."""

    def __init__(self, model, policy, skipped=()):
        self.model, self.skipped = model, skipped
        self.stages = dict(policy.stages)
        self.kept = {}  # layer -> keys, values and positions

    def layer(self, number, x, positions):
        """The states after a layer, and what the last token paid to each of those at hand."""
        k, v, at = self.kept.get(number, (None, None, []))
        noted = []

        def attend(*parts):
            new = [np.asarray(part[0], np.float64) for part in parts]
            keys, values = (new[i] if old is None else np.concatenate([old, new[i]]) for i, old in ((1, k), (2, v)))
            self.kept[number] = keys, values, [*at, *positions]
            weights = paid(new[0], keys)
            noted.append(weights[:, -1].mean(axis=0))
            out = np.einsum("nts,snh->tnh", weights, np.repeat(values, len(weights) // values.shape[1], axis=1))
            return np.asarray(out, np.float32)[None]

        attends.append(attend)
        x = jax.block_until_ready(through(self.model.layers[number], x, jnp.asarray([positions])))
        attends.pop()
        return x, noted[0]

    def prompt(self, tokens):
        positions, x = list(range(len(tokens))), self.model.embed(jnp.asarray([tokens]))
        worth = None
        for number in range(len(self.model.layers)):
            if number in self.stages and len(positions) > self.stages[number]:
                ranked = sorted(range(len(positions) - 1), key=lambda i: (-worth[i], i))
                stay = sorted([*ranked[: self.stages[number] - 1], len(positions) - 1])
                x, positions = x[:, np.array(stay)], [positions[i] for i in stay]
            if number not in self.skipped:
                x, worth = self.layer(number, x, positions)
        return self.read(x)

    def token(self, token, position):
        x = self.model.embed(jnp.asarray([[token]]))
        for number in range(len(self.model.layers)):
            if number not in self.skipped:
                x, _ = self.layer(number, x, [position])
        return self.read(x)

    def read(self, x):
        return np.asarray(self.model.unembed(x))[0, -1]


def test_by_hand():
    # One key/value head. Weights of the keys 1 4 2 1 for head 0 and, with the opposite query, 1 1/4 1/2 1 for head 1.
    # The last query pays 1 4 2 1 eighths and 4 1 2 4 elevenths: means 0.244 0.295 0.216 0.244 (of 0.125 + 0.364, ...).
    keys = np.log([1, 4, 2, 1], dtype=np.float32)[None, :, None, None]
    queries = np.ones((1, 4, 2, 1), np.float32) * np.array([1, -1], np.float32)[None, None, :, None]
    got = LAZY.worth(observe(queries, keys))
    want = (np.array([1, 4, 2, 1]) / 8 + np.array([4, 1, 2, 4]) / 11) / 2
    np.testing.assert_allclose(got[0], want, rtol=1e-6)
    # Of a prompt of three tokens the third one asks: 1 4 2 sevenths and 4 1 2 sevenths.
    got = LAZY.worth(observe(queries, keys, [3]))
    np.testing.assert_allclose(got[0], [5 / 14, 5 / 14, 4 / 14, 0], rtol=1e-6)


def test_prompts_and_steps_are_those_of_a_stack_that_drops(tiny_model):
    logits, state = run(tiny_model, Plan(sparsity=LAZY))
    dense, _ = run(tiny_model, Plan())
    stacks = [Stack(tiny_model, LAZY) for _ in LENGTHS]
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row], stacks[row].prompt(TOKENS[row, :length]), **CLOSE)
        assert np.allclose(logits[row], dense[row], **CLOSE) == (length <= 3)
        for number, cache in enumerate(state.cache.layers):
            budget = {0: T, 1: T, 2: 9, 3: 9, 4: 5, 5: 3}[number]
            keys, values, positions = stacks[row].kept[number]
            assert len(positions) == min(budget, length) and positions[-1] == length - 1
            assert np.nonzero(np.asarray(cache.valid)[row])[0].tolist() == positions
            np.testing.assert_allclose(cache.k[row, np.array(positions)], keys, **CLOSE)
            np.testing.assert_allclose(cache.v[row, np.array(positions)], values, **CLOSE)
            assert not np.asarray(cache.k)[row, ~np.asarray(cache.valid)[row]].any()
    for number in range(STEPS):
        # Empty slots, those of dropped tokens among them, may hold anything.
        layers = tuple(
            dataclasses.replace(
                cache,
                **{name: jnp.where(cache.valid[:, :, None, None], getattr(cache, name), jnp.nan) for name in "kv"},
            )
            for cache in state.cache.layers
        )
        state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=layers))
        state = dataclasses.replace(state, token=jnp.asarray(FED[:, number]))
        state, logits, _, _ = step(tiny_model, state, Plan(sparsity=LAZY))
        want = [stack.token(FED[row, number], LENGTHS[row] + number) for row, stack in enumerate(stacks)]
        np.testing.assert_allclose(logits, want, **CLOSE)


@pytest.mark.parametrize(
    ("depth", "skipped"), [(SkipLayers(layers=(2, 3), prompt=True), (2, 3)), (ExitAt(layer=4), (4, 5))], ids=str
)
def test_layers_that_prompts_skip(tiny_model, depth, skipped):
    policy = LazyLLM(layers=(2, 5), budgets=(9, 5))
    logits, _ = run(tiny_model, Plan(sparsity=policy, depth=depth))
    want = [Stack(tiny_model, policy, skipped).prompt(TOKENS[row, :length]) for row, length in enumerate(LENGTHS)]
    np.testing.assert_allclose(logits, want, **CLOSE)


@pytest.mark.slow
def test_masked_exits_follow_dropped_tokens(roll):
    plan = Plan(sparsity=LAZY, depth=every(Confidence(threshold=0.5), step=2), fill="mask")
    out = roll(plan, TOKENS, np.full(3, T))
    text = np.concatenate([TOKENS, out.tokens[:, :-1]], axis=1)
    forced = roll.forward(roll.model, jnp.asarray(text), plan, prompt_lengths=jnp.full(3, T))
    np.testing.assert_allclose(forced.logits[:, T - 1 :], out.logits, **CLOSE)
    np.testing.assert_array_equal(forced.needed[:, T:], out.stats.needed.T)
    assert len(np.unique(forced.needed[:, T:])) > 1
    # Before the last token of a prompt stands what a prompt that keeps all predicts.
    dense = roll.forward(roll.model, jnp.asarray(text), Plan())
    np.testing.assert_allclose(forced.states[:, : T - 1], dense.states[:, : T - 1], **CLOSE)
    assert not np.allclose(forced.states[:, T - 1], dense.states[:, T - 1], **CLOSE)


def test_stacked_layers_prefill_the_same(tiny_model):
    want, plain = run(tiny_model, Plan(sparsity=LAZY))
    got, stacked = run(stack_for_decoding(tiny_model), Plan(sparsity=LAZY))
    np.testing.assert_allclose(got, want, **CLOSE)
    np.testing.assert_array_equal(stacked.cache.layers.valid, [cache.valid for cache in plain.cache.layers])
    reason = refuse_indexed(Plan(sparsity=LAZY), range(6))
    assert reason is not None and "in every layer, which LazyLLM does not" in reason


@pytest.mark.slow
def test_windows_belong_below_the_first_stage():
    config = ModelConfig(
        vocab_size=61, num_layers=4, d_model=24, d_ff=40, num_heads=6, num_kv_heads=2, head_dim=8, max_length=64,
        windows=(5, None, None, 32),
    )  # fmt: skip
    model = Transformer(config, jax.random.key(1))
    low, high = (LazyLLM(layers=(layer,), budgets=(3,)) for layer in (1, 3))
    # A window of 32 hides nothing of a cache of 32 slots.
    logits, _ = run(model, Plan(sparsity=high))
    assert np.isfinite(logits).all()
    narrow = Transformer(dataclasses.replace(config, windows=(None, 5, None, None)), jax.random.key(1))
    with pytest.raises(NotImplementedError, match="layers above dropped tokens, got a window of 5 tokens"):
        run(narrow, Plan(sparsity=low))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"evict": TopK(scorer=H2O(), budget=8)}, NotImplementedError, r"evict=KeepAll\(\) .* for LazyLLM"),
        ({"select": TopK(scorer=Quest(page_size=2), budget=8, sinks=0)}, NotImplementedError, "for LazyLLM"),
        ({"fill": "catch_up", "depth": every(Confidence(threshold=0.5), step=2)}, NotImplementedError, "'catch_up'"),
        ({"depth": SkipLayers(layers=(3,), prompt=True)}, ValueError, "run layer 3, which says .* before layer 4"),
        ({"sparsity": LazyLLM(layers=(2, 4), budgets=(5,))}, ValueError, "a budget for each layer"),
        ({"sparsity": LazyLLM(layers=(6,), budgets=(5,))}, ValueError, "between 1 and 5, got 6"),
        ({"sparsity": LazyLLM(layers=(0,), budgets=(5,))}, ValueError, "between 1 and 5, got 0"),
        ({"sparsity": LazyLLM(layers=(2,), budgets=(0,))}, ValueError, "a budget of LazyLLM"),
        ({"sparsity": LazyLLM(layers=(4, 2), budgets=(5, 4))}, ValueError, "ascending layers"),
        ({"sparsity": LazyLLM(layers=(2, 4), budgets=(4, 5))}, ValueError, "budgets that do not grow"),
        ({"sparsity": PerHead(patterns=(LAZY,), heads=((0,) * 6,) * 6)}, ValueError, "patterns that drop no tokens"),
    ],
    ids=lambda value: None,
)
def test_what_cannot_be_had_together_is_refused(tiny_model, change, error, message):
    with pytest.raises(error, match=message):
        run(tiny_model, dataclasses.replace(Plan(sparsity=LAZY), **change))


def test_chunks_and_texts_without_a_prompt_are_refused(tiny_model):
    plan = Plan(sparsity=LAZY)
    with pytest.raises(NotImplementedError, match="drops no token for prompts read in chunks, got LazyLLM"):
        generate(tiny_model, TOKENS, plan, max_new_tokens=1, prefill_chunk=8)
    with pytest.raises(ValueError, match="expected prompt_lengths for LazyLLM"):
        forward(tiny_model, jnp.asarray(TOKENS), plan)
    with pytest.raises(ValueError, match="selects or drops tokens, got 'segments'"):
        forward(tiny_model, jnp.asarray(TOKENS), plan, prompt_lengths=jnp.full(3, 3), driver="segments")
    with pytest.raises(NotImplementedError, match="expected SparsityPolicy to define worth"):
        SparsityPolicy().worth(None)
    assert not AShape().stages
