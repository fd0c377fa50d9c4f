"""``dyninf calibrate``: exit thresholds that meet a budget, or stay close to the dense model, on a text."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

import dyninf
from dyninf.cli.calibrated import RULES
from dyninf.cli.common import add_model_options, check_output, load, table_console
from dyninf.cli.compare import add_data_options, read_windows
from dyninf.cli.heldout import Windows
from dyninf.cli.quality import evaluate
from dyninf.depth import DepthPolicy
from dyninf.training.calibrate import check_exits, check_peak, layer_bytes_of
from dyninf.training.calibrate_guarantee import guarantee_agreement
from dyninf.training.calibrate_plan import calibrate_plan
from dyninf.training.calibrate_scores import collect_agreement, collect_scores

EIGHTHS = 8  # exits by default: asking costs about as much as a layer or two
# The only fill under which tokens see the dense model's keys, as the guarantee has it; with "propagate" the shipped
# model differs on 12 % of tokens where 5 % are guaranteed.
GUARANTEED_FILL = "catch_up"
WINDOW = 256  # tokens; many short pieces of text say more about a mean than few long ones

EXAMPLES = """\
examples:
  dyninf calibrate --mean 0.55 --peak 12 --json plan.json
  dyninf calibrate --mean 0.7 --memory 20000000 --rule saturation --exits 4,8,12
  dyninf calibrate --guarantee 0.02 --delta 0.05

Every other window of the text is calibrated on, the others are measured. Other commands take the file as a plan:
dyninf compare --plans dense,plan.json; in Python it is dyninf.cli.calibrated.read_calibrated("plan.json").
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "calibrate",
        help="exit thresholds for a budget or a guarantee",
        description="Find exit thresholds on a text: for mean layers, peak layers and memory, or for agreement.",
        epilog=EXAMPLES,
    )
    add_model_options(parser)
    add_data_options(parser)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--mean", type=float, metavar="SHARE", help="mean share of the layers that tokens run (0 to 1)")
    goal.add_argument("--guarantee", type=float, metavar="EPSILON", help="share of tokens that may differ from dense")
    parser.add_argument("--delta", type=float, default=0.05, help="chance that the guarantee fails (default: 0.05)")
    parser.add_argument("--peak", type=int, metavar="LAYERS", help="the most layers any token runs (default: all)")
    parser.add_argument("--memory", type=int, metavar="BYTES", help="bytes that the layers up to the peak may take")
    parser.add_argument("--rule", choices=tuple(RULES), default="max_prob", help="what is compared (default: max_prob)")
    parser.add_argument(
        "--exits", metavar="A,B,C", help="layers run at each exit (default: every eighth, and the peak)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan, too")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Calibrate on half of the windows, measure on the other half, print both."""
    check_output(arguments.json)
    if arguments.guarantee is not None and arguments.memory is not None:
        raise ValueError("expected --memory beside --mean, got --guarantee; give the --peak that fits instead")
    if arguments.mean is not None and not 0 < arguments.mean <= 1:
        raise ValueError(f"expected --mean to be a share of the layers, above 0 and up to 1, got {arguments.mean:g}")
    loaded = load(arguments)
    model, rule = loaded.model, RULES[arguments.rule]
    layers = _exits(arguments.exits, arguments.peak, len(model.layers))
    windows = read_windows(loaded, arguments, window=WINDOW)
    if len(windows.lengths) < 2:
        raise ValueError(f"expected at least two windows of text, got {len(windows.lengths)}; give more: --data")
    texts, held_out = _half(windows, 0), _half(windows, 1)
    found = _calibrate(model, texts, rule, layers, arguments)
    fill = "propagate" if arguments.guarantee is None else GUARANTEED_FILL
    plan = dyninf.Plan(depth=found.policy(rule), fill=fill)
    measured, dense = evaluate(model, plan, held_out), evaluate(model, dyninf.Plan(), held_out)
    result = {
        "model": loaded.name,
        "rule": arguments.rule,
        "fill": fill,
        "layers": list(found.layers),
        "thresholds": [None if math.isinf(value) else value for value in found.thresholds],
        "peak": found.peak,
        "num_layers": found.num_layers,
        "shares": list(found.shares),
        "calibrated_layers": found.mean_layers,
        "held_out_layers": measured.layers_needed,
        "held_out_agreement": float(np.mean(measured.choices == dense.choices)),
        "held_out_accuracy": measured.accuracy,
        "held_out_accuracy_of_dense": measured.accuracy / dense.accuracy if dense.accuracy else 0.0,
    }
    if arguments.guarantee is not None:
        result |= {"epsilon": found.epsilon, "delta": found.delta, "reached": found.reached, "p_value": found.p_value}
    _print(result, int(texts.lengths.sum()))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _calibrate(model: Any, texts: Windows, rule: DepthPolicy, layers: tuple[int, ...], arguments: Any) -> Any:
    tokens, lengths, num_layers = texts.inputs, texts.lengths, len(model.layers)
    if arguments.guarantee is None:
        return calibrate_plan(
            model,
            tokens,
            lengths,
            rule,
            layers,
            mean_layers=arguments.mean * num_layers,
            peak=arguments.peak,
            memory=arguments.memory,
            layer_bytes=layer_bytes_of(model),
        ).exits
    check_exits(layers, num_layers)
    check_peak(arguments.peak, layers, num_layers)
    scores = collect_scores(model, tokens, lengths, rule, layers)
    agreement = collect_agreement(model, tokens, lengths, layers)
    demands = {"epsilon": arguments.guarantee, "delta": arguments.delta, "peak": arguments.peak}
    return guarantee_agreement(scores, agreement, layers, num_layers, **demands)


def _exits(text: str | None, peak: int | None, num_layers: int) -> tuple[int, ...]:
    if text is None:
        step = max(1, num_layers // EIGHTHS)
        given = {layer for layer in (peak,) if layer is not None and 1 <= layer < num_layers}
        return tuple(sorted({*range(step, num_layers, step), *given}))
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected layers joined by commas for --exits, got {text!r}") from None


def _half(windows: Windows, first: int) -> Windows:
    names = ("inputs", "targets", "lengths", "num_bytes")
    return replace(windows, **{name: getattr(windows, name)[first::2] for name in names})


def _print(result: dict[str, Any], num_tokens: int) -> None:
    table = Table(title=f"{result['model']}, {result['rule']}, calibrated on {num_tokens} tokens", title_justify="left")
    for column in ("layers run", "threshold", "tokens that exit"):
        table.add_column(column, justify="right")
    shown = ["never" if value is None else f"{value:.6g}" for value in result["thresholds"]]
    rows = zip([*result["layers"], result["peak"]], [*shown, "all left"], result["shares"], strict=True)
    for layers, threshold, share in rows:
        table.add_row(str(layers), threshold, f"{100 * share:.1f} %")
    console = table_console()
    console.print(table)
    num_layers = result["num_layers"]
    console.print(
        f"held out: {result['held_out_layers']:.2f} of {num_layers} layers needed "
        f"({100 * result['held_out_layers'] / num_layers:.1f} %), {100 * result['held_out_agreement']:.1f} % of tokens "
        f"as dense, {100 * result['held_out_accuracy_of_dense']:.1f} % of its accuracy"
    )
    if "epsilon" in result:
        differ, chance = f"at most {100 * result['epsilon']:g} %", f"{100 * (1 - result['delta']):g} %"
        said = f"with fill={result['fill']!r} {differ} of tokens differ from dense, with a confidence of {chance} if "
        said += "tokens are independent draws"
        console.print(f"guaranteed: {said}" if result["reached"] else f"not reached by any threshold: {said}")
