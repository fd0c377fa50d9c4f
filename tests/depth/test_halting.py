"""Token halting: the rule by hand, what it never does, and the keys that a halted token does not write."""

import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, check
from dyninf.depth import EXIT, RUN, LayerObs, Saturation, TokenHalting, at_layers

NAN, INF = float("nan"), float("inf")


def actions(policy, x, prev):
    """The action of one sequence per row of states."""
    x_BTD, prev_BTD = jnp.asarray(x, jnp.float32)[:, None], jnp.asarray(prev, jnp.float32)[:, None]
    step_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    # No readout is offered: asking for one would fail.
    obs = LayerObs(layer=2, num_layers=6, first=False, x_BTD=x_BTD, prev_BTD=prev_BTD, step_BT=step_BT, logits=None)
    return np.asarray(policy.update((), obs)[0])[:, 0].tolist()


@pytest.mark.parametrize(
    ("prev", "x", "action"),
    [
        # |(0, 0.9)| / |(4, 0)| = 0.225
        ((4.0, 0.0), (4.0, 0.9), EXIT),
        # 1 / 4 is the threshold itself.
        ((4.0, 0.0), (4.0, 1.0), RUN),
        # |(1.2, -1.6)| / |(6, 8)| = 2 / 10
        ((6.0, 8.0), (7.2, 6.4), EXIT),
        ((0.0, 0.0), (0.0, 0.0), RUN),
        ((0.0, 0.0), (0.1, 0.0), RUN),
        ((4.0, 0.0), (NAN, 0.0), RUN),
        ((NAN, 0.0), (4.0, 0.0), RUN),
    ],
    ids=["below", "at", "another", "nothing", "from_nothing", "nan", "from_nan"],
)
def test_by_hand(prev, x, action):
    assert actions(TokenHalting(threshold=0.25), [x], [prev]) == [action]


def test_a_state_that_only_grows_is_saturated_but_not_halted():
    assert actions(Saturation(threshold=0.99), [(8.0, 6.0)], [(4.0, 3.0)]) == [EXIT]
    assert actions(TokenHalting(threshold=0.99), [(8.0, 6.0)], [(4.0, 3.0)]) == [RUN]


def test_never_halts_at_zero(rng):
    x = rng.normal(size=(100, 7))
    assert set(actions(TokenHalting(threshold=0.0), x, x)) == {RUN}


def test_a_halted_token_keeps_its_state_and_writes_no_keys(roll):
    """Every generated token halts before layer 3; a state that halts there is the output of the first 3 layers."""
    prompts, lengths = np.random.default_rng(0).integers(0, 61, (2, 5)), np.array([5, 3])
    plan = Plan(depth=at_layers(TokenHalting(threshold=INF), layers=(3,)), fill="mask")
    got = roll(plan, prompts, lengths)
    assert (got.stats.needed == 3).all()
    for layer, cache in enumerate(got.state.cache.layers):
        for row, length in enumerate(lengths):
            written = np.asarray(cache.valid)[row]
            assert written[:length].all() and not written[length + roll.steps :].any()
            assert (written[length : length + roll.steps] == (layer < 3)).all()


@pytest.mark.parametrize("threshold", [-0.1, NAN, "0.5", [0.1, 0.2]], ids=str)
def test_thresholds_out_of_range_are_refused(tiny_model, threshold):
    with pytest.raises(ValueError, match="threshold to be a number between 0 and inf"):
        check(Plan(depth=TokenHalting(threshold=threshold)), tiny_model)
