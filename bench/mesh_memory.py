"""What a model takes of each device of a TPU slice, and what a step sends: compiled ahead of time, without any TPU.

``python bench/mesh_memory.py --jsonl FILE`` compiles prefill and decode step of a 70B shape for described topologies.
Parameters and caches are shapes with shardings, nothing is allocated. Programs of ``--layers`` (2 and 4) layers are
compiled and what differs is counted once for each layer beyond, temporaries not; ``--layers 80`` compiles the whole,
which matters where weights are gathered, since many may be held at once. Bytes are those of ``memory_analysis`` for one
device; collectives are counted in the compiled program, their bytes are those of the results that each leaves on a
device. A prompt of ``--context`` tokens for each group of devices that splits the batch.
"""

import argparse
import dataclasses
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

sys.path.append(str(Path(__file__).resolve().parents[1]))

from dyninf import CacheSpec, Plan, decode_step, prefill
from dyninf.cli.bench import describe_device, write_row
from dyninf.configs.models import shapes
from dyninf.configs.plans import plans
from dyninf.models import cache_shardings, make_mesh, model_shardings, on_mesh
from dyninf.models.parameters import abstract_model
from dyninf.models.sharding import placement

# Meshes by topology; eight key/value heads, so that more devices of ``tensor`` would hold the same ones.
CASES = (
    ("v5p:4x4x4", {"data": 8, "tensor": 8}),
    ("v5e:4x4", {"data": 2, "tensor": 8}),
    ("v5e:4x4", {"fsdp": 2, "tensor": 8}),
    ("v5e:16x16", {"data": 32, "tensor": 8}),
    ("v6e:8x8", {"data": 8, "tensor": 8}),
    ("tpu7x:2x2x1", {"tensor": 8}),
)
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
OPERATION = re.compile(rf" = (\(?[^=]*?) ({'|'.join(KINDS)})(-start)?\(.*?channel_id=(\d+)")
ARRAY = re.compile(r"(pred|[a-z]+(\d+))\[([\d,]*)\]")


def main() -> int:
    """Compile every case and print one JSON object a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3.1-70b", choices=shapes())
    parser.add_argument("--context", type=int, default=32768, help="tokens of each prompt (default: 32768)")
    parser.add_argument("--layers", default="2,4", help="layers to compile: two numbers, or all (default: 2,4)")
    parser.add_argument("--plan", default="dense")
    parser.add_argument("--only", default="", help="cases whose name has this, such as 'v5e:4x4 fsdp'; all without")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file, too")
    arguments = parser.parse_args()
    config, compiled = shapes()[arguments.shape], [int(layers) for layers in arguments.layers.split(",")]
    for topology, axes in CASES:
        if arguments.only in f"{topology} {','.join(f'{axis}={size}' for axis, size in axes.items())}":
            found = [measure(config, layers, topology, axes, arguments) for layers in compiled]
            for program in ("prefill", "decode"):
                row = whole([one[program] for one in found], compiled, config.num_layers)
                about = {"bench": "mesh_memory", "program": program, "shape": arguments.shape, "plan": arguments.plan}
                about |= {"topology": topology, "mesh": axes, "context": arguments.context}
                about |= {"compiled_layers": compiled}
                write_row(about | row | describe_device() | {"device": f"{topology}, described"}, arguments.jsonl)
    return 0


def measure(config: Any, num_layers: int, topology: str, axes: dict, arguments: Any) -> dict[str, dict]:
    """Compile both programs for some layers; return what each takes and sends."""
    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = make_mesh(axes, devices)
    model = abstract_model(dataclasses.replace(config, num_layers=num_layers), jnp.bfloat16)
    model = on_mesh(_given(model, model_shardings(model, mesh)), mesh)
    where, batch = placement(mesh), math.prod(size for axis, size in axes.items() if axis != "tensor")
    plan = plans(config.num_layers)[arguments.plan] if arguments.plan != "dense" else Plan()
    whole, split = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), (where.mesh_axes("batch") or None,)))
    tokens = jax.ShapeDtypeStruct((batch, arguments.context), jnp.int32, sharding=split)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split)
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    spec = CacheSpec(capacity=arguments.context + 128)
    run = jax.jit(lambda *given: prefill(*given[:3], plan, spec, given[3])[1])
    first = run.lower(model, tokens, lengths, key)
    state, cache = first.out_info, first.out_info.cache
    state = dataclasses.replace(
        _given(state, jax.tree.map(lambda _: whole, state)), cache=_given(cache, cache_shardings(cache, mesh))
    )
    step = jax.jit(lambda model, state: decode_step(model, state, plan)[0], donate_argnums=1)
    return {"prefill": _taken(first, batch), "decode": _taken(step.lower(model, state), batch)}


def whole(found: list[dict], compiled: list[int], num_layers: int) -> dict:
    """Return a row for all layers from rows for one number of them or two: a line, but for temporaries.

    Layers use the room of those before them; what schedules make of more of it is no line. Those of more layers count.
    """
    if compiled == [num_layers]:
        return found[0]
    (few, many), (less, more) = found, compiled
    line = lambda low, high: low + (high - low) * (num_layers - less) // (more - less)  # noqa: E731
    zero = {"count": 0, "bytes": 0}
    sent = {
        kind: {key: line(few["sent"].get(kind, zero)[key], many["sent"].get(kind, zero)[key]) for key in zero}
        for kind in KINDS
        if kind in many["sent"]
    }
    fitted = {key: line(few[key], many[key]) for key in ("arguments", "outputs", "aliased")}
    return {"batch": many["batch"], "sent": sent, "temporaries": many["temporaries"]} | fitted


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Return how many collectives a compiled program has, and the bytes of their results on a device, by kind.

    One that runs beside others is written several times, where it begins, goes on and ends, under one channel.
    """
    sent: dict[str, dict[str, int]] = {}
    found = {channel: (result, kind, start) for result, kind, start, channel in OPERATION.findall(text)}
    for result, kind, start in found.values():
        sizes = [
            math.prod(map(int, filter(None, sizes.split(",")))) * max(1, int(bits or 8) // 8)
            for _, bits, sizes in ARRAY.findall(result)
        ]
        one = sent.setdefault(kind, {"count": 0, "bytes": 0})
        one["count"] += 1
        one["bytes"] += max(sizes) if start else sum(sizes)
    return sent


def _taken(lowered: Any, batch: int) -> dict[str, Any]:
    """Compile a program; where the compiler finds no room for it, return how much it would take."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, had = re.findall(r"([\d.]+)G", str(error))[:2]
        return {"batch": batch, "needed_gib": float(needed), "had_gib": float(had)}
    memory = compiled.memory_analysis()
    return {
        "batch": batch,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "sent": collectives(compiled.as_text()),
    }


def _given(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


if __name__ == "__main__":
    sys.exit(main())
