"""What it takes two GPUs to add up a layer's projections: within the kernel that runs the layers, alone, and by XLA.

``python bench/mesh_exchange.py --jsonl FILE`` on a machine with two Hopper GPUs. ``in_kernel`` is what a step of layers
takes longer on two devices than one device needs for its own part alone, heads and MLP, for each of the two sums of a
layer; residual and norm are part of either. ``psum`` is a chain of sums by XLA, each with the residual and the norm
behind it, less the same chain on one device. ``kernel`` is that chain with ``add_devices``, as lists of layers add. By
the wall clock, in one program each, on random numbers.
"""

import argparse
import contextlib
import functools
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

sys.path.append(str(Path(__file__).resolve().parents[1]))

from dyninf.cli.bench import describe_device, write_row
from dyninf.configs.models import shapes
from dyninf.models import make_mesh
from dyninf.timing import measure
from pallas_kernels import DecoderWeights, add_devices, decode_layers
from pallas_kernels.add_devices import make_inbox
from pallas_kernels.partition import partitioned, per_device

FILLED, CAPACITY = 1024, 2048
PROGRAMS = ("in_kernel", "kernel", "psum")


def main() -> int:
    """Time all and print one JSON object a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3.1-8b", choices=shapes())
    parser.add_argument("--batch", default="1,8", help="batch sizes, separated by commas")
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS, help="(default: all)")
    parser.add_argument("--steps", type=int, default=20, help="steps, each two sums a layer, in a program")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file, too")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu" or len(jax.devices()) < 2:
        parser.error(f"expected two GPUs, got {len(jax.devices())} devices of {jax.default_backend()}")
    config, mesh = shapes()[arguments.shape], make_mesh({"tensor": 2}, jax.devices()[:2])
    programs = dict(zip(PROGRAMS, (time_layers, functools.partial(time_sums, kernel=True), time_sums), strict=True))
    for batch in map(int, arguments.batch.split(",")):
        for name in arguments.programs:
            both = programs[name](config, batch, mesh, arguments.steps)
            alone = programs[name](config, batch, None, arguments.steps)
            row = {"bench": "mesh_exchange", "program": name, "shape": arguments.shape, "batch": batch}
            row |= {"bytes": 2 * batch * config.d_model, "us": 1e6 * (both - alone) / (2 * config.num_layers)}
            row |= {"both_ms": 1e3 * both, "alone_ms": 1e3 * alone}
            write_row(row | describe_device(), arguments.jsonl)
    return 0


def time_layers(config: Any, batch: int, mesh: Any, steps: int) -> float:
    """Return the seconds of one token's layers: of both devices, or of the first for its part alone."""
    parts = 1 if mesh else 2
    heads, hidden, layers = config.num_kv_heads // parts, config.d_ff // parts, config.num_layers
    group, head_dim, width = config.num_heads // config.num_kv_heads, config.head_dim, config.d_model
    sizes = {
        "norm_attn": (layers, width),
        "wqkv": (layers, width, heads * (group + 2) * head_dim),
        "wo": (layers, heads * group * head_dim, width),
        "norm_mlp": (layers, width),
        "w_gate_up": (layers, 2, width, hidden),
        "w_down": (layers, hidden, width),
    }
    split = {"wqkv": 2, "wo": 1, "w_gate_up": 3, "w_down": 1}
    weights = DecoderWeights(
        **{name: _random(number, size, mesh, split.get(name)) for number, (name, size) in enumerate(sizes.items())}
    )
    x_BD = _random(6, (batch, width), mesh, None)
    cache = [_random(7, (layers, batch, CAPACITY, heads, head_dim), mesh, 3) for _ in "kv"]

    @functools.partial(jax.jit, donate_argnums=1)
    def run(x_BD, cache, weights):
        def step(_, carry):
            x_BD, cache = carry
            out = decode_layers(
                x_BD,
                weights,
                *cache,
                jnp.full(batch, FILLED),
                order_M=jnp.arange(layers),
                planned_B=jnp.full(batch, layers),
                live_B=jnp.ones(batch, bool),
                frequencies=1e4 ** -jnp.linspace(0, 1, head_dim // 2),
                eps=config.norm_eps,
                fill=False,
                implementation="mosaic_gpu",
            )
            return out.x_BD, [out.k_LBSKH, out.v_LBSKH]

        with partitioned(mesh, heads=["tensor"]) if mesh else contextlib.nullcontext():
            return jax.lax.fori_loop(0, steps, step, (x_BD, cache))

    timing = measure(lambda cache: run(x_BD, cache, weights), warmup=2, setup=lambda: jax.tree.map(jnp.copy, cache))
    return timing.median / steps


def time_sums(config: Any, batch: int, mesh: Any, steps: int, *, kernel: bool = False) -> float:
    """Return the seconds of one token's sums, two a layer, with what follows them, or of what follows them alone."""

    def add(part_BD, residual_BD, inbox):
        if mesh and kernel:
            return add_devices(part_BD, residual_BD, inbox=inbox, implementation="mosaic_gpu")
        return residual_BD + (jax.lax.psum(part_BD, "tensor") if mesh else part_BD)

    def chain(parts_NBD, residual_BD, inbox):
        def step(_, carry):
            part_BD, residual_BD = carry
            for _ in range(2 * config.num_layers):
                residual_BD = add(part_BD, residual_BD, inbox)
                wide = residual_BD.astype(jnp.float32)
                scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps)
                part_BD = (wide * scale).astype(residual_BD.dtype)
            return part_BD, residual_BD

        return jax.lax.fori_loop(0, steps, step, (parts_NBD[0], residual_BD))[1]

    marked = per_device("BD", inbox="Z____")(chain)

    @jax.jit
    def run(*given):
        with partitioned(mesh, heads=["tensor"]) if mesh else contextlib.nullcontext():
            return marked(*given)

    sizes = ((2, batch, config.d_model), 0), ((batch, config.d_model), None)
    given = [_random(number, size, mesh, split) for number, (size, split) in enumerate(sizes)]
    inbox = make_inbox(mesh, ("tensor",), config.d_model) if mesh and kernel else jnp.zeros((2, 1, 1, 1, 1), jnp.int32)
    return measure(lambda: run(*given, inbox), warmup=2).median / steps


def _random(number: int, size: tuple[int, ...], mesh: Any, split: int | None) -> jax.Array:
    """Return random numbers, small enough for sums of many, on one device or split along an axis."""
    spec = PartitionSpec(*("tensor" if axis == split else None for axis in range(len(size))))
    draw = lambda: 0.5 / math.sqrt(size[-1]) * jax.random.normal(jax.random.key(number), size, jnp.bfloat16)  # noqa: E731
    return jax.jit(draw, out_shardings=NamedSharding(mesh, spec) if mesh else None)()


if __name__ == "__main__":
    sys.exit(main())
