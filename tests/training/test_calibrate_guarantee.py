"""The guarantee: p-values by hand and against scipy, how often it is broken, and what it refuses."""

import math

import numpy as np
import pytest
import scipy.stats

from dyninf.depth import Confidence, ExitAt, RunAll, Thresholds
from dyninf.training.calibrate_guarantee import guarantee_agreement, num_needed, p_value

METHODS = ("binomial", "hoeffding", "hoeffding_bentkus")


@pytest.mark.parametrize(
    ("mean", "n", "epsilon", "method", "value"),
    [
        (1 / 3, 3, 0.5, "binomial", 0.5),  # (1 + 3) / 2^3
        (0.0, 10, 0.1, "binomial", 0.3486784401),  # 0.9^10
        (0.1, 10, 0.1, "binomial", 0.7360989291),  # 0.9^10 + 10 * 0.1 * 0.9^9
        (1.0, 10, 0.1, "binomial", 1.0),
        (0.1, 100, 0.2, "hoeffding", 0.1353352832),  # exp(-2 * 100 * 0.01)
        (0.3, 100, 0.2, "hoeffding", 1.0),
        # KL = 0.1 ln 0.5 + 0.9 ln 1.125 = 0.0366896, exp(-3.66896) = 0.0255; e P(Bin(100, 0.2) <= 10) = 0.0155
        (0.1, 100, 0.2, "hoeffding_bentkus", math.e * 0.0056963765),
        # Without a loss: exp(-n KL(0, eps)) = 0.8^20, and e times as much
        (0.0, 20, 0.2, "hoeffding_bentkus", 0.8**20),
        (0.2, 100, 0.2, "hoeffding_bentkus", 1.0),
    ],
)
def test_p_values_by_hand(mean, n, epsilon, method, value):
    np.testing.assert_allclose(p_value(mean, n, epsilon, method), value, rtol=1e-6)


def test_p_values_against_scipy(rng):
    for n, epsilon in ((1, 0.5), (37, 0.03), (1000, 0.02), (50_000, 0.3)):
        for k in {0, 1, n // 50, int(n * epsilon), n - 1, n}:
            want = scipy.stats.binom.cdf(k, n, epsilon)
            np.testing.assert_allclose(p_value(k / n, n, epsilon), want, rtol=1e-7, atol=1e-300)
            bentkus = math.e * scipy.stats.binom.cdf(k, n, epsilon)
            mean = min(k / n, epsilon)
            chernoff = math.exp(-n * scipy.stats.entropy([mean, 1 - mean], [epsilon, 1 - epsilon]))
            np.testing.assert_allclose(
                p_value(k / n, n, epsilon, "hoeffding_bentkus"), min(1, bentkus, chernoff), rtol=1e-6, atol=1e-300
            )


def test_needed_samples_are_the_first_with_a_small_p_value():
    # ln 0.05 / ln 0.98 = 148.3; ln 20 / (2 * 0.0004) = 3744.7
    assert num_needed(0.02, 0.05) == 149 and num_needed(0.02, 0.05, "hoeffding") == 3745
    for method in METHODS:
        n = num_needed(0.1, 0.05, method)
        assert p_value(0.0, n, 0.1, method) <= 0.05 < p_value(0.0, n - 1, 0.1, method)


def sample(rng, count):
    """One exit; scores uniform in [0, 1], and 0.4 (1 - score) the chance that it disagrees."""
    scores = rng.uniform(size=(count, 1)).astype(np.float32)
    return scores, rng.uniform(size=(count, 1)) >= 0.4 * (1 - scores)


def true_loss(threshold):
    return 0.2 * (1 - min(threshold, 1)) ** 2  # the integral of 0.4 (1 - s) from the threshold to 1


@pytest.mark.parametrize("method", METHODS)
def test_it_is_broken_no_more_often_than_delta(method, rng):
    epsilon, delta, draws = 0.05, 0.1, 300
    # One threshold only that breaks it, and hardly: here the bound on the failures is tight.
    grid = (1.0, 0.9, 0.8, 0.7, 0.6, 0.499, 0.4)
    assert true_loss(0.499) > epsilon > true_loss(0.6)
    broken, chosen = 0, []
    for _ in range(draws):
        scores, agree = sample(rng, 800)
        found = guarantee_agreement(
            scores, agree, [1], 2, epsilon=epsilon, delta=delta, grid=grid, method=method
        ).threshold
        broken += true_loss(found) > epsilon
        chosen.append(found)
    # Three standard deviations of what 300 draws show of a rate of delta.
    assert broken <= delta * draws + 3 * math.sqrt(draws * delta * (1 - delta))
    assert (broken == 0) == (method == "hoeffding")
    # It is not safe by doing nothing: 0.8 has a loss of 0.008, 0.7 one of 0.018.
    assert np.mean(np.asarray(chosen) <= (0.9 if method == "hoeffding" else 0.7)) > 0.9


def test_the_smallest_passing_threshold_by_hand():
    # 40 samples, two exits. Scores of exit 1: ten 0.9, ten 0.5, the rest 0.1; exit 2 always 0.6.
    scores = np.stack([np.repeat([0.9, 0.5, 0.1], [10, 10, 20]), np.full(40, 0.6)], axis=1)
    agree = np.ones((40, 2), bool)
    agree[10:14, 0] = False
    found = guarantee_agreement(
        scores, agree, [3, 5], 8, epsilon=0.2, delta=0.1, grid=(1.0, 0.8, 0.55, 0.4), method="binomial"
    )
    # At 0.4 ten and ten exit first, four of them wrong: P(Bin(40, 0.2) <= 4) = 0.0759 passes; the rest take exit 2.
    assert (found.threshold, found.disagreement, found.reached) == (float(np.float32(0.4)), 0.1, True)
    np.testing.assert_allclose(found.p_value, 0.0759, atol=5e-5)
    assert found.shares == (0.5, 0.5, 0.0) and found.mean_layers == 4.0
    assert found.policy(Confidence(threshold=1.0)) == Thresholds(
        policy=Confidence(threshold=1.0), thresholds=np.float32([0.4, 0.4]), layers=(3, 5)
    )
    agree[14, 0] = False  # the fifth: P(Bin(40, 0.2) <= 5) = 0.1613
    found = guarantee_agreement(scores, agree, [3, 5], 8, epsilon=0.2, delta=0.1, grid=(1.0, 0.8, 0.55, 0.4))
    assert (found.threshold, found.disagreement) == (float(np.float32(0.55)), 0.0)
    assert found.shares == (0.25, 0.75, 0.0)


def test_testing_stops_at_the_first_threshold_that_fails():
    scores, agree = np.full((100, 1), 0.5), np.ones((100, 1), bool)
    scores[:50], agree[:50] = 0.9, False  # half are surer and wrong
    scores = np.concatenate([scores, np.full((100, 1), 0.1)], axis=1)
    agree = np.concatenate([agree, np.ones((100, 1), bool)], axis=1)
    found = guarantee_agreement(scores, agree, [1, 2], 3, epsilon=0.3, delta=0.05, grid=(1.0, 0.8, 0.4))
    assert found.threshold == 1.0 and found.mean_layers == 3.0


def test_a_guarantee_out_of_reach_never_exits_and_says_so(rng):
    scores, agree = rng.uniform(0.5, 1, size=(200, 2)), np.zeros((200, 2), bool)
    grid = (0.4, 0.3)  # every sample exits at the strictest already
    found = guarantee_agreement(scores, agree, [1, 2], 3, epsilon=0.1, delta=0.05, grid=grid)
    assert not found.reached and found.threshold == math.inf and found.p_value == 1.0
    assert found.mean_layers == 3.0 and found.disagreement == 0.0
    assert found.policy(Confidence(threshold=1.0)) == RunAll()
    # Capped at 2 layers it cannot but exit there.
    found = guarantee_agreement(scores, agree, [1, 2], 3, epsilon=0.1, delta=0.05, grid=grid, peak=2)
    assert not found.reached and found.disagreement == 1.0 and found.mean_layers == 2.0
    assert found.policy(Confidence(threshold=1.0)) == ExitAt(layer=2)


def test_the_peak_counts_what_it_gets_wrong():
    scores, agree = np.full((100, 2), 0.5), np.ones((100, 2), bool)
    agree[:20, 1] = False
    capped = guarantee_agreement(scores, agree, [1, 2], 3, epsilon=0.3, delta=0.05, grid=(0.9, 0.8), peak=2)
    assert capped.disagreement == 0.2 and capped.reached and capped.layers == (1,)


def test_agreement_may_be_partial(rng):
    scores = rng.uniform(size=(500, 1))
    found = guarantee_agreement(
        scores, np.full((500, 1), 0.95), [1], 2, epsilon=0.1, delta=0.05, method="hoeffding_bentkus"
    )
    assert found.threshold == 0.0
    np.testing.assert_allclose(found.disagreement, 0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon between 0 and 1, both excluded, got 0.0"),
        ({"epsilon": 1}, "epsilon .* got 1"),
        ({"epsilon": math.nan}, "epsilon .* got nan"),
        ({"delta": 1.0}, "delta .* got 1.0"),
        ({"delta": -0.1}, "delta .* got -0.1"),
        ({"epsilon": 0.02}, r"at least 149 samples for epsilon=0.02 and delta=0.05, got 100"),
        ({"method": "hoeffding", "epsilon": 0.1}, "at least 150 samples"),
        ({"method": "exact"}, "binomial, hoeffding, hoeffding_bentkus, got 'exact'"),
        ({"grid": ()}, "grid .* descending order"),
        ({"grid": (0.5, 0.9)}, "grid .* descending order"),
        ({"grid": (0.9, math.nan)}, "grid .* descending order"),
        ({"agreement_NE": np.ones((100, 2))}, r"shape \(100, 1\), got \(100, 2\)"),
        ({"agreement_NE": np.full((100, 1), 0.5)}, "hoeffding_bentkus"),
        ({"agreement_NE": np.full((100, 1), np.nan)}, "NaN"),
        ({"agreement_NE": np.full((100, 1), 2.0)}, "between 0 and 1"),
        ({"scores_NE": np.full((100, 1), np.nan)}, "100 that are NaN"),
        ({"scores_NE": np.zeros((0, 1)), "agreement_NE": np.zeros((0, 1))}, r"at least one sample, got shape \(0, 1\)"),
        ({"peak": 1, "layers": [2]}, r"an exit \(2, 3\), got 1"),
    ],
    ids=str,
)
def test_bad_input_is_refused(changes, message):
    arguments = {
        "scores_NE": np.full((100, 1), 0.5),
        "agreement_NE": np.ones((100, 1)),
        "layers": [1],
        "num_layers": 3,
        "epsilon": 0.1,
        "delta": 0.05,
    }
    with pytest.raises(ValueError, match=message):
        guarantee_agreement(**(arguments | changes))
