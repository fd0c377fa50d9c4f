"""Thresholds for early exits that meet a budget: mean layers, peak layers and memory, from scores on a small data set.

Convention: a score is higher the surer an exit is, as the measures of :mod:`dyninf.depth.exits` are, and a token exits
where its score exceeds the threshold. For values that are lower for surer, such as the distance of two predictions in
DeeR-VLA, pass their negatives and negate the thresholds. An exit is named by the layers that run up to it.
Source: DeeR-VLA (Yue et al. 2024), section 3.3, and its released code; the same family as MSDNet (Huang et al. 2018).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import numpy as np

from dyninf.depth.base import DepthPolicy, RunAll
from dyninf.depth.combinators import first_of
from dyninf.depth.static import ExitAt
from dyninf.depth.thresholds import Thresholds
from dyninf.model import CausalLM

Family = Literal["exponential", "gaussian", "gamma"]
MIN_SAMPLES = 20  # an exit; each loses up to one sample to rounding, which moves the mean by 2.5 % of the exits at most
GAMMA_SCALE = 2.0  # DeeR's
NEVER = math.inf  # the threshold of an exit that nothing takes


@dataclass(frozen=True, kw_only=True)
class CalibratedExits:
    """Thresholds of exits, and what they did on the samples that they come from.

    Attributes:
        layers: layers run at each exit below the peak, ascending.
        thresholds: one for each of ``layers``, exact in float32; a score above it exits, infinity never does.
        peak: layers that no sample exceeds; all that are left exit here.
        num_layers: layers of the model; those above the peak need not exist.
        shares: share of the samples that took each exit, then that reached the peak.
        mean_layers: mean layers of the samples.
    """

    layers: tuple[int, ...]
    thresholds: tuple[float, ...]
    peak: int
    num_layers: int
    shares: tuple[float, ...]
    mean_layers: float

    def policy(self, rule: DepthPolicy) -> DepthPolicy:
        """Return the depth policy: ``rule`` asked where an exit is taken, capped at the peak.

        Layers above the peak are in no program of the plan, and exits that nothing takes are not asked.

        Args:
            rule: the policy whose scores were calibrated, with a threshold of 1, which is not used.
        """
        taken = [(layer, value) for layer, value in zip(self.layers, self.thresholds, strict=True) if value < NEVER]
        if not taken:
            return RunAll() if self.peak == self.num_layers else ExitAt(layer=self.peak)
        layers, values = zip(*taken, strict=True)
        exits = Thresholds(policy=rule, thresholds=np.asarray(values, np.float32), layers=layers)
        return exits if self.peak == self.num_layers else first_of(exits, ExitAt(layer=self.peak))


@dataclass(frozen=True, kw_only=True)
class BudgetedExits(CalibratedExits):
    """Result of :func:`solve_exits`: also the ``distribution`` over exits and peak that the thresholds aim at."""

    distribution: tuple[float, ...]


def solve_exits(
    scores_NE: Any,
    layers: Sequence[int],
    num_layers: int,
    *,
    mean_layers: float,
    peak: int | None = None,
    memory: int | None = None,
    layer_bytes: Sequence[int] | None = None,
    family: Family = "exponential",
) -> BudgetedExits:
    """Return thresholds under which tokens run ``mean_layers`` on average and never more than ``peak``.

    One parameter of a family of distributions over the exits is bisected until its mean meets the demand. In order of
    depth, each threshold then lets the exit's share of all samples out of those that are still there. Cost: one sort an
    exit. What the mean of other data is off by falls with the square root of the samples, where they are independent;
    tokens of one text go together, and hundreds of texts are what it takes for two hundredths of the depth.

    Scores of the dense model are not quite those that a plan meets, where earlier tokens left early:
    :func:`dyninf.training.calibrate_plan.calibrate_plan` corrects for that.

    Source: DeeR-VLA, section 3.3. Differences: the parameter follows from the demand (there it is given); exits need
    not be evenly spaced; a threshold is the next float32 below the last score that exits, as a score has to exceed it;
    where equal scores rule the wanted share out the nearer one is taken, and later exits make up for it (there all
    equal scores exit, and later exits keep their shares). The online search on top of it is left out.

    Args:
        scores_NE: one row a sample, one column an exit.
        layers: layers run at each exit, ascending, 1 to ``num_layers``.
        mean_layers: demanded mean.
        peak: the largest exit allowed; ``None`` for ``num_layers``.
        memory: bytes that the layers up to the peak may take; lowers the peak to the largest exit that fits.
        layer_bytes: bytes of each layer, for ``memory``; see :func:`layer_bytes_of`.
        family: shape of the distribution; see :func:`exit_distribution`.

    Raises:
        ValueError: if the demands contradict each other, or the scores are too few, not finite, or do not fit.
    """
    below, peak, distribution_E = choose_distribution(
        layers, num_layers, mean_layers=mean_layers, peak=peak, memory=memory, layer_bytes=layer_bytes, family=family
    )
    scores_NE = check_scores(scores_NE, layers, num_layers)
    needed = MIN_SAMPLES * (len(below) + 1)
    if len(scores_NE) < needed:
        raise ValueError(
            f"expected at least {needed} samples for {len(below) + 1} exits, got {len(scores_NE)}; collect more scores"
        )
    thresholds, shares = _cut(scores_NE[:, : len(below)], distribution_E)
    return BudgetedExits(
        layers=below,
        thresholds=thresholds,
        peak=peak,
        num_layers=num_layers,
        shares=shares,
        mean_layers=float(np.dot(shares, [*below, peak])),
        distribution=tuple(distribution_E.tolist()),
    )


def choose_distribution(
    layers: Sequence[int],
    num_layers: int,
    *,
    mean_layers: float,
    peak: int | None = None,
    memory: int | None = None,
    layer_bytes: Sequence[int] | None = None,
    family: Family = "exponential",
) -> tuple[tuple[int, ...], int, np.ndarray]:
    """Return the exits below the peak, the peak, and the distribution over both that meets the demands.

    Arguments and errors are those of :func:`solve_exits`, which needs scores on top: ask here first where collecting
    them takes long.
    """
    check_exits(layers, num_layers)
    peak = _fit_memory(layers, check_peak(peak, layers, num_layers), num_layers, memory, layer_bytes)
    below = tuple(int(layer) for layer in layers if layer < peak)
    return below, peak, _meet(family, mean_layers, np.asarray([*below, peak], np.float64))


def exit_distribution(family: Family, parameter: float, num_exits: int) -> np.ndarray:
    """Return the probabilities ``[E]`` of a family at the exits 1 to E; the mean rises with the parameter.

    ``exponential``: proportional to ``q ** i`` with ``q = exp(parameter)``. ``gaussian``: a normal density of
    deviation 1 around exit ``parameter + 1``. ``gamma``: the density of scale 2 and shape ``parameter``, at any real
    shape, since only ratios count.

    Source: DeeR-VLA, released code (``exp`` with q itself, ``gauss``, ``gamma``).
    """
    exits_E = np.arange(1.0, num_exits + 1)
    if family == "exponential":
        log_E = parameter * exits_E
    elif family == "gaussian":
        log_E = -0.5 * (exits_E - 1 - parameter) ** 2
    elif family == "gamma":
        log_E = (parameter - 1) * np.log(exits_E) - exits_E / GAMMA_SCALE
    else:
        raise ValueError(f"expected a family among {', '.join(get_args(Family))}, got {family!r}")
    weights_E = np.exp(log_E - log_E.max())
    return weights_E / weights_E.sum()


def layer_bytes_of(model: CausalLM) -> tuple[int, ...]:
    """Return the bytes of each layer's weights."""
    layers = [model.layers[index] for index in range(len(model.layers))]
    return tuple(sum(leaf.nbytes for leaf in jax.tree.leaves(layer)) for layer in layers)


def first_exits(scores_NE: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """Return the index of the first exit whose score exceeds its threshold ``[N]``, E where none does."""
    exceeds_NE = scores_NE > np.asarray(thresholds, np.float32)[None]
    return np.where(exceeds_NE.any(axis=1), exceeds_NE.argmax(axis=1), scores_NE.shape[1])


def check_exits(layers: Sequence[int], num_layers: int) -> None:
    """Raise ValueError unless the exits are ascending layers of the model."""
    whole = all(isinstance(layer, int | np.integer) for layer in layers)
    if not len(layers) or not whole or list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] > num_layers:
        raise ValueError(
            f"expected exits as different layers from 1 to {num_layers} in ascending order, got {tuple(layers)}; sort "
            "them and the columns of the scores alike"
        )


def check_scores(scores_NE: Any, layers: Sequence[int], num_layers: int) -> np.ndarray:
    """Return the scores as policies see them, in float32 without subnormal numbers, after checking them.

    Raises:
        ValueError: if there are none, they do not fit the exits, or one is not finite.
    """
    check_exits(layers, num_layers)
    scores_NE = np.asarray(scores_NE)
    if scores_NE.ndim != 2 or scores_NE.shape[1] != len(layers) or not len(scores_NE):
        raise ValueError(
            f"expected scores [samples, {len(layers)}] of at least one sample, got shape {scores_NE.shape}; give one "
            "row a sample and one column an exit"
        )
    bad = int(np.sum(~np.isfinite(scores_NE.astype(np.float32))))
    if bad:
        raise ValueError(f"expected finite scores, got {bad} that are NaN or infinite; leave these samples out")
    scores_NE = scores_NE.astype(np.float32)
    return np.where(np.abs(scores_NE) < np.finfo(np.float32).tiny, np.float32(0), scores_NE)


def check_peak(peak: int | None, layers: Sequence[int], num_layers: int) -> int:
    """Return the peak, ``num_layers`` for ``None``.

    Raises:
        ValueError: if it is no exit.
    """
    if peak is None:
        return num_layers
    if peak != num_layers and peak not in layers:
        known = ", ".join(map(str, sorted({*layers, num_layers})))
        raise ValueError(f"expected the peak to be an exit ({known}), got {peak}; choose one of them")
    return int(peak)


def _fit_memory(layers, peak, num_layers, memory, layer_bytes) -> int:
    if memory is None:
        return peak
    if layer_bytes is None or len(layer_bytes) != num_layers:
        given = "none" if layer_bytes is None else len(layer_bytes)
        raise ValueError(f"expected layer_bytes of {num_layers} layers beside memory, got {given}; see layer_bytes_of")
    upto = np.concatenate([[0], np.cumsum(layer_bytes, dtype=np.int64)])
    fitting = [layer for layer in {*layers, peak} if layer <= peak and upto[layer] <= memory]
    if not fitting:
        first = min(*layers, peak)
        raise ValueError(
            f"expected memory for the {first} layers of the first exit, {upto[first]} bytes, got {memory}; allow more "
            "or add an earlier exit"
        )
    return int(max(fitting))


def _meet(family: Family, mean_layers: float, costs_E: np.ndarray) -> np.ndarray:
    """Return the distribution of a family whose mean cost is the demand."""
    first, peak = costs_E[0], costs_E[-1]
    if not first <= mean_layers <= peak:
        raise ValueError(
            f"expected mean_layers between the first exit and the peak ({first:g} to {peak:g}), got {mean_layers}; "
            "change the demand, the peak or the exits"
        )
    num_exits = len(costs_E)
    # At either end e^-60 is left beside the first or the last exit.
    low, high = -100.0 - num_exits, 100.0 + 61.0 * num_exits
    for _ in range(200):
        middle = 0.5 * (low + high)
        if exit_distribution(family, middle, num_exits) @ costs_E < mean_layers:
            low = middle
        else:
            high = middle
    return exit_distribution(family, high, num_exits)


def _cut(scores_NE: np.ndarray, distribution_E: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return thresholds and the shares that they let out, the rest's share last."""
    count = len(scores_NE)
    # Rounding must not make floor(0.1 * 30) less than 3.
    wanted_E = np.floor(count * distribution_E + 1e-9).astype(int).cumsum()
    here_N, thresholds, shares = np.ones(count, bool), [], []
    for scores_N, wanted in zip(scores_NE.T, wanted_E, strict=False):  # the peak has no threshold
        left_N = np.sort(scores_N[here_N])[::-1]
        thresholds.append(_threshold(left_N, max(0, wanted - (count - len(left_N)))))
        leaves_N = here_N & (scores_N > np.float32(thresholds[-1]))
        here_N &= ~leaves_N
        shares.append(leaves_N.mean())
    return tuple(thresholds), tuple(float(share) for share in (*shares, here_N.mean()))


def _threshold(descending_N: np.ndarray, wanted: int) -> float:
    """Return the threshold that lets out as near to the ``wanted`` highest scores as equal ones allow."""
    if wanted == 0:
        return NEVER
    last = descending_N[wanted - 1]
    above, with_equal = int(np.sum(descending_N > last)), int(np.sum(descending_N >= last))
    if wanted - above < with_equal - wanted:
        return float(last) if above else NEVER
    tiny = np.finfo(np.float32).tiny
    if last == 0 or last == tiny:  # what lies just below is subnormal, which hardware takes for 0
        return float(last - tiny)
    return float(np.nextafter(last, np.float32(-np.inf)))
