"""One threshold an exit: by hand, against rules that have one threshold each, and settings that change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Greedy, Plan, check, generate, pytree
from dyninf.depth import (
    EXIT,
    RUN,
    Confidence,
    ExitAt,
    LayerObs,
    Patience,
    Saturation,
    SkipLayers,
    Thresholds,
    at_layers,
    every,
    first_of,
)
from dyninf.depth.base import consult

TOKENS = np.array([[5, 9, 2, 60, 33, 1, 8], [7, 7, 1, 3, 0, 0, 0], [20, 41, 6, 12, 3, 0, 0]])
LENGTHS = np.array([7, 4, 5])
CONFIDENCE = Confidence(threshold=1.0)


def thresholds(values, layers, rule=CONFIDENCE):
    return Thresholds(policy=rule, thresholds=jnp.asarray(values, jnp.float32), layers=layers)


@pytest.mark.parametrize("traced", [False, True])
def test_each_layer_has_its_own_threshold_by_hand(traced):
    policy = thresholds([0.5, 0.7, np.inf, -np.inf], (1, 3, 4, 5))
    logits = jnp.log(jnp.array([[[0.6, 0.3, 0.1]], [[0.5, 0.3, 0.2]], [[0.8, 0.1, 0.1]]]))
    x_BTD, found = jnp.zeros((3, 1, 2)), []
    for layer in range(6):
        obs = LayerObs(
            layer=jnp.int32(layer) if traced else layer,
            num_layers=6,
            first=False,
            x_BTD=x_BTD,
            prev_BTD=x_BTD,
            step_BT=jnp.zeros((3, 1), jnp.int32),
            logits=lambda: logits,
        )
        action_BT, _ = consult(policy, policy.init((3, 1)), obs)
        found.append(np.asarray(action_BT)[:, 0].tolist())
    # Largest probabilities 0.6, 0.5 and 0.8; layers 0 and 2 have no threshold.
    none = [RUN, RUN, RUN]
    assert found == [none, [EXIT, RUN, EXIT], none, [RUN, RUN, EXIT], none, [EXIT, EXIT, EXIT]]


@pytest.mark.parametrize("driver", ["segments", "scan"])
def test_equals_one_rule_a_layer_under_every_driver(roll, driver):
    own = roll(Plan(depth=thresholds([0.9, 0.6], (2, 4))), TOKENS, LENGTHS, driver=driver)
    rules = [at_layers(Confidence(threshold=value), layers=(layer,)) for value, layer in ((0.9, 2), (0.6, 4))]
    want = roll(Plan(depth=first_of(*rules)), TOKENS, LENGTHS, driver="segments")
    np.testing.assert_array_equal(own.tokens, want.tokens)
    np.testing.assert_array_equal(own.stats.needed, want.stats.needed)
    assert set(np.unique(own.stats.needed)) == {2, 4, 6}


def test_never_exits_at_infinity_and_new_thresholds_are_no_new_program(roll):
    roll(Plan(depth=thresholds([0.9, 0.6], (2, 4))), TOKENS, LENGTHS)
    before = roll.traces
    never = roll(Plan(depth=thresholds([np.inf, np.inf], (2, 4))), TOKENS, LENGTHS)
    assert roll.traces == before
    dense = roll(Plan(), TOKENS, LENGTHS)
    np.testing.assert_array_equal(never.tokens, dense.tokens)
    assert (never.stats.needed == 6).all()


def test_thresholds_are_leaves_and_layers_are_not():
    policy = thresholds([0.9, 0.3], (2, 4), rule=Saturation(threshold=1.0))
    # The rule's own threshold, which is not used, and the two that are.
    assert [np.shape(leaf) for leaf in jax.tree.leaves(policy)] == [(), (2,)]
    assert policy.decision_layers(6) == (2, 4) and policy.prefill_layers(6) == tuple(range(6))
    assert policy == dataclasses.replace(policy, thresholds=np.float32([0.9, 0.3]))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (thresholds([0.9, 0.3], (4, 2)), "ascending order"),
        (thresholds([0.9, 0.3], (2, 2)), "ascending order"),
        (thresholds([0.9, 0.3], (2, 6)), "between 0 and 5, got 6"),
        (thresholds([0.9, 0.3], (0, 2)), r"Confidence decides, got \[0\]"),
        (thresholds([0.9], (2, 4)), r"each of 2 layers, got shape \(1,\)"),
        (thresholds(0.9, (2,)), r"got shape \(\)"),
        (thresholds([0.9, np.nan], (2, 4)), "infinity is one"),
        (thresholds([0.9], (2,), rule=Patience(patience=1)), "an exit policy with a threshold, got Patience"),
        (thresholds([0.9], (2,), rule=SkipLayers(layers=(3,))), "an exit policy .* got SkipLayers"),
        (thresholds([0.9], (2,), rule=every(CONFIDENCE, step=2)), "an exit policy with a threshold"),
        (thresholds([0.9], (2,), rule=ExitAt(layer=3)), "got ExitAt"),
        (thresholds([0.9], (2,), rule=0.5), "got 0.5"),
        (thresholds([0.9], (2,), rule=Confidence(threshold=2.0)), "between 0 and 1, got 2"),
        (thresholds([0.9], (2,), rule=Confidence(threshold=0.8)), "not used, to be 1, got 0.8; set thresholds"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(tiny_model, policy, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(depth=policy), tiny_model)


@pytest.mark.parametrize(
    "sweep",
    [np.linspace(0.1, 0.95, 8), pytest.param(jnp.linspace(0.1, 1, 8), marks=pytest.mark.slow)],
    ids=["numpy", "jax"],
)
def test_a_sweep_of_eight_thresholds_is_traced_once(shallow_model, sweep):
    traced = []

    @pytree()
    class Count(Greedy):
        def __call__(self, logits_BV, key_B):
            traced.append(logits_BV.shape)
            return Greedy.__call__(self, logits_BV, key_B)

    mean_depth = []
    for threshold in sweep:
        plan = Plan(depth=every(Confidence(threshold=threshold), step=2), sampler=Count())
        generation = generate(shallow_model, TOKENS, plan, max_new_tokens=5, lengths=LENGTHS)
        mean_depth.append(float(generation.stats.needed.mean()))
        if len(mean_depth) == 1:
            once = len(traced)
    assert len(traced) == once and len(mean_depth) == 8
    assert mean_depth[0] < mean_depth[-1], "the thresholds were not used"
