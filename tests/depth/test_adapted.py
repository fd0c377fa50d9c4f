"""Adapted exits: gate and adapter by hand, and what a token that left is read out from, under every driver."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyninf
from dyninf import Plan, check
from dyninf.depth import RUN, SKIP, AdaptedExit, LayerObs, after_layer, every

NAN, INF = float("nan"), float("inf")
L, D, R = 6, 2, 1


def policy_of(**changes):
    """Gates (1, 1) with a bias of -2; adapters that scale by (2, 1) and add gelu(x_0 - x_1) (3, 0.5)."""
    policy = AdaptedExit(
        gate=jnp.ones((L, D)),
        bias=jnp.full(L, -2.0),
        scale=jnp.tile(jnp.array([[2.0, 1.0]]), (L, 1)),
        down=jnp.tile(jnp.array([[[1.0], [-1.0]]]), (L, 1, 1)),
        up=jnp.tile(jnp.array([[[3.0, 0.5]]]), (L, 1, 1)),
    )
    return dataclasses.replace(policy, **changes)


def observe(x, *, first=True, layer=1):
    x_BTD = jnp.asarray(x, jnp.float32)[None]
    step_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    return LayerObs(layer=layer, num_layers=L, first=first, x_BTD=x_BTD, prev_BTD=x_BTD, step_BT=step_BT, logits=None)


def test_a_token_leaves_once():
    policy = policy_of()
    # The logits are x_0 + x_1 - 2 = 1, 0, -1 and no number: the first token leaves.
    action, state = policy.update(policy.init((1, 4)), observe([(2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (NAN, 1.0)]))
    assert action.tolist() == [[SKIP, RUN, RUN, RUN]]
    # gelu (tanh form) of 1: 0.5 * (1 + tanh(sqrt(2 / pi) * 1.044715)) = 0.841192; (4, 1) + 0.841192 * (3, 0.5)
    left = policy.skip_state(state, observe([(2.0, 1.0)] * 4))
    np.testing.assert_allclose(left[0, 0], (6.523576, 1.420596), rtol=1e-6)
    # At the next layer it is held whatever its gate says, and not adapted again; now the second leaves.
    x = [(-9.0, 1.0), (2.0, 1.0), (0.0, 1.0), (1.0, 0.5)]
    action, state = policy.update(state, observe(x, first=False, layer=2))
    assert action.tolist() == [[SKIP, SKIP, RUN, RUN]]
    left = policy.skip_state(state, observe(x, first=False, layer=2))
    np.testing.assert_allclose(left[0, :2], [(-9.0, 1.0), (6.523576, 1.420596)], rtol=1e-6)
    # The next token's first decision forgets.
    assert policy.update(state, observe([(0.0, 0.0)] * 4))[0].tolist() == [[RUN] * 4]


def test_nothing_leaves_at_a_threshold_of_one_or_a_bias_of_minus_infinity():
    sure = observe([(1e6, 1e6), (INF, 0.0)])
    for changes, want in (({}, SKIP), ({"threshold": 1.0}, RUN), ({"bias": jnp.full(L, -INF)}, RUN)):
        policy = policy_of(**changes)
        assert int(policy.update(policy.init((1, 2)), sure)[0][0, 0]) == want


def test_a_created_policy_never_leaves_and_its_heads_do_nothing():
    policy = AdaptedExit.create(jax.random.key(0), 6, 24, 5, first=2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 24)), jnp.float32)
    np.testing.assert_array_equal(policy.adapt(3, x), x)
    assert (policy.update(policy.init((3, 4)), dataclasses.replace(observe([(0, 0)]), x_BTD=x))[0] == RUN).all()
    assert policy.adapt(3, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert policy.decision_layers(6) == (2, 3, 4, 5)


@pytest.mark.parametrize("driver", ["segments", pytest.param("masked", marks=pytest.mark.slow), "scan"])
def test_the_adapted_state_is_what_is_read_out(roll, driver):
    """Only the last token of each text decides: the others are prompt, so that dense states say what it must get."""
    policy = AdaptedExit.create(jax.random.key(0), 6, 24, 5, first=2)
    keys = jax.random.split(jax.random.key(3), 4)
    gate, up = 0.02 * jax.random.normal(keys[0], (6, 24)), jax.random.normal(keys[1], (6, 5, 24))
    policy = dataclasses.replace(policy, gate=gate, up=up, scale=1 + jax.random.normal(keys[2], (6, 24)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (5, 4)))
    lengths = jnp.full(5, 3)
    out = roll.forward(roll.model, tokens, Plan(depth=policy), driver=driver, prompt_lengths=lengths)
    dense = jax.jit(dyninf.layer_states)(roll.model, tokens)[:, :, -1:]  # [L+1, B, 1, D]

    @jax.jit
    def by_layer(dense):
        layers = range(6)
        gates, adapted = zip(*((policy.logits(i, dense[i]), policy.adapt(i, dense[i])) for i in layers), strict=True)
        return jnp.stack(gates)[..., 0], jnp.stack(adapted)

    gates, adapted = map(np.asarray, by_layer(dense))
    needed = []
    for row in range(5):
        layer = next((layer for layer in range(2, 6) if gates[layer, row] > 0), 6)
        needed.append(layer)
        want = dense[6, row] if layer == 6 else adapted[layer, row]
        np.testing.assert_allclose(out.states[row, -1:], want, rtol=1e-4, atol=1e-4)
    assert out.needed[:, -1].tolist() == needed and len(set(needed)) > 2


def test_a_combinator_may_raise_the_first_layer_but_leave_none_out(tiny_model):
    policy, tokens = AdaptedExit.create(jax.random.key(0), 6, 24, 5), jnp.zeros((1, 3), jnp.int32)
    out = jax.eval_shape(dyninf.forward, tiny_model, tokens, Plan(depth=after_layer(policy, layer=3)))
    assert out.states.shape == (1, 3, 24)
    with pytest.raises(ValueError, match=r"every layer from its first on, got \(2, 4\)"):
        jax.eval_shape(dyninf.forward, tiny_model, tokens, Plan(depth=every(policy, step=2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": jnp.zeros((5, D))}, r"gate of 2 axes, the first of 6 layers, got shape \(5, 2\)"),
        ({"scale": jnp.zeros((L, 3))}, r"gate and scale \[L, D\].* got \(6, 2\), \(6, 3\)"),
        ({"up": jnp.zeros((L, 2, D))}, r"up \[L, R, D\], got .* and \(6, 2, 2\)"),
        ({"threshold": 1.5}, "threshold to be a number between 0 and 1, got 1.5"),
        ({"first": 0}, "asked about to be an integer between 1 and 6, got 0"),
    ],
    ids=["gate", "scale", "up", "threshold", "first"],
)
def test_what_does_not_fit_is_refused(tiny_model, changes, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(depth=policy_of(**changes)), tiny_model)
