"""Exits by a gate on the state: by hand, one gate for all layers, and under the drivers on a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyninf
from dyninf import Plan, check
from dyninf.depth import EXIT, RUN, LayerObs, MetaExit

NAN, INF = float("nan"), float("inf")
L, D = 6, 2


def policy_of(**changes):
    """Layer 1 has the gate (1, -1) with a bias of 1; nothing else may be read."""
    gate, bias = np.full((L, D), NAN, np.float32), np.full(L, NAN, np.float32)
    gate[1], bias[1] = (1.0, -1.0), 1.0
    return dataclasses.replace(MetaExit(gate=jnp.asarray(gate), bias=jnp.asarray(bias)), **changes)


def actions(policy, x, layer=1):
    x_BTD = jnp.asarray(x, jnp.float32)[None]
    step_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    obs = LayerObs(layer=layer, num_layers=L, first=True, x_BTD=x_BTD, prev_BTD=x_BTD, step_BT=step_BT, logits=None)
    return policy.update(policy.init(step_BT.shape), obs)[0][0].tolist()


def test_the_gate_by_hand():
    # The logits are x_0 - x_1 + 1 = 2, 0, -1: probabilities 0.881, 0.5, 0.269; the last is no number.
    x = [(2.0, 1.0), (0.0, 1.0), (0.0, 2.0), (NAN, 0.0)]
    assert actions(policy_of(), x) == [EXIT, RUN, RUN, RUN]
    assert actions(policy_of(threshold=0.26), x) == [EXIT, EXIT, EXIT, RUN]
    assert actions(policy_of(threshold=0.89), x) == [RUN] * 4
    assert actions(policy_of(threshold=1.0), [(1e9, 0.0)]) == [RUN]
    assert actions(MetaExit.create(L, D), x) == [RUN] * 4


@pytest.mark.parametrize("layer", [1, 5, jnp.int32(4)], ids=["first", "last", "traced"])
def test_one_gate_may_serve_every_layer(layer):
    policy = MetaExit(gate=jnp.array([[1.0, -1.0]]), bias=jnp.array([1.0]))
    assert actions(policy, [(2.0, 1.0), (0.0, 2.0)], layer) == [EXIT, RUN]
    assert MetaExit.create(L, D, shared=True).gate.shape == (1, D)
    policy.validate(L)


def drawn():
    return MetaExit(gate=0.02 * jax.random.normal(jax.random.key(3), (6, 24)), bias=jnp.full(6, -0.4))


@pytest.mark.parametrize("driver", ["segments", "scan"])
def test_a_token_exits_where_its_gate_fires_first(roll, driver):
    """Only the last token of each text decides: the others are prompt, so that dense states say what it must get."""
    policy, tokens = drawn(), jnp.asarray(np.random.default_rng(0).integers(0, 61, (5, 4)))
    out = roll.forward(roll.model, tokens, Plan(depth=policy), driver=driver, prompt_lengths=jnp.full(5, 3))
    dense = np.asarray(jax.jit(dyninf.layer_states)(roll.model, tokens))[:, :, -1]  # [L+1, B, D]
    fires = np.einsum("lbd,ld->lb", dense[:6].astype(np.float64), np.asarray(policy.gate)) > 0.4
    fires[0] = False
    depths = np.where(fires.any(0), fires.argmax(0), 6)
    assert out.needed[:, -1].tolist() == depths.tolist() and len(set(depths)) > 2
    np.testing.assert_allclose(out.states[:, -1], dense[depths, np.arange(5)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": jnp.zeros((5, D))}, r"gate of 2 axes, the first of 6 layers, got shape \(5, 2\)"),
        ({"bias": jnp.zeros(1)}, r"bias of 1 axes, the first of 6 layers, got shape \(1,\)"),
        ({"gate": jnp.zeros((1, D))}, r"bias of 1 axes, the first of 1 layers, got shape \(6,\)"),
        ({"threshold": -0.5}, "threshold to be a number between 0 and 1, got -0.5"),
    ],
    ids=["gate", "bias", "shared", "threshold"],
)
def test_what_does_not_fit_is_refused(tiny_model, changes, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(depth=policy_of(**changes)), tiny_model)
