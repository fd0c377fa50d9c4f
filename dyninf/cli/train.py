"""``dyninf train``: a folder of text to a small language model whose early exits work."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dyninf.cli.plan_options import read_value
from dyninf.configs.training import PYCODE_13M, PYCODE_13M_RECIPE, TINY, TINY_RECIPE
from dyninf.models import ModelConfig
from dyninf.training.loop import prepare, train
from dyninf.training.recipe import Recipe

CONFIGS = {"tiny": (TINY, TINY_RECIPE), "pycode-13m": (PYCODE_13M, PYCODE_13M_RECIPE)}

EXAMPLES = """\
examples:
  dyninf train my_project/ --run runs/mine
  dyninf train src/ docs/ --run runs/mine --config pycode-13m --set recipe.steps=2000 --set model.num_layers=12
  dyninf generate --model runs/mine/model --prompt "import "

The run directory keeps the tokenizer, the packed text, checkpoints and a log. The same command again goes on from the
last checkpoint and makes the losses of a run that was never stopped.
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "train",
        help="train a model on a folder of text",
        description="Train a tokenizer and a model with the LayerSkip recipe on folders of Python files.",
        epilog=EXAMPLES,
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders of text (.py files)")
    parser.add_argument("--run", required=True, metavar="FOLDER", dest="directory", help="where the run is kept")
    parser.add_argument("--config", choices=tuple(CONFIGS), default="tiny", help="model and recipe (default: tiny)")
    parser.add_argument(
        "--set",
        metavar="PATH=VALUE",
        dest="changes",
        action="append",
        default=[],
        help="change a number of the model or recipe, e.g. recipe.steps=1000 (may be given several times)",
    )
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Prepare the data, train, and say where the model is."""
    config, recipe = configure(arguments.config, arguments.changes)
    directory = Path(arguments.directory)
    reporter = Reporter(recipe)
    with reporter:
        prepare(arguments.folders, directory, vocab_size=config.vocab_size, report=reporter)
        folder = train(config, recipe, directory, report=reporter)
    print(f"the model is in {folder}; try: dyninf generate --model {folder} --prompt 'import '")
    return 0


def configure(name: str, changes: Sequence[str]) -> tuple[ModelConfig, Recipe]:
    """Return a named model and recipe, changed.

    Raises:
        ValueError: if there is no such field, or a value cannot be read or is out of range.
    """
    parts: dict[str, Any] = dict(zip(("model", "recipe"), CONFIGS[name], strict=True))
    values = {
        f"{part}.{field.name}": getattr(whole, field.name)
        for part, whole in parts.items()
        for field in dataclasses.fields(whole)
        if isinstance(getattr(whole, field.name), int | float | str)
    }
    changed: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or path not in values:
            raise ValueError(f"expected PATH=VALUE with a path among {', '.join(values)}, got {change!r}")
        part, _, field = path.partition(".")
        changed[part][field] = read_value(text, values[path], path)
    return tuple(dataclasses.replace(whole, **changed[part]) for part, whole in parts.items())


class Reporter:
    """Show what a run reports: a progress bar and lines above it on a terminal, lines alone elsewhere."""

    def __init__(self, recipe: Recipe):
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("preparing", total=recipe.steps)

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if event["event"] in ("step", "resumed"):
            self._progress.update(self._task, completed=event["step"])
        if event["event"] == "step":
            self._progress.update(self._task, description=f"loss {event['loss']:.3f}")
            if not self._console.is_terminal:
                self._say(f"step {event['step']}: loss {event['loss']:.4f}, {event['tokens_per_second']} tokens/s")
        elif event["event"] == "eval":
            losses = " ".join(f"{loss:.3f}" for loss in event["exit_losses"])
            self._say(f"step {event['step']}: held-out loss by exit layer: {losses}")
        else:
            details = ", ".join(f"{name} {value}" for name, value in event.items() if name != "event")
            self._say(f"{event['event']}: {details}")

    def _say(self, line: str) -> None:
        self._progress.console.print(line, markup=False)
