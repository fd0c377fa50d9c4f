"""The budget solver: an oracle in numpy, demands on held-out data, what the plan compiles, and what is refused."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dyninf import CacheSpec, Plan, check, decode_step, prefill
from dyninf.depth import Confidence, ExitAt, FirstOf, RunAll, Thresholds
from dyninf.models import Transformer, stack_for_decoding
from dyninf.training.calibrate import (
    MIN_SAMPLES,
    exit_distribution,
    first_exits,
    layer_bytes_of,
    solve_exits,
)

FAMILIES = ("exponential", "gaussian", "gamma")
L = 12
LAYERS = (2, 4, 6, 8, 10)


def surer(rng, count, exits):
    """Scores in [0, 1) that rise with depth, each sample at its own pace, and now and then fall."""
    start, pace = rng.normal(-1, 1.5, size=(count, 1)), rng.gamma(2.0, 0.4, size=(count, 1))
    noise = rng.normal(0, 0.5, size=(count, exits))
    return (1 / (1 + np.exp(-(start + pace * np.arange(exits)[None] + noise)))).astype(np.float32)


def deer_thresholds(deltas_EN, probs_E):
    """DeeR's thresholds of E-1 exits: values ``[exits, samples]``, lower for surer; an exit takes what is not above."""
    num_exits, count = deltas_EN.shape
    thresholds, gone = [], [False] * count
    for k in range(num_exits - 1):
        wanted, seen, threshold = math.floor(count * probs_E[k]), 0, -1e8
        for sample in np.argsort(deltas_EN[k], kind="stable"):
            if gone[sample]:
                continue
            seen += 1
            if seen == wanted:
                threshold = deltas_EN[k, sample]
                break
        thresholds.append(threshold)
        gone = [was or bool(value <= threshold) for was, value in zip(gone, deltas_EN[k], strict=True)]
    return np.asarray(thresholds, np.float32)


@pytest.mark.parametrize(("family", "mean"), [*itertools.product(FAMILIES, (5.0, 8.5)), ("exponential", 11.9)])
def test_thresholds_are_deers(family, mean, rng):
    deltas_NE = rng.gamma(1.5, 0.02, size=(377, len(LAYERS))).astype(np.float32)
    found = solve_exits(-deltas_NE, LAYERS, L, mean_layers=mean, family=family)
    deltas_EN = np.concatenate([deltas_NE, np.zeros((377, 1), np.float32)], axis=1).T
    want = deer_thresholds(deltas_EN, np.asarray(found.distribution))
    taken = np.isfinite(found.thresholds)
    np.testing.assert_array_equal(taken, want > -1e8)
    # A delta that equals its threshold exits there; here the score has to exceed it, so it is the float just below.
    ours = np.asarray(found.thresholds, np.float32)[taken]
    np.testing.assert_array_equal(np.nextafter(ours, np.float32(np.inf)), -want[taken])
    np.testing.assert_array_equal((-deltas_NE)[:, taken] > ours[None], deltas_NE[:, taken] <= want[taken][None])
    assert abs(np.dot(found.distribution, [*LAYERS, L]) - mean) < 1e-9
    # Each exit loses up to one sample to rounding.
    assert abs(found.mean_layers - mean) < L * len(LAYERS) / 377


@pytest.mark.parametrize("parameter", [0.3, 1.7, 4.2])
def test_distributions_are_those_of_scipy(parameter):
    i = np.arange(6)
    want = {
        "exponential": np.exp(parameter) ** (i + 1),
        "gaussian": scipy.stats.norm.pdf(i, loc=parameter),
        "gamma": scipy.stats.gamma.pdf(i + 1, parameter, scale=2.0),
    }
    for family in FAMILIES:
        np.testing.assert_allclose(
            exit_distribution(family, parameter, 6), want[family] / want[family].sum(), rtol=1e-12
        )


def test_solved_by_hand():
    # Exits after 1 and 2 of 4 layers; q = 1 gives a third each, a mean of 7/3.
    scores_NE = np.stack([np.arange(60) / 64, np.arange(60)[::-1] / 64], axis=1)
    found = solve_exits(scores_NE, [1, 2], 4, mean_layers=7 / 3)
    np.testing.assert_allclose(found.distribution, [1 / 3] * 3)
    assert found.shares == (1 / 3, 1 / 3, 1 / 3) and found.mean_layers == pytest.approx(7 / 3)
    # The 20 highest of exit 1 are samples 40 to 59; the 20 highest of exit 2 among the others are 0 to 19.
    below = [float(np.nextafter(np.float32(value), np.float32(-1))) for value in (40 / 64, 40 / 64)]
    assert found.thresholds == tuple(below)
    assert np.bincount(first_exits(np.float32(scores_NE), found.thresholds)).tolist() == [20, 20, 20]


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_means_meet_the_demand(family, rng):
    calibration, held_out = surer(rng, 6000, len(LAYERS)), surer(rng, 20000, len(LAYERS))
    costs = np.asarray([*LAYERS, L])
    for share, peak in itertools.product((0.4, 0.55, 0.7, 0.85), (12, 10)):
        if share * L <= peak:
            found = solve_exits(calibration, LAYERS, L, mean_layers=share * L, peak=peak, family=family)
            ran = costs[first_exits(held_out[:, : len(found.layers)], found.thresholds)]
            ran = np.minimum(ran, peak)
            assert abs(ran.mean() / L - share) < 0.02
            assert ran.max() == peak == found.peak
            np.testing.assert_allclose(found.mean_layers, share * L, atol=0.02)


def test_equal_scores_are_split_as_near_as_can_be():
    # Five values, 40 samples each: exit 1 can let out none or 40, 80, ... of 200.
    scores_NE = np.repeat(np.linspace(0.2, 1.0, 5), 40)[:, None] * np.ones((1, 2))
    scores_NE[:, 1] = np.arange(200) / 200
    found = solve_exits(scores_NE, [1, 2], 3, mean_layers=2.0)  # a third each: 66 wanted
    assert found.shares[0] == 0.4  # 80 are nearer than 40
    assert found.shares[1] == 52 / 200  # of 132 in all; what exit 1 took too much is missing here
    found = solve_exits(scores_NE, [1, 2], 3, mean_layers=2.2)
    assert found.distribution[0] == pytest.approx(0.238, abs=1e-3) and found.shares[0] == 0.2  # 47: nearer to 40
    found = solve_exits(np.ones((100, 2)), [1, 2], 3, mean_layers=2.8)  # all or none
    assert found.thresholds == (math.inf, math.inf) and found.mean_layers == 3.0


@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-40, 2.0**-126, -(2.0**-126), 1.0])
def test_thresholds_hold_where_hardware_flushes_subnormal_numbers(value):
    scores_N1 = np.full((60, 1), value)
    found = solve_exits(scores_N1, [1], 2, mean_layers=1.0)
    assert found.shares == (1.0, 0.0)
    # On this backend, too, which takes subnormal numbers for 0.
    assert bool(jnp.float32(value) > jnp.float32(found.thresholds[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_demands_at_either_end(family, rng):
    scores = surer(rng, 200, len(LAYERS))
    first = solve_exits(scores, LAYERS, L, mean_layers=2, family=family)
    assert first.mean_layers == 2.0 and first.shares[0] == 1.0
    last = solve_exits(scores, LAYERS, L, mean_layers=12, family=family)
    assert last.mean_layers == 12.0 and last.policy(Confidence(threshold=1.0)) == RunAll()
    capped = solve_exits(scores, LAYERS, L, mean_layers=8, peak=8, family=family)
    assert capped.mean_layers == 8.0 and capped.policy(Confidence(threshold=1.0)) == ExitAt(layer=8)
    only = solve_exits(scores, LAYERS, L, mean_layers=2, peak=2, family=family)
    assert only.layers == only.thresholds == () and only.shares == (1.0,)


def test_memory_lowers_the_peak(rng):
    scores = surer(rng, 200, len(LAYERS))
    sizes = [10] * 6 + [20] * 6
    for memory, peak in ((180, 12), (179, 10), (140, 10), (139, 8), (20, 2)):
        found = solve_exits(scores, LAYERS, L, mean_layers=2, memory=memory, layer_bytes=sizes)
        assert found.peak == peak
    found = solve_exits(scores, LAYERS, L, mean_layers=2, peak=6, memory=10**6, layer_bytes=sizes)
    assert found.peak == 6


def test_bytes_of_layers_by_hand(tiny_model):
    # Two norms of 24; wqkv 24 x 2 x 5 x 8; wo 6 x 8 x 24; gate and up 24 x 2 x 40; down 40 x 24. Float32.
    layer = 4 * (2 * 24 + 24 * 2 * 5 * 8 + 6 * 8 * 24 + 24 * 2 * 40 + 40 * 24)
    assert layer_bytes_of(tiny_model) == layer_bytes_of(stack_for_decoding(tiny_model)) == (layer,) * 6


def after_a_prompt(model, plan):
    """Return what one decode step gives after a prompt."""
    tokens, spec = jnp.array([[5, 9, 2], [7, 7, 1]]), CacheSpec(capacity=5)
    _, state = prefill(model, tokens, jnp.array([3, 2]), plan, spec, jax.random.key(0))
    return decode_step(model, state, plan)


def test_layers_above_the_peak_are_in_no_program(tiny_model, rng):
    found = solve_exits(surer(rng, 200, 3), [1, 2, 4], 6, mean_layers=2.0, peak=4)
    plan = Plan(depth=found.policy(Confidence(threshold=1.0)))
    assert isinstance(plan.depth, FirstOf)
    check(plan, tiny_model)
    assert plan.depth.prefill_layers(6) == (0, 1, 2, 3)
    # As many products, in prompt and step, as in a model that has no other layers.
    shallow = object.__new__(Transformer)
    vars(shallow).update(vars(tiny_model) | {"layers": tiny_model.layers[:4]})
    uncapped = Plan(depth=plan.depth.policies[0])
    counts = [
        str(jax.make_jaxpr(after_a_prompt)(model, chosen)).count("dot_general")
        for model, chosen in ((tiny_model, plan), (shallow, uncapped), (tiny_model, uncapped))
    ]
    assert counts[0] == counts[1] < counts[2]
    # And their weights are never read.
    poisoned = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * jnp.nan if "[4]" in jax.tree_util.keystr(path) else leaf, tiny_model
    )
    assert sum(bool(jnp.isnan(leaf).any()) for leaf in jax.tree.leaves(poisoned)) > 3
    step = jax.jit(after_a_prompt, compiler_options={"xla_backend_optimization_level": 0})
    (clean, stats), (dirty, _) = step(tiny_model, plan), step(poisoned, plan)
    np.testing.assert_array_equal(clean.token, dirty.token)
    assert int(stats.needed.max()) <= 4


def test_the_policy_asks_only_where_something_exits(rng):
    scores = surer(rng, 1000, len(LAYERS))
    scores[:, 2] = 0.5  # nothing can be told apart here: the exit takes all that are left, or none
    found = solve_exits(scores, LAYERS, L, mean_layers=10.5)
    assert found.thresholds[2] == math.inf
    policy = found.policy(Confidence(threshold=1.0, measure="margin"))
    assert isinstance(policy, Thresholds) and policy.layers == (2, 4, 8, 10)
    np.testing.assert_array_equal(policy.thresholds, np.float32([found.thresholds[i] for i in (0, 1, 3, 4)]))
    assert policy.policy.measure == "margin"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean_layers": 1.9}, r"between the first exit and the peak \(2 to 12\), got 1.9"),
        ({"mean_layers": 9, "peak": 8}, r"\(2 to 8\), got 9"),
        ({"mean_layers": math.nan}, "got nan"),
        ({"peak": 7}, r"an exit \(2, 4, 6, 8, 10, 12\), got 7"),
        ({"peak": 13}, "an exit .*, got 13"),
        ({"memory": 19, "layer_bytes": [10] * L}, "2 layers of the first exit, 20 bytes, got 19"),
        ({"memory": 50, "layer_bytes": [10] * L}, r"\(2 to 4\), got 6"),
        ({"memory": 50}, "layer_bytes of 12 layers beside memory, got none"),
        ({"memory": 50, "layer_bytes": [10]}, "got 1"),
        ({"scores_NE": np.zeros((0, 5))}, r"at least one sample, got shape \(0, 5\)"),
        ({"scores_NE": np.zeros(5)}, r"got shape \(5,\)"),
        ({"scores_NE": np.zeros((200, 4))}, r"scores \[samples, 5\] .* got shape \(200, 4\)"),
        ({"scores_NE": np.zeros((119, 5))}, f"at least {6 * MIN_SAMPLES} samples for 6 exits, got 119"),
        ({"scores_NE": np.full((200, 5), np.nan)}, "got 1000 that are NaN or infinite"),
        ({"scores_NE": np.full((200, 5), np.inf)}, "NaN or infinite"),
        ({"layers": (4, 2, 6, 8, 10)}, "ascending order"),
        ({"layers": (2, 2, 6, 8, 10)}, "different layers"),
        ({"layers": (0, 2, 6, 8, 10)}, "from 1 to 12"),
        ({"layers": (2, 4, 6, 8, 14)}, "from 1 to 12"),
        ({"layers": (2, 4, 6, 8, 9.5)}, "layers from 1 to 12"),
        ({"layers": ()}, "layers from 1 to 12"),
        ({"family": "poisson"}, "exponential, gaussian, gamma, got 'poisson'"),
    ],
    ids=str,
)
def test_bad_input_is_refused(changes, message):
    arguments = {"scores_NE": np.zeros((200, 5)), "layers": LAYERS, "num_layers": L, "mean_layers": 6.0}
    with pytest.raises(ValueError, match=message):
        solve_exits(**(arguments | changes))
