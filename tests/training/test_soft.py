"""Sorted fine-tuning against the layers and the cross-entropy written out in float64 NumPy, and against sub-models."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyninf
from dyninf import Plan
from dyninf.depth import ExitAt
from dyninf.models import ModelConfig, Transformer, stack_layers
from dyninf.models.parameters import named_parameters
from dyninf.training.soft import soft_depths, soft_loss
from dyninf.training.sorted_net import extract
from dyninf.training.states import exit_predictions, exit_states, masked_mean

CONFIG = ModelConfig(
    vocab_size=43, num_layers=4, d_model=12, d_ff=20, num_heads=4, num_kv_heads=2, head_dim=6, max_length=16
)
B, T, DEPTHS = 3, 7, (1, 3, 4)
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all the time of these tests
quick_loss = jax.jit(soft_loss, static_argnums=2, compiler_options=QUICK)


@pytest.fixture(scope="module")
def model():
    """A model whose layers matter: at the usual initial weights each adds next to nothing to its input."""
    model = jax.jit(functools.partial(Transformer, CONFIG), compiler_options=QUICK)(jax.random.key(5))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, model)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, T + 1)))


@pytest.fixture(scope="module")
def mask():
    """Each text has a prompt that does not count, and the second ends early."""
    return jnp.asarray(np.arange(T)[None] >= np.array([[2], [1], [3]])).at[1, 5:].set(False)


def states_by_numpy(model, tokens):
    """The output of every layer of one text ``[L, T, D]``, token by token and head by head."""
    weights = {name: np.asarray(array, np.float64) for name, array in named_parameters(model).items()}

    def norm(x, scale):
        return x / np.sqrt((x * x).mean() + CONFIG.norm_eps) * scale

    def turn(x, position):
        half = CONFIG.head_dim // 2
        angle = position * CONFIG.rope_theta ** (-np.arange(half) / half)
        rotated = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate([rotated.real, rotated.imag])

    states, rows = [], [weights["embedding"][token] for token in tokens]
    for layer in range(CONFIG.num_layers):
        w = {name.split(".")[2]: w for name, w in weights.items() if name.startswith(f"layers.{layer}.")}
        keys, values, out = [], [], []
        for position, x in enumerate(rows):
            qkv = np.tensordot(norm(x, w["norm_attn"]), w["wqkv"], 1)
            keys.append([turn(head[-2], position) for head in qkv])
            values.append([head[-1] for head in qkv])
            for kv in range(CONFIG.num_kv_heads):
                for member in range(CONFIG.group_size):
                    q = turn(qkv[kv, member], position) / CONFIG.head_dim**0.5
                    scores = np.exp([q @ key[kv] for key in keys])
                    mixed = sum(s * value[kv] for s, value in zip(scores, values, strict=True)) / scores.sum()
                    x = x + mixed @ w["wo"][kv * CONFIG.group_size + member]
            gate, up = np.tensordot(norm(x, w["norm_mlp"]), w["w_gate_up"], 1)
            out.append(x + (gate / (1 + np.exp(-gate)) * up) @ w["w_down"])
        rows = out
        states.append(rows)
    logits = [[norm(x, weights["norm_final"]) @ weights["unembedding"] for x in rows] for rows in states]
    return np.array(states), np.array(logits)


@pytest.fixture(scope="module")
def by_numpy(model, tokens):
    states, logits = zip(*[states_by_numpy(model, row[:-1]) for row in np.asarray(tokens)], strict=True)
    return np.stack(states, 1), np.stack(logits, 1)


def test_the_loss_is_that_of_numpy(model, tokens, mask, by_numpy):
    loss, entropy_K = quick_loss(model, tokens, DEPTHS, mask_BT=mask)
    want = []
    for depth in DEPTHS:
        terms = [
            np.log(np.exp(by_numpy[1][depth - 1, b, t]).sum()) - by_numpy[1][depth - 1, b, t, tokens[b, t + 1]]
            for b, t in zip(*np.nonzero(np.asarray(mask)), strict=True)
        ]
        want.append(sum(terms) / len(terms))
    np.testing.assert_allclose(entropy_K, want, rtol=2e-5)
    np.testing.assert_allclose(loss, sum(want) / 3, rtol=2e-5)
    assert min(abs(a - b) for a, b in itertools.pairwise(want)) > 1e-2  # the depths do differ


@pytest.mark.parametrize("form", ["list", "stacked"])
def test_the_states_are_those_of_numpy(model, tokens, by_numpy, form):
    model = model if form == "list" else stack_layers(model)
    states = jax.jit(exit_states, static_argnums=2, compiler_options=QUICK)(model, tokens[:, :-1], DEPTHS)
    np.testing.assert_allclose(states, by_numpy[0][[0, 2, 3]], rtol=1e-4, atol=1e-4)
    predictions = exit_predictions(model, states, chunk=4)
    np.testing.assert_array_equal(predictions, by_numpy[1][[0, 2, 3]].argmax(-1))


@pytest.mark.slow
def test_the_gradient_is_the_mean_over_sub_models_cut_out(model, tokens, mask):
    """Each sub-model alone, as a model of its own; its gradient reaches its own layers only."""

    @functools.partial(jax.jit, static_argnums=2, compiler_options=QUICK)
    def gradient(model, tokens, depth):
        def loss(model):
            return soft_loss(extract(model, depth), tokens, (depth,), mask_BT=mask)[0]

        return jax.grad(loss)(model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def sorted_gradient(model):
        return jax.grad(lambda model: soft_loss(model, tokens, (1, 2), mask_BT=mask, chunk=5)[0])(model)

    alone = [named_parameters(gradient(model, tokens, depth)) for depth in (1, 2)]
    for name, got in named_parameters(sorted_gradient(model)).items():
        np.testing.assert_allclose(got, (alone[0][name] + alone[1][name]) / 2, rtol=1e-4, atol=1e-5, err_msg=name)
    assert not np.any(alone[0]["layers.1.wo"]) and np.any(alone[1]["layers.1.wo"])


def test_a_depth_is_what_an_exit_there_reads_out(model, tokens):
    plan = Plan(depth=ExitAt(layer=3))
    logits = jax.jit(dyninf.forward, compiler_options=QUICK)(model, tokens[:, :-1], plan).logits
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    np.testing.assert_allclose(quick_loss(model, tokens, (3,))[0], -picked.mean(), rtol=1e-5)


def test_bfloat16_with_float32_gradients(model, tokens):
    run = jax.value_and_grad(lambda model: soft_loss(model, tokens, (1, 2), dtype=jnp.bfloat16)[0])
    loss, grads = jax.jit(run, compiler_options=QUICK)(stack_layers(model))
    want = quick_loss(model, tokens, (1, 2))[0]
    assert abs(loss - want) < 0.02 * want and loss != want  # 8 bits of mantissa: an error of 0.4 % a product
    for form in (grads, jax.eval_shape(run, model)[1]):
        assert {leaf.dtype for leaf in jax.tree.leaves(form)} == {jnp.dtype("float32")}
    assert jax.eval_shape(lambda: exit_states(model, tokens, (1,), dtype=jnp.bfloat16)).dtype == jnp.bfloat16


def test_padding_and_nothing_that_counts(model, tokens, mask):
    padded = jnp.concatenate([tokens, jnp.zeros((B, 2), tokens.dtype)], axis=1)
    wider = jnp.pad(mask, ((0, 0), (0, 2)))
    got, want = (quick_loss(model, t, (1,), mask_BT=m)[0] for t, m in ((padded, wider), (tokens, mask)))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert quick_loss(model, tokens, (1,), mask_BT=jnp.zeros_like(mask))[0] == 0
    np.testing.assert_allclose(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])), 2.0)


def test_depths():
    assert soft_depths(40, first=12, step=4) == (12, 16, 20, 24, 28, 32, 36, 40)  # the paper's
    assert soft_depths(7, first=2, step=3) == (2, 5, 7)
    assert soft_depths(3, first=3, step=1) == (3,)


@pytest.mark.parametrize("depths", [(), (0, 2), (2, 2), (3, 1), (1, 5), (1.5,)], ids=str)
def test_wrong_depths_are_refused(model, tokens, depths):
    with pytest.raises(ValueError, match=r"ascending depths between 1 and 4, got " + re.escape(repr(depths))):
        soft_loss(model, tokens, depths)
    with pytest.raises(ValueError, match="a step of at least 1 layer, got step=0"):
        soft_depths(4, first=1, step=0)
