"""``dyninf batch``: continue every prompt of a file under a plan, write each result once, go on after a kill."""

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from dyninf.cli.batch_decode import Settings, answer, check_settings, parts_of
from dyninf.cli.batch_input import MAX_SEED, Prompts, is_whole
from dyninf.cli.batch_output import Ledger, Results, header_of
from dyninf.cli.common import (
    Loaded,
    add_layout_options,
    add_model_options,
    check_output,
    check_positive,
    load,
    progress,
)
from dyninf.cli.generate import DEFAULT_NEW_TOKENS, INTERRUPTED
from dyninf.cli.plan_options import add_plan_options, check_plan, read_plan
from dyninf.cli.processes import add_process_options, agree_on_options, identity, join, one_voice
from dyninf.cli.sampler_options import add_sampler_options, with_sampler
from dyninf.models.processes import agree, is_first, together
from dyninf.timing import device_name

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
    add_layout_options(parser, "model and batch, as in tensor=4,data=2,")
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
    add_process_options(parser)
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Write the results to the output and one line of statistics on stderr."""
    join(arguments)
    with contextlib.ExitStack() as files:
        with together():
            shard, prompts, results = _open(arguments, files)
        agree_on_options(arguments, input=prompts.sha256)
        with one_voice():
            return _run(arguments, prompts, results, shard)


def _open(arguments: argparse.Namespace, files: contextlib.ExitStack) -> tuple[tuple[int, int], Prompts, Ledger]:
    """Check the options and open what they name, the output in process 0 alone."""
    counts = {name: getattr(arguments, name) for name in ("max_new_tokens", "batch", "prefill_chunk", "top_k")}
    check_positive(**counts)
    shard = _read_shard(arguments.shard)
    if not is_whole(arguments.seed, 0, MAX_SEED):
        raise ValueError(f"expected --seed between 0 and {MAX_SEED}, got {arguments.seed}")
    source, target = Path(arguments.input), Path(arguments.output)
    if not is_first():
        return shard, files.enter_context(Prompts(source)), Ledger()
    check_output(arguments.output)
    prompts = files.enter_context(Prompts(source))
    for written in (target, header_of(target)):
        if written.exists() and written.samefile(source):
            raise ValueError(f"expected an output that is not the input, got {str(target)!r}; name another file")
    return shard, prompts, files.enter_context(Results(target))


def _run(arguments: argparse.Namespace, prompts: Prompts, results: Ledger, shard: tuple[int, int]) -> int:
    loaded = load(arguments)
    with together():
        plan = with_sampler(read_plan(arguments.plan, arguments.changes, len(loaded.model.layers)), arguments)
        check_plan(plan, loaded.model)
        lines = range(shard[0] + 1, prompts.num_lines + 1, shard[1])
        parts = parts_of(loaded)
        batch = min(arguments.batch, -(-max(1, len(lines)) // parts) * parts)
        settings = Settings(plan=plan, batch=batch, chunk=arguments.prefill_chunk, seed=arguments.seed)
        check_settings(loaded, settings)
    asked = _asked(arguments, identity(loaded, plan), prompts, shard)
    agree(asked)
    with together():
        results.begin(asked, lines)
    results.share()
    before, made, start = len(results.done), [], time.perf_counter()
    entries = prompts.read(loaded, arguments.max_new_tokens, shard)
    try:
        with progress() as bar:
            task = bar.add_task("answering", total=len(lines), completed=before)
            for rows in answer(loaded, entries, settings, results.done):
                with together():
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
    arguments: argparse.Namespace, runs: dict[str, Any], prompts: Prompts, shard: tuple[int, int]
) -> dict[str, Any]:
    """Return all that decides what the lines say; batch and layout do so by rounding only and may be others."""
    return {
        "input": prompts.sha256,
        "shard": f"{shard[0]}/{shard[1]}",
        **runs,
        "max_new_tokens": arguments.max_new_tokens,
        "prefill_chunk": arguments.prefill_chunk,
        "seed": arguments.seed,
    }


def _summary(
    plan: str,
    loaded: Loaded,
    results: Ledger,
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
