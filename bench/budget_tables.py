"""The tables and the picture of quality against budget, made from the rows of ``bench/budgets.py`` in any order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.budget_plans import DENSE, policy_names

BEST = "most_attended"
Rows = list[dict[str, Any]]
Cell = Callable[[Rows], str]


def tables(study: str, rows: Rows) -> list[tuple[list[str], list[list[str]], str]]:
    """Return head, lines and a note for each table of a study: one, or one for each model of ``mass``."""
    cell, note = {"tasks": (_tasks_cell, _TASKS), "nll": (_nll_cell, _NLL), "mass": (_mass_cell, _MASS)}[study]
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        denominators = sorted({row["denominator"] for row in mine if row["denominator"] is not None})
        lines = [
            [_label(policy, mine), *(cell(_of(mine, policy, denominator)) for denominator in denominators)]
            for policy in _policies(mine)
        ]
        dense = cell(_of(mine, DENSE, None))
        text = f"{model}, {_amount(mine[0])}; {note}" + (f" Dense: {dense}." if dense else "")
        found.append((["policy", *(f"1/{denominator}" for denominator in denominators)], lines, text))
    return found


def draw(path: Path, tasks: Rows, nll: Rows, pyplot: Any) -> None:
    """Draw accuracy with the question after the context, and loss, against the budget: a line a policy."""
    after = [row for row in tasks if row["query"] == "after"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5.5), layout="constrained")
    policies = list(dict.fromkeys([*_policies(after), *_policies(nll)]))
    colors = pyplot.get_cmap("tab20").colors
    for number, policy in enumerate(policies):
        style = {
            "color": colors[number % len(colors)],
            "marker": "os^vD<>Px*"[number % 10],
            "linestyle": "--" if policy.startswith("select") else "-",
            "markersize": 5,
            "label": policy,
        }
        left.plot(*_points(after, policy, lambda row: 100 * mean_exact(row)), **style)
        right.plot(*_points(nll, policy, lambda row: row["nll"]), **style)
    for axes, rows, value in ((left, after, lambda row: 100 * mean_exact(row)), (right, nll, lambda row: row["nll"])):
        for row in _of(rows, DENSE, None)[:1]:
            axes.axhline(value(row), color="black", linewidth=1, linestyle=":", label=DENSE)
        denominators = sorted({row["denominator"] for row in rows if row["denominator"] is not None})
        axes.set_xscale("log", base=2)
        axes.set_xticks([1 / denominator for denominator in denominators], [f"1/{n}" for n in denominators])
        axes.minorticks_off()
        axes.set_xlabel("budget, share of the context")
        axes.set_title(f"{rows[0]['model']}, {_amount(rows[0])}", fontsize=9)
        axes.grid(alpha=0.3)
    left.set_ylabel("answers right, the question after the context, %")
    right.set_ylabel("nats a token, after a compressed prompt")
    labels = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    labels |= dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def mean_exact(row: dict[str, Any]) -> float:
    """Return the share of answers that are right token for token, a mean of the tasks."""
    return sum(row["exact"].values()) / len(row["exact"])


_TASKS = (
    "answers right to the last token, %, a mean of needle, multikey_all, multivalue and multiquery: the question is "
    "part of the prompt / comes after the context was read. In the first case the answers of needle and multikey_all, "
    "one token each, come from the full context."
)
_NLL = "nats a token in the second half of each window, the first half being the prompt / next tokens right, %."
_MASS = (
    "share of the exact attention of the last token on what is read (not known of caches in a form of their own) / "
    "relative error of the attention output."
)


def _tasks_cell(rows: Rows) -> str:
    shown = {row["query"]: f"{100 * mean_exact(row):.0f}" for row in rows}
    return " / ".join(shown.get(query, "–") for query in ("with", "after")) if shown else ""


def _nll_cell(rows: Rows) -> str:
    return f"{rows[-1]['nll']:.3f} / {100 * rows[-1]['accuracy']:.1f}" if rows else ""


def _mass_cell(rows: Rows) -> str:
    if not rows:
        return ""
    recall = "–" if rows[-1]["recall"] is None else f"{rows[-1]['recall']:.3f}"
    return f"{recall} / {rows[-1]['error']:.3f}"


def _of(rows: Rows, policy: str, denominator: int | None) -> Rows:
    return [row for row in rows if row["policy"] == policy and row["denominator"] == denominator]


def _policies(rows: Rows) -> list[str]:
    """Return the policies that have a budget, in the order of ``configs/plans.py``."""
    present = {row["policy"] for row in rows}
    return [name for name in (*policy_names(), BEST) if name in present]


def _label(policy: str, rows: Rows) -> str:
    dense = max(row["dense_layers"] or 0 for row in rows if row["policy"] == policy)
    return f"{policy} ({dense} layers read everything)" if dense else policy


def _amount(row: dict[str, Any]) -> str:
    counted = {"tasks": f"{row['samples']} samples a task", "nll": f"{row['samples']} windows"}
    return f"{counted.get(row['study']) or str(row['texts']) + ' texts'} of {row['length']} tokens"


def _points(rows: Rows, policy: str, value: Callable[[dict[str, Any]], float]) -> tuple[list[float], list[float]]:
    points = sorted({row["denominator"]: value(row) for row in rows if row["policy"] == policy}.items())
    return [1 / denominator for denominator, _ in points], [number for _, number in points]
