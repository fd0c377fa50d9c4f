"""Depth shortcuts: router and adapter by hand, what training mixes, and what a decoded token takes on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, check
from dyninf.depth import RUN, SKIP, DepthShortcut, LayerObs
from pallas_kernels import prefill_attention

NAN, INF = float("nan"), float("inf")
L, D, R = 6, 2, 1


def policy_of(**changes):
    """Layer 1 has the router (1, 1) with a bias of -2, and an adapter that adds gelu(x_0 - x_1) (3, 0.5)."""
    router, bias = np.full((L, D), NAN, np.float32), np.full(L, NAN, np.float32)
    down, up = np.full((L, D, R), NAN, np.float32), np.full((L, R, D), NAN, np.float32)
    router[1], bias[1], down[1, :, 0], up[1, 0] = (1.0, 1.0), -2.0, (1.0, -1.0), (3.0, 0.5)
    arrays = {"router": router, "bias": bias, "down": down, "up": up}
    policy = DepthShortcut(**{name: jnp.asarray(array) for name, array in arrays.items()})
    return dataclasses.replace(policy, **changes)


def observe(x, layer=1):
    x_BTD = jnp.asarray(x, jnp.float32)[None]
    step_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    return LayerObs(layer=layer, num_layers=L, first=True, x_BTD=x_BTD, prev_BTD=x_BTD, step_BT=step_BT, logits=None)


def actions(policy, x):
    return np.asarray(policy.update((), observe(x))[0])[0].tolist()


def test_the_router_by_hand():
    # The logits are x_0 + x_1 - 2 = 1, 0 and -1: weights 0.731, 0.5 and 0.269.
    x = [(2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (NAN, 1.0)]
    assert actions(policy_of(), x) == [SKIP, RUN, RUN, RUN]
    assert actions(policy_of(threshold=0.25), x) == [SKIP, SKIP, SKIP, RUN]
    assert actions(policy_of(threshold=0.74), x) == [RUN, RUN, RUN, RUN]


def test_nothing_is_skipped_at_a_threshold_of_one_or_a_bias_of_minus_infinity():
    certain = [(1e6, 1e6), (INF, 0.0)]
    assert actions(policy_of(), certain) == [SKIP, SKIP]
    assert actions(policy_of(threshold=1.0), certain) == [RUN, RUN]
    assert actions(policy_of(bias=jnp.full(L, -INF)), certain[:1]) == [RUN]


def test_the_adapter_and_the_mixture_by_hand():
    # gelu (tanh form) of 1: 0.5 * (1 + tanh(sqrt(2 / pi) * 1.044715)) = 0.841192; (2, 1) + 0.841192 * (3, 0.5)
    adapted = [[(4.523576, 1.420596)]]
    x = jnp.array([[(2.0, 1.0)]])
    np.testing.assert_allclose(policy_of().skip_state((), observe([(2.0, 1.0)])), adapted, rtol=1e-6)
    # The weight of the shortcut is sigmoid(1) = 0.731059: 0.731059 * adapted + 0.268941 * (10, 20)
    mixed = policy_of().mix(1, x, jnp.array([[(10.0, 20.0)]]))
    np.testing.assert_allclose(mixed, [[(5.996413, 6.417367)]], rtol=1e-6)
    assert policy_of().adapt(1, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert policy_of().mix(1, x.astype(jnp.bfloat16), x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_created_policy_skips_nothing_and_can_be_trained():
    policy = DepthShortcut.create(jax.random.key(0), 6, 24, 5)
    x, y = jax.random.normal(jax.random.key(1), (2, 3, 4, 24))
    np.testing.assert_array_equal(policy.adapt(2, x), x)
    assert (policy.weight(2, 1e6 * x) < 0.12).all()
    grads = jax.jit(jax.grad(lambda policy: jnp.sum(jnp.square(policy.mix(2, x, y)))))(policy)
    # The first weights of the adapter learn once the second ones are no longer zero, as in any such pair.
    for leaf in (grads.router, grads.bias, grads.up):
        assert np.isfinite(leaf).all() and np.abs(leaf[2]).max() > 0 and not np.delete(leaf, 2, 0).any()


@pytest.mark.parametrize("driver", ["segments", pytest.param("masked", marks=pytest.mark.slow), "scan"])
def test_a_token_that_skips_takes_on_the_adapters_output(roll, driver):
    """Always through the adapters of layers 2 and 4, which turn the state; a mask keeps keys out of the question."""
    policy = DepthShortcut.create(jax.random.key(0), 6, 24, 5)
    up = jax.random.normal(jax.random.key(1), policy.up.shape)
    bias = jnp.full(6, -INF).at[jnp.array([2, 4])].set(INF)
    policy = dataclasses.replace(policy, up=up, bias=bias)
    tokens = np.random.default_rng(0).integers(0, 61, (1, 4))
    out = roll.forward(
        roll.model, jnp.asarray(tokens), Plan(depth=policy, fill="mask"), driver=driver, prompt_lengths=jnp.array([0])
    )
    shortcut, unchanged = (by_hand(roll.model, tokens, policy, adapt) for adapt in (True, False))
    np.testing.assert_allclose(out.states, shortcut, rtol=1e-4, atol=1e-4)
    assert np.abs(shortcut - unchanged).max() > 1
    np.testing.assert_array_equal(out.needed, 4)


@functools.partial(jax.jit, static_argnames="adapt")
def by_hand(model, tokens, policy, adapt):
    def attend(q, k, v, *, window=None):
        return prefill_attention(q, k, v, None, window=window), None

    x, positions = model.embed(jnp.asarray(tokens)), jnp.arange(tokens.shape[1])[None]
    for index, layer in enumerate(model.layers):
        if index not in (2, 4):
            x = layer(x, positions, attend)[0]
        elif adapt:
            x = policy.adapt(index, x)
    return x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": jnp.zeros((5, D))}, r"router of 2 axes, the first of 6 layers, got shape \(5, 2\)"),
        ({"bias": jnp.zeros(5)}, r"bias of 1 axes, .* got shape \(5,\)"),
        ({"down": jnp.zeros((L, D))}, r"down of 3 axes, .* got shape \(6, 2\)"),
        ({"up": jnp.zeros((L, D, R))}, r"up \[L, R, D\], got .* and \(6, 2, 1\)"),
        ({"router": jnp.zeros((L, 3))}, r"router \[L, D\].* got \(6, 3\)"),
        ({"threshold": 1.5}, "threshold to be a number between 0 and 1, got 1.5"),
    ],
    ids=["router", "bias", "down", "up", "size", "threshold"],
)
def test_what_does_not_fit_is_refused(tiny_model, changes, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(depth=policy_of(**changes)), tiny_model)
