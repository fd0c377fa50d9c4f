"""The tables of the project's pages, made from the committed result rows."""

import json
import re
from functools import partial
from itertools import pairwise

from bench import budget_tables, mesh_tables, prefill_tables, selection_tables, sparse_tables
from bench.rendering import H200_COPY_GB_S, RESULTS, commits, read_rows, table


def decode_table() -> str:
    """Return decode speed at the Llama-3-8B shape, dense and under static plans."""
    rows = read_rows("decode_h200")
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
    return table(head, lines) + note


PROGRAMS = {
    "dense_list": "dense, a list of layers (XLA)",
    "dense_indexed": "dense, stacked layers, driver `indexed`",
    "indexed": "depth decided by data, `indexed`",
    "indexed_cosine": "the same, states compared before every layer",
    "generate_list": "`generate`, a list of layers",
    "generate_indexed": "`generate`, stacked layers, depth decided by data",
    "segments": "depth decided by data, `segments`: a conditional for each layer",
    "naive_while": "`lax.while_loop` over stacked weights",
    "naive_scan": "`lax.scan` over stacked weights",
    "naive_cond": "`lax.cond` for each layer of stacked weights",
    "masked": "every layer, states frozen (`masked`)",
    "compact": "rows that go on gathered (`Compact`), capacity",
    "catch_up": 'upper layers later (`fill="catch_up"`)',
}


def depth_table(name: str) -> str:
    """Return what dynamic depth costs and saves, beside the programs one would write first."""
    rows = read_rows(name)
    kinds = list(PROGRAMS)
    lines = []
    for row in sorted(rows, key=lambda row: (row["batch"], kinds.index(_kind(row["program"])))):
        lines.append(
            [
                _described(row["program"]),
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
    steps = " or ".join(map(str, sorted({row.get("steps", 32) for row in rows})))  # which older rows do not say
    note = (
        f"\nLlama-3-8B shape, random weights, {about['filled']} of {about['context']} slots filled, {steps} steps in a "
        f"program, {about['device']}, {about['dtype']}, jax {about['jax']}, {commits(rows)}.\n"
    )
    return table(head, lines) + note


def decisions_table() -> str:
    """Return what it costs to ask each rule, against the same layers, driver and commit without one."""
    found = read_rows("decisions_h200")
    never = {(row["commit"], row["program"]): row for row in found if row["program"].startswith("dense_")}
    rows = [row for row in found if not row["program"].startswith("dense_")]
    asked = 7
    lines = []
    for row in rows:
        driver, rule = row["program"].split("_", 1)
        dense = never[row["commit"], "dense_indexed" if driver == "indexed" else "dense_list"]
        cost, layer = (row["median_ms"] - dense["median_ms"]) / asked, dense["median_ms"] / dense["layers_run"]
        times = (f"{one['median_ms']:.2f}" for one in (row, dense))
        lines.append([rule, f"`{driver}`", *times, f"{1000 * cost:.0f}", f"{100 * cost / layer:.0f} %"])
    head = ["rule", "driver", "ms/step", "not asked", "us a question", "of a layer"]
    note = (
        f"\nAsked before {asked} of {rows[0]['layers_run']:.0f} layers, never leaving; Llama-3-8B shape, batch 1, "
        f"{rows[0]['device']}, jax {rows[0]['jax']}, {commits(rows)}.\n"
    )
    return table(head, lines) + note


def _described(program: str) -> str:
    kind = _kind(program)
    return f"{PROGRAMS[kind]} {program.removeprefix('compact_')}" if kind == "compact" else PROGRAMS[kind]


def _kind(program: str) -> str:
    return "compact" if program.startswith("compact_") else re.sub("_(all|half|quarter)$", "", program)


TASKS = ("needle", "multikey_4", "multikey_all", "multivalue", "multiquery", "tracking", "tracking_names", "frequent")
TASKS += ("common",)


def recall_table(name: str) -> str:
    """Return the score of every plan on the token tasks."""
    rows = read_rows(name)
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    scores = {(row["plan"], row["task"]): f"{100 * row['score']:.0f}" for row in rows}
    plans = list(dict.fromkeys(row["plan"] for row in rows))
    held = {row["plan"]: max(r["kv_live"] for r in rows if r["plan"] == row["plan"]) for row in rows}
    lines = [[plan, f"{held[plan]:.0f}", *(scores.get((plan, task), "") for task in tasks)] for plan in plans]
    about = rows[0]
    when = {"with": "the question is part of the prompt", "after": "the question comes after the context was evicted"}
    note = (
        f"\nScore in %, {about['samples']} samples of {about['length']} tokens; {when[about['query']]}. "
        f"{about['device']}, {about['dtype']}, jax {about['jax']}.\n"
    )
    return table(["plan", "tokens held", *tasks], lines) + note


def recall_lengths_table() -> str:
    """Return the share of answers that the recall model gets wholly right, by length."""
    rows = read_rows("recall_lengths_h200")
    lines = [[str(row["length"]), *(f"{100 * row['exact'][task]:.0f}" for task in TASKS)] for row in rows]
    about = rows[0]
    note = (
        f"\nAnswers right to the last token, %, by teacher forcing; {about['samples']} samples each, "
        f"{about['device']}, {about['dtype']}, jax {about['jax']}.\n"
    )
    return table(["tokens", *TASKS], lines) + note


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
    return table(head, lines) + note


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
    return table(head, lines) + note


RECIPES = {
    "layerskip": "LayerSkip",
    "soft": "SoFT",
    "plain": "last layer only",
    "frozen": "frozen backbone, adapters and gates",
    "jei": "frozen backbone, JEI-DNN's gates",
}


def recipes_table() -> str:
    """Return what each training recipe leaves at its exits, for equal tokens."""
    rows = read_rows("recipes_h200")
    num_layers = rows[0]["shapes"]["num_layers"]
    depths, shares = [num_layers * part // 4 for part in (1, 2, 3, 4)], (50, 75)
    lines = []
    for row in rows:
        found = [interpolate(row["curve"], num_layers * share / 100) for share in shares]
        lines.append(
            [
                RECIPES[row["variant"]] + ("" if row["price"] is None else f", price {row['price']:g}"),
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
    return table(head, lines) + note


def interpolate(curve: list[dict[str, float]], layers: float) -> float | None:
    """Return a curve's accuracy at a mean number of layers, between its points; ``None`` outside of them."""
    points = sorted((point["layers"], point["accuracy"]) for point in curve)
    for (left, low), (right, high) in pairwise(points):
        if left <= layers <= right:
            return low if left == right else low + (high - low) * (layers - left) / (right - left)
    return None


def stops_table() -> str:
    """Return how well stops find the tokens that no layer gets right, and what they save."""
    rows = [row for row in read_rows("stops_cpu") if row["exit_threshold"] == 1.0]
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
    return table(head, lines) + note


def budgets_table(study: str) -> str:
    """Return quality against the budget of every cache policy."""
    if not (RESULTS / f"budgets_{study}.jsonl").is_file():
        return f"No rows in `results/budgets_{study}.jsonl`.\n"
    rows = read_rows(f"budgets_{study}")
    about = f"{rows[0]['device']}, {rows[0]['dtype']}, jax {rows[0]['jax']}, {commits(rows)}.\n"
    return "\n".join(f"{table(head, lines)}\n{note} {about}" for head, lines, note in budget_tables.tables(study, rows))


TABLES = {
    "depth": lambda: depth_table("depth_h200"),
    "depth_64k": lambda: depth_table("depth_64k_h200"),
    "decisions": decisions_table,
    "batch": lambda: depth_table("batch_h200"),
    "recall": lambda: recall_table("recall_h200"),
    "recall_after": lambda: recall_table("recall_after_cpu"),
    "recall_lengths": recall_lengths_table,
    "decode": decode_table,
    "compare_cpu": lambda: compare_table("compare_cpu"),
    "compare_h200": lambda: compare_table("compare_h200"),
    "exits": exits_table,
    "recipes": recipes_table,
    "stops": stops_table,
    "selection_decode": lambda: selection_tables.selection_table("decode"),
    "selection_step": lambda: selection_tables.selection_table("step"),
    "selection_topk": lambda: selection_tables.selection_table("topk"),
    "decode_128k": selection_tables.whole_table,
    "mesh_exchange": mesh_tables.exchange_table,
    "mesh_memory": mesh_tables.memory_table,
    "mesh_speed": mesh_tables.speed_table,
    "scaling": mesh_tables.scaling_table,
    "eviction_merge": selection_tables.eviction_table,
    "prefill_dense": lambda: prefill_tables.prefill_table("dense"),
    "prefill_blocks": lambda: prefill_tables.prefill_table("blocks"),
    "prefill_policies": lambda: prefill_tables.prefill_table("policies"),
    "prefill_peers": prefill_tables.peers_table,
    "prompt": prefill_tables.prompt_table,
    **{f"budgets_{study}": partial(budgets_table, study) for study in ("tasks", "nll", "mass")},
    **{f"sparse_quality_{study}": partial(sparse_tables.sparse_table, study) for study in ("tasks", "mass")},
}
