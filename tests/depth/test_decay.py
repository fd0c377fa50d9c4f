"""Depth that falls with the position: the rules by hand, against numpy, and their nesting."""

import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, check
from dyninf.depth import RUN, SKIP, DepthDecay, LayerObs


def observe(layer, steps, num_layers):
    step_BT = jnp.asarray(steps)[:, None]
    x_BTD = jnp.zeros((len(steps), 1, 2))
    return LayerObs(
        layer=layer, num_layers=num_layers, first=False, x_BTD=x_BTD, prev_BTD=x_BTD, step_BT=step_BT, logits=None
    )


def layers_run(policy, steps, num_layers):
    """Which layers each generated token runs ``[steps, L]``, asked as the drivers ask."""
    runs = np.ones((len(steps), num_layers), bool)
    for layer in policy.decision_layers(num_layers):
        action, _ = policy.update((), observe(layer, steps, num_layers))
        assert set(np.unique(action)) <= {RUN, SKIP}
        runs[:, layer] = np.asarray(action)[:, 0] == RUN
    return runs


@pytest.mark.parametrize(
    ("policy", "counts"),
    [
        # floor(10 * 0.5 ** i) = 10, 5, 2, 1, 0; never fewer than the first and the last layer.
        (DepthDecay(kind="power", alpha=0.5), [10, 5, 2, 2, 2]),
        (DepthDecay(kind="power", alpha=0.5, min_layers=4), [10, 5, 4, 4, 4]),
        (DepthDecay(kind="power", alpha=0.5, flex_start=3, tail=4), [10, 7, 7, 7, 7]),
        (DepthDecay(kind="power", alpha=0.0), [10, 2, 2, 2, 2]),
        # 10 - (10 - 2) * i / 4 = 10, 8, 6, 4, 2.
        (DepthDecay(kind="linear", length=4.0, min_layers=2), [10, 8, 6, 4, 2]),
        # 10 - 9 * i / 6 = 10, 8.5, 7, 5.5, 4.
        (DepthDecay(kind="linear", length=6.0, min_layers=1), [10, 8, 7, 5, 4]),
        (DepthDecay(kind="linear", length=1.0, min_layers=3), [10, 3, 3, 3, 3]),
    ],
    ids=str,
)
def test_counts_by_hand(policy, counts):
    np.testing.assert_array_equal(policy.num_run(jnp.arange(5), 10), counts)
    np.testing.assert_array_equal(layers_run(policy, range(5), 10).sum(axis=1), counts)


def test_the_lowest_flexible_layers_go_first():
    # 8 * 0.75 ** 2 = 4.5: four of eight layers, so the four lowest after the first two are skipped.
    runs = layers_run(DepthDecay(kind="power", alpha=0.75, flex_start=2, tail=1), [2], 8)
    assert np.flatnonzero(~runs[0]).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("num_layers", [4, 7, 16, 32])
@pytest.mark.parametrize(
    "policy",
    [
        DepthDecay(kind="power", alpha=0.97, flex_start=2, tail=1),
        DepthDecay(kind="power", alpha=0.9, flex_start=0, tail=1, min_layers=2),
        DepthDecay(kind="linear", length=100.0, min_layers=2, flex_start=1, tail=2),
        DepthDecay(kind="linear", length=37.0, min_layers=3, flex_start=3, tail=0),
    ],
    ids=str,
)
def test_numpy_agrees_and_schedules_are_nested(policy, num_layers):
    steps = np.arange(300)
    if policy.kind == "power":
        count = num_layers * policy.alpha ** steps.astype(np.float64)
    else:
        count = num_layers - (num_layers - policy.min_layers) * steps / policy.length
    fewest = min(num_layers, max(policy.min_layers, policy.flex_start + policy.tail))
    want = np.clip(np.floor(count + 1e-9), fewest, num_layers)
    sure = np.abs(count - np.round(count)) > 1e-3  # float32 may fall on either side of an integer
    sure |= count == np.round(count)
    runs = layers_run(policy, steps, num_layers)
    np.testing.assert_array_equal(runs.sum(axis=1)[sure], want[sure])
    assert (runs[1:] <= runs[:-1]).all(), "a later token runs a layer that an earlier one skipped"
    assert runs[:, : policy.flex_start].all() and runs[:, num_layers - policy.tail :].all()


@pytest.mark.parametrize("num_layers", [3, 10, 31, 80])
@pytest.mark.parametrize(
    "policy",
    [DepthDecay(kind="power", alpha=1.0), DepthDecay(kind="linear", length=3.0, min_layers=80)],
    ids=["power", "linear"],
)
def test_exact_at_full_budget_however_long_the_text(policy, num_layers):
    steps = jnp.array([0, 1, 1000, 1_000_000])
    np.testing.assert_array_equal(policy.num_run(steps, num_layers), num_layers)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (DepthDecay(kind="cubic"), "kind 'power' or 'linear', got 'cubic'"),
        (DepthDecay(alpha=1.5), "alpha to be a number between 0 and 1, got 1.5"),
        (DepthDecay(alpha=float("nan")), "alpha .* got nan"),
        (DepthDecay(length=0.0), "length .* got 0.0"),
        (DepthDecay(min_layers=0), "min_layers .* between 1 and 6, got 0"),
        (DepthDecay(min_layers=7), "min_layers .* between 1 and 6, got 7"),
        (DepthDecay(flex_start=-1), "flex_start .* got -1"),
        (DepthDecay(flex_start=4, tail=3), r"flex_start \+ tail between 1 and 6 layers, got 4 \+ 3"),
        (DepthDecay(flex_start=0, tail=0), r"got 0 \+ 0"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(tiny_model, policy, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(depth=policy), tiny_model)
