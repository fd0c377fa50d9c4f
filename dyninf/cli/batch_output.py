"""The results of ``dyninf batch``: a file of JSON lines that only grows, and beside it what was asked for.

Lines are written whole and reach the disk before more work is done. A kill can leave a part of a line at the end; it
is removed when the job goes on. What was asked for stands in ``NAME.job.json``: a job goes on only as it was begun.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dyninf.models.processes import broadcast

FORMAT = "dyninf batch, version 1"  # raise it when what the lines mean changes
HEADER = ".job.json"
SHOWN = 80  # characters of a value in an error


class Ledger:
    """What is done of a job; alone it writes nothing, which is what all processes but the first do.

    Attributes:
        done: lines of the input that have their result.
        num_errors: how many of them failed.
        first_error: the number of the first one that did, and why.
    """

    def __init__(self):
        self.done: set[int] = set()
        self.num_errors = 0
        self.first_error: tuple[int, str] | None = None

    def begin(self, asked: dict[str, Any], lines: range) -> None:
        """Begin a job, or go on with one; see :meth:`Results.begin`."""

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Note results."""
        for row in rows:
            self.done.add(row["line"])
            if "error" in row:
                self.num_errors += 1
                self.first_error = self.first_error or (row["line"], row["error"])

    def share(self) -> None:
        """Take over what process 0 has found done; all processes must call this."""
        state = broadcast([sorted(self.done), self.num_errors, self.first_error])
        self.done, self.num_errors = set(state[0]), state[1]
        self.first_error = state[2] and tuple(state[2])


class Results(Ledger):
    """An output file, held by this process alone.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if it is no regular file, or another process is at work on it.
    """

    def __init__(self, path: Path):
        if path.exists() and not path.is_file():
            raise ValueError(f"expected a file to write results to, got {str(path)!r}, which is none")
        super().__init__()
        self._path, self._header = path, header_of(path)
        self._created = not path.exists()
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(
                f"expected no other process that writes {str(path)!r}, got one; wait for it, or name another output"
            ) from None
        except OSError:  # a file system without locks
            pass

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._created:  # and nothing was begun
            self._path.unlink()
        with contextlib.suppress(OSError):  # all is on the disk but what could not be written before
            self._file.close()

    def begin(self, asked: dict[str, Any], lines: range) -> None:
        """Begin a job, or go on with one: read what is done and remove a last line that a kill cut short.

        Args:
            asked: all that decides what the lines say.
            lines: of the input that belong here.

        Raises:
            ValueError: if the file holds something else, or was begun otherwise; it stays as it is.
        """
        asked = {"format": FORMAT} | asked
        begun = self._begun()
        if not os.fstat(self._file.fileno()).st_size:
            self._write_header(asked)
            self._created = False
            return
        if begun is None:
            raise ValueError(
                f"expected an output of dyninf batch with {self._header.name} beside it, got {str(self._path)!r} "
                "without; name another output"
            )
        changed = [
            f"{name}: {_shown(begun.get(name))} -> {_shown(asked.get(name))}"
            for name in dict.fromkeys((*begun, *asked))
            if begun.get(name) != asked.get(name)
        ]
        if changed:
            raise ValueError(
                f"expected to go on with {str(self._path)!r} as it was begun, got {'; '.join(changed)}; name another "
                "output"
            )
        self._read(lines)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append results and wait until they are on the disk.

        Raises:
            OSError: if they cannot be written, for want of room for one; what was written before is kept.
        """
        if not rows:
            return
        try:
            self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode("ascii"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                f"expected to write to {str(self._path)!r}, got: {error}; finished lines are kept and the same command "
                "goes on"
            ) from error
        super().add(rows)

    def _read(self, lines: range) -> None:
        self._file.seek(0)
        whole = 0
        for number, raw in enumerate(self._file, start=1):
            if not raw.endswith(b"\n"):
                break
            try:
                row = json.loads(raw)
                if row["line"] not in lines or row["line"] in self.done:
                    raise ValueError
                super().add([row])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(
                    f"expected results of dyninf batch in {str(self._path)!r}, one for a line, got {raw!r:.60} in line "
                    f"{number}; name another output"
                ) from None
            whole += len(raw)
        self._file.truncate(whole)

    def _begun(self) -> dict[str, Any] | None:
        """Return what the header says, ``None`` if there is none."""
        try:
            begun = json.loads(self._header.read_bytes())
            if begun["format"].startswith("dyninf batch"):
                return begun
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise ValueError(f"expected what a job was begun with in {str(self._header)!r}, got something else; move it")

    def _write_header(self, asked: dict[str, Any]) -> None:
        partial = self._header.with_name(self._header.name + ".partial")
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(asked, indent=1) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, self._header)
        with contextlib.suppress(OSError):  # file systems that do not write folders by themselves
            folder = os.open(self._header.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def header_of(path: Path) -> Path:
    """Return the file that says what an output was begun with."""
    return path.with_name(path.name + HEADER)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
