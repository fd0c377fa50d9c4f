"""Render the committed result rows into README.md, bench/README.md and the model cards, and draw their pictures.

Run ``python bench/report.py`` from anywhere; it rewrites what stands between ``<!-- bench:NAME -->`` and
``<!-- /bench -->`` and draws ``exits.png``, ``recipes.png``, ``scaling.png`` and, where its rows are, ``budgets.png``
in ``bench/results``. ``--check`` changes nothing and fails if a table is stale.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench import budget_tables, mesh_tables  # noqa: E402
from bench.rendering import RESULTS, read_rows  # noqa: E402
from bench.tables import RECIPES, TABLES  # noqa: E402

PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md", *sorted(ROOT.glob("models/pretrained/*/README.md")))
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def draw_recipes(path: Path) -> None:
    """Draw accuracy against layers for every recipe: all tokens leave at one layer, or each by the rule."""
    pyplot, rows = _pyplot(), read_rows("recipes_h200")
    figure, (fixed, dynamic) = pyplot.subplots(1, 2, figsize=(10, 5), layout="constrained", sharey=True)
    share, priced = 100 / rows[0]["shapes"]["num_layers"], [row for row in rows if row["price"] is not None]
    for color, (variant, label) in enumerate(RECIPES.items()):
        row = next(row for row in rows if row["variant"] == variant)  # of several prices, the first
        style = {"color": f"C{color}", "markersize": 3}
        shares = [share * depth for depth in range(1, len(row["exits"]) + 1)]
        label += "" if row["price"] is None else f", price {row['price']:g}"
        fixed.plot(shares, [100 * right for right in row["exits"]], "o-", **style)
        dynamic.plot(*_points(row["curve"], share), "o-", label=label, **style)
        if row in priced:
            chosen = [point for row in priced for point in row["curve"] if point["threshold"] == 0.5]
            label = f"the same at threshold 0.5, prices {priced[0]['price']:g} to {priced[-1]['price']:g}"
            dynamic.plot(*_points(chosen, share), "D-", color="black", markersize=5, fillstyle="none", label=label)
    tokens = rows[0]["training_tokens"] / 1e6
    for axes, title in ((fixed, "every token leaves at one layer"), (dynamic, "each token leaves by the rule")):
        axes.set_xlabel("layers needed, % of the model")
        axes.set_title(f"{title}, {tokens:.0f} million training tokens", fontsize=9)
        axes.grid(alpha=0.3)
    fixed.set_ylabel("next tokens right, %")
    figure.legend(*dynamic.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw(path: Path) -> None:
    """Draw accuracy against layers needed: every exit layer as a fixed depth, and the exit plans."""
    pyplot = _pyplot()
    exits = json.loads((RESULTS / "eval_cpu.json").read_text(encoding="utf-8"))["exits"]
    about = json.loads((RESULTS / "compare_cpu.json").read_text(encoding="utf-8"))
    num_layers, full = about["num_layers"], exits[-1]["right"]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(
        [100 * row["layers"] / num_layers for row in exits],
        [100 * row["right"] / full for row in exits],
        "o-",
        color="#888888",
        label="the same exit for every token",
    )
    for row in about["plans"]:
        if row["plan"] != "dense":
            axes.plot(100 * row["layers_needed_share"], 100 * row["accuracy_of_dense"], "D", label=row["plan"])
    axes.set_xlabel("layers needed, % of the model")
    axes.set_ylabel("next tokens right, % of dense")
    axes.set_title(f"{about['model']}: what a token needs")
    axes.set_xlim(25, 102)
    axes.set_ylim(55, 102)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def render(text: str) -> str:
    """Return a page with every table made anew from the rows."""
    return BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", text)


def main() -> int:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description="Render the committed results into README.md and the model card.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is stale")
    arguments = parser.parse_args()
    stale = []
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = render(before)
        if after != before:
            stale.append(page.name)
            if not arguments.check:
                page.write_text(after, encoding="utf-8")
    if arguments.check:
        if stale:
            print(f"stale tables in {', '.join(stale)}; run python bench/report.py")
        return 1 if stale else 0
    draw(RESULTS / "exits.png")
    draw_recipes(RESULTS / "recipes.png")
    mesh_tables.draw_scaling(RESULTS / "scaling.png", _pyplot())
    drawn = ["exits.png", "recipes.png", "scaling.png"]
    if all((RESULTS / f"budgets_{study}.jsonl").is_file() for study in ("tasks", "nll")):
        drawn.append("budgets.png")
        budget_tables.draw(RESULTS / drawn[-1], read_rows("budgets_tasks"), read_rows("budgets_nll"), _pyplot())
    print(f"rewrote {', '.join(stale) or 'no page'}; drew {', '.join(drawn)}")
    return 0


def _points(curve: list[dict], share: float) -> tuple[list[float], list[float]]:
    points = sorted((share * point["layers"], 100 * point["accuracy"]) for point in curve)
    return [layers for layers, _ in points], [right for _, right in points]


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


if __name__ == "__main__":
    sys.exit(main())
