"""Training of gates that predict consistency: losses and gradients against torch, labels against float64 NumPy.

Numbers named TORCH were printed by torch 2.13.0 (CPU, float64) from a program written from the definitions: weighted
``binary_cross_entropy_with_logits`` per exit, and ``distributions.Categorical`` over the exits of each token.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dyninf.depth import AdaptedExit, MetaExit
from dyninf.models import ModelConfig
from dyninf.training.meta_classifier import balanced_bce, consistency_labels, geometric_loss, meta_loss
from dyninf.training.states import exit_states

CONFIG = ModelConfig(
    vocab_size=5, num_layers=4, d_model=14, d_ff=20, num_heads=4, num_kv_heads=2, head_dim=6, max_length=16
)
L, D, B, T = 4, 14, 3, 6
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all the time of these tests
# loss -> value, gradient of the logits [0, 0, 1], [1, 0, 1], [2, 0, 1], sum of the absolute gradient
TORCH = {
    "balanced_bce": (0.294603549, (0.008962473, -0.013300547, 0.000629896), 0.169069109),
    "geometric_loss": (2.100439567, (0.107549679, -0.053202190, 0.0), 1.155354456),
}


def torch_case():
    """Logits, labels ``[3, 2, 5]`` and mask: the inputs of TORCH."""
    number = np.arange(3 * 2 * 5)
    mask = np.ones((2, 5), bool)
    mask[0, 4] = mask[1, 0] = False
    logits, labels = 2 * np.sin(1.7 * number + 0.3), (5 * number**2 + number) % 11 < 4
    return jnp.asarray(logits, jnp.float32).reshape(3, 2, 5), jnp.asarray(labels).reshape(3, 2, 5), jnp.asarray(mask)


@pytest.mark.parametrize("loss", [balanced_bce, geometric_loss], ids=["balanced", "geometric"])
def test_the_losses_are_those_of_torch(loss):
    logits, labels, mask = torch_case()
    value, grad = jax.jit(jax.value_and_grad(loss))(logits, labels, mask)
    want, entries, total = TORCH[loss.__name__]
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad[:, 0, 1], entries, atol=1e-7)
    np.testing.assert_allclose(np.abs(grad).sum(), total, rtol=1e-6)


def test_labels_by_hand():
    # Three depths, four tokens; the last depth's prediction of the fourth is no number.
    labels = consistency_labels(jnp.array([[[1, 2, 3, -1]], [[4, 2, 0, 7]], [[1, 2, 0, -1]]]))
    assert labels.tolist() == [[[True, True, False, False]], [[False, True, True, False]]]


def test_an_exit_whose_labels_are_alike_teaches_nothing():
    labels = jnp.ones((1, 1, 3), bool)
    value, grad = jax.jit(jax.value_and_grad(balanced_bce))(jnp.zeros((1, 1, 3)), labels, labels[0])
    assert value == 0 and not np.any(grad)


@pytest.fixture(scope="module")
def model(lively):
    return lively(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, T)))


@pytest.fixture(scope="module")
def states(model, tokens):
    return jax.jit(exit_states, static_argnums=2, compiler_options=QUICK)(model, tokens, (1, 2, 3, 4))


def predictions_by_numpy(model, states):
    states = np.asarray(states, np.float64)
    normed = states / np.sqrt((states**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * np.asarray(model.norm_final[...])
    return (normed @ np.asarray(model.unembedding[...], np.float64)).argmax(-1)


@pytest.mark.parametrize("kind", ["meta", "shared", "adapted"])
def test_the_loss_of_a_model_by_numpy(model, tokens, states, kind):
    rng = np.random.default_rng(3)
    gate, bias = rng.normal(size=(1 if kind == "shared" else L, D)) / 4, rng.normal(size=1 if kind == "shared" else L)
    arrays = {"gate": jnp.asarray(gate, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    read = np.array(states)
    if kind == "adapted":  # heads that only scale
        scale = rng.normal(size=(L, D)).astype(np.float32)
        policy = AdaptedExit.create(jax.random.key(0), L, D, 2, threshold=0.5)
        policy = AdaptedExit(**arrays, scale=jnp.asarray(scale), down=policy.down, up=policy.up)
        read[:-1] *= scale[1:, None, None]
    else:
        policy = MetaExit(**arrays)
    mask = jnp.ones((B, T), bool).at[2, 4:].set(False)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(model, policy):
        return jax.value_and_grad(functools.partial(meta_loss, mask_BT=mask, chunk=7), (0, 1), has_aux=True)(
            model, policy, tokens
        )

    (loss, right), (for_model, for_policy) = run(model, policy)
    predicted, want, want_right = predictions_by_numpy(model, read), [], []
    for depth in (1, 2, 3):
        row, keep = (0 if kind == "shared" else depth), np.asarray(mask)
        logit = (np.asarray(states[depth - 1], np.float64) @ gate[row] + bias[row])[keep]
        label = (predicted[depth - 1] == predicted[-1])[keep]
        likely = 1 / (1 + np.exp(-logit))
        want.append(np.mean(np.where(label, -(1 - label.mean()) * np.log(likely), -label.mean() * np.log(1 - likely))))
        want_right.append(np.mean(label == (likely > 0.5)))
    np.testing.assert_allclose(loss, np.mean(want), rtol=1e-5)
    np.testing.assert_allclose(right, want_right, rtol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(for_model))
    assert np.abs(for_policy.gate).max() > 0 and np.abs(for_policy.bias).max() > 0


@pytest.mark.parametrize("objective", ["independent", "geometric"])
def test_gates_learn(model, tokens, objective):
    policy, optimizer = MetaExit.create(L, D), optax.adam(0.1)
    moments, seen = optimizer.init(policy), []

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(policy, moments):
        loss = functools.partial(meta_loss, model, tokens_BT=tokens, objective=objective)
        (value, right), grads = jax.value_and_grad(loss, has_aux=True)(policy)
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(policy, updates), moments, (value, right)

    for _ in range(40):
        policy, moments, values = step(policy, moments)
        seen.append(values)
    assert seen[-1][0] < 0.6 * seen[0][0]
    assert policy.threshold == 0.5  # a comparison has no gradient
    if objective == "independent":
        assert min(seen[-1][1]) > 0.8


def test_what_does_not_fit_is_refused(model, tokens):
    with pytest.raises(ValueError, match="objective 'independent' or 'geometric', got 'joint'"):
        meta_loss(model, MetaExit.create(L, D), tokens, objective="joint")
    with pytest.raises(ValueError, match="the first of 4 layers"):
        meta_loss(model, MetaExit.create(5, D), tokens)
