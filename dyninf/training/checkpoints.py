"""The checkpoints of a training run: one folder a step, there whole or not at all.

``arrays/`` is an orbax folder of the state's leaves under plain names, so that a checkpoint does not depend on how
classes are laid out; ``checkpoint.json`` holds the step, what the arrays are, and the size and SHA-256 of every file.
All of that is compared before an array is read, because orbax itself restores flipped bytes without a word. Nothing is
ever unpickled.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dyninf.models.atomic import replace_folder, reserve
from dyninf.models.checkpoint import quiet_orbax

FORMAT = "dyninf-run-1"
MARKER = "checkpoint.json"
KEPT = 2  # the last one, and the one before it should the last be damaged


def latest(folder: str | os.PathLike) -> int | None:
    """Return the step of the last checkpoint in ``folder``, ``None`` if there is none.

    Raises:
        ValueError: if ``folder`` is a file.
    """
    return max(_steps(Path(folder)), default=None)


def save(folder: str | os.PathLike, state: Any) -> None:
    """Write the state as the checkpoint of its step, then delete all but the last two.

    Args:
        state: a pytree of arrays with a field ``step``.

    Raises:
        OSError: if it cannot be written (the disk is full); the checkpoints before it are as they were.
    """
    # In a thread of its own: Ctrl-C reaches this one, which waits until the checkpoint is whole before it passes it on.
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(_save, Path(folder).resolve(), _arrays(state), int(state.step)).result()


def restore(folder: str | os.PathLike, state: Any) -> Any:
    """Return the state of the last checkpoint in ``folder``, bit for bit.

    Args:
        state: has the structure, shapes, dtypes and devices of what was saved.

    Raises:
        ValueError: if there is no checkpoint, or the last one is damaged or does not fit.
    """
    step = latest(folder)
    if step is None:
        raise ValueError(f"expected a checkpoint in {str(folder)!r}, got none; save one first")
    path, wanted = Path(folder).resolve() / str(step), _arrays(state)
    try:
        _check(path, step, _kinds(wanted))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        with quiet_orbax(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            arrays = checkpointer.restore(path / "arrays", args=ocp.args.StandardRestore(abstract))
    except Exception as error:
        raise ValueError(
            f"expected a whole checkpoint of this run in {str(path)!r}, got {_reason(error)}; delete that folder to go "
            "on from the checkpoint before it"
        ) from error
    return jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in wanted])


def _save(folder: Path, arrays: dict[str, jax.Array], step: int) -> None:
    try:
        with replace_folder(folder / str(step), marker=MARKER, overwrite=True) as new:
            # Orbax writes from many threads; when the disk fills up under them, each complains for itself. Ask before.
            reserve(new, [sum(array.nbytes for array in arrays.values())])
            with quiet_orbax(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                checkpointer.save(new / "arrays", args=ocp.args.StandardSave(arrays))
            values = {"format": FORMAT, "step": step, "arrays": _kinds(arrays), "files": _files(new)}
            (new / MARKER).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except Exception as error:  # orbax raises ValueError and others for what the operating system refused
        raise OSError(
            f"could not write the checkpoint of step {step} in {str(folder)!r} ({_reason(error.__cause__ or error)}); "
            "free disk space and start the same command again: it goes on from the checkpoint before"
        ) from error
    for old in sorted(_steps(folder))[:-KEPT]:
        shutil.rmtree(folder / str(old), ignore_errors=True)


def _steps(folder: Path) -> list[int]:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder of checkpoints at {str(folder)!r}, got a file; move it away")
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.exists() else []
    return [int(name) for name in names if name.isascii() and name.isdigit()]


def _arrays(state: Any) -> dict[str, jax.Array]:
    return {f"leaf_{number:04d}": leaf for number, leaf in enumerate(jax.tree.leaves(state))}


def _kinds(arrays: dict[str, jax.Array]) -> dict[str, str]:
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}


def _files(path: Path) -> dict[str, list]:
    """Return size and SHA-256 of every file under a folder, except the marker at its top."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file != path / MARKER:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            found[file.relative_to(path).as_posix()] = [file.stat().st_size, digest]
    return found


def _check(path: Path, step: int, kinds: dict[str, str]) -> None:
    """Raise what is wrong with a checkpoint; the caller says where."""
    try:
        values = json.loads((path / MARKER).read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"no {MARKER}") from error
    expected = {"format": FORMAT, "step": step, "arrays": kinds, "files": _files(path)}
    for name, value in expected.items():
        found = values.get(name) if isinstance(values, dict) else None
        if found == value:
            continue
        if isinstance(value, dict) and isinstance(found, dict):
            name = min(key for key in value.keys() | found.keys() if value.get(key) != found.get(key))
        raise ValueError(f"{name!r} missing or changed")


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
