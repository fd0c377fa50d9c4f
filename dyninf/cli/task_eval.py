"""``dyninf eval --tasks``: what plans answer of long-context tasks, how much they read for it and how long it takes.

One row is one plan on one task at one length. Rows are appended to the file of ``--jsonl`` as they are measured; rows
that are there already are not measured again, so that a run that was stopped goes on.
"""

import argparse
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

import dyninf
from dyninf.cli.bench import commit
from dyninf.cli.common import Loaded, check_output, check_positive, load, progress, table_console
from dyninf.cli.decoding import Excerpt, time_excerpt
from dyninf.cli.plan_options import check_plan, read_plans
from dyninf.cli.task_plots import draw_plots, require_matplotlib
from dyninf.models import MeshModel
from dyninf.models.processes import replicate
from dyninf.tasks import TASKS, TOKEN_TASKS, Sample, Vocabulary, draw, evaluate_task, load_or_make, make_samples
from dyninf.tasks import to_samples as rows_to_samples
from dyninf.timing import device_name
from dyninf.training.run_files import write

VERSION = 1  # of the rows; raise it when what they mean changes
KEY = ("model", "weights", "dtype", "plan", "task", "length", "samples", "seed", "query", "device")
BEGINNING = '{"bench": "task", '  # of every row
SHOWN = {"num_layers", "score", "by_depth", "seconds_per_token", "layers_run", "kv_read", "tokens_held"}
DEPTH_BINS = 5
TIMED = 32  # tokens that are decoded for the time


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--tasks`` and what belongs to it."""
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--tasks",
        metavar="A,B",
        help="answer questions about long contexts instead; 'text' or 'tokens' for all of a kind. "
        f"Text: {', '.join(TASKS)}. Tokens, for models trained on them: {', '.join(TOKEN_TASKS)}",
    )
    group.add_argument("--plans", default="dense", metavar="A,B@PATH=VALUE", help="named plans, changed with @")
    group.add_argument("--lengths", default="2048", metavar="T,T", help="tokens of a sample (default: 2048)")
    group.add_argument("--samples", type=int, default=32, help="samples of each task (default: 32)")
    group.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    group.add_argument(
        "--query",
        choices=("with", "after"),
        default="with",
        help="the question comes with the context, or after the context was read and its cache compressed",
    )
    group.add_argument("--batch", type=int, default=8, help="samples that are answered at once (default: 8)")
    group.add_argument("--keep", metavar="FOLDER", help="keep the samples of text tasks here, to make them once")
    group.add_argument(
        "--jsonl", metavar="FILE", help="append a row for each plan, task and length; go on where it ends"
    )
    group.add_argument("--plots", metavar="FOLDER", help="draw quality against budget, time and needle depth as PNG")


def run_tasks(arguments: argparse.Namespace) -> int:
    """Measure every plan on every task and print the table."""
    check_positive(samples=arguments.samples, batch=arguments.batch)
    tasks, lengths = _names(arguments.tasks), _lengths(arguments.lengths)
    if arguments.plots is not None:
        require_matplotlib()
    check_output(arguments.jsonl)
    loaded = load(arguments)
    plans = read_plans(arguments.plans, len(loaded.model.layers))
    for plan in plans.values():
        check_plan(plan, loaded.model)
    if max(lengths) > loaded.model.config.max_length:
        raise ValueError(
            f"expected lengths up to the context of {loaded.name}, {loaded.model.config.max_length} tokens, got "
            f"{max(lengths)}"
        )
    file = None if arguments.jsonl is None else Path(arguments.jsonl)
    done = {} if file is None else read_rows(file)
    wanted = [(length, task, plan) for length in lengths for task in tasks for plan in plans]
    weights = fingerprint(loaded.model)
    rows = []
    samples: dict[tuple[int, str], list[Sample]] = {}
    times: dict[tuple[int, str], dict[str, float]] = {}
    for length, task in dict.fromkeys((length, task) for length, task, _ in wanted):  # before any work: may refuse
        samples[length, task] = make(loaded, task, length, arguments)
    with progress() as bar:
        bar_task = bar.add_task("answering", total=len(wanted))
        for length, task, name in wanted:
            about = _about(loaded, weights, name, task, length, arguments)
            row = done.get(_key(about))
            if row is None:
                bar.update(bar_task, description=f"{task} at {length} as {name}")
                if (length, name) not in times:
                    times[length, name] = _time(loaded, plans[name], samples[length, task][0])
                row = about | _answer(loaded, plans[name], samples[length, task], arguments) | times[length, name]
                if file is not None:
                    _append(file, row)
            rows.append(row)
            bar.advance(bar_task)
    _print(loaded, rows)
    if arguments.plots is not None:
        for path in draw_plots(rows, Path(arguments.plots)):
            table_console().print(f"drew {path}")
    return 0


def make(loaded: Loaded, task: str, length: int, arguments: argparse.Namespace) -> list[Sample]:
    """Return the samples of a task for a model.

    Raises:
        ValueError: if the model's vocabulary or tokenizer cannot hold the task, or the length is too short for it.
    """
    if task in TASKS:
        request = (task, loaded.tokenizer, length, arguments.seed, arguments.samples)
        return make_samples(*request) if arguments.keep is None else load_or_make(arguments.keep, *request)
    spare = Vocabulary()
    num_keys = loaded.model.config.vocab_size - (spare.size - spare.num_keys)
    if num_keys < 1:
        raise ValueError(
            f"expected a model with the vocabulary of token tasks for {task}, got {loaded.name} with "
            f"{loaded.model.config.vocab_size} ids; train one with dyninf train --tasks"
        )
    vocabulary = Vocabulary(num_keys=num_keys)
    return rows_to_samples(draw(task, length, arguments.seed, arguments.samples, vocabulary=vocabulary))


def fingerprint(model: Any) -> str:
    """Return a checksum of the beginning of every weight: another model under the same name is another model."""
    model, checksum = model.model if isinstance(model, MeshModel) else model, 0
    for beginning in replicate([leaf.reshape(-1)[:4096] for leaf in jax.tree.leaves(model)]):
        checksum = zlib.crc32(np.asarray(beginning).tobytes(), checksum)
    return f"{checksum:08x}"


def read_rows(file: Path) -> dict[tuple, dict[str, Any]]:
    """Return the rows of an earlier run by their key; a last row that a kill cut short is removed from the file.

    Raises:
        ValueError: if the file holds anything else, or rows of another version; it stays as it is.
    """
    if not file.exists():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"expected rows of dyninf eval --tasks in {file}, got no text; name another file") from None
    whole, newline, rest = text.rpartition("\n")
    cut = len(whole) + len(newline) if rest.startswith(BEGINNING[: len(rest)]) and not _reads(rest) else None
    rows = {}
    for number, line in enumerate(text[:cut].splitlines(), start=1):
        try:
            row = json.loads(line)
            found = row["version"]
            if found == VERSION:
                rows[_key(row)] = row
                if missing := SHOWN - set(row):
                    raise KeyError(*missing)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"expected rows of dyninf eval --tasks in {file}, got {line!r:.60} in line {number}; name another file"
            ) from None
        if found != VERSION:
            raise ValueError(
                f"expected rows of version {VERSION} in {file}, got {found!r} in line {number}; name another file"
            )
    if rest:  # no newline at the end: what is whole gets one, what is not goes
        write(file, text[:cut] if cut is not None else text + "\n")
    return rows


def _reads(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _about(
    loaded: Loaded, weights: str, plan: str, task: str, length: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    return {
        "bench": "task",
        "version": VERSION,
        "model": loaded.name,
        "weights": weights,
        "dtype": loaded.dtype,
        "plan": plan,
        "task": task,
        "length": length,
        "samples": arguments.samples,
        "seed": arguments.seed,
        "query": arguments.query,
        "device": device_name(),
        "jax": jax.__version__,
        "dyninf": dyninf.__version__,
        "commit": commit(),
        "num_layers": len(loaded.model.layers),
    }


def _key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in KEY)


def _answer(loaded: Loaded, plan: dyninf.Plan, samples: list[Sample], arguments: argparse.Namespace) -> dict[str, Any]:
    config = loaded.model.config
    found = evaluate_task(
        loaded.model,
        plan,
        samples,
        tokenizer=loaded.tokenizer,
        query=arguments.query,
        batch_size=min(arguments.batch, len(samples)),
        stop=config.eos_ids,
    )
    scores, counts = found.by_depth(DEPTH_BINS)
    by_depth = [None if math.isnan(score) else round(float(score), 6) for score in scores]
    return {"score": found.score, "exact": found.exact, "by_depth": by_depth, "depth_counts": counts.tolist()}


def _time(loaded: Loaded, plan: dyninf.Plan, sample: Sample) -> dict[str, float]:
    """Return seconds per decoded token at batch 1 behind this sample's prompt, and what a step runs and reads."""
    following = np.resize(np.asarray(sample.target_ids, np.int32), TIMED)
    prompt = np.asarray(sample.prompt_ids, np.int32)[: loaded.model.config.max_length - TIMED - 1]
    timing, means = time_excerpt(loaded.model, plan, Excerpt(prompt=prompt, following=following), warmup=1, repeats=3)
    return {
        "seconds_per_token": timing.median,
        "layers_needed": means["layers_needed"],
        "layers_run": means["layers_run"],
        "kv_live": means["kv_live"],
        "kv_read": means["kv_read"],
        "tokens_held": len(prompt) + (TIMED + 1) / 2,
    }


def _names(text: str) -> list[str]:
    kinds = {"text": list(TASKS), "tokens": list(TOKEN_TASKS)}
    names = [name for entry in text.split(",") for name in kinds.get(entry.strip(), [entry.strip()])]
    for name in names:
        if name not in TASKS and name not in TOKEN_TASKS:
            raise ValueError(f"expected tasks among text, tokens, {', '.join([*TASKS, *TOKEN_TASKS])}, got {name!r}")
    return list(dict.fromkeys(names))


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected lengths such as 2048,8192, got {text!r}") from None
    check_positive(lengths=min(lengths))
    return list(dict.fromkeys(lengths))


def _print(loaded: Loaded, rows: list[dict[str, Any]]) -> None:
    about = rows[0]
    for length in dict.fromkeys(row["length"] for row in rows):
        here = [row for row in rows if row["length"] == length]
        tasks = list(dict.fromkeys(row["task"] for row in here))
        question = "question with the context" if about["query"] == "with" else "question after the context"
        title = f"{loaded.name}: {about['samples']} samples of {length} tokens, {question}; {about['device']}"
        table = Table(title=title, title_justify="left")
        table.add_column("plan")
        for column in (*tasks, "mean", "layers run", "KV read", "ms/token"):
            table.add_column(column, justify="right")
        for plan in dict.fromkeys(row["plan"] for row in here):
            mine = [row for row in here if row["plan"] == plan]
            scores = [row["score"] for row in mine]
            table.add_row(
                plan,
                *(f"{100 * score:.1f} %" for score in (*scores, float(np.mean(scores)))),
                f"{mine[0]['layers_run']:.1f} of {mine[0]['num_layers']}",
                f"{mine[0]['kv_read']:.0f}",
                f"{1000 * np.mean([row['seconds_per_token'] for row in mine]):.2f}",
            )
        table_console().print(table)
