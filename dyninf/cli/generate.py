"""``dyninf generate``: continue a text under a plan, token by token, and say what it took."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dyninf
from dyninf.cli.common import Loaded, add_layout_options, add_model_options, bucket, check_positive, load
from dyninf.cli.plan_options import add_plan_options, check_plan, read_plan
from dyninf.cli.processes import add_process_options, agree_on_options, identity, join, one_voice
from dyninf.cli.quality import dense_agreement
from dyninf.cli.sampler_options import add_sampler_options, with_sampler
from dyninf.cli.text import Painter, StopTexts, TextStream
from dyninf.models.processes import agree, broadcast, is_first, together
from dyninf.timing import device_name

DEFAULT_NEW_TOKENS = 128
INTERRUPTED = 130

EXAMPLES = """\
examples:
  dyninf generate --prompt "def fibonacci(n):" --show depth
  dyninf generate --file main.py --plan exit_confidence --set depth.threshold=0.8 --temperature 0.7 --seed 1
  cat main.py | dyninf generate --max-new-tokens 64 --stop "class " > completed.py
"""


@dataclasses.dataclass(kw_only=True)
class Run:
    """What happened while text was generated."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    stats: list[dyninf.StepStats] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    interrupted: bool = False


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "generate", help="continue a text", description="Continue a text under a plan.", epilog=EXAMPLES
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help='the text to continue; "-" reads standard input')
    source.add_argument("--file", metavar="FILE", help='a file with the text to continue; "-" reads standard input')
    add_model_options(parser)
    add_layout_options(parser, "the model, as in tensor=4 or tensor=4,fsdp=2,")
    add_plan_options(parser, default="exit_confidence")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"stop after N tokens (default: {DEFAULT_NEW_TOKENS})"
    )
    parser.add_argument(
        "--prefill-chunk", type=int, metavar="N", help="read the prompt N tokens at a time (default: at once)"
    )
    add_sampler_options(parser)
    add_process_options(parser)
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before TEXT (may be given several times)"
    )
    parser.add_argument("--show", choices=("depth",), help="colour each token by the layers it needed")
    parser.add_argument("--no-echo", action="store_true", help="do not repeat the prompt")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Generate text on stdout and one line of statistics on stderr."""
    join(arguments)
    with together():
        counts = {name: getattr(arguments, name) for name in ("max_new_tokens", "prefill_chunk", "top_k")}
        check_positive(**counts)
        stops = StopTexts(arguments.stop)
        prompt = _read_prompt(arguments) if is_first() else None
    agree_on_options(arguments)
    prompt = broadcast(prompt)
    with one_voice():
        return _run(arguments, prompt, stops)


def _run(arguments: argparse.Namespace, prompt: str, stops: StopTexts) -> int:
    loaded = load(arguments)
    with together():
        plan = read_plan(arguments.plan, arguments.changes, len(loaded.model.layers))
        plan = with_sampler(plan, arguments)
        check_plan(plan, loaded.model)
        ids = loaded.tokenizer.encode(prompt).ids
        if not ids:
            raise ValueError("expected a text to continue of at least one token, got an empty one; give --prompt TEXT")
    if jax.process_count() > 1:
        agree(identity(loaded, plan))
    painter = Painter(len(loaded.model.layers), colours=arguments.show == "depth")
    if painter.legend():
        print(painter.legend(), file=sys.stderr)
    done = _generate(loaded, plan, prompt, ids, stops, painter, arguments)
    print(_summary(loaded, plan, ids, done, arguments.plan), file=sys.stderr)
    return INTERRUPTED if done.interrupted else 0


def _generate(
    loaded: Loaded,
    plan: dyninf.Plan,
    prompt: str,
    ids: list[int],
    stops: StopTexts,
    painter: Painter,
    arguments: argparse.Namespace,
) -> Run:
    model, eos = loaded.model, loaded.model.config.eos_ids
    limit = model.config.max_length
    count = arguments.max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, limit - len(ids)))
    padded = np.zeros((1, bucket(len(ids), limit)), np.int32)
    padded[0, : len(ids)] = ids
    tokens = dyninf.stream(
        model,
        padded,
        plan,
        max_new_tokens=count,
        key=jax.random.key(arguments.seed),
        lengths=[len(ids)],
        stop=eos,
        prefill_chunk=arguments.prefill_chunk,
    )
    if not arguments.no_echo:
        painter.echo(prompt)
    text, done = TextStream(loaded.tokenizer, ids), Run()
    depth = len(plan.depth.prefill_layers(len(model.layers)))  # what the first token needed
    try:
        for token_B, stats in tokens:
            token = int(token_B[0])
            done.tokens.append(token)
            done.times.append(time.perf_counter())
            if stats is not None:
                done.stats.append(stats)
                depth = int(stats.needed[0]) if arguments.show else depth
            for piece, needed in stops.add("" if token in eos else text.add(token), depth):
                painter.write(piece, needed)
            if stops.stopped:
                break
    except KeyboardInterrupt:
        done.interrupted = True
    for piece, needed in stops.rest():
        painter.write(piece, needed)
    painter.write("\n")
    return done


def _summary(loaded: Loaded, plan: dyninf.Plan, prompt: list[int], done: Run, plan_name: str) -> str:
    parts = [f"{len(done.tokens)} tokens" + (" (interrupted)" if done.interrupted else "")]
    if len(done.times) > 2:
        # The first two arrive after compilation: of the prompt, then of the step.
        parts.append(f"{(len(done.times) - 2) / (done.times[-1] - done.times[1]):.1f} tokens/s after the first step")
    num_layers = len(loaded.model.layers)
    if done.stats:
        means = dyninf.summarize(jax.tree.map(lambda *leaves: jnp.stack(leaves), *done.stats))
        needed, used = means["layers_needed"], means["layers_run"]
        parts.append(f"layers needed {needed:.1f}, run {used:.1f} of {num_layers}")
    if not isinstance(plan.sampler, dyninf.Greedy):
        parts.append("agreement with dense not measured (tokens were drawn)")
    elif done.tokens and not done.interrupted:
        share = dense_agreement(loaded.model, prompt, done.tokens)
        parts.append(f"agreement with dense {100 * share:.1f} %")
    parts.append(f"plan {plan_name}, {loaded.dtype} on {device_name()}")
    return "; ".join(parts)


def _read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt not in (None, "-"):
        return arguments.prompt
    try:
        if arguments.file not in (None, "-"):
            return Path(arguments.file).read_text(encoding="utf-8")
        if arguments.file is None and arguments.prompt is None and sys.stdin.isatty():
            raise ValueError("expected a text to continue, got none; give --prompt TEXT or --file FILE")
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        name = arguments.file or "standard input"
        raise ValueError(f"expected UTF-8 text in {name}, got {error.reason} at byte {error.start}") from None
