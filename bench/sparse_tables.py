"""The tables of quality under sparse prefill, made from the rows of ``bench/sparse_quality.py`` in any order."""

from typing import Any

from bench.rendering import RESULTS, commits, read_rows, table
from bench.sparse_budgets import policy_names

Rows = list[dict[str, Any]]
NOTES = {
    "tasks": "answers right to the last token, and the mean score of answers, %, means of needle, multikey_all, "
    "multivalue and multiquery (blocks that are attended to, % of dense attention).",
    "mass": "share of the exact attention of all queries on what is attended to / relative error of the attention "
    "outputs (blocks that are attended to, % of dense attention).",
}


def sparse_table(study: str) -> str:
    """Return quality against the budget of every policy, a table for each model."""
    rows = read_rows(f"sparse_quality_{study}") if (RESULTS / f"sparse_quality_{study}.jsonl").is_file() else []
    if not rows:
        return f"No rows in `results/sparse_quality_{study}.jsonl`.\n"
    about = f"{rows[0]['device']}, {rows[0]['dtype']}, jax {rows[0]['jax']}, {commits(rows)}.\n"
    return "\n".join(f"{table(head, lines)}\n{note} {about}" for head, lines, note in tables(study, rows))


def tables(study: str, rows: Rows) -> list[tuple[list[str], list[list[str]], str]]:
    """Return head, lines and a note for each model."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        cells = {(row["policy"], row["denominator"]): _cell(row) for row in mine}
        denominators = sorted({row["denominator"] for row in mine if row["denominator"] is not None})
        present = {row["policy"] for row in mine}
        lines = [
            [policy, *(cells.get((policy, denominator), "") for denominator in denominators)]
            for policy in policy_names()
            if policy in present
        ]
        dense = cells.get(("dense", None))
        text = f"{model}, {_amount(mine[0])} in blocks of {mine[0]['block_size']}; {NOTES[study]}"
        text += f" Dense: {dense}." if dense else ""
        found.append((["policy", *(f"1/{denominator}" for denominator in denominators)], lines, text))
    return found


def _cell(row: dict[str, Any]) -> str:
    share = f"({100 * row['density']:.0f})"
    if row["study"] == "mass":
        return f"{row['mass']:.3f} / {row['error']:.3f} {share}"
    exact, score = (100 * sum(row[name].values()) / len(row[name]) for name in ("exact", "score"))
    return f"{exact:.0f} / {score:.0f} {share}"


def _amount(row: dict[str, Any]) -> str:
    if row["study"] == "tasks":
        return f"{row['samples']} samples a task of {row['length']} tokens"
    return f"{row['texts']} text{'s' * (row['texts'] > 1)} of {row['length']} tokens"
