"""Stop, exit or continue: by hand over several decisions, on a model, and the end of a generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyninf
from dyninf import Plan, check
from dyninf.depth import EXIT, RUN, LayerObs, StopExit
from dyninf.prompts import PAD

NAN = float("nan")
L, D = 6, 3


def policy_of(**changes):
    """The state itself holds the logits of stop, exit and continue."""
    policy = StopExit(weight=jnp.tile(jnp.eye(3)[None], (L, 1, 1)), bias=jnp.zeros((L, 3)))
    return dataclasses.replace(policy, **changes)


def decide(policy, *layers):
    """The actions of tokens at layers 1, 2, ... whose states are given ``[T, 3]``, and where they stopped."""
    state, found = policy.init((1, len(layers[0]))), []
    for number, x in enumerate(layers):
        x_BTD = jnp.log(jnp.asarray(x, jnp.float32))[None]
        step_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
        obs = LayerObs(
            layer=1 + number,
            num_layers=L,
            first=number == 0,
            x_BTD=x_BTD,
            prev_BTD=x_BTD,
            step_BT=step_BT,
            logits=None,
        )
        action, state = policy.update(state, obs)
        found.append(action[0].tolist())
    return found, policy.stops(state)[0].tolist()


def test_the_rule_by_hand():
    # Probabilities of stop, exit, continue.
    first = [(0.6, 0.3, 0.1), (0.3, 0.6, 0.1), (0.1, 0.3, 0.6), (0.48, 0.47, 0.05), (NAN, 0.6, 0.1)]
    assert decide(policy_of(), first) == ([[EXIT, EXIT, RUN, RUN, RUN]], [True, False, False, False, False])
    assert decide(policy_of(exit_threshold=0.7), first) == ([[EXIT, RUN, RUN, RUN, RUN]], [True] + [False] * 4)
    assert decide(policy_of(stop_threshold=0.7), first) == ([[RUN, EXIT, RUN, RUN, RUN]], [False] * 5)
    assert decide(policy_of(stop_threshold=0.4), first)[1] == [True, False, False, True, False]
    sure = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]
    assert decide(policy_of(exit_threshold=1.0, stop_threshold=1.0), sure) == ([[RUN, RUN]], [False, False])
    assert decide(StopExit.create(L, D), sure) == ([[RUN, RUN]], [False, False])


def test_the_first_decision_holds_and_a_new_token_starts_afresh():
    stop, leave, go_on = (0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8)
    found, stopped = decide(policy_of(), [leave, go_on, stop], [stop, stop, leave], [go_on, leave, go_on])
    assert found == [[EXIT, RUN, EXIT], [EXIT] * 3, [EXIT] * 3] and stopped == [False, True, True]
    policy, x_BTD = policy_of(), jnp.log(jnp.array([[go_on]]))
    obs = LayerObs(layer=1, num_layers=L, first=True, x_BTD=x_BTD, prev_BTD=x_BTD, step_BT=None, logits=None)
    state = jax.tree.map(jnp.ones_like, policy.init((1, 1)))
    action, state = policy.update(state, obs)
    assert action.tolist() == [[RUN]] and not policy.stops(state).any() and not state.decided.any()


def drawn(**changes):
    policy = StopExit(weight=0.05 * jax.random.normal(jax.random.key(6), (6, 24, 3)), bias=jnp.zeros((6, 3)))
    return dataclasses.replace(policy, **{"exit_threshold": 0.6, "stop_threshold": 0.7} | changes)


@pytest.mark.parametrize("driver", ["segments", "scan"])
def test_the_drivers_are_numpy(roll, driver):
    """Only the last token of each text decides: the others are prompt, so that dense states say what it must get."""
    policy, tokens = drawn(), jnp.asarray(np.random.default_rng(0).integers(0, 61, (7, 4)))
    out = roll.forward(roll.model, tokens, Plan(depth=policy), driver=driver, prompt_lengths=jnp.full(7, 3))
    dense, depths = np.asarray(jax.jit(dyninf.layer_states)(roll.model, tokens))[:, :, -1], []
    for row in range(7):
        depth = 6
        for layer in (5, 4, 3, 2, 1):
            odds = np.exp(dense[layer, row].astype(np.float64) @ np.asarray(policy.weight[layer], np.float64))
            stop, leave, _ = odds / odds.sum()
            depth = layer if stop > 0.7 or leave > 0.6 else depth  # above one half is the likeliest
        depths.append(depth)
    assert out.needed[:, -1].tolist() == depths and len(set(depths)) > 2
    np.testing.assert_allclose(out.states[:, -1], dense[depths, np.arange(7)], rtol=1e-4, atol=1e-4)


def test_a_stop_ends_the_text(roll):
    prompts, lengths = np.random.default_rng(0).integers(0, 61, (3, 7)), np.array([7, 4, 5])
    out, free = (roll(Plan(depth=drawn(**t)), prompts, lengths) for t in ({}, {"stop_threshold": 1.0}))
    lasts = (out.tokens != PAD).sum(1).tolist()
    assert max(lasts) == 1 + roll.steps and min(lasts) < roll.steps
    for row, last in enumerate(lasts):
        np.testing.assert_array_equal(out.tokens[row, :last], free.tokens[row, :last])
        assert (out.tokens[row, last:] == PAD).all()
        assert out.stats.active[:, row].tolist() == [step < last for step in range(roll.steps)]
        # The step that stopped left early; those before it ran what they run without stops.
        np.testing.assert_array_equal(out.stats.needed[: last - 1, row], free.stats.needed[: last - 1, row])
        assert last > roll.steps or 0 < out.stats.needed[last - 1, row] < 6
    masked = roll(Plan(depth=drawn()), prompts, lengths, driver="masked")
    np.testing.assert_array_equal(masked.tokens, out.tokens)
    np.testing.assert_array_equal(masked.stats.needed, out.stats.needed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": jnp.zeros((5, D, 3))}, r"weight of 3 axes, the first of 6 layers, got shape \(5, 3, 3\)"),
        ({"weight": jnp.zeros((L, D, 2))}, r"weight \[L, D, 3\].* got \(6, 3, 2\)"),
        ({"bias": jnp.zeros((L, 2))}, r"bias \[L, 3\], got .* and \(6, 2\)"),
        ({"exit_threshold": 1.5}, "exit_threshold to be a number between 0 and 1, got 1.5"),
        ({"stop_threshold": -1.0}, "stop_threshold to be a number between 0 and 1, got -1.0"),
    ],
    ids=["weight", "classes", "bias", "exit", "stop"],
)
def test_what_does_not_fit_is_refused(tiny_model, changes, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(depth=policy_of(**changes)), tiny_model)
