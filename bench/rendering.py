"""Reading committed result rows and writing them as Markdown."""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"

# Device copy rate measured on the H200 (bytes read and written); the floor of a step is its bytes over this rate.
H200_COPY_GB_S = 4140.0


def read_rows(name: str) -> list[dict]:
    """Return the rows of a file of results."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def commits(rows: list[dict]) -> str:
    """Return the commits that rows were measured at."""
    found = sorted({row["commit"] for row in rows})
    return f"commit{'s' * (len(found) > 1)} {' and '.join(found)}"
