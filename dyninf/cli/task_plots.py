"""Pictures of what plans answer: quality against budget, against time, and by the depth of the needle."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def require_matplotlib() -> None:
    """Raise ValueError if there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("expected matplotlib for plots, got none; pip install matplotlib, or leave --plots out")


def budget(row: dict[str, Any]) -> float:
    """Return the cache entries that a step's layers read, as a share of all layers reading all tokens."""
    return row["layers_run"] / row["num_layers"] * row["kv_read"] / row["tokens_held"]


def draw_plots(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw three pictures of the rows of ``dyninf eval --tasks``; return their files.

    A point is the mean over the tasks of one plan at one length.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    pictures = (
        ("quality_budget.png", "cache entries read by a step, % of dense", lambda row: 100 * budget(row)),
        ("quality_time.png", "ms a token", lambda row: 1000 * row["seconds_per_token"]),
    )
    paths = []
    for name, label, value in pictures:
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        _scatter(axes, rows, value)
        axes.set(xlabel=label, ylabel="answers right, %", ylim=(-3, 103), xlim=(0, None))
        paths.append(_save(pyplot, figure, axes, folder / name))
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for plan in _plans(rows):
        scores = np.array(
            [[np.nan if s is None else s for s in row["by_depth"]] for row in rows if row["plan"] == plan]
        )
        known = ~np.isnan(scores)
        means = np.where(known.any(0), np.nansum(scores, 0) / np.maximum(known.sum(0), 1), np.nan)
        centres = 100 * (np.arange(len(means)) + 0.5) / len(means)
        axes.plot(centres, 100 * means, "o-", label=plan)
    axes.set(xlabel="depth of the needle, % of the context", ylabel="answers right, %", ylim=(-3, 103))
    paths.append(_save(pyplot, figure, axes, folder / "needle_depth.png"))
    return paths


def _scatter(axes: Any, rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> None:
    for plan in _plans(rows):
        points = []
        for length in dict.fromkeys(row["length"] for row in rows):
            mine = [row for row in rows if row["plan"] == plan and row["length"] == length]
            points.append((np.mean([value(row) for row in mine]), 100 * np.mean([row["score"] for row in mine])))
        axes.plot(*np.array(points).T, "D", label=plan)


def _plans(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["plan"] for row in rows))


def _save(pyplot: Any, figure: Any, axes: Any, path: Path) -> Path:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
