"""``dyninf bench``: speed of a model, or of a shape with random weights, over plans and batch sizes.

That of decode steps, or the time until a prompt of random tokens has given its first one.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.table import Table

import dyninf
from dyninf import models
from dyninf.cli.common import (
    DTYPES,
    add_layout_options,
    add_model_options,
    check_output,
    check_positive,
    default_dtype,
    load_model,
    model_name,
    progress,
    read_mesh,
    require_known,
    table_console,
)
from dyninf.cli.decoding import bytes_per_step, decode_steps, random_state, summary_bytes, time_prompt
from dyninf.cli.plan_options import check_plan, read_plans
from dyninf.configs.models import shapes
from dyninf.model import CausalLM
from dyninf.timing import device_name, measure

EXAMPLES = """\
examples:
  dyninf bench --shape tiny --batch 1,4 --context 256
  dyninf bench --shape llama3-8b --batch 1,8 --context 2048 --plans dense,unified_skip --jsonl rows.jsonl
  dyninf bench --shape llama3-8b --prompt 8192 --plans dense,sparse_a_shape
  dyninf bench --shape llama3-8b --mesh tensor=2 --batch 1,8 --context 2048 --plans dense,unified_skip

The cache and the tokens fed are random, so plans that look at the text mostly run every layer here: this measures
what a step costs. "dyninf compare" measures what a plan saves on real text.
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "bench",
        help="speed of a model or a shape",
        description="Time decode steps in one program on the device, or the reading of a prompt, with warm-up.",
        epilog=EXAMPLES,
    )
    add_model_options(parser)
    add_layout_options(parser, "the model, as in tensor=4,")
    parser.add_argument("--shape", metavar="NAME", help=f"random weights of a known shape: {', '.join(shapes())}")
    parser.add_argument("--plans", default="dense", metavar="A,B", help="named plans, as for compare (default: dense)")
    parser.add_argument("--batch", default="1", metavar="B,B", help="batch sizes (default: 1)")
    parser.add_argument("--context", type=int, default=512, metavar="S", help="cache slots (default: 512)")
    parser.add_argument(
        "--filled", type=int, metavar="N", help="slots filled before the first step (default: all but --steps)"
    )
    parser.add_argument("--steps", type=int, default=64, help="decode steps in each run (default: 64)")
    parser.add_argument("--prompt", type=int, metavar="N", help="time a prompt of N tokens instead of decode steps")
    parser.add_argument("--prefill-chunk", type=int, metavar="N", help="read the prompt N tokens at a time")
    parser.add_argument("--repeats", type=int, default=5, help="runs that count, after one that compiles (default: 5)")
    parser.add_argument("--jsonl", metavar="FILE", help='append one JSON object a row; "-" prints them, not the table')
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Time every plan at every batch size and print the rows."""
    batches = _integers(arguments.batch)
    check_positive(steps=arguments.steps, repeats=arguments.repeats, batch=min(batches))
    if arguments.prompt is not None:
        check_positive(prompt=arguments.prompt)
        arguments.context = max(arguments.prompt, arguments.steps + 1)
    elif arguments.prefill_chunk is not None:
        raise ValueError("expected --prompt beside --prefill-chunk; without it decode steps are timed")
    if arguments.steps >= arguments.context:
        raise ValueError(f"expected --context above --steps, got {arguments.context} and {arguments.steps}")
    if arguments.filled is None:
        arguments.filled = arguments.context - arguments.steps
    if not 1 <= arguments.filled <= arguments.context - arguments.steps:
        raise ValueError(
            f"expected --filled between 1 and --context less --steps = {arguments.context - arguments.steps}, got "
            f"{arguments.filled}"
        )
    if arguments.jsonl != "-":
        check_output(arguments.jsonl)
    dtype = arguments.dtype or default_dtype()
    name, model = _model(arguments, dtype)
    if arguments.context > model.config.max_length:
        raise ValueError(f"expected --context up to {model.config.max_length} for {name}, got {arguments.context}")
    plans = read_plans(arguments.plans, len(model.layers))
    for plan in plans.values():
        check_plan(plan, model)
    rows = []
    bench, time = ("decode", time_steps) if arguments.prompt is None else ("prompt", _time_prompt)
    with progress() as bar:
        for batch, plan_name in bar.track([(b, p) for b in batches for p in plans], description="timing"):
            timed = time(model, plans[plan_name], batch, arguments)
            rows.append({"bench": bench, "model": name, "plan": plan_name, "dtype": dtype, "batch": batch, **timed})
    about = describe_run(model) | {"stacked": arguments.stacked}
    about |= {} if arguments.mesh is None else {"mesh": arguments.mesh}
    for row in rows:
        dense = [other for other in rows if other["plan"] == "dense" and other["batch"] == row["batch"]]
        row["speedup"] = dense[0]["median_ms"] / row["median_ms"] if dense else None
        row |= about
    if arguments.jsonl is not None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        if arguments.jsonl == "-":
            sys.stdout.write(lines)
            return 0
        with Path(arguments.jsonl).open("a", encoding="utf-8") as file:
            file.write(lines)
    _print(name, rows)
    return 0


def time_steps(model: CausalLM, plan: dyninf.Plan, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the times of a decode step, and what it must read, for the command's options of these names."""
    steps, context = arguments.steps, arguments.context
    key = jax.random.key(0)
    tokens_NB = jax.random.randint(jax.random.fold_in(key, 1), (steps, batch), 0, model.config.vocab_size)
    spent = []

    def decode(state: dyninf.DecodeState) -> Any:
        spent[:] = [decode_steps(model, state, plan, tokens_NB)[1]]
        return spent

    def begin() -> dyninf.DecodeState:  # made anew for each run, as two states may not fit in memory
        return random_state(model, plan, batch=batch, length=arguments.filled, capacity=context, key=key)

    timing = measure(decode, warmup=1, repeats=arguments.repeats, setup=begin)
    timing, means = timing.per(steps), dyninf.summarize(spent[0])
    pages = summary_bytes(jax.eval_shape(begin).cache) * arguments.filled / context
    num_bytes = bytes_per_step(model, means, batch) + pages * means["layers_run"] / len(model.layers)
    return {
        "context": context,
        "filled": arguments.filled,
        "steps": steps,
        "median_ms": 1000 * timing.median,
        "p10_ms": 1000 * timing.p10,
        "p90_ms": 1000 * timing.p90,
        "tokens_per_s": batch / timing.median,
        "layers_needed": means["layers_needed"],
        "layers_run": means["layers_run"],
        "bytes_per_step": num_bytes,
        "achieved_gb_s": num_bytes / timing.median / 1e9,
    }


def _time_prompt(model: models.Transformer, plan: dyninf.Plan, batch: int, arguments: Any) -> dict[str, Any]:
    timing = time_prompt(
        model,
        plan,
        batch=batch,
        length=arguments.prompt,
        chunk=arguments.prefill_chunk,
        repeats=arguments.repeats,
    )
    return {
        "prompt": arguments.prompt,
        "prefill_chunk": arguments.prefill_chunk,
        "median_ms": 1000 * timing.median,
        "p10_ms": 1000 * timing.p10,
        "p90_ms": 1000 * timing.p90,
        "tokens_per_s": batch * arguments.prompt / timing.median,
    }


def _model(arguments: argparse.Namespace, dtype: str) -> tuple[str, models.Transformer | models.MeshModel]:
    if arguments.shape is not None and arguments.model is not None:
        raise ValueError("expected --model or --shape, got both")
    if arguments.shape is not None:
        require_known("a shape", arguments.shape, shapes())
    mesh, stacked = read_mesh(arguments.mesh), arguments.stacked
    if arguments.shape is not None:
        return arguments.shape, shape_model(arguments.shape, dtype, mesh, stacked)
    name = model_name(arguments.model)
    return name, load_model(name, dtype, mesh, stacked=stacked)


def shape_model(shape: str, dtype: str, mesh: Mesh | None, stacked: bool) -> models.Transformer | models.MeshModel:
    """Return random weights of a known shape, on a mesh if there is one."""
    config, key = shapes()[shape], jax.random.key(0)
    if mesh is not None:
        return models.on_mesh(models.random_model(config, mesh, key=key, dtype=DTYPES[dtype], stacked=stacked), mesh)
    model = models.Transformer(config, key, DTYPES[dtype])
    return models.stack_for_decoding(model) if stacked else model


def describe_run(model: models.Transformer) -> dict[str, Any]:
    """Return where a row comes from: shapes, device, versions, commit."""
    config = model.config
    names = ("num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    return {
        "shapes": {name: getattr(config, name) for name in names},
        **describe_device(),
    }


def describe_device() -> dict[str, Any]:
    """Return the device, versions and commit of a row."""
    return {
        "device": device_name(),
        "jax": jax.__version__,
        "dyninf": dyninf.__version__,
        "commit": commit(),
    }


def write_row(row: dict[str, Any], file: Path | None) -> None:
    """Print one JSON object on a line of its own, and append it to a file, if any, so that a stopped run keeps it."""
    line = json.dumps(row) + "\n"
    sys.stdout.write(line)
    sys.stdout.flush()
    if file is not None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(line)


def commit() -> str | None:
    """Return the commit of the checkout that this code runs from, ``None`` outside one."""
    root = Path(dyninf.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _integers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected batch sizes such as 1,8, got {text!r}") from None
    return list(np.unique(values).tolist())


def _print(name: str, rows: list[dict[str, Any]]) -> None:
    about = rows[0]
    decodes = about["bench"] == "decode"
    what = (
        f"{about['filled']} of {about['context']} slots filled" if decodes else f"prompts of {about['prompt']} tokens"
    )
    title = f"{name}, {about['dtype']}, {what}, on {about['device']}, jax {about['jax']}"
    table = Table(title=title, title_justify="left")
    table.add_column("plan")
    spent = ("layers run", "GB/s") if decodes else ()
    for column in ("batch", "ms/step" if decodes else "ms", "p10", "p90", "tokens/s", *spent, "speed-up"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["plan"],
            str(row["batch"]),
            *(f"{row[name]:.3f}" for name in ("median_ms", "p10_ms", "p90_ms")),
            f"{row['tokens_per_s']:.1f}",
            *((f"{row['layers_run']:.2f}", f"{row['achieved_gb_s']:.1f}") if decodes else ()),
            "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        )
    table_console().print(table)
