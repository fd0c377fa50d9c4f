"""``dyninf train``: from a folder of text, or from tasks made of tokens, to a small model whose early exits work."""

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dyninf.cli.common import add_mesh_option, read_mesh
from dyninf.cli.plan_options import read_value
from dyninf.configs.training import PYCODE_13M, PYCODE_13M_RECIPE, RECALL, RECALL_RECIPE, TINY, TINY_RECIPE
from dyninf.models import ModelConfig, load
from dyninf.tasks import TOKEN_TASKS
from dyninf.training import checkpoints
from dyninf.training.loop import check_start, prepare, train, train_tasks
from dyninf.training.meshes import training_placement
from dyninf.training.recipe import CHOICES, HEADS, Recipe
from dyninf.training.step import check_exits

CONFIGS = {
    "tiny": (TINY, TINY_RECIPE),
    "pycode-13m": (PYCODE_13M, PYCODE_13M_RECIPE),
    "recall": (RECALL, RECALL_RECIPE),
}

DESCRIPTION = """\
Train a tokenizer and a small language model on folders of text, with the LayerSkip recipe or another one (--recipe), so
that every layer can be an exit. The result is a Hugging Face folder that the other commands take as --model. With
--tasks the model learns to retrieve from long contexts of tokens instead, and no text is read.
"""

EXAMPLES = """\
examples:
  dyninf train my_project/ --run runs/mine
  dyninf train docs/ notes/ --suffix .md --suffix .txt --run runs/docs --set recipe.steps=600
  dyninf train src/ --run runs/large --config pycode-13m --set model.num_layers=12
  dyninf train my_project/ --run runs/exits --recipe frozen --from runs/mine/model
  dyninf compare --model runs/exits/model --plans dense,runs/exits/exits.safetensors
  dyninf generate --model runs/mine/model --prompt "import "
  dyninf train src/ --run runs/large --config pycode-13m --mesh data=4,fsdp=2
  dyninf train --tasks needle,multivalue,tracking=2 --config recall --run runs/recall

what is read: files with the suffix (.py) under the folders, in UTF-8 and up to 1 MB each; not hidden folders, symbolic
links, generated or minified files, files of mere data and near-duplicates. About 5 % of the files are held out and only
evaluated on. A few files are enough to see it work; a model worth using takes some tens of MB.

how long it takes: tiny, 0.9 million parameters, a few minutes on two CPU cores; pycode-13m, 629 million tokens, is made
for a GPU (a quarter of an hour on an H200, days on a CPU).

recipes: layerskip, early-exit losses and layer dropout; soft, the mean loss of nested depths; plain, the last layer's
loss; frozen, adapters and gates beside a model that stays as it is; jei, gates and the readout they judge, in turn;
stop, a classifier that exits, or ends a text that no layer would get right. The last three need --from and leave
exits.safetensors, which other commands take as a plan.

the run directory: tokenizer.json, the packed text, recipe.json, checkpoints/ (the last two), log.jsonl (losses) and at
the end model/. Ctrl-C, a kill or a full disk costs what came after the last checkpoint: the same command goes on from
there and makes the losses of a run that was never stopped. It needs the same folders and settings, which may change
only before the first checkpoint; recipe.save_every says how often there is one. --mesh may change at any time.

settings for --set, with the values of the config tiny:
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "train",
        help="train a model on a folder of text",
        description=DESCRIPTION,
        epilog=EXAMPLES + _settings(),
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="folders of text")
    parser.add_argument(
        "--tasks",
        metavar="A,B=WEIGHT",
        help=f"train on token tasks instead of text, drawn by weight: {', '.join(TOKEN_TASKS)}",
    )
    parser.add_argument(
        "--questions",
        type=int,
        metavar="N",
        help="with --tasks, the most that are asked about one context, as many as fit (default: 1)",
    )
    parser.add_argument("--run", required=True, metavar="FOLDER", dest="directory", help="where the run is kept")
    parser.add_argument("--config", choices=tuple(CONFIGS), default="tiny", help="model and recipe (default: tiny)")
    parser.add_argument(
        "--recipe",
        choices=CHOICES["kind"],
        help="what is trained, and by which loss (default: that of the config, layerskip); --set recipe.kind, too",
    )
    parser.add_argument(
        "--suffix",
        metavar=".EXT",
        dest="suffixes",
        action="append",
        help="ending of the files to read (default: .py; may be given several times)",
    )
    parser.add_argument(
        "--set",
        metavar="PATH=VALUE",
        dest="changes",
        action="append",
        default=[],
        help="change a setting of the model or recipe, e.g. recipe.steps=1000 (may be given several times)",
    )
    parser.add_argument(
        "--from",
        metavar="NAME_OR_FOLDER",
        dest="init",
        help="go on from the weights and tokenizer of a model that dyninf trained, instead of random weights",
    )
    add_mesh_option(parser, "the batch, and weights along fsdp, as in data=4,fsdp=2,")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Prepare the data, train, and say where the model is."""
    kind = [] if arguments.recipe is None else [f"recipe.kind={arguments.recipe}"]
    config, recipe = configure(arguments.config, [*arguments.changes, *kind])
    mesh = read_mesh(arguments.mesh)
    check_fit(config, recipe, arguments.init, mesh)
    directory, suffixes, init = Path(arguments.directory), tuple(arguments.suffixes or (".py",)), arguments.init
    reporter = Reporter(recipe)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"expected a folder for --run, got the file {str(directory)!r}; name another one")
    if bool(arguments.folders) == (arguments.tasks is not None):
        raise ValueError("expected folders of text or --tasks, one of them; see dyninf train --help")
    if arguments.questions is not None and arguments.tasks is None:
        raise ValueError("expected --questions beside --tasks only, got folders of text; leave it out")
    try:
        with reporter:
            if arguments.tasks is not None:
                tasks = read_tasks(arguments.tasks)
                several = {} if arguments.questions is None else {"questions": arguments.questions}
                folder = train_tasks(
                    config, recipe, directory, tasks=tasks, report=reporter, init=init, mesh=mesh, **several
                )
                print(f"the model is in {folder}; try: dyninf eval --model {folder} --tasks {','.join(tasks)}")
                return 0
            prepare(
                arguments.folders,
                directory,
                vocab_size=config.vocab_size,
                report=reporter,
                suffixes=suffixes,
                init=init,
            )
            folder = train(config, recipe, directory, report=reporter, init=init, mesh=mesh)
    except KeyboardInterrupt:
        step = checkpoints.latest(directory / "checkpoints")
        place = "the beginning" if step is None else f"the checkpoint of step {step}"
        print(f"\nstopped; the same command goes on from {place}", file=sys.stderr, end="")
        raise
    exits = f"compare --model {folder} --plans dense,{directory / 'exits.safetensors'}"
    command = exits if recipe.kind in HEADS else f"generate --model {folder} --prompt 'import '"
    print(f"the model is in {folder}; try: dyninf {command}")
    return 0


def check_fit(config: ModelConfig, recipe: Recipe, init: str | None, mesh: Mesh | None = None) -> None:
    """Refuse, before text is read, a recipe that does not fit the model that it would train, or the mesh.

    Raises:
        ValueError: if it does not, or the model to go on from cannot be read.
    """
    check_start(recipe, init)
    config = config if init is None else load(init).config
    if recipe.length > config.max_length:
        place, remedy = ("model.", "set both") if init is None else (f"{init}'s ", "set it")
        raise ValueError(
            f"expected recipe.length at most {place}max_length={config.max_length}, got {recipe.length}; {remedy}"
        )
    check_exits(config.num_layers, recipe)
    if mesh is not None:
        training_placement(mesh, config, recipe)


def read_tasks(text: str) -> dict[str, float]:
    """Return the weight of each task of a list such as ``needle,tracking=2``.

    Raises:
        ValueError: if an entry has no name, a weight cannot be read, or a task comes twice.
    """
    tasks: dict[str, float] = {}
    for entry in text.split(","):
        name, equals, weight = entry.strip().partition("=")
        if not name or name in tasks:
            raise ValueError(f"expected different tasks joined by commas, got {text!r}")
        try:
            tasks[name] = float(weight) if equals else 1.0
        except ValueError:
            raise ValueError(f"expected a number as the weight of {name}, got {weight!r}") from None
    return tasks


def configure(name: str, changes: Sequence[str]) -> tuple[ModelConfig, Recipe]:
    """Return a named model and recipe, changed.

    Raises:
        ValueError: if there is no such field, or a value cannot be read or is out of range.
    """
    parts, values = _parts(name), _values(name)
    changed: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or path not in values:
            raise ValueError(f"expected PATH=VALUE with a path among {', '.join(values)}, got {change!r}")
        part, _, field = path.partition(".")
        changed[part][field] = read_value(text, values[path], path)
    return tuple(dataclasses.replace(whole, **changed[part]) for part, whole in parts.items())


def _parts(name: str) -> dict[str, Any]:
    return dict(zip(("model", "recipe"), CONFIGS[name], strict=True))


def _values(name: str) -> dict[str, Any]:
    """Return what can be changed, by path."""
    return {
        f"{part}.{field.name}": getattr(whole, field.name)
        for part, whole in _parts(name).items()
        for field in dataclasses.fields(whole)
        if isinstance(getattr(whole, field.name), int | float | str)
    }


def _settings() -> str:
    settings = ", ".join(f"{path}={value}" for path, value in _values("tiny").items())
    return textwrap.fill(settings, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False) + "\n"


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
            speed = f"{event['tokens_per_second']} tokens/s"
            self._progress.update(self._task, description=f"loss {event['loss']:.3f}, {speed}")
            if not self._console.is_terminal:
                self._say(f"step {event['step']}: loss {event['loss']:.4f}, {speed}")
        elif event["event"] == "eval":
            losses = " ".join(f"{loss:.3f}" for loss in event["exit_losses"])
            self._say(f"step {event['step']}: held-out loss by exit layer: {losses}")
        else:
            details = ", ".join(f"{name} {value}" for name, value in event.items() if name != "event")
            self._say(f"{event['event']}: {details}")

    def _say(self, line: str) -> None:
        self._progress.console.print(line, markup=False)
