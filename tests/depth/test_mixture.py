"""Mixture-of-Depths while decoding: the router's rule by hand, where it is asked, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, check
from dyninf.depth import RUN, SKIP, LayerObs, MixtureOfDepths

NAN, INF = float("nan"), float("inf")
L, D = 6, 2


def policy_of(**settings):
    """Layer 1 has the router (2, -1) with a bias of -3; the others' are not numbers and must not be read."""
    router, bias = np.full((L, D), NAN, np.float32), np.full(L, NAN, np.float32)
    router[1], bias[1] = (2.0, -1.0), -3.0
    return MixtureOfDepths(router=jnp.asarray(router), bias=jnp.asarray(bias), **settings)


def actions(policy, x, layer=1):
    x_BTD = jnp.asarray(x, jnp.float32)[None]
    step_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    obs = LayerObs(layer=layer, num_layers=L, first=True, x_BTD=x_BTD, prev_BTD=x_BTD, step_BT=step_BT, logits=None)
    return np.asarray(policy.update((), obs)[0])[0].tolist()


def test_by_hand_and_at_a_traced_layer():
    # 2 * 2 - 0.5 - 3 = 0.5; 2 * 2 - 1 - 3 = 0, a probability of one half; 2 * 1 - 2 - 3 = -3; not a number
    x = [(2.0, 0.5), (2.0, 1.0), (1.0, 2.0), (NAN, 0.0)]
    want = [RUN, SKIP, SKIP, RUN]
    assert actions(policy_of(), x) == want
    obs = jax.jit(lambda layer: policy_of().logits(layer, jnp.asarray(x)[None]))(1)
    np.testing.assert_allclose(obs, [[0.5, 0.0, -3.0, NAN]])


def test_a_large_bias_runs_everything():
    policy = dataclasses.replace(policy_of(), bias=jnp.full(L, INF))
    assert actions(policy, [(2.0, 0.5), (-1e30, 1e30)]) == [RUN, RUN]


@pytest.mark.parametrize(
    ("settings", "layers"), [({}, (1, 3, 5)), ({"start": 0, "step": 4}, (0, 4)), ({"start": 6}, ())], ids=str
)
def test_routed_layers(settings, layers):
    assert policy_of(**settings).decision_layers(L) == layers


def test_created_policies_fit_and_differ_by_layer(tiny_model):
    policy = MixtureOfDepths.create(jax.random.key(0), L, 24, capacity=0.5)
    check(Plan(depth=policy, fill="mask"), tiny_model)
    assert policy.capacity == 0.5 and len(np.unique(policy.router)) == L * 24 and not policy.bias.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": jnp.zeros((5, D))}, r"router of 2 axes, the first of 6 layers, got shape \(5, 2\)"),
        ({"router": jnp.zeros(L)}, r"router of 2 axes, .* got shape \(6,\)"),
        ({"bias": jnp.zeros((L, 1))}, r"bias of 1 axes, .* got shape \(6, 1\)"),
        ({"capacity": 1.5}, "capacity to be a number between 0 and 1, got 1.5"),
        ({"start": -1}, "first routed layer .* got -1"),
        ({"step": 0}, "layers between routed layers .* got 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_is_refused(tiny_model, changes, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(depth=dataclasses.replace(policy_of(), **changes)), tiny_model)
