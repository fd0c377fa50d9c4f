"""The sum over devices: against numpy, interpreted with a detector of races, and compiled for described TPUs.

The interpreter gives every call memory of its own. That calls cannot overtake each other, which is what the barrier of
the kernel is for, is argued there and not tested.
"""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.add_devices import ADD_DEVICES, add_devices, mosaic_tpu
from pallas_kernels.partition import partitioned, per_device

AXES = {"2x4": {"data": 2, "tensor": 4}, "4x2": {"tensor": 4, "data": 2}, "1x8": {"data": 1, "tensor": 8}}


@per_device("DB", parts="NDB", residual="")
def summed(parts, residual, *, implementation):
    """Add a part of its own for each device of heads (N), three times with other numbers; parts ``[N, B, D]``."""

    def again(turn, x_BD):
        return add_devices(parts[0] * (turn + 1), x_BD, implementation=implementation)

    return jax.lax.fori_loop(0, 3, again, residual)


def on(mesh, **options):
    """:func:`summed` as it is traced for a mesh."""

    def run(parts, residual):
        with partitioned(mesh, heads=("tensor",)):
            return summed(parts, residual, **options)

    return run


def draw(rng, devices, rows, width, dtype):
    return (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((devices, rows, width), (rows, width)))


def numpy_sum(parts, residual):
    """Parts in the order of the devices in float32, rounded, and the residual added in its dtype."""
    for turn in range(3):
        total = functools.reduce(np.add, np.asarray(parts * (turn + 1), np.float32))
        wide = np.asarray(residual, np.float32) + np.asarray(jnp.asarray(total, residual.dtype), np.float32)
        residual = jnp.asarray(wide, residual.dtype)
    return residual


@pytest.mark.parametrize(
    ("axes", "rows", "width", "dtype"),
    [
        ("2x4", 3, 256, "bfloat16"),
        pytest.param("4x2", 1, 128, "float32", marks=pytest.mark.slow),
        pytest.param("1x8", 17, 128, "bfloat16", marks=pytest.mark.slow),
        pytest.param("1x8", 8, 384, "float32", marks=pytest.mark.slow),
    ],
)
def test_the_kernel_adds_in_the_order_of_the_devices(rng, capfd, monkeypatch, axes, rows, width, dtype):
    monkeypatch.setattr(importlib.import_module("pallas_kernels.add_devices"), "platform", lambda: "tpu")
    axes = AXES[axes]
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(*axes.values()), tuple(axes))
    parts, residual = draw(rng, axes["tensor"], rows, width, dtype)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, vector_clock_size=128)):
        got = jax.block_until_ready(jax.jit(on(mesh, implementation="mosaic_tpu"))(parts, residual))
    assert "RACE DETECTED" not in capfd.readouterr().out
    want = np.asarray(numpy_sum(parts, residual), np.float32)
    for device in got.addressable_shards:
        np.testing.assert_array_equal(np.asarray(device.data, np.float32), want)


def test_plain_jax_adds_the_same_numbers(rng):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))
    parts, residual = draw(rng, 4, 3, 5, "float32")
    got = jax.jit(on(mesh, implementation=None))(parts, residual)
    np.testing.assert_allclose(got, numpy_sum(parts, residual), rtol=1e-5, atol=1e-5)
    alone = add_devices(parts[0], residual)  # outside of a mark there is nobody else
    np.testing.assert_array_equal(alone, residual + parts[0])


@pytest.mark.parametrize(
    "tpu", ["v5e:2x4", *(pytest.param(t, marks=pytest.mark.slow) for t in ("v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"))]
)
@pytest.mark.parametrize("rows", [1, pytest.param(64, marks=pytest.mark.slow)])
def test_a_loop_compiles_for_many_tpus_without_an_all_reduce(tpu, rows):
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(tpu, "tpu").devices[:8]
    mesh = Mesh(np.array(devices).reshape(-1, 4), ("data", "tensor"))
    shapes = [(4, rows, 8192), (rows, 8192)]
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec())
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    text = jax.jit(on(mesh, implementation="mosaic_tpu")).lower(*given).compile().as_text()
    assert "tpu_custom_call" in text and not re.search(r"all-reduce(-start)?\(", text)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"platform": "gpu"}, "needs a TPU, got platform 'gpu'"),
        ({"dtype": jnp.float16}, "needs bfloat16 or float32, got float16"),
        ({"shape": (8, 200)}, "multiple of 128, got 200"),
        ({"shape": (64, 8192), "devices": 16}, "bytes of VMEM for the parts of 16 devices, got"),
    ],
    ids=str,
)
def test_the_kernel_says_why_it_cannot_serve(change, reason):
    facts = {"platform": "tpu", "shape": (64, 8192), "dtype": jnp.bfloat16, "devices": 4} | change
    found = ADD_DEVICES[1].refuse(**facts)
    assert found is None if reason is None else reason in found
    assert mosaic_tpu.refuse(**facts | {"shape": (1, 128), "dtype": jnp.float32, "devices": 8}) is None


@pytest.mark.parametrize(
    ("part", "residual"),
    [(jnp.zeros((2, 8)), jnp.zeros((2, 9))), (jnp.zeros(8), jnp.zeros(8)), (jnp.zeros((2, 8)), jnp.zeros((2, 8), int))],
    ids=["shape", "axes", "dtype"],
)
def test_what_does_not_fit_is_refused(part, residual):
    with pytest.raises(ValueError, match=r"expected a part and a residual \[B, D\] of one shape and dtype"):
        add_devices(part, residual)
