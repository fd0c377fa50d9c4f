"""Replace a folder as a whole, so that a crash or a full disk never damages what was there.

A new folder is filled under the hidden sibling ``.NAME.incomplete`` and takes its place by renaming. An existing
folder steps aside to ``.NAME.replaced`` first and is deleted last; if the process is killed between the two renames,
:func:`current` still finds it, and the next :func:`replace_folder` puts it back.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from dyninf.models.processes import is_first, together


@contextlib.contextmanager
def replace_folder(path: str | os.PathLike, *, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` when the block ends without an exception.

    The processes of one job call this together, for a path that all of them see; process 0 makes and renames. What
    fails in one of them only, inside of the block, belongs into :func:`dyninf.models.processes.together`.

    Args:
        marker: file that tells a folder of this kind; only a folder that holds it (or an empty one) is replaced.
        overwrite: replace ``path`` if it exists.

    Raises:
        ValueError: if ``path`` exists and ``overwrite`` is not given, or it is no folder of this kind.
        OSError: if the new folder cannot be written (the disk is full, for one). The message says so in one line;
            ``path`` is as it was and nothing is left beside it, as after any other exception in the block.
    """
    path = Path(path).resolve()
    old, new = _replaced(path), path.with_name(f".{path.name}.incomplete")
    with together():
        if is_first():
            _put_back(old, path)
            _check(path, marker, overwrite)
    try:
        with together():
            if is_first():
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(old, ignore_errors=True)
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir()
        yield new
        with together():
            if is_first():
                if path.exists():
                    path.rename(old)
                new.rename(path)
                shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if is_first():
            shutil.rmtree(new, ignore_errors=True)
            _put_back(old, path)
        if not isinstance(error, OSError):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise OSError(
            f"expected to write {path}, got: {reason}; free disk space or choose another path, then save again "
            "(what was there before is unchanged)"
        ) from error


def reserve(folder: str | os.PathLike, sizes: Iterable[int]) -> None:
    """Check that files of these sizes (bytes) fit into ``folder`` together, by allocating and deleting them.

    Raises:
        OSError: if they do not: the disk is too full, or a quota or a limit on file sizes stands in the way.
    """
    sizes = list(sizes)
    need, free = sum(sizes), shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"{need} bytes do not fit into {free} free bytes")
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for i, size in enumerate(sizes):
            with open(Path(scratch) / str(i), "wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, size)


def current(path: str | os.PathLike) -> Path:
    """Return ``path``, or the folder that stepped aside for a replacement that never came."""
    path = Path(path).resolve()
    return _replaced(path) if not path.exists() and _replaced(path).exists() else path


def _put_back(old: Path, path: Path) -> None:
    if old.exists() and not path.exists():
        old.rename(path)


def _check(path: Path, marker: str, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir() or (any(path.iterdir()) and not (path / marker).is_file()):
        raise ValueError(f"expected {path} to be a folder with {marker}, got something else; choose another path")
    if any(path.iterdir()) and not overwrite:
        raise ValueError(f"expected a path that does not exist, got {path}; pass overwrite=True to replace it")


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")
