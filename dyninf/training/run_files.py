"""The files of a training run: one process at a time, written whole or not at all, never begun twice differently."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """Hold the run directory; the operating system lets go of it when the process ends, however it ends."""
    with (run / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"expected no other process in {str(run)!r}, got one that is at work there; wait for it or stop it"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def refuse_changes(path: Path, description: dict[str, dict[str, Any]]) -> None:
    """Refuse to go on with a run that was begun differently."""
    try:
        begun = json.loads(path.read_bytes())
        found = {(part, key): value for part, fields in begun.items() for key, value in fields.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"expected how the run was begun in {str(path)!r}, got {type(error).__name__}; use another run directory"
        ) from error
    wanted = {
        (part, key): value
        for part, fields in json.loads(json.dumps(description)).items()
        for key, value in fields.items()
    }
    changed = [
        f"{part}.{key}: {found.get((part, key))!r} -> {wanted.get((part, key))!r}"
        for part, key in sorted(found.keys() | wanted.keys())
        if found.get((part, key)) != wanted.get((part, key))
    ]
    if changed:
        raise ValueError(
            f"expected what {str(path.parent)!r} was begun with, got {'; '.join(changed)}; use another run directory"
        )


def refuse_text(run: Path) -> None:
    """Refuse to train on tasks where there is text, whose tokenizer and tokens belong together."""
    if (run / "train.tokens.json").exists():
        raise ValueError(
            f"expected a run directory without text to train on tasks, got {str(run)!r}, which holds train.tokens; "
            "use another one"
        )


def refuse_tasks(run: Path) -> None:
    """Refuse to prepare text for a run that was begun with tasks, whose tokenizer it would replace."""
    try:
        tasks = json.loads((run / "recipe.json").read_bytes())["data"]["tasks"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    raise ValueError(
        f"expected a run directory without tasks to train on text, got {str(run)!r}, begun with {', '.join(tasks)}; "
        "use another one"
    )


def write(path: Path, text: str) -> None:
    """Replace a file by another text, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def open_log(path: Path, step: int) -> TextIO:
    """Open the log for appending, without the lines of steps that will be made again."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.decode("utf-8"))
        except (ValueError, KeyError, TypeError):  # a line that a kill cut short
            continue
    write(path, "".join(line + "\n" for line in kept))
    return path.open("a", encoding="utf-8")
