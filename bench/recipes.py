"""What each training recipe leaves at its exits: accuracy against layers, for equal parameters and equal tokens.

One model is trained from scratch on a run directory of packed tokens (``dyninf train`` or
:func:`dyninf.training.loop.prepare` makes one) under every recipe, for the same number of steps of the same batches:

- ``layerskip``, ``soft`` and ``plain`` train the whole model for all of the steps;
- ``frozen`` and ``jei`` put exits on one plain backbone that was trained for the first ``1 - --heads`` of the steps,
  and train these for the rest, so that the model they make has seen as many tokens as the others; ``jei`` once for each
  of ``--prices``, by which its gates are told how deep to go.

Then held-out windows are read: what every exit layer predicts if all tokens leave there, and what tokens that leave by
a rule need and predict, over a sweep of its threshold. The rule is the confidence of the exits' own readout (asked at
every eighth of the depth), or the trained gates of ``frozen`` and ``jei``.

``python bench/recipes.py --data RUN --config pycode-13m --steps 800 --jsonl FILE`` prints one JSON object a variant.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

import dyninf
from bench.names import names_among
from dyninf import depth, models
from dyninf.cli.bench import describe_run, write_row
from dyninf.cli.common import DTYPES, default_dtype
from dyninf.cli.heldout import Windows
from dyninf.cli.plan_options import change_field
from dyninf.cli.quality import evaluate
from dyninf.cli.train import CONFIGS, configure
from dyninf.depth.base import DepthPolicy
from dyninf.training.data import TokenData
from dyninf.training.exits_file import load_exits
from dyninf.training.heads import handed_over
from dyninf.training.loop import train
from dyninf.training.recipe import HEADS, Recipe
from dyninf.training.states import exit_predictions, hidden_states

VARIANTS = ("layerskip", "soft", "plain", "frozen", "jei")
EIGHTHS = 8  # of the depth; asking costs about as much as a layer or two
BACKBONE = "backbone"  # plain, for fewer steps
PRICES = "0.05,0.15,0.3,0.7"
THRESHOLDS = "0.02,0.05,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95,0.98,0.99"
FILES = ("tokenizer.json", *(f"{part}.tokens{end}" for part in ("train", "heldout") for end in ("", ".json")))


def main() -> int:
    """Train and measure the variants one after the other and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="run directory with the packed tokens")
    parser.add_argument("--config", choices=tuple(CONFIGS), default="tiny", help="model and recipe (default: tiny)")
    parser.add_argument("--set", metavar="PATH=VALUE", dest="changes", action="append", default=[], help="as for train")
    parser.add_argument("--steps", type=int, default=100, help="steps of each variant, in all (default: 100)")
    parser.add_argument("--heads", type=float, default=0.25, help="share of them that frozen and jei train exits for")
    parser.add_argument("--variants", help="separated by commas (default: all)")
    parser.add_argument("--prices", default=PRICES, help=f"of all layers, for jei; separated by commas ({PRICES})")
    parser.add_argument("--windows", type=int, default=32, help="held-out windows of the recipe's length to read")
    parser.add_argument("--thresholds", default=THRESHOLDS, help=f"separated by commas (default: {THRESHOLDS})")
    parser.add_argument("--work", type=Path, help="where runs are kept; again, they go on (default: nowhere)")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file, too")
    arguments = parser.parse_args()
    variants = names_among(parser, "--variants", arguments.variants, VARIANTS)
    try:
        prices = [float(price) for price in arguments.prices.split(",")]
    except ValueError:
        parser.error(f"expected --prices as numbers separated by commas, got {arguments.prices!r}")
    if not 0 < round(arguments.heads * arguments.steps) < arguments.steps:
        parser.error(f"expected --heads to leave steps on both sides of --steps={arguments.steps}")
    if missing := [name for name in FILES if not (arguments.data / name).is_file()]:
        parser.error(f"expected packed tokens in --data {arguments.data}, which lacks {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as scratch:
        for variant in variants:
            for price in prices if variant == "jei" else (None,):
                row = measure_variant(variant, price, arguments, arguments.work or Path(scratch))
                write_row(row, arguments.jsonl)
    return 0


def measure_variant(variant: str, price: float | None, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Train one variant, on its backbone where it has one, and return its row."""
    config, recipe = configure(arguments.config, arguments.changes)
    heads = round(arguments.heads * arguments.steps)
    init, steps = None, arguments.steps
    if variant in HEADS:
        backbone = of_kind(recipe, "plain", arguments.steps - heads, config.num_layers)
        init, steps = train_once(BACKBONE, config, backbone, arguments.data, work), heads
    recipe = of_kind(recipe, variant, steps, config.num_layers)
    recipe = recipe if price is None else dataclasses.replace(recipe, price=price)
    name = variant if price is None else f"{variant}_{price}"
    folder = train_once(name, config, recipe, arguments.data, work, init=init)
    model = models.load(folder, dtype=DTYPES[default_dtype()])
    exits = load_exits(folder.parent / "exits.safetensors") if variant in HEADS else None
    windows = read_windows(arguments.data, recipe, arguments.windows)
    plan = dyninf.Plan(depth=rule_of(exits, len(model.layers)))
    return {
        "bench": "recipes",
        "variant": variant,
        "price": price,
        "parameters": num_parameters(model) + (0 if exits is None else num_parameters(exits)),
        "backbone_parameters": num_parameters(models.load(folder if init is None else init)),
        "steps": arguments.steps,
        "head_steps": heads if variant in HEADS else 0,
        "training_tokens": arguments.steps * recipe.batch_size * recipe.length,
        "heldout_tokens": int(windows.lengths.sum()),
        "exits": exit_accuracy(model, exits, windows, recipe.batch_size),
        "curve": [measure_plan(model, plan, windows, text) for text in arguments.thresholds.split(",")],
        **describe_run(model),
    }


def of_kind(recipe: Recipe, kind: str, steps: int, num_layers: int) -> Recipe:
    """Return the recipe for a number of steps of one kind, with exits that suit it.

    SoFT takes every eighth of the depth (its paper has eight depths of 40 layers, too), and the gates of JEI-DNN are at
    the same; its two phases change eight times.
    """
    changes = {"kind": kind, "steps": steps, "warmup": min(recipe.warmup, steps // 20), "phase": max(1, steps // 8)}
    changes |= {"eval_every": steps, "eval_batches": 1, "save_every": max(1, steps // 4)}
    if kind in ("soft", "jei"):
        changes["exit_period"] = max(1, num_layers // EIGHTHS)
    return dataclasses.replace(recipe, **changes)


def train_once(name: str, config: Any, recipe: Recipe, data: Path, work: Path, *, init: Path | None = None) -> Path:
    """Return the model folder of a variant, trained in a run directory of its own unless it was before."""
    run = work / name
    run.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        if not (run / file).exists():
            (run / file).symlink_to((data / file).resolve())

    def report(event: dict[str, Any]) -> None:
        sys.stderr.write(f"{name}: {json.dumps(event)}\n")

    return train(config, recipe, run, report=report, init=None if init is None else str(init))


def read_windows(data: Path, recipe: Recipe, count: int) -> Windows:
    """Return held-out windows of the recipe's length; their bytes are not known."""
    tokens = TokenData.open(data / "heldout.tokens")
    count = min(count, tokens.num_windows(recipe.length))
    rows = tokens.batch(0, batch_size=count, length=recipe.length, seed=recipe.seed)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    lengths = np.full(count, recipe.length, np.int32)
    return Windows(inputs=inputs, targets=targets, lengths=lengths, num_bytes=np.zeros_like(targets))


def rule_of(exits: DepthPolicy | None, num_layers: int) -> DepthPolicy:
    """Return the rule to sweep: the trained one, or the confidence at every eighth of the depth."""
    return depth.every(depth.Confidence(threshold=0.9), step=max(1, num_layers // EIGHTHS)) if exits is None else exits


def exit_accuracy(model: models.Transformer, exits: DepthPolicy | None, windows: Windows, batch: int) -> list[float]:
    """Return the share of tokens that each exit layer gets right, with the exit's adapter where it has one."""
    stacked = models.stack_layers(model)
    parts = [slice(start, start + batch) for start in range(0, len(windows.inputs), batch)]
    right = [_right(stacked, exits, windows.inputs[rows], windows.targets[rows]) for rows in parts]
    return [round(float(share), 5) for share in np.mean(np.concatenate(right, axis=1), axis=(1, 2))]


def measure_plan(model: models.Transformer, plan: dyninf.Plan, windows: Windows, threshold: str) -> dict[str, float]:
    """Return what a threshold of the plan's rule needs and gets right, keys of skipped layers being filled in."""
    quality = evaluate(model, change_field(plan, "depth.threshold", threshold), windows)
    needed, right = round(quality.layers_needed, 4), round(quality.accuracy, 5)
    return {"threshold": float(threshold), "layers": needed, "accuracy": right}


def num_parameters(tree: Any) -> int:
    """Return how many numbers the arrays of a tree hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))


@jax.jit
def _right(model, exits, tokens_BT, targets_BT):
    keep_LB = jnp.ones((model.config.num_layers, tokens_BT.shape[0]), bool)
    states_LBTD = handed_over(exits, hidden_states(model, tokens_BT, keep_LB))
    return exit_predictions(model, states_LBTD) == targets_BT[None]


if __name__ == "__main__":
    sys.exit(main())
