"""Weights of exits by hand, their loss against float64 NumPy, and FREE's distillation against torch.

Numbers named TORCH were printed by torch 2.13.0 (CPU, float64) from a program written from the definitions: mean
squared errors between layers under ``mse_loss``, the dynamic mapping by sorting Python lists.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.training.states import depth_loss
from dyninf.training.weighted_exits import calm_weights, free_weights, layer_distillation, warm_up_weights

L, B, T, D, S = 6, 2, 3, 4, 3
# mapping -> value, gradient of entry [0, 1, 2, 3] ... [2, 1, 2, 3], sums of the absolute gradient of layers 0 to 2
TORCH = {
    "dynamic": (0.615322398, (0.049317658, -0.005420632, 0.0), (0.9041406, 0.0881881, 0.0)),  # students 0, 0, 1
    "uniform": (0.826015508, (0.032392317, -0.015466977, 0.025090794), (0.4970027, 0.4756108, 0.4579443)),
    "last": (0.741896882, (0.0, 0.0, 0.075272382), (0.0, 0.0, 1.3738328)),
}


def states():
    states_LBTD = np.sin(0.37 * np.arange(L * B * T * D) ** 1.3).reshape(L, B, T, D)
    states_LBTD[4], states_LBTD[5] = states_LBTD[0] * 0.9 + 0.05, states_LBTD[1] * 0.8
    return jnp.asarray(states_LBTD, jnp.float32)


def test_weights_by_hand():
    np.testing.assert_allclose(calm_weights(4), [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(calm_weights(4, "geometric"), np.array([1, 2, 4, 8]) / 15)
    np.testing.assert_allclose(calm_weights(5, "uniform"), np.full(5, 0.2))
    np.testing.assert_allclose(calm_weights(1), [1.0])
    np.testing.assert_allclose(free_weights((6, 24)), [0.2, 0.8])
    np.testing.assert_allclose(free_weights(range(1, 5)), calm_weights(4))


def test_the_warm_up_by_hand():
    run = jax.jit(warm_up_weights, static_argnums=2, static_argnames="shape")
    weights = jnp.array([0.5, 1.0, 9.0])
    for step, linear, cosine in ((0, 0.0, 0.0), (1, 0.25, 0.1464466), (2, 0.5, 0.5), (4, 1.0, 1.0), (7, 1.0, 1.0)):
        # (1 - cos(pi / 4)) / 2 = 0.1464466
        np.testing.assert_allclose(run(weights, step, 4), [0.5 * linear, linear, 1.0], atol=1e-7)
        np.testing.assert_allclose(run(weights, step, 4, shape="cosine"), [0.5 * cosine, cosine, 1.0], atol=1e-7)
    assert run._cache_size() == 2
    np.testing.assert_allclose(warm_up_weights(weights, 0, 0), [0.5, 1.0, 1.0])


def test_the_weighted_loss_is_that_of_numpy(rng):
    """A model of layers that add a matrix product, read out at depths 1, 2 and 4."""
    vocab, num_layers, tokens = 7, 4, rng.integers(0, 7, (B, T + 1))
    weights = {"in": rng.normal(size=(vocab, D)), "out": rng.normal(size=(D, vocab)), "w": rng.normal(size=(4, D, D))}

    def model_of(weights):
        def layer_of(w):
            return lambda x, positions, attend: (x + jnp.einsum("btd,de->bte", x, w), None)

        return types.SimpleNamespace(
            layers=[layer_of(weights["w"][i]) for i in range(num_layers)],
            embed=lambda tokens: weights["in"][tokens],
            unembed=lambda x: jnp.einsum("btd,dv->btv", x, weights["out"]),
        )

    weights32 = {name: jnp.asarray(w, jnp.float32) for name, w in weights.items()}
    mask = jnp.array([[True, True, False], [False, True, True]])
    loss, entropy = depth_loss(model_of(weights32), jnp.asarray(tokens), (1, 2, 4), calm_weights(3), mask_BT=mask)
    want = []
    for depth in (1, 2, 4):
        matrix = np.linalg.multi_dot([*[np.eye(D) + w for w in weights["w"][:depth]], weights["out"]])
        scores = [(weights["in"][tokens[b, t]] @ matrix, tokens[b, t + 1]) for b, t in ((0, 0), (0, 1), (1, 1), (1, 2))]
        want.append(np.mean([-np.log(np.exp(z[y]) / np.exp(z).sum()) for z, y in scores]))
    np.testing.assert_allclose(entropy, want, rtol=1e-5)
    np.testing.assert_allclose(loss, (1 * want[0] + 2 * want[1] + 3 * want[2]) / 6, rtol=1e-5)


@pytest.mark.parametrize("mapping", TORCH)
def test_distillation_is_that_of_torch(mapping):
    value, grads = jax.jit(jax.value_and_grad(lambda h: layer_distillation(h, S, mapping)))(states())
    want, entries, sums = TORCH[mapping]
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(grads[:S, 1, 2, 3], entries, atol=1e-6)
    np.testing.assert_allclose(np.abs(grads[:S]).sum((1, 2, 3)), sums, rtol=1e-5)
    assert not np.any(grads[S:])  # nor the teachers'


@pytest.mark.parametrize("mapping", TORCH)
def test_padding_does_not_count(mapping):
    padded = jnp.pad(states(), ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=jnp.nan)
    mask = jnp.pad(jnp.ones((B, T), bool), ((0, 0), (0, 2)))
    value, grads = jax.value_and_grad(lambda h: layer_distillation(h, S, mapping, mask_BT=mask))(padded)
    np.testing.assert_allclose(value, TORCH[mapping][0], rtol=1e-5)
    assert np.isfinite(grads).all()


def test_a_shallow_model_that_is_the_whole_one_learns_nothing():
    assert layer_distillation(states(), L, "uniform") == 0 and layer_distillation(states(), L, "dynamic") == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calm_weights(0), "at least 1 exit"),
        (lambda: calm_weights(3, "cubic"), "got 'cubic'"),
        (lambda: warm_up_weights(jnp.ones(2), 0, -1), "steps=-1"),
        (lambda: warm_up_weights(jnp.ones(2), 0, 3, shape="sudden"), "sudden"),
        (lambda: layer_distillation(states(), 7), "between 1 and 6"),
        (lambda: layer_distillation(states(), 2, "random"), "mapping='random'"),
    ],
    ids=["exits", "growth", "steps", "shape", "shallow", "mapping"],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
