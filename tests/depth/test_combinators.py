"""Combinators: where they ask, what they decide together, thresholds that decay, and settings that change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, check
from dyninf.depth import (
    EXIT,
    RUN,
    Confidence,
    DecayingThreshold,
    DepthDecay,
    ExitAt,
    LayerObs,
    Patience,
    Saturation,
    SkipLayers,
    after_layer,
    at_layers,
    every,
    first_of,
)
from dyninf.depth.base import consult

SURE, UNSURE = Confidence(threshold=0.0), Confidence(threshold=1.0)


def observe(layer, probs=((0.5, 0.5),), steps=(0,), num_layers=9):
    logits = jnp.log(jnp.asarray(probs))[:, None]
    x_BTD = jnp.zeros((len(steps), 1, 2))
    return LayerObs(
        layer=layer,
        num_layers=num_layers,
        first=False,
        x_BTD=x_BTD,
        prev_BTD=x_BTD,
        step_BT=jnp.asarray(steps)[:, None],
        logits=lambda: logits,
    )


def walk(policy, predictions, num_layers=9, *, traced=False):
    """The first layer at which one token exits when the logits before layer l favour ``predictions[l]``."""
    # The token before left a prediction of 3 that never changed, which must not count for this one.
    state = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3), policy.init((1, 1)))

    def ask(policy, state, layer, probs):
        return consult(policy, state, observe(layer, probs, num_layers=num_layers))

    ask = jax.jit(ask) if traced else ask
    for layer in range(num_layers):
        probs = np.full((1, 9), 0.05)
        probs[0, predictions[layer]] = 0.6
        action, state = ask(policy, state, layer, probs)
        if int(action[0, 0]) == EXIT:
            return layer
    return num_layers


@pytest.mark.parametrize(
    ("policy", "layers"),
    [
        (SURE, (1, 2, 3, 4, 5, 6, 7, 8)),
        (every(SURE, step=3), (3, 6)),
        (every(SURE, step=100), ()),
        (after_layer(SURE, layer=6), (6, 7, 8)),
        (after_layer(SURE, layer=9), ()),
        (at_layers(SURE, layers=(2, 5)), (2, 5)),
        (at_layers(SURE, layers=(0, 5)), (5,)),  # no layer has run before layer 0
        (at_layers(SURE, layers=()), ()),
        (after_layer(every(SURE, step=2), layer=5), (6, 8)),
        (first_of(every(SURE, step=4), at_layers(SURE, layers=(2, 8))), (2, 4, 8)),
        (first_of(), ()),
        (first_of(every(SURE, step=4), ExitAt(layer=3)), (3, 4, 8)),
        (DecayingThreshold(policy=SURE), (1, 2, 3, 4, 5, 6, 7, 8)),
    ],
    ids=[
        "plain",
        "every",
        "never",
        "after",
        "after_all",
        "at",
        "at_0",
        "nowhere",
        "nested",
        "first_of",
        "none",
        "capped",
        "decaying",
    ],
)
def test_where_a_policy_is_asked(policy, layers):
    assert policy.decision_layers(9) == layers
    assert walk(policy, [1] * 9) == (layers[0] if layers else 9)


@pytest.mark.parametrize("traced", [False, True], ids=["known", "traced"])
@pytest.mark.parametrize(
    ("policy", "exit_layer"),
    [
        # Predictions before layers 0 to 8: 3 3 4 4 4 4 4 4 4, the first never asked.
        (Patience(patience=2), 4),  # asked at 1 (3), 2 (4), 3, 4
        (every(Patience(patience=2), step=2), 6),  # asked at 2, 4, 6
        (after_layer(Patience(patience=3), layer=3), 6),
        (first_of(Patience(patience=4), every(Patience(patience=1), step=4)), 6),  # the second would exit at 8
        (first_of(UNSURE, at_layers(SURE, layers=(5,)), at_layers(SURE, layers=(7,))), 5),
        (first_of(UNSURE, Patience(patience=9)), 9),
        (every(first_of(UNSURE, Patience(patience=2)), step=2), 6),  # asked at 2, 4, 6, whatever its own first layer is
        (at_layers(first_of(UNSURE, after_layer(Patience(patience=1), layer=4)), layers=(2, 5, 7)), 7),
    ],
    ids=["patience", "every", "after", "patience_first", "earliest", "never", "every_first_of", "at_first_of"],
)
def test_exit_layer_by_hand(policy, exit_layer, traced):
    assert walk(policy, [3, 3, 4, 4, 4, 4, 4, 4, 4], traced=traced) == exit_layer


def test_decaying_threshold_by_hand():
    policy = DecayingThreshold(policy=Confidence(threshold=0.9), temperature=4.0, length=128.0)
    # 0.81 + 0.09 * exp(-4 t / 128): 0.9 at 0, 0.81 + 0.09 / e = 0.843109 at 32, 0.81 + 0.09 / e^4 = 0.811648 at 128
    for step, threshold in ((0, 0.9), (32, 0.843109), (128, 0.811648), (100_000, 0.81)):
        above, below = threshold + 1e-4, threshold - 1e-4
        obs = observe(1, [[above, 1 - above], [below, 1 - below]], steps=[step, step])
        action, _ = policy.update((), obs)
        assert np.asarray(action)[:, 0].tolist() == [EXIT, RUN], f"at step {step}"


def test_each_token_has_the_threshold_of_its_own_position():
    policy = DecayingThreshold(policy=Confidence(threshold=0.9), temperature=4.0, length=128.0)
    obs = observe(1, [[0.85, 0.15]] * 3, steps=[0, 20, 64])  # thresholds 0.9, 0.858 and 0.822
    assert np.asarray(policy.update((), obs)[0])[:, 0].tolist() == [RUN, RUN, EXIT]


def test_a_threshold_that_does_not_decay_is_the_threshold(rng):
    probs = rng.uniform(0.5, 1, 200).astype(np.float32)
    pairs, steps = np.stack([probs, 1 - probs], 1), rng.integers(0, 999, 200)
    for threshold in (0.6, 0.75, 0.9, 1.0):
        plain = Confidence(threshold=threshold)
        constant = DecayingThreshold(policy=plain, temperature=0.0)
        obs = observe(1, pairs, steps=steps)
        np.testing.assert_array_equal(constant.update((), obs)[0], plain.update((), obs)[0])


def test_thresholds_can_be_vmapped():
    obs = observe(1, [[0.7, 0.3]])
    sweep = first_of(every(Confidence(threshold=jnp.array([0.6, 0.8])), step=1))
    actions = jax.vmap(lambda policy: policy.update(policy.init((1, 1)), obs)[0])(sweep)
    assert np.asarray(actions).ravel().tolist() == [EXIT, RUN]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (every(SURE, step=0), "layers between decisions .* got 0"),
        (every(SURE, step=7), "layers between decisions .* between 1 and 6, got 7"),
        (after_layer(SURE, layer=7), "between 0 and 6, got 7"),
        (after_layer(SURE, layer=-1), "got -1"),
        (at_layers(SURE, layers=(2, 6)), "decision layer .* between 0 and 5, got 6"),
        (every(Confidence(threshold=2.0), step=2), "threshold .* got 2.0"),
        (first_of(SURE, Saturation(threshold=-1.0)), "threshold .* got -1.0"),
        (first_of(SURE, ExitAt(layer=7)), "between 1 and 6, got 7"),
        (every(ExitAt(layer=3), step=2), "decides for each token, got ExitAt"),
        (after_layer(SkipLayers(layers=(1,)), layer=2), "decides for each token, got SkipLayers"),
        (first_of(SkipLayers(layers=(1,))), "policies that exit, got SkipLayers"),
        (first_of(DepthDecay()), "policies that exit, got DepthDecay"),
        (DecayingThreshold(policy=Patience(patience=2)), "policy with a threshold, got Patience"),
        (DecayingThreshold(policy=SURE, temperature=-1.0), "temperature .* got -1.0"),
        (DecayingThreshold(policy=SURE, temperature=float("nan")), "temperature .* got nan"),
        (DecayingThreshold(policy=SURE, temperature=float("inf")), "temperature .* got inf"),
        (DecayingThreshold(policy=SURE, length=0.0), "length .* got 0.0"),
        (DecayingThreshold(policy=SURE, length=float("nan")), "length .* got nan"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(tiny_model, policy, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(depth=policy), tiny_model)
