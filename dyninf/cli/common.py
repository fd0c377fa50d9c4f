"""What several commands share: the model they load, the number format it runs in, and where they print."""

import argparse
import difflib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from dyninf import models
from dyninf.models.processes import together

PLAIN_WIDTH = 160  # columns of a table that does not go to a terminal
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model, its tokenizer and the folder both came from."""

    name: str
    folder: Path
    dtype: str
    model: models.Transformer | models.MeshModel
    tokenizer: Tokenizer


def require_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError with the known names, and the nearest of them, if a name is none of them."""
    known = list(known)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"expected {what} among {', '.join(known)}, got {name!r}{hint}")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--dtype``."""
    parser.add_argument(
        "--model", metavar="NAME_OR_FOLDER", help="a shipped model, or a folder with a checkpoint (default: shipped)"
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="dtype of the weights (default: float32 on CPU, else bfloat16)"
    )


def add_mesh_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--mesh``, which splits what is named, with an example."""
    parser.add_argument("--mesh", metavar="NAME=SIZE,...", help=f"split {what} over devices (default: one)")


def add_layout_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--mesh`` and ``--stacked``, for commands that decode."""
    add_mesh_option(parser, what)
    parser.add_argument(
        "--stacked",
        action="store_true",
        help="stack the layers: on Hopper GPUs one kernel runs them all; not with plans that evict, or select by other "
        "scores than those of Quest and PageMean",
    )


def default_dtype() -> str:
    """Return the dtype that models run in here: float32 on CPUs, which have no fast bfloat16, else bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def model_name(requested: str | None) -> str:
    """Return the model asked for, or the first shipped one.

    Raises:
        ValueError: if none was asked for and none is shipped.
    """
    if requested is not None:
        return requested
    if not models.available():
        raise ValueError("expected a shipped model, found none in this installation; give the folder of one: --model")
    return models.available()[0]


def model_folder(name: str) -> Path:
    """Return the folder of a model; a path that exists wins over a shipped name, as in ``dyninf.models.load``."""
    return Path(name) if Path(name).is_dir() else Path(models.__file__).parent / "pretrained" / name


def load(arguments: argparse.Namespace) -> Loaded:
    """Load the model and tokenizer that the options name, onto the mesh that ``--mesh`` asks for if there is one."""
    name = model_name(arguments.model)
    dtype = arguments.dtype or default_dtype()
    mesh = read_mesh(getattr(arguments, "mesh", None))
    model = load_model(name, dtype, mesh, stacked=getattr(arguments, "stacked", False))
    with together():
        tokenizer = models.load_tokenizer(name)
    return Loaded(name=name, folder=model_folder(name), dtype=dtype, model=model, tokenizer=tokenizer)


def load_model(name: str, dtype: str, mesh: Mesh | None, *, stacked: bool) -> models.Transformer | models.MeshModel:
    """Load a model onto a mesh if there is one, with stacked layers if asked."""
    model = models.load(name, dtype=DTYPES[dtype], mesh=mesh)
    model = models.stack_for_decoding(model) if stacked else model
    return model if mesh is None else models.on_mesh(model, mesh)


def read_mesh(text: str | None) -> Mesh | None:
    """Return the mesh that ``--mesh`` asks for, ``None`` if it asks for none.

    Raises:
        ValueError: if it cannot be read or made, or leaves out devices of a job of several processes.
    """
    mesh = None if text is None else models.make_mesh(models.parse_mesh(text))
    if jax.process_count() > 1 and (mesh is None or mesh.size != jax.device_count()):
        raise ValueError(
            f"expected --mesh over all {jax.device_count()} devices of {jax.process_count()} processes, got "
            f"{text or 'none'}; use data={jax.device_count()}, for one"
        )
    return mesh


def table_console() -> Console:
    """Return the console for tables: the width of the terminal, or wide enough that a file gets whole lines."""
    console = Console(file=sys.stdout, highlight=False)
    return console if console.is_terminal else Console(file=sys.stdout, highlight=False, width=PLAIN_WIDTH)


def progress() -> Progress:
    """Return a progress display on stderr that disappears when done; nothing where stderr is no terminal."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def bucket(length: int, limit: int) -> int:
    """Return the padded length of a text: the next power of two from 16 on, so that compilations are shared."""
    padded = 16
    while padded < length:
        padded *= 2
    return max(length, min(padded, limit))


def check_output(file: str | None) -> None:
    """Raise ValueError, before any work, if a file to write could not be created where it is asked for."""
    if file is not None and (not Path(file).resolve().parent.is_dir() or Path(file).is_dir()):
        raise ValueError(f"expected a file in a folder that exists, got {file!r}")


def check_positive(**values: int | None) -> None:
    """Raise ValueError unless every number that was given is at least 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"expected --{name.replace('_', '-')} of at least 1, got {value}")
