"""Render the committed result rows into README.md and the model card, and draw their pictures.

Run ``python bench/report.py`` from anywhere; it rewrites what stands between ``<!-- bench:NAME -->`` and
``<!-- /bench -->`` and draws ``exits.png`` and ``recipes.png`` in ``bench/results``. ``--check`` changes nothing and
fails if a table is stale.
"""

import argparse
import json
import re
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "models" / "pretrained" / "pycode-13m" / "README.md")
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)

# Device copy rate measured on the H200 (bytes read and written); the floor of a step is its bytes over this rate.
H200_COPY_GB_S = 4140.0


def decode_table() -> str:
    """Return decode speed at the Llama-3-8B shape, dense and under static plans."""
    rows = _rows("decode_h200")
    lines = []
    for row in rows:
        share = row["achieved_gb_s"] / H200_COPY_GB_S
        lines.append(
            [
                row["plan"],
                str(row["batch"]),
                f"{row['filled']} of {row['context']}",
                f"{row['median_ms']:.2f}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['speedup']:.2f}x",
                f"{row['achieved_gb_s'] / 1000:.2f}",
                f"{100 * share:.0f} %",
            ]
        )
    about = rows[0]
    head = ["plan", "batch", "cache filled", "ms/step", "tokens/s", "against dense", "TB/s", "of the floor"]
    note = f"\n{about['device']}, {about['dtype']}, jax {about['jax']}, commit {about['commit']}, random weights.\n"
    return _table(head, lines) + note


PROGRAMS = {
    "dense_list": "dense, a list of layers (XLA)",
    "dense_indexed": "dense, stacked layers, driver `indexed`",
    "indexed": "depth decided by data, `indexed`",
    "indexed_cosine": "the same, states compared before every layer",
    "segments": "depth decided by data, `segments`: a conditional for each layer",
    "naive_while": "`lax.while_loop` over stacked weights",
    "naive_scan": "`lax.scan` over stacked weights",
    "naive_cond": "`lax.cond` for each layer of stacked weights",
}


def depth_table() -> str:
    """Return what dynamic depth costs and saves, beside the programs one would write first."""
    rows = _rows("depth_h200")
    kinds = list(PROGRAMS)
    lines = []
    for row in sorted(rows, key=lambda row: (row["batch"], kinds.index(_kind(row["program"])))):
        lines.append(
            [
                PROGRAMS[_kind(row["program"])],
                str(row["batch"]),
                f"{row['layers_run']:.0f}",
                f"{row['median_ms']:.2f}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['speedup']:.2f}x" if row["speedup"] else "",
                f"{row['achieved_gb_s'] / 1000:.2f}",
            ]
        )
    about = rows[0]
    head = ["program", "batch", "layers run", "ms/step", "tokens/s", "against dense (XLA)", "TB/s"]
    note = (
        f"\nLlama-3-8B shape, random weights, {about['filled']} of {about['context']} slots filled, {about['device']}, "
        f"{about['dtype']}, jax {about['jax']}, commit {about['commit']}.\n"
    )
    return _table(head, lines) + note


def _kind(program: str) -> str:
    return program.removesuffix("_all").removesuffix("_half").removesuffix("_quarter")


def compare_table(name: str) -> str:
    """Return what plans predict, need and save on the shipped model's held-out text."""
    about = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    lines = [
        [
            row["plan"],
            f"{row['bits_per_byte']:.3f}",
            f"{100 * row['accuracy']:.1f} %",
            f"{100 * row['accuracy_of_dense']:.1f} %",
            f"{row['layers_needed']:.2f} ({100 * row['layers_needed_share']:.0f} %)",
            f"{1000 * row['seconds_per_token']:.2f}",
            f"{row['speedup']:.2f}x",
        ]
        for row in about["plans"]
    ]
    head = ["plan", "bits/byte", "next token right", "of dense", "layers needed", "ms/token", "against dense"]
    note = f"\n{about['device']}, {about['dtype']}, jax {about['jax']}, {about['tokens']} held-out tokens.\n"
    return _table(head, lines) + note


def exits_table() -> str:
    """Return the share of tokens that each exit layer gets right."""
    about = json.loads((RESULTS / "eval_cpu.json").read_text(encoding="utf-8"))
    lines = [
        [str(row["layers"]), *(f"{100 * row[name]:.1f} %" for name in ("right", "first_right", "agreement"))]
        for row in about["exits"]
    ]
    head = ["exit after layer", "right", "right here first", "agrees with layer 16"]
    note = (
        f"\nRight at no layer: {100 * about['right_nowhere']:.1f} %. Full model: {about['bits_per_byte']:.3f} bits "
        f"per byte. {about['tokens']} held-out tokens.\n"
    )
    return _table(head, lines) + note


RECIPES = {
    "layerskip": "LayerSkip",
    "soft": "SoFT",
    "plain": "last layer only",
    "frozen": "frozen backbone, adapters and gates",
    "jei": "frozen backbone, JEI-DNN's gates",
}


def recipes_table() -> str:
    """Return what each training recipe leaves at its exits, for equal tokens."""
    rows = _rows("recipes_h200")
    num_layers = rows[0]["shapes"]["num_layers"]
    depths, shares = [num_layers * part // 4 for part in (1, 2, 3, 4)], (50, 75)
    lines = []
    for row in rows:
        found = [interpolate(row["curve"], num_layers * share / 100) for share in shares]
        lines.append(
            [
                RECIPES[row["variant"]],
                f"{row['parameters'] / 1e6:.2f}",
                *(f"{100 * row['exits'][depth - 1]:.1f} %" for depth in depths),
                *("" if right is None else f"{100 * right:.1f} %" for right in found),
            ]
        )
    about = rows[0]
    head = ["recipe", "million parameters", *(f"right at layer {depth}" for depth in depths)]
    head += [f"leaving by the rule, {share} % of the layers" for share in shares]
    note = (
        f"\n{about['training_tokens'] / 1e6:.1f} million training tokens each, {about['heldout_tokens']} held-out; "
        f"{about['device']}, jax {about['jax']}, commit {about['commit']}.\n"
    )
    return _table(head, lines) + note


def interpolate(curve: list[dict[str, float]], layers: float) -> float | None:
    """Return a curve's accuracy at a mean number of layers, between its points; ``None`` outside of them."""
    points = sorted((point["layers"], point["accuracy"]) for point in curve)
    for (left, low), (right, high) in pairwise(points):
        if left <= layers <= right:
            return low if left == right else low + (high - low) * (layers - left) / (right - left)
    return None


def stops_table() -> str:
    """Return how well stops find the tokens that no layer gets right, and what they save."""
    rows = [row for row in _rows("stops_cpu") if row["exit_threshold"] == 1.0]
    names = ("hopeless_precision", "hopeless_recall", "tokens_saved", "useful", "useful_lost")
    lines = [
        [
            "never" if row["stop_threshold"] == 1.0 else f"{row['stop_threshold']:g}",
            *(f"{100 * row[name]:.1f} %" for name in names),
            f"{row['rouge_l']:.3f}",
        ]
        for row in rows
    ]
    about = rows[0]
    head = ["stop above", "precision", "recall", "tokens saved", "useful", "useful tokens lost", "ROUGE-L"]
    note = (
        f"\nRight at no layer: {100 * about['hopeless']:.1f} % of {about['heldout_tokens']} held-out tokens; "
        f"{about['completions']} completions; {about['device']}, jax {about['jax']}, commit {about['commit']}.\n"
    )
    return _table(head, lines) + note


def draw_recipes(path: Path) -> None:
    """Draw accuracy against layers for every recipe: all tokens leave at one layer, or each by the rule."""
    pyplot, rows = _pyplot(), _rows("recipes_h200")
    figure, (fixed, dynamic) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for row in rows:
        label, share = RECIPES[row["variant"]], 100 / row["shapes"]["num_layers"]
        shares = [share * depth for depth in range(1, len(row["exits"]) + 1)]
        fixed.plot(shares, [100 * right for right in row["exits"]], "o-", markersize=3, label=label)
        curve = sorted(row["curve"], key=lambda point: point["layers"])
        points = [(share * point["layers"], 100 * point["accuracy"]) for point in curve]
        dynamic.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
    tokens = rows[0]["training_tokens"] / 1e6
    for axes, title in ((fixed, "every token leaves at one layer"), (dynamic, "each token leaves by the rule")):
        axes.set_xlabel("layers needed, % of the model")
        axes.set_title(f"{title}, {tokens:.0f} million training tokens", fontsize=9)
        axes.grid(alpha=0.3)
    fixed.set_ylabel("next tokens right, %")
    fixed.legend(loc="lower right", fontsize=8)
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


TABLES = {
    "depth": depth_table,
    "decode": decode_table,
    "compare_cpu": lambda: compare_table("compare_cpu"),
    "compare_h200": lambda: compare_table("compare_h200"),
    "exits": exits_table,
    "recipes": recipes_table,
    "stops": stops_table,
}


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
    print(f"rewrote {', '.join(stale) or 'no page'}; drew exits.png and recipes.png")
    return 0


def _rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
