"""A threshold that keeps early exits close to the dense model, with a stated probability.

Source: CALM (Schuster et al. 2022), section 4, which calibrates its threshold by Learn then Test (Angelopoulos et al.
2021) with fixed-sequence testing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from dyninf.training.calibrate import NEVER, CalibratedExits, check_peak, check_scores, first_exits

Method = Literal["binomial", "hoeffding", "hoeffding_bentkus"]
# Fixed in advance, as the guarantee asks: a grid read off the calibration scores would void it.
GRID = tuple(float(value) for value in np.linspace(1.0, 0.0, 101))


@dataclass(frozen=True, kw_only=True)
class GuaranteedExits(CalibratedExits):
    """Result of :func:`guarantee_agreement`.

    Attributes:
        reached: whether some threshold passed. If not, ``threshold`` never exits: exact unless the peak is below the
            model's depth, where it still exits at the peak and nothing is guaranteed.
        threshold: of every exit alike.
        disagreement: mean loss of the calibration samples at ``threshold``.
        p_value: of the hypothesis that the expected loss at ``threshold`` exceeds ``epsilon``; 1 if none passed.
        num_samples, epsilon, delta: what the guarantee rests on and says.
    """

    reached: bool
    threshold: float
    disagreement: float
    p_value: float
    num_samples: int
    epsilon: float
    delta: float


def guarantee_agreement(
    scores_NE: Any,
    agreement_NE: Any,
    layers: Sequence[int],
    num_layers: int,
    *,
    epsilon: float,
    delta: float,
    peak: int | None = None,
    grid: Sequence[float] = GRID,
    method: Method = "binomial",
) -> GuaranteedExits:
    """Return the smallest threshold whose expected agreement with the dense model is at least ``1 - epsilon``.

    Over the draw of the calibration samples this holds with probability ``1 - delta``. From the strictest threshold
    down, each is tested with a p-value of "the expected loss exceeds epsilon" until the first that is above delta, so
    that all tests together err with probability delta. A sample exits at the first exit whose score exceeds the
    threshold, else at the peak, and loses one minus its agreement there; at the last layer nothing.

    The samples have to be independent draws of what is to be predicted. Tokens of one text are not: take them from many
    texts, or one row a text. Scores and agreement of the dense model speak of tokens that see its keys: decode with
    ``fill="catch_up"``. Under the other fills the keys of tokens that left early change later predictions on top.

    Source: CALM, section 4 (there with Hoeffding-Bentkus p-values, also for consistency with a textual metric).

    Args:
        scores_NE: one row a sample, one column an exit; higher for surer.
        agreement_NE: whether an exit's prediction is the dense model's, or how alike they are (0 to 1).
        layers: layers run at each exit, ascending, 1 to ``num_layers``.
        epsilon: tolerated loss (0 to 1).
        delta: tolerated probability that it is exceeded (0 to 1).
        peak: the largest exit allowed; ``None`` for ``num_layers``.
        grid: thresholds to test, descending, chosen without looking at these samples.
        method: see :func:`p_value`; ``binomial`` needs an agreement of 0 or 1.

    Raises:
        ValueError: if the samples are too few for any threshold to pass, or an argument is out of its range.
    """
    scores_NE = check_scores(scores_NE, layers, num_layers)
    loss_NE = 1.0 - _check_agreement(agreement_NE, scores_NE.shape, method)
    peak = check_peak(peak, layers, num_layers)
    count, grid = len(scores_NE), _check_grid(grid)
    needed = num_needed(epsilon, delta, method)
    if count < needed:
        raise ValueError(
            f"expected at least {needed} samples for {epsilon=} and {delta=}, got {count}: fewer pass no threshold, "
            "even if all agree; collect more or ask for less"
        )
    below = tuple(int(layer) for layer in layers if layer < peak)
    used = len(below)
    last_N1 = np.zeros((count, 1)) if peak == num_layers else loss_NE[:, used : used + 1]
    loss_NE = np.concatenate([loss_NE[:, :used], last_N1], axis=1)
    passed, exits_N, p = NEVER, np.full(count, used), 1.0
    for threshold in grid:
        tried_N = first_exits(scores_NE[:, :used], (threshold,) * used)
        tried = p_value(float(np.mean(loss_NE[np.arange(count), tried_N])), count, epsilon, method)
        if tried > delta:
            break
        passed, exits_N, p = threshold, tried_N, tried
    shares = np.bincount(exits_N, minlength=used + 1) / count
    return GuaranteedExits(
        layers=below,
        thresholds=(passed,) * used,
        peak=peak,
        num_layers=num_layers,
        shares=tuple(shares.tolist()),
        mean_layers=float(np.dot(shares, [*below, peak])),
        reached=passed < NEVER,
        threshold=passed,
        disagreement=float(np.mean(loss_NE[np.arange(count), exits_N])),
        p_value=p,
        num_samples=count,
        epsilon=epsilon,
        delta=delta,
    )


def p_value(mean_loss: float, num_samples: int, epsilon: float, method: Method = "binomial") -> float:
    """Return a p-value of "the expected loss exceeds epsilon" for a mean of independent losses in [0, 1].

    ``binomial``: ``P(Bin(n, epsilon) <= n mean)``, exact for losses of 0 or 1. ``hoeffding``:
    ``exp(-2 n (epsilon - mean)^2)``. ``hoeffding_bentkus``: the smaller of ``exp(-n KL(mean, epsilon))`` and
    ``e P(Bin(n, epsilon) <= ceil(n mean))``.

    Source: Learn then Test (Angelopoulos et al. 2021), proposition 1 for the last; Bates et al. 2021.

    Raises:
        ValueError: if the method is unknown.
    """
    n, eps, mean = num_samples, epsilon, min(mean_loss, epsilon)
    if method == "binomial":
        return _binomial_cdf(round(n * mean_loss), n, eps)
    if method == "hoeffding":
        return math.exp(-2 * n * (eps - mean) ** 2)
    if method == "hoeffding_bentkus":
        divergence = (1 - mean) * math.log((1 - mean) / (1 - eps)) + (mean * math.log(mean / eps) if mean else 0.0)
        # Rounding must not make ceil(100 * 0.07) more than 7.
        bentkus = math.e * _binomial_cdf(math.ceil(n * mean_loss - 1e-9), n, eps)
        return min(1.0, math.exp(-n * divergence), bentkus)
    raise ValueError(f"expected a method among {', '.join(get_args(Method))}, got {method!r}")


def num_needed(epsilon: float, delta: float, method: Method = "binomial") -> int:
    """Return how many samples a threshold needs to pass if none of them has a loss.

    Raises:
        ValueError: if epsilon or delta is not between 0 and 1.
    """
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(f"expected {name} between 0 and 1, both excluded, got {value}; 0.05 is usual")
    rate = 2 * epsilon**2 if method == "hoeffding" else -math.log1p(-epsilon)
    return max(1, math.ceil(-math.log(delta) / rate - 1e-9))


def _binomial_cdf(k: int, n: int, p: float) -> float:
    """Return ``P(Bin(n, p) <= k)``, summed over the logarithms of its terms."""
    if k >= n:
        return 1.0
    i = np.arange(1, k + 1)
    steps = np.log(n - i + 1) - np.log(i) + math.log(p) - math.log1p(-p)
    log_terms = n * math.log1p(-p) + np.concatenate([[0.0], np.cumsum(steps)])
    top = log_terms.max()
    return min(1.0, float(np.exp(top) * np.exp(log_terms - top).sum()))


def _check_agreement(agreement_NE: Any, shape: tuple[int, ...], method: str) -> np.ndarray:
    agreement_NE = np.asarray(agreement_NE, np.float64)
    if agreement_NE.shape != shape:
        raise ValueError(f"expected agreement of the scores' shape {shape}, got {agreement_NE.shape}; pair them up")
    if not np.all((agreement_NE >= 0) & (agreement_NE <= 1)):
        raise ValueError("expected agreement between 0 and 1, got values outside or NaN; leave these samples out")
    if method == "binomial" and not np.isin(agreement_NE, (0.0, 1.0)).all():
        raise ValueError("expected agreement of 0 or 1 for method 'binomial', got others; use 'hoeffding_bentkus'")
    return agreement_NE


def _check_grid(grid: Sequence[float]) -> tuple[float, ...]:
    # As policies see them, so that what was tested is what runs.
    values = tuple(float(np.float32(value)) for value in grid)
    if not values or not all(a > b for a, b in pairwise(values)) or not np.isfinite(values).all():
        raise ValueError(f"expected a grid of finite thresholds in descending order, got {tuple(grid)}; sort it")
    return values
