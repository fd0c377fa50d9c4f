"""Our own checkpoints: an orbax folder of arrays with the configuration as JSON beside it.

``dyninf.json`` holds the format number, the :class:`ModelConfig` and the size of every file, ``arrays/`` one orbax
array per parameter name, ``tokenizer.json`` the tokenizer if there is one. Saving fills a new folder and renames it,
so that a full disk or a killed process never damages the checkpoint that was there. Restoring compares file sizes,
names and shapes with ``dyninf.json`` before it reads an array; nothing is ever unpickled.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from dyninf.models.atomic import current, replace_folder, reserve
from dyninf.models.config import ModelConfig, RopeScaling
from dyninf.models.hf_files import read_json
from dyninf.models.parameters import abstract_model, named_parameters, with_parameters
from dyninf.models.processes import is_first, together
from dyninf.models.sharding import Placement, parameter_shardings
from dyninf.models.transformer import Transformer, unstack_layers

MARKER = "dyninf.json"
FORMAT = 1


def save(
    model: Transformer,
    path: str | os.PathLike,
    *,
    overwrite: bool = False,
    tokenizer_file: str | os.PathLike | None = None,
) -> None:
    """Write the model as an orbax checkpoint; it appears at ``path`` whole or not at all.

    A model with stacked layers is saved layer by layer, so that every checkpoint has the same names. The processes of
    one job call this together; each writes what its devices hold, to a folder that all of them see.

    Args:
        overwrite: replace the checkpoint that is there.
        tokenizer_file: a ``tokenizer.json`` to copy beside the arrays.

    Raises:
        ValueError: if ``path`` exists and may not be replaced, the tokenizer file does not exist, or the model of
            several processes does not lie on the devices of all.
        OSError: if writing fails (a full disk); what was at ``path`` is unchanged.
    """
    model = model if isinstance(model.layers, nnx.List) else unstack_layers(model)
    arrays = named_parameters(model)
    with together():
        if is_first() and tokenizer_file is not None and not Path(tokenizer_file).is_file():
            raise ValueError(f"expected a tokenizer file, got {tokenizer_file}, which does not exist")
        if jax.process_count() > 1 and any(array.is_fully_addressable for array in arrays.values()):
            raise ValueError("expected a model on devices of all processes, got one of this process; load(..., mesh=)")
    with replace_folder(path, marker=MARKER, overwrite=overwrite) as folder:
        with together():
            # Orbax writes from many threads; when the disk fills up under them, each complains for itself. Ask before.
            if is_first():
                reserve(folder, (array.nbytes for array in arrays.values()))
        try:
            with quiet_orbax(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                checkpointer.save(folder / "arrays", args=ocp.args.StandardSave(arrays))
        except Exception as error:  # orbax raises ValueError and others for what the operating system refused
            raise OSError(str(error)) from error
        with together():
            if is_first():
                _describe(folder, model.config, tokenizer_file)


def restore(path: str | os.PathLike, dtype: Any = None, where: Placement | None = None) -> Transformer:
    """Return the model of a checkpoint that :func:`save` wrote, wherever its arrays were then.

    Args:
        dtype: dtype of the weights; ``None`` for the dtype each was saved in.
        where: mesh and rules; ``None`` for the default device.

    Raises:
        ValueError: if the checkpoint is missing, incomplete, or does not fit its own configuration or the mesh.
        NotImplementedError: if another version of the format is stored.
    """
    path = current(path)
    with quiet_orbax(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        with together():
            config, wanted = _wanted(checkpointer, path, dtype, where)
        try:
            arrays = checkpointer.restore(path / "arrays", args=ocp.args.StandardRestore(wanted))
        except Exception as error:
            raise _damaged(path / "arrays", error) from error
    return with_parameters(abstract_model(config), arrays)


def _wanted(checkpointer, path: Path, dtype: Any, where: Placement | None) -> tuple[ModelConfig, dict[str, Any]]:
    """Check a checkpoint as far as that goes without reading arrays, and return what to read and where to."""
    values = read_json(path / MARKER)
    if values.get("format") != FORMAT:
        raise NotImplementedError(
            f"expected checkpoint format {FORMAT} in {path}, got {values.get('format')!r}; update dyninf"
        )
    config = _config(values.get("config"), path / MARKER)
    expected = named_parameters(abstract_model(config, jnp.float32 if dtype is None else dtype))
    _check_files(path / "arrays", values.get("files"))
    stored = _stored(checkpointer, path / "arrays")
    shapes = {name: array.shape for name, array in expected.items()}
    _check(path, shapes, stored)
    default = dict.fromkeys(shapes, jnp.zeros(()).sharding)
    places = default if where is None else parameter_shardings(shapes, config, where)
    return config, {
        name: jax.ShapeDtypeStruct(
            array.shape, np.dtype(array.dtype if dtype is None else dtype), sharding=places[name]
        )
        for name, array in stored.items()
    }


def _describe(folder: Path, config: ModelConfig, tokenizer_file: str | os.PathLike | None) -> None:
    """Write what stands beside the arrays."""
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    values = {"format": FORMAT, "config": dataclasses.asdict(config), "files": _files(folder / "arrays")}
    (folder / MARKER).write_text(json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keep orbax from logging the traceback of every thread; the exception it then raises says the same once."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _config(values: Any, file: Path) -> ModelConfig:
    if not isinstance(values, dict):
        raise ValueError(f"expected the configuration of the model in {file}, got {values!r}")
    values = dict(values)
    try:
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        if values.get("windows") is not None:
            values["windows"] = tuple(values["windows"])
        values["eos_ids"] = tuple(values["eos_ids"])
        return ModelConfig(**values)
    except (TypeError, KeyError) as error:
        raise ValueError(f"expected the configuration of a model in {file}, got {error}") from error


def _files(path: Path) -> dict[str, int]:
    return {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()}


def _check_files(path: Path, expected: Any) -> None:
    if not isinstance(expected, dict):
        raise ValueError(f"expected the sizes of the files in {path} in {MARKER}, got {expected!r}")
    found = _files(path)
    for name, size in expected.items():
        if found.get(name) != size:
            got = "none" if name not in found else f"{found[name]} bytes"
            raise ValueError(
                f"expected the file {name} of {size} bytes in {path}, got {got}; the checkpoint is incomplete or "
                "damaged: use another one"
            )


def _stored(checkpointer: ocp.Checkpointer, path: Path) -> Mapping[str, Any]:
    try:
        tree = checkpointer.metadata(path).item_metadata.tree
    except Exception as error:
        raise _damaged(path, error) from error
    if not isinstance(tree, dict) or not all(hasattr(leaf, "shape") for leaf in tree.values()):
        raise ValueError(f"expected arrays by name in {path}, got {tree!r:.80}; save the checkpoint again")
    return tree


def _check(path: Path, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Any]) -> None:
    if missing := sorted(set(expected) - set(stored)):
        raise ValueError(f"expected the array {missing[0]!r} in {path}, found none ({len(missing)} are missing)")
    if extra := sorted(set(stored) - set(expected)):
        raise ValueError(f"expected no array beside those of {MARKER}, got {extra[0]!r} in {path} ({len(extra)} more)")
    for name, shape in expected.items():
        if tuple(stored[name].shape) != shape:
            raise ValueError(f"expected {name!r} in {path} to have shape {shape}, got {tuple(stored[name].shape)}")


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [""])[0]
    return ValueError(
        f"expected the arrays of a checkpoint in {path}, got {type(error).__name__}: {reason:.200}; the checkpoint is "
        "incomplete or damaged: use another one"
    )
