"""``dyninf batch``: continue every prompt of a file under a plan, write each result once, go on after a kill."""

import argparse
import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dyninf
from dyninf.cli.batch_decode import Settings, answer, check_settings
from dyninf.cli.batch_input import MAX_SEED, Prompts, is_whole
from dyninf.cli.batch_output import Results, header_of
from dyninf.cli.common import Loaded, add_model_options, check_output, check_positive, load, progress
from dyninf.cli.generate import DEFAULT_NEW_TOKENS, INTERRUPTED
from dyninf.cli.plan_options import add_plan_options, check_plan, read_plan
from dyninf.cli.sampler_options import add_sampler_options, with_sampler
from dyninf.cli.task_eval import fingerprint
from dyninf.plan import describe
from dyninf.timing import device_name
from dyninf.training import data

SOME_FAILED = 1

EXAMPLES = """\
example:
  dyninf batch --input prompts.jsonl --output out.jsonl --plan exit_capped --batch 16

A line of the input is an object with a "prompt" (or its "tokens") and, if wanted, a "max_new_tokens", a "seed", an "id"
(else the number of the line) and "metadata", which is handed through. Any other key is an error of that line.

Results come in the order in which batches end; "line" says where the prompt stands. The same command goes on where a
job was stopped, also with another --batch. Ends with status 1 if some lines failed.
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "batch",
        help="continue the prompts of a file",
        description="Continue every prompt of a file of JSON lines under a plan.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--input", metavar="FILE", required=True, help="prompts, one JSON object a line")
    parser.add_argument("--output", metavar="FILE", required=True, help="results, one JSON object a line")
    add_model_options(parser)
    add_plan_options(parser, default="exit_confidence")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"tokens of lines that do not say (default: {DEFAULT_NEW_TOKENS}, or what the context has room for)",
    )
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="prompts that run at once (default: 8)")
    parser.add_argument(
        "--prefill-chunk", type=int, metavar="N", help="read prompts N tokens at a time (default: at once)"
    )
    add_sampler_options(parser)
    parser.add_argument(
        "--shard", metavar="I/N", default="0/1", help="only lines I + 1, I + 1 + N, ..., for N processes (default: 0/1)"
    )
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Write the results to the output and one line of statistics on stderr."""
    counts = {name: getattr(arguments, name) for name in ("max_new_tokens", "batch", "prefill_chunk", "top_k")}
    check_positive(**counts)
    shard = _read_shard(arguments.shard)
    if not is_whole(arguments.seed, 0, MAX_SEED):
        raise ValueError(f"expected --seed between 0 and {MAX_SEED}, got {arguments.seed}")
    source, target = Path(arguments.input), Path(arguments.output)
    check_output(arguments.output)
    with Prompts(source) as prompts:
        for written in (target, header_of(target)):
            if written.exists() and written.samefile(source):
                raise ValueError(f"expected an output that is not the input, got {str(target)!r}; name another file")
        with Results(target) as results:
            return _run(arguments, prompts, results, shard)


def _run(arguments: argparse.Namespace, prompts: Prompts, results: Results, shard: tuple[int, int]) -> int:
    loaded = load(arguments)
    plan = with_sampler(read_plan(arguments.plan, arguments.changes, len(loaded.model.layers)), arguments)
    check_plan(plan, loaded.model)
    lines = range(shard[0] + 1, prompts.num_lines + 1, shard[1])
    batch = max(1, min(arguments.batch, len(lines)))
    settings = Settings(plan=plan, batch=batch, chunk=arguments.prefill_chunk, seed=arguments.seed)
    check_settings(loaded, settings)
    results.begin(_asked(arguments, loaded, plan, prompts, shard), lines)
    before, made, start = len(results.done), [], time.perf_counter()
    entries = prompts.read(loaded, arguments.max_new_tokens, shard)
    try:
        with progress() as bar:
            task = bar.add_task("answering", total=len(lines), completed=before)
            for rows in answer(loaded, entries, settings, results.done):
                results.add(rows)
                made += [(row["num_tokens"], row["stats"]["layers_needed"]) for row in rows if "error" not in row]
                bar.advance(task, len(rows))
    except KeyboardInterrupt:
        done = f"{len(results.done)} of {len(lines)} lines"
        print(f"dyninf: interrupted after {done}; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    seconds = time.perf_counter() - start
    print(_summary(arguments.plan, loaded, results, before, made, seconds), file=sys.stderr)
    if results.first_error is None:
        return 0
    line, error = results.first_error
    print(
        f"dyninf: {results.num_errors} of {len(lines)} lines failed, the first in line {line}: {error}", file=sys.stderr
    )
    return SOME_FAILED


def _asked(
    arguments: argparse.Namespace, loaded: Loaded, plan: dyninf.Plan, prompts: Prompts, shard: tuple[int, int]
) -> dict[str, Any]:
    """Return all that decides what the lines say; the batch does so by rounding only and may be another one."""
    return {
        "input": prompts.sha256,
        "shard": f"{shard[0]}/{shard[1]}",
        "model": fingerprint(loaded.model),
        "tokenizer": data.fingerprint(loaded.tokenizer),
        "dtype": loaded.dtype,
        "plan": describe(plan),
        "plan_values": _digest(plan),
        "max_new_tokens": arguments.max_new_tokens,
        "prefill_chunk": arguments.prefill_chunk,
        "seed": arguments.seed,
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
        "dyninf": dyninf.__version__,
    }


def _digest(plan: dyninf.Plan) -> str:
    """Return a checksum of the numbers of a plan, which its description may shorten."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(plan):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def _summary(
    plan: str,
    loaded: Loaded,
    results: Results,
    before: int,
    made: list[tuple[int, float | None]],
    seconds: float,
) -> str:
    parts = [f"lines {len(results.done) - before}" + (f" (and {before} before)" if before else "")]
    num_tokens = sum(count for count, _ in made)
    if num_tokens:
        speed = f"{num_tokens / seconds:.1f} tokens/s with compilation"
        parts.append(f"{num_tokens} tokens in {seconds:.1f} s, {speed}")
    if needed := [mean for _, mean in made if mean is not None]:
        parts.append(f"layers needed {sum(needed) / len(needed):.1f} of {len(loaded.model.layers)}, a mean of lines")
    parts.append(f"plan {plan}, {loaded.dtype} on {device_name()}")
    return "; ".join(parts)


def _read_shard(text: str) -> tuple[int, int]:
    place, slash, number = text.partition("/")
    if not (slash and place.isdecimal() and number.isdecimal() and int(place) < int(number)):
        raise ValueError(f"expected --shard I/N with I from 0 to N - 1, got {text!r}")
    return int(place), int(number)
