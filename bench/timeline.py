"""Where the time of a decode step goes on a GPU: its device kernels, by time, and the gaps between them.

``python bench/timeline.py --shape llama3-8b --dtype bfloat16 --stacked`` profiles a run of steps with jax's profiler
and prints the kernels of one step. Profiling slows a step by a few percent: compare shares, and take times from
``dyninf bench`` and ``bench/depth.py``.
"""

import argparse
import collections
import sys
import tempfile
from pathlib import Path

import jax

from dyninf import DecodeState, Plan
from dyninf.cli.bench import shape_model
from dyninf.cli.common import DTYPES, add_layout_options, read_mesh
from dyninf.cli.decoding import decode_steps, random_state
from dyninf.cli.plan_options import read_plan
from dyninf.configs.models import shapes
from dyninf.model import CausalLM


def main() -> int:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=shapes())
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    add_layout_options(parser, "the model, as in tensor=2,")
    parser.add_argument("--plan", default="dense")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=256, help="cache slots; half of them are filled")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows", type=int, default=25, help="kernels to print")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"expected a GPU, whose kernels the profiler names, got {jax.default_backend()}")
    model = shape_model(arguments.shape, arguments.dtype, read_mesh(arguments.mesh), arguments.stacked)
    plan = read_plan(arguments.plan, arguments.changes, len(model.layers))
    sizes = {"batch": arguments.batch, "length": arguments.context // 2, "capacity": arguments.context}
    print_table(profile_steps(model, plan, arguments.steps, **sizes), arguments.steps, arguments.rows)
    return 0


def profile_steps(
    model: CausalLM, plan: Plan, steps: int, *, batch: int, length: int, capacity: int
) -> list[tuple[str, int, int]]:
    """Return the kernels of a run of decode steps on random numbers, after one that compiles: :func:`read_kernels`."""
    key = jax.random.key(0)
    tokens_NB = jax.random.randint(key, (steps, batch), 0, model.config.vocab_size)

    def start() -> DecodeState:  # made anew for each run, as two states may not fit in memory
        return jax.block_until_ready(random_state(model, plan, batch=batch, length=length, capacity=capacity, key=key))

    jax.block_until_ready(decode_steps(model, start(), plan, tokens_NB))
    state = start()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(decode_steps(model, state, plan, tokens_NB))
        return read_kernels(Path(folder))


def read_kernels(folder: Path) -> list[tuple[str, int, int]]:
    """Return name, begin and end (ns) of every kernel on the first GPU, in the order in which they began."""
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise RuntimeError(f"expected a trace in {folder}, found none")
    planes = jax.profiler.ProfileData.from_file(str(files[-1])).planes
    plane = next(plane for plane in planes if plane.name.startswith("/device:GPU:0"))
    events = [
        (event.name, round(event.start_ns), round(event.start_ns + event.duration_ns))
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    ]
    return sorted(events, key=lambda event: event[1])


def print_table(events: list[tuple[str, int, int]], steps: int, rows: int) -> None:
    """Print microseconds of a step by kernel, and those in which no kernel ran."""
    spent, counts, idle, until = collections.Counter(), collections.Counter(), 0, events[0][1]
    for name, begin, end in events:
        spent[name] += end - begin
        counts[name] += 1
        idle += max(0, begin - until)
        until = max(until, end)
    total = until - events[0][1]
    write = sys.stdout.write
    write(f"{'us a step':>10} {'share':>7} {'calls':>7}  kernel\n")
    for name, nanoseconds in spent.most_common(rows):
        share = nanoseconds / total
        write(f"{nanoseconds / steps / 1000:10.1f} {share:7.1%} {counts[name] / steps:7.1f}  {name[:100]}\n")
    write(f"{idle / steps / 1000:10.1f} {idle / total:7.1%} {'':>7}  nothing runs\n")
    write(f"{total / steps / 1000:10.1f} {1:7.1%} {len(events) / steps:7.1f}  all\n")


if __name__ == "__main__":
    sys.exit(main())
