"""``dyninf compare``: quality and speed of several plans on held-out text, in one table."""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import Progress
from rich.table import Table

import dyninf
from dyninf.cli.common import Loaded, add_model_options, check_output, check_positive, load, progress, table_console
from dyninf.cli.decoding import Excerpt, time_excerpt
from dyninf.cli.heldout import MAX_WINDOW, SUFFIXES, Windows, read_documents, windows_of
from dyninf.cli.plan_options import check_plan, read_plans
from dyninf.cli.quality import Quality, batches, evaluate
from dyninf.model import kv_shape
from dyninf.models import Transformer
from dyninf.timing import Timing, device_name

DEFAULT_PLANS = "dense,exit_half,unified_skip,exit_confidence,exit_patience,exit_saturation"
CPU_TOKENS, DEVICE_TOKENS = 16384, 131072  # two minutes for six plans of the shipped model on two CPU cores
QUICK_TOKENS, QUICK_WINDOW = 8 * 512, 512
EXCERPTS = 5  # pieces of text that are decoded for the time
PROMPT, DECODED = 256, 64  # tokens of each

EXAMPLES = """\
examples:
  dyninf compare --plans dense,exit_confidence --quick
  dyninf compare --plans exit_confidence@depth.threshold=0.8,exit_confidence@depth.threshold=0.95
  dyninf compare --plans exit_half,exit_patience --data my_project/ --json results.json

The dense model is always measured along. Quality is teacher-forced over windows of the text. Time is that of decoding
the same pieces of text at batch 1 on this machine: the text's tokens are fed, so every plan decodes the same.
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "compare",
        help="quality and speed of plans on held-out text",
        description="Compare plans on held-out text: what they predict, what they need, what they save.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--plans",
        default=DEFAULT_PLANS,
        metavar="A,B@PATH=VALUE",
        help=f"named plans, changed with @ (default: {DEFAULT_PLANS})",
    )
    add_model_options(parser)
    add_data_options(parser)
    parser.add_argument("--quick", action="store_true", help=f"use {QUICK_TOKENS} tokens in windows of {QUICK_WINDOW}")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON, too")
    parser.set_defaults(run=run)
    return parser


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``, ``--suffixes`` and ``--tokens``."""
    parser.add_argument(
        "--data",
        metavar="FOLDER_OR_FILE",
        help="held-out text: a folder, a text file or .jsonl with a field text (default: shipped beside the model)",
    )
    parser.add_argument(
        "--suffixes", default=",".join(SUFFIXES), help=f"files read of a folder (default: {','.join(SUFFIXES)})"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        help=f"use about N tokens, spread over the text; 0: all (default: {CPU_TOKENS} on CPU, else {DEVICE_TOKENS})",
        metavar="N",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure every plan and print the table."""
    check_output(arguments.json)
    loaded = load(arguments)
    num_layers = len(loaded.model.layers)
    plans = {"dense": dyninf.Plan(), **read_plans(arguments.plans, num_layers)}
    for plan in plans.values():
        check_plan(plan, loaded.model)
    windows = read_windows(loaded, arguments, quick=arguments.quick)
    with progress() as bar:
        qualities = _measure_quality(loaded, plans, windows, bar)
        timings = _measure_time(loaded, plans, excerpts(windows), bar)
    rows = [_row(name, loaded.model, windows, qualities, timings) for name in plans]
    about = {
        "model": loaded.name,
        "dtype": loaded.dtype,
        "device": device_name(),
        "jax": jax.__version__,
        "dyninf": dyninf.__version__,
        "num_layers": num_layers,
        "tokens": int(windows.lengths.sum()),
        "bytes": int(windows.num_bytes.sum()),
        "window": int(windows.inputs.shape[1]),
    }
    _print(about, rows)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({**about, "plans": rows}, indent=2) + "\n", encoding="utf-8")
    return 0


def read_windows(
    loaded: Loaded, arguments: argparse.Namespace, *, quick: bool = False, window: int = MAX_WINDOW
) -> Windows:
    """Return the held-out text that the options name, as windows of at most ``window`` tokens."""
    tokens = arguments.tokens
    if tokens is None:
        tokens = CPU_TOKENS if jax.default_backend() == "cpu" else DEVICE_TOKENS
        tokens = QUICK_TOKENS if quick else tokens
    if tokens < 0:
        raise ValueError(f"expected --tokens of at least 1, or 0 for all, got {tokens}")
    suffixes = tuple(suffix for suffix in arguments.suffixes.split(",") if suffix)
    documents = read_documents(loaded, arguments.data, suffixes)
    length = QUICK_WINDOW if quick else window
    if tokens:
        check_positive(tokens=tokens)
        length = min(length, max(tokens, 2))
    return windows_of(loaded, documents, length=length, max_tokens=tokens or None)


def excerpts(windows: Windows) -> list[Excerpt]:
    """Return the pieces of text to decode, all of one size so that they share a compilation."""
    longest = int(windows.lengths.max())
    if longest < 2:
        raise ValueError("expected a piece of text of at least three tokens to decode, got less; give more text")
    decoded = max(1, min(DECODED, longest // 2))
    prompt = max(1, min(PROMPT, longest - decoded))
    whole = np.flatnonzero(windows.lengths >= prompt + decoded)
    chosen = whole[np.linspace(0, len(whole) - 1, min(EXCERPTS, len(whole))).round().astype(int)]
    return [
        Excerpt(prompt=windows.inputs[row, :prompt], following=windows.inputs[row, prompt : prompt + decoded])
        for row in chosen
    ]


def _measure_quality(
    loaded: Loaded, plans: dict[str, dyninf.Plan], windows: Windows, bar: Progress
) -> dict[str, Quality]:
    task = bar.add_task("reading", total=len(plans) * len(batches(loaded.model, windows)))
    qualities = {}
    for name, plan in plans.items():
        bar.update(task, description=f"reading as {name}")
        qualities[name] = evaluate(loaded.model, plan, windows, step=lambda: bar.advance(task))
    return qualities


def _measure_time(
    loaded: Loaded, plans: dict[str, dyninf.Plan], texts: list[Excerpt], bar: Progress
) -> dict[str, tuple[Timing, dict[str, float]]]:
    """Time every plan on one text before the next text, so that all see the same state of the machine."""
    task = bar.add_task("decoding", total=len(plans) * (1 + len(texts)))
    samples: dict[str, list[float]] = {name: [] for name in plans}
    used: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
    for number, text in enumerate([texts[0], *texts]):
        for name, plan in plans.items():
            bar.update(task, description=f"decoding as {name}")
            timing, means = time_excerpt(loaded.model, plan, text, warmup=int(number == 0), repeats=1)
            if number:  # the first text warms up
                samples[name].append(timing.median)
                used[name].append(means)
            bar.advance(task)
    means = {
        name: {key: float(np.mean([one[key] for one in spent])) for key in spent[0]} for name, spent in used.items()
    }
    return {name: (Timing(samples=tuple(samples[name])), means[name]) for name in plans}


def _row(
    name: str,
    model: Transformer,
    windows: Windows,
    qualities: dict[str, Quality],
    timings: dict[str, tuple[Timing, dict[str, float]]],
) -> dict[str, Any]:
    quality, dense = qualities[name], qualities["dense"]
    timing, means = timings[name]
    entry, num_layers = kv_shape(model), len(model.layers)
    token = 2 * entry.size * entry.dtype.itemsize  # bytes of a key and a value in one layer
    return {
        "plan": name,
        "bits_per_byte": quality.bits_per_byte,
        "accuracy": quality.accuracy,
        "accuracy_of_dense": quality.accuracy / dense.accuracy if dense.accuracy else 0.0,
        "agreement_with_dense": float(np.mean(quality.choices == dense.choices)),
        "layers_needed": quality.layers_needed,
        "layers_needed_share": quality.layers_needed / num_layers,
        "layers_run": means["layers_run"],
        "kv_live_bytes": means["kv_live"] * (num_layers - means["own_layers"]) * token + means["own_bytes"],
        "kv_read_bytes": means["kv_read"] * means["layers_run"] * token,
        "seconds_per_token": timing.median,
        "seconds_per_token_p10": timing.p10,
        "seconds_per_token_p90": timing.p90,
        "speedup": timings["dense"][0].median / timing.median,
    }


def _print(about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    title = (
        f"{about['model']} on {about['tokens']} tokens ({about['bytes']} bytes) of held-out text; "
        f"decoded at batch 1 on {about['device']}, {about['dtype']}, jax {about['jax']}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("plan")
    columns = ("bits/byte", "accuracy", "of dense", "agrees", "needed", f"of {about['num_layers']}", "run")
    for column in (*columns, "KV held", "KV read", "ms/token", "speed-up"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["plan"],
            f"{row['bits_per_byte']:.3f}",
            f"{100 * row['accuracy']:.1f} %",
            f"{100 * row['accuracy_of_dense']:.1f} %",
            f"{100 * row['agreement_with_dense']:.1f} %",
            f"{row['layers_needed']:.2f}",
            f"{100 * row['layers_needed_share']:.0f} %",
            f"{row['layers_run']:.2f}",
            f"{row['kv_live_bytes'] / 1e6:.2f} MB",
            f"{row['kv_read_bytes'] / 1e6:.2f} MB",
            f"{1000 * row['seconds_per_token']:.2f}",
            f"{row['speedup']:.2f}x",
        )
    console = table_console()
    console.print(table)
    console.print(
        "accuracy: next token right; of dense: relative to the dense model; agrees: same choice as dense; needed, of "
        f"{about['num_layers']}: mean layers a token needed; run: layers run while timed; KV held, read: keys and "
        "values in the cache and those that a step reads, without the summaries that it chooses by, though for caches "
        "of low-rank factors all that they hold; speed-up: against dense."
    )
