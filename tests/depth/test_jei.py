"""Exits by gates with masses: features against torch, masses by hand, and the drivers against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyninf
from dyninf import Plan, check
from dyninf.depth import EXIT, RUN, JointExit, LayerObs, at_layers
from dyninf.depth.jei import uncertainty_features

NAN, INF = float("nan"), float("inf")
L = 6
# torch 2.13.0 (CPU, float64): softmax, sort and distributions.Categorical.entropy of p and of p^2 / sum p^2
LOGITS = (2.0, -1.0, 0.5, 0.0, 1.5)
TORCH = (0.49633132446336975, 1.2256263226015578, 0.19529115880055697, 0.784423337049933)


def logit(probability):
    return float(np.log(probability / (1 - probability)))


def decide(policy, *decisions):
    """The actions of one token at layers 1, 2, ... whose logits are given."""
    state, found = policy.init((1, 1)), []
    for number, logits in enumerate(decisions):
        obs = LayerObs(
            layer=1 + number,
            num_layers=L,
            first=number == 0,
            x_BTD=None,
            prev_BTD=None,
            step_BT=jnp.zeros((1, 1), jnp.int32),
            logits=lambda logits=logits: jnp.asarray(logits, jnp.float32)[None, None],
        )
        action, state = policy.update(state, obs)
        found.append(int(action[0, 0]))
    return found


def test_features_are_those_of_torch():
    np.testing.assert_allclose(uncertainty_features(jnp.array(LOGITS)), TORCH, rtol=1e-6)
    # A certain prediction, with logits of minus infinity; the best of two that are equal; a vocabulary of one.
    np.testing.assert_allclose(uncertainty_features(jnp.array([0.0, -INF, -INF])), [1, 0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(uncertainty_features(jnp.zeros(2)), [0.5, np.log(2), 0, np.log(2)], atol=1e-6)
    np.testing.assert_allclose(uncertainty_features(jnp.zeros((3, 1))), [[1, 0, 1, 0]] * 3, atol=1e-6)
    assert np.isnan(uncertainty_features(jnp.array([0.0, NAN]))[0])


def test_masses_by_hand():
    """Gates that read nothing: 0.3, 0.25, 0.35, 0.4 at layers 1 to 4."""
    gates = [0.5, 0.3, 0.25, 0.35, 0.4, 0.5]
    policy = JointExit(gate=jnp.zeros((L, 4)), bias=jnp.array([logit(gate) for gate in gates]))
    # P = 0.3, 0.25, 0.35 and what is left of 1, 0.1. c = 0.3, 0.25 / 0.7 = 0.357, 0.35 / (0.7 * 0.643 = 0.45) = 0.778
    assert decide(policy, *[LOGITS] * 4) == [RUN, RUN, EXIT, EXIT]
    assert decide(dataclasses.replace(policy, threshold=0.35), *[LOGITS] * 3) == [RUN, EXIT, EXIT]
    assert decide(dataclasses.replace(policy, threshold=0.79), *[LOGITS] * 3) == [RUN, RUN, RUN]
    # The first gate gives all away: 0.45 is left of nothing.
    shut = dataclasses.replace(policy, bias=policy.bias.at[1].set(INF).at[2].set(logit(0.45)), threshold=1.0)
    assert decide(shut, LOGITS, LOGITS) == [RUN, RUN]


def test_a_gate_reads_the_features():
    # 8 p_max - 4 = -0.029 and, where one token has 0.73, 1.85: chances of 0.493 and 0.864.
    policy = JointExit(gate=jnp.zeros((L, 4)).at[:, 0].set(8.0), bias=jnp.full(L, -4.0))
    assert decide(policy, LOGITS) == [RUN] and decide(policy, (1.0, 0.0)) == [EXIT]
    assert decide(policy, (NAN, 0.0), (9.0, 0.0)) == [RUN, RUN]
    assert decide(JointExit.create(L), *[(9.0, 0.0)] * 3) == [RUN] * 3


def drawn(**changes):
    gate = jnp.tile(jnp.array([[3.0, -1.0, 3.0, -1.0]]), (6, 1))  # tokens of the test exit at five depths
    return JointExit(**({"gate": gate, "bias": jnp.full(6, -4.0)} | changes))


@pytest.mark.parametrize("driver", ["segments", "scan"])
def test_the_drivers_are_numpy(roll, driver):
    """Only the last token of each text decides: the others are prompt, so that dense states say what it must get."""
    policy, tokens = drawn(), jnp.asarray(np.random.default_rng(0).integers(0, 61, (5, 4)))
    plan = Plan(depth=at_layers(policy, layers=(1, 2, 4, 5)))
    out = roll.forward(roll.model, tokens, plan, driver=driver, prompt_lengths=jnp.full(5, 3))
    dense = np.asarray(jax.jit(dyninf.layer_states)(roll.model, tokens))[:, :, -1:]
    logits = np.asarray(jax.jit(roll.model.unembed)(dense.reshape(-1, 1, 24)), np.float64).reshape(7, 5, -1)
    gate, bias, depths = np.asarray(policy.gate, np.float64), np.asarray(policy.bias, np.float64), []
    for row in range(5):
        given, left, depth = 0.0, 1.0, 6
        for layer in (1, 2, 4, 5):
            z = logits[layer, row]
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            q, top = p**2 / (p**2).sum(), np.sort(p)
            seen = [top[-1], -np.sum(p * np.log(p)), top[-1] - top[-2], -np.sum(q * np.log(np.maximum(q, 1e-300)))]
            g = 1 / (1 + np.exp(-(gate[layer] @ seen + bias[layer])))
            chance = max(0.0, min(g, 1 - given)) / left
            if chance > 0.5:
                depth = layer
                break
            given, left = given + g, left * (1 - chance)
        depths.append(depth)
    assert out.needed[:, -1].tolist() == depths and len(set(depths)) > 2
    np.testing.assert_allclose(out.states[:, -1], dense[depths, np.arange(5), 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": jnp.zeros((5, 4))}, r"gate of 2 axes, the first of 6 layers, got shape \(5, 4\)"),
        ({"gate": jnp.zeros((L, 3))}, r"gate \[L, 4\].* got \(6, 3\)"),
        ({"bias": jnp.zeros(5)}, r"bias of 1 axes"),
        ({"threshold": 2.0}, "threshold to be a number between 0 and 1, got 2.0"),
    ],
    ids=["gate", "features", "bias", "threshold"],
)
def test_what_does_not_fit_is_refused(tiny_model, changes, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(depth=drawn(**changes)), tiny_model)
