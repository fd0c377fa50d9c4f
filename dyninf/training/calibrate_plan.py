"""From a model, a text and a budget to a plan: scores, thresholds, and a correction by what the plan does on the text.

Scores come from the dense model, but under a plan later tokens attend to keys of tokens that left early, or catch up
with them, and so exit elsewhere. The demand is corrected by the difference, measured under teacher forcing.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.depth.base import DepthPolicy
from dyninf.forward import forward
from dyninf.model import CausalLM, vocab_size
from dyninf.plan import Plan
from dyninf.training.calibrate import BudgetedExits, choose_distribution, solve_exits
from dyninf.training.calibrate_scores import collect_scores

LOGITS = 1 << 26  # logits held at once while a plan reads a text: 256 MiB


@dataclass(frozen=True, kw_only=True)
class CalibratedPlan:
    """A plan, the exits that it takes, and the mean layers it needed on the calibration text."""

    plan: Plan
    exits: BudgetedExits
    mean_layers: float


def calibrate_plan(
    model: CausalLM,
    tokens: Any,
    lengths: Any,
    rule: DepthPolicy,
    layers: Sequence[int],
    *,
    mean_layers: float,
    plan: Plan | None = None,
    rounds: int = 2,
    **demands: Any,
) -> CalibratedPlan:
    """Return a plan that needs ``mean_layers`` on average on this text, and on others like it.

    Solves for the demand, measures the plan, and solves again for the demand less what it was exceeded by, ``rounds``
    times. On the shipped model the correction is 1 % of depth with ``fill="propagate"``, up to 2 % with ``mask`` and
    7 % with ``catch_up``, where tokens that find no room to wait run every layer. Costs a pass of the dense model, a
    readout of every exit, and ``1 + rounds`` passes of the plan. The result says what mean was met.

    Args:
        tokens: ``int [B, T]``, right-padded; many short texts say more than few long ones.
        lengths: tokens of each text ``[B]``; ``None`` for T.
        rule: a :class:`Confidence` or :class:`Saturation`; the threshold is not used.
        layers: layers run at each exit, ascending.
        plan: how the rest runs; its depth is replaced. ``None`` for ``Plan()``.
        rounds: corrections (0: none).
        demands: ``peak``, ``memory``, ``layer_bytes`` and ``family`` of :func:`solve_exits`.

    Raises:
        ValueError: as :func:`collect_scores` and :func:`solve_exits`.
    """
    plan, num_layers = Plan() if plan is None else plan, len(model.layers)
    choose_distribution(layers, num_layers, mean_layers=mean_layers, **demands)
    scores_NE = collect_scores(model, tokens, lengths, rule, layers)
    asked = mean_layers
    for number in range(1 + rounds):
        exits = solve_exits(scores_NE, layers, num_layers, mean_layers=asked, **demands)
        found = dataclasses.replace(plan, depth=exits.policy(rule))
        measured = float(np.mean(needed_layers(model, tokens, lengths, found)))
        if number < rounds:
            asked = float(np.clip(asked + mean_layers - measured, min(*layers, exits.peak), exits.peak))
    return CalibratedPlan(plan=found, exits=exits, mean_layers=measured)


def needed_layers(model: CausalLM, tokens: Any, lengths: Any, plan: Plan) -> np.ndarray:
    """Return the layers that each token needs under a plan, ``int [samples]``; samples as in :func:`collect_scores`."""
    tokens = np.asarray(tokens)
    batch, length = tokens.shape
    lengths = np.full(batch, length) if lengths is None else np.asarray(lengths)
    rows_at_once = min(batch, max(1, LOGITS // (length * vocab_size(model))))
    places_T, parts = np.arange(length), []
    for start in range(0, batch, rows_at_once):
        rows = np.minimum(np.arange(start, start + rows_at_once), batch - 1)
        needed_BT = np.asarray(_needed(model, tokens[rows], lengths[rows], plan))[: batch - start]
        used_BT = (places_T > 0) & (places_T < lengths[rows, None])
        parts.append(needed_BT[used_BT[: batch - start]])
    return np.concatenate(parts)


@jax.jit
def _needed(model, tokens_BT, lengths_B, plan):
    prompts_B = jnp.ones_like(lengths_B)  # said even where the plan's prompts are sparse and would be the whole text
    return forward(model, tokens_BT, plan, lengths=lengths_B, prompt_lengths=prompts_B).needed
