"""How decoding and reading prompts scale over the GPUs of one host, dense and under plans.

``python bench/scaling.py --mesh tensor=8 --jsonl FILE`` builds a shape with random weights on the mesh, stacked and as
a list of layers, and prints one JSON object a program, batch and context: tokens a second, what the first device held
at most since the process began, the time of its kernels that are collectives (from a profile; what the kernel of
stacked layers adds up within itself is not among them) and the floor, which is the bytes that a step must read over the
summed copy rate of the devices. Groups of ``data`` read the weights each for themselves. What would not fit is a row
that says so. Sequences leave at recorded depths in batches of as many as the recording has.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import jax
from jax.sharding import Mesh

from bench.depth import recorded_depths
from bench.rendering import H200_COPY_GB_S
from bench.timeline import profile_steps
from dyninf import Plan, depth, kv
from dyninf.cli.bench import describe_run, shape_model, time_steps, write_row
from dyninf.cli.common import DTYPES, read_mesh
from dyninf.cli.decoding import time_prompt
from dyninf.configs.models import shapes
from dyninf.configs.plans import plans

COLLECTIVES = re.compile(r"nccl|all.?reduce|all.?gather|reduce.?scatter|psum|pmax|pmin|MultiGpuBarrier", re.IGNORECASE)
BUDGET = 2048
LAYERS = ("stacked", "list")


def main(argv: list[str] | None = None) -> int:
    """Measure every case and print a row for each."""
    arguments = _parse(argv)
    mesh = read_mesh(arguments.mesh)
    for stacked in (layers == "stacked" for layers in arguments.layers):
        model = None
        for batch, context, name, plan in cases(stacked, arguments):
            row = {"bench": "scaling", "shape": arguments.shape, "dtype": arguments.dtype, "mesh": arguments.mesh}
            row |= {"stacked": stacked, "plan": name, "batch": batch, "context": context}
            needed, had = held(arguments, mesh, batch, context), room()
            if had is not None and needed > had:
                write_row(row | {"needed_gib": needed / 2**30, "had_gib": had / 2**30}, arguments.jsonl)
                continue
            if model is None:
                model = shape_model(arguments.shape, arguments.dtype, mesh, stacked)
            if name == "prompt":
                row |= prompt(model, plan, arguments)
            else:
                row |= steps(model, plan, batch, context, arguments)
            write_row(row | describe_run(model), arguments.jsonl)
            jax.clear_caches()
    return 0


def cases(stacked: bool, arguments: Any) -> Iterator[tuple[int, int, str, Plan]]:
    """Return batch, cache slots, name and plan of every program that runs on stacked layers, or on a list of them."""
    layers = shapes()[arguments.shape].num_layers
    if not stacked and arguments.prompt:
        yield 1, arguments.prompt, "prompt", plans(layers)["sparse_a_shape"]
    for context in arguments.context:
        for batch in arguments.batch:
            found = {"dense": Plan()}
            if stacked:
                found["half"] = Plan(depth=depth.ExitAt(layer=layers // 2))
                with contextlib.suppress(ValueError):
                    found["exits"] = Plan(depth=recorded_depths(arguments.depths, layers, batch))
            if context > 2 * BUDGET:
                found["select"] = select()
            yield from ((batch, context, name, plan) for name, plan in found.items())


def select() -> Plan:
    """Return the plan that reads a budget of the cache."""
    pages = kv.Quest(page_size=64)
    return Plan(select=kv.TopK(scorer=pages, budget=BUDGET, sinks=64, recent=64, dense_layers=0))


def steps(model: Any, plan: Plan, batch: int, context: int, arguments: Any) -> dict[str, Any]:
    """Return speed, memory, floor and collectives of decode steps on a cache that is nearly full."""
    options = argparse.Namespace(
        steps=arguments.steps, context=context, filled=context - arguments.steps, repeats=arguments.repeats
    )
    row = time_steps(model, plan, batch, options)
    mesh = model.where.mesh
    weights = row["layers_run"] / len(model.layers) * layer_bytes(arguments)
    read = row["bytes_per_step"] + (mesh.shape.get("data", 1) - 1) * weights
    floor = 1e3 * read / (mesh.size * H200_COPY_GB_S * 1e9)
    row |= {"floor_ms": floor, "of_floor": floor / row["median_ms"], "peak_gib": peak()}
    return row | {"collectives_ms": collectives(model, plan, batch, options)}


def prompt(model: Any, plan: Plan, arguments: Any) -> dict[str, Any]:
    """Return the seconds until a prompt has given its first token."""
    length, chunk = arguments.prompt, arguments.prefill_chunk
    timing = time_prompt(model, plan, batch=1, length=length, chunk=chunk, repeats=1)
    return {"prefill_chunk": chunk, "median_ms": 1e3 * timing.median, "peak_gib": peak()}


def collectives(model: Any, plan: Plan, batch: int, options: Any) -> float | None:
    """Return the milliseconds a step in which the first GPU runs, or waits in, a collective; ``None`` without GPUs."""
    if jax.default_backend() != "gpu":
        return None
    sizes = {"batch": batch, "length": options.filled, "capacity": options.context}
    events = profile_steps(model, plan, options.steps, **sizes)
    spent = sum(end - begin for name, begin, end in events if COLLECTIVES.search(name))
    return spent / 1e6 / options.steps


def held(arguments: Any, mesh: Mesh, batch: int, context: int) -> float:
    """Return the bytes of weights and cache that each device is to hold, of a batch that divides."""
    config, itemsize = shapes()[arguments.shape], DTYPES[arguments.dtype].dtype.itemsize
    vocabulary = 2 * config.vocab_size * config.d_model * itemsize
    entry = 2 * config.num_kv_heads * config.head_dim * itemsize
    cache = config.num_layers * batch * context * entry
    return (layer_bytes(arguments) + vocabulary) / mesh.shape.get("tensor", 1) + cache / mesh.size


def layer_bytes(arguments: Any) -> float:
    """Return the bytes of the weights of all layers."""
    config = shapes()[arguments.shape]
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    count = config.d_model * (heads * config.head_dim + 3 * config.d_ff)
    return float(config.num_layers * count * DTYPES[arguments.dtype].dtype.itemsize)


def room() -> float | None:
    """Return the bytes that a device has for programs, ``None`` where it does not say."""
    found = jax.local_devices()[0].memory_stats()
    return None if found is None else 0.97 * found["bytes_limit"]


def peak() -> float | None:
    """Return the GiB that the first device held at most since the process began."""
    found = jax.local_devices()[0].memory_stats()
    return None if found is None else found["peak_bytes_in_use"] / 2**30


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3.1-70b", choices=shapes())
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES))
    parser.add_argument("--mesh", required=True, metavar="NAME=SIZE,...", help="such as tensor=8 or data=2,tensor=4")
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS, help="how to hold them (default: both)")
    parser.add_argument("--batch", default="1,8,64", type=_integers, help="batch sizes (default: 1,8,64)")
    parser.add_argument("--context", default="2048,131072", type=_integers, help="cache slots (default: 2048,131072)")
    parser.add_argument("--prompt", type=int, default=131072, help="tokens of a prompt to time; 0 for none")
    parser.add_argument("--prefill-chunk", type=int, default=16384, help="of them at a time (default: 16384)")
    parser.add_argument("--depths", type=Path, default=Path(__file__).parent / "results" / "depths_pycode.json")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file, too")
    return parser.parse_args(argv)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
