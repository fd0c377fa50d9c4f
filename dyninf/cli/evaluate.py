"""``dyninf eval``: how early a model knows the next token, exit layer by exit layer; or what it answers of tasks."""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import dyninf
from dyninf.cli.common import Loaded, add_model_options, check_output, load, progress, table_console
from dyninf.cli.compare import add_data_options, read_windows
from dyninf.cli.heldout import Windows
from dyninf.cli.plan_options import add_plan_options, check_plan, read_plan
from dyninf.cli.quality import batches, evaluate
from dyninf.cli.task_eval import add_task_options, run_tasks

EXAMPLES = """\
examples:
  dyninf eval
  dyninf eval --model my_model/ --data held_out/ --plan exit_confidence --json exits.json
  dyninf eval --tasks niah_single_1,passkey --plans dense,exit_half --lengths 1024 --jsonl rows.jsonl --plots plots/

An exit after layer l reads the state of layer l with the model's own final norm and vocabulary matrix.
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "eval",
        help="how many tokens each exit layer gets right, or what plans answer",
        description="Measure a model on held-out text at every exit layer, and under a plan; or plans on tasks.",
        epilog=EXAMPLES,
    )
    add_model_options(parser)
    add_data_options(parser)
    add_plan_options(parser, default=None)
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON, too")
    add_task_options(parser)
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Measure and print one row per exit layer, or one table of plans and tasks."""
    if arguments.tasks is not None:
        text_only = {"--plan": arguments.plan, "--set": arguments.changes, "--data": arguments.data}
        text_only |= {"--tokens": arguments.tokens, "--json": arguments.json}
        if given := [name for name, value in text_only.items() if value]:
            raise ValueError(f"expected --plans and --jsonl beside --tasks, got {', '.join(given)}, which is for text")
        return run_tasks(arguments)
    if arguments.changes and arguments.plan is None:
        raise ValueError("expected --plan NAME beside --set, got no plan to change")
    check_output(arguments.json)
    loaded = load(arguments)
    plan = None
    if arguments.plan is not None:
        plan = read_plan(arguments.plan, arguments.changes, len(loaded.model.layers))
        check_plan(plan, loaded.model)
    windows = read_windows(loaded, arguments)
    result = {"model": loaded.name, "dtype": loaded.dtype, **measure_exits(loaded, windows)}
    if plan is not None:
        quality = evaluate(loaded.model, plan, windows)
        result["plan"] = {
            "name": arguments.plan,
            "changes": arguments.changes,
            "bits_per_byte": quality.bits_per_byte,
            "accuracy": quality.accuracy,
            "layers_needed": quality.layers_needed,
        }
    _print(result)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def measure_exits(loaded: Loaded, windows: Windows) -> dict[str, Any]:
    """Return shares of the text's tokens for every exit layer of the dense model.

    Returns:
        ``exits``: for each number of layers run, the share of tokens ``right`` there, ``first_right`` there and at no
        earlier exit, the ``agreement`` with the full model, and ``bits_per_byte``. ``right_nowhere`` is the share
        that no exit gets right; the ``first_right`` and it sum to 1.
    """
    model = loaded.model
    parts = []
    with progress() as bar:
        for rows in bar.track(batches(model, windows), description="reading every exit"):
            inputs, targets, lengths = windows.inputs[rows], windows.targets[rows], windows.lengths[rows]
            parts.append(jax.device_get(_read_exits(model, inputs, targets, lengths)))
    count, live = len(windows.lengths), windows.live
    choices_LP, nll_LP = (np.concatenate(part, axis=1)[:, :count][:, live] for part in zip(*parts, strict=True))
    right_LP = choices_LP == windows.targets[live][None]
    num_tokens, num_bytes = right_LP.shape[1], int(windows.num_bytes.sum())
    first_P = np.where(right_LP.any(axis=0), right_LP.argmax(axis=0), -1)
    bits_L = nll_LP.sum(axis=1, dtype=np.float64) / np.log(2) / max(1, num_bytes)
    exits = [
        {
            "layers": layer + 1,
            "right": float(right_LP[layer].mean()),
            "first_right": float(np.mean(first_P == layer)),
            "agreement": float(np.mean(choices_LP[layer] == choices_LP[-1])),
            "bits_per_byte": float(bits_L[layer]),
        }
        for layer in range(len(right_LP))
    ]
    return {
        "tokens": num_tokens,
        "bytes": num_bytes,
        "bits_per_byte": float(bits_L[-1]),
        "exits": exits,
        "right_nowhere": float(np.mean(first_P == -1)),
    }


@jax.jit
def _read_exits(model, tokens_BT, targets_BT, lengths_B):
    states_LBTD = dyninf.layer_states(model, tokens_BT, lengths_B)[1:]

    def read(x_BTD):
        logits_BTV = model.unembed(x_BTD)
        target_BT = jnp.take_along_axis(logits_BTV, targets_BT[:, :, None], axis=-1)[:, :, 0]
        return jnp.argmax(logits_BTV, axis=-1), jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT

    return jax.lax.map(read, states_LBTD)  # one layer's logits at a time


def _print(result: dict[str, Any]) -> None:
    title = (
        f"{result['model']} on {result['tokens']} tokens ({result['bytes']} bytes): "
        f"{result['bits_per_byte']:.3f} bits/byte"
    )
    table = Table(title=title, title_justify="left")
    for column in ("layers run", "right", "first right here", "agrees with the full model", "bits/byte"):
        table.add_column(column, justify="right")
    for row in result["exits"]:
        shares = (f"{100 * row[name]:.1f} %" for name in ("right", "first_right", "agreement"))
        table.add_row(str(row["layers"]), *shares, f"{row['bits_per_byte']:.3f}")
    console = table_console()
    console.print(table)
    console.print(f"right at no layer: {100 * result['right_nowhere']:.1f} %")
    if "plan" in result:
        plan, num_layers = result["plan"], len(result["exits"])
        name = " ".join([plan["name"], *plan["changes"]])
        console.print(
            f"plan {name}: {100 * plan['accuracy']:.1f} % right, {plan['bits_per_byte']:.3f} bits/byte, "
            f"{plan['layers_needed']:.2f} of {num_layers} layers needed"
        )
