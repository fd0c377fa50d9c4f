"""Rows of a script that goes on where it was stopped: which are measured already, and which part of them is whose."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def row_key(row: dict[str, Any], names: Sequence[str]) -> str:
    """Return what tells a row from every other."""
    return json.dumps([row[name] for name in names])


def read_keys(file: Path | None, bench: str, names: Sequence[str]) -> set[str]:
    """Return the keys of the rows of an earlier run; a last row that a kill cut short is removed from the file.

    Args:
        bench: first entry of every row, and the name of the script.

    Raises:
        ValueError: if the file holds anything else.
    """
    if file is None or not file.exists():
        return set()
    text, beginning = file.read_text(encoding="utf-8"), f'{{"bench": "{bench}", '
    expected = f"expected rows of bench/{bench}.py in {file}"
    whole, newline, rest = text.rpartition("\n")
    keys = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            keys.add(row_key(json.loads(line), names))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{expected}, got {line!r:.60} in line {number}; name another file") from None
    if rest:
        if not rest.startswith(beginning[: len(rest)]):
            raise ValueError(f"{expected}, got {rest!r:.60}; name another file")
        file.write_text(whole + newline, encoding="utf-8")
    return keys


def parse_shard(text: str) -> tuple[int, int]:
    """Return the first job and the step of ``I/N``.

    Raises:
        ValueError: if the text is something else.
    """
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"expected --shard as I/N with 0 <= I < N, such as 0/4, got {text!r}")
    return int(part), int(parts)


def parse_shares(text: str) -> list[int]:
    """Return the N of ``--budgets`` 1/N.

    Raises:
        ValueError: if the text is something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected --budgets as numbers separated by commas, such as 2,4, got {text!r}") from None
