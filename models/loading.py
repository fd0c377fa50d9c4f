"""Load a model or its tokenizer by path or by the name of a model that dyninf ships."""

import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from tokenizers import Tokenizer

from dyninf.models.atomic import current
from dyninf.models.checkpoint import MARKER, restore
from dyninf.models.convert import load_hf
from dyninf.models.processes import together
from dyninf.models.sharding import Rules, placement
from dyninf.models.transformer import Transformer

_PRETRAINED = Path(__file__).parent / "pretrained"


def available() -> tuple[str, ...]:
    """Return the names of the models that dyninf ships."""
    return tuple(sorted(file.parent.name for file in _PRETRAINED.glob("*/config.json")))


def load(
    path_or_name: str | os.PathLike, *, dtype: Any = None, mesh: Mesh | None = None, rules: Rules | None = None
) -> Transformer:
    """Return the model of a Hugging Face folder, of one of our checkpoints, or one that dyninf ships.

    Nothing is downloaded and nothing is unpickled. A path that exists wins over a shipped name. On a mesh every process
    reads what its own devices hold, and has about one parameter in host memory at a time; all must call this together,
    and what one cannot read all raise.

    Args:
        dtype: dtype of the weights; ``None`` for the dtype they are stored in.
        mesh: devices to split the weights over (:func:`dyninf.models.make_mesh`); ``None`` for the default device.
        rules: what differs from ``dyninf.models.sharding.RULES``.

    Raises:
        ValueError: if there is no such model, its files are incomplete or do not fit each other, or it cannot be split
            over the mesh as the rules say.
        NotImplementedError: if the model cannot be represented; names what stands in the way.
    """
    with together():
        if rules is not None and mesh is None:
            raise ValueError("expected a mesh for the rules, got none; pass mesh=make_mesh({'tensor': 2})")
        where = None if mesh is None else placement(mesh, rules)
        path = _find(path_or_name)
        inner = path / "model"  # of a training run
        if (inner / "config.json").is_file() and not (path / MARKER).is_file() and not (path / "config.json").is_file():
            raise ValueError(f"expected the folder of a model, got the run directory {path}; its model is {inner}")
    if (path / MARKER).is_file():
        return restore(path, dtype, where)
    with together():
        return load_hf(path, dtype, where)


def load_tokenizer(path_or_name: str | os.PathLike) -> Tokenizer:
    """Return the tokenizer that lies beside a model (``tokenizer.json``).

    Raises:
        ValueError: if there is no such model, it has no ``tokenizer.json``, or that file is not a tokenizer.
    """
    file = _find(path_or_name) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"expected tokenizer.json in {file.parent}, found none; copy it there")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise ValueError(f"expected a tokenizer in {file}, got {error}") from error


def _find(path_or_name: str | os.PathLike) -> Path:
    path = current(path_or_name)
    if path.is_dir():
        return path
    if str(path_or_name) in available():
        return _PRETRAINED / str(path_or_name)
    if path.exists():
        raise ValueError(f"expected the folder of a model, got the file {path}")
    raise ValueError(
        f"expected a folder or one of the shipped models ({', '.join(available()) or 'none'}), got {path_or_name!s}; "
        "models are not downloaded: fetch the files first and give their folder"
    )
