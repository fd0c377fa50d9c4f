"""The sum over devices on Hopper GPUs: what it refuses, that it lowers, and on GPUs against numpy and across programs.

Interpreters have no memory of other devices. That calls cannot overtake each other is argued in the kernel; here many
follow each other, in loops and branches, in programs of other sizes, and leave every slot empty.
"""

import importlib
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dyninf.models import make_mesh
from pallas_kernels import few_rows
from pallas_kernels.add_devices import add_devices, add_product, make_inbox, mosaic_gpu
from pallas_kernels.dispatch import MOSAIC_GPU_JAX
from pallas_kernels.exchange import EMPTY_BITS
from pallas_kernels.partition import partitioned, per_device

needs_mosaic = pytest.mark.skipif(jax.__version_info__ < MOSAIC_GPU_JAX, reason="jax runs the kernel from 0.11.2 on")
# A device that waits for ever blocks the main thread, which a signal would not reach.
on_gpus = [pytest.mark.multigpu, pytest.mark.timeout(240, method="thread")]
MESHES = {"2": {"tensor": 2}, "4": {"tensor": 4}, "2x2": {"data": 2, "tensor": 2}}
FACTS = {"platform": "gpu", "shape": (8, 4096), "dtype": jnp.bfloat16, "devices": 2, "numbers": [0, 1]}


@per_device("HD", parts="NHD", residual="HD", inbox="Z____")
def summed(parts, residual, inbox, implementation="mosaic_gpu"):
    """Add a part of its own for each device of heads (N); parts ``[N, rows, width]``."""
    return add_devices(parts[0], residual, inbox=inbox, implementation=implementation)


def chain(mesh, *, turns=1, step=summed):
    """A program of so many calls, each with another multiple of the parts."""

    @jax.jit
    def run(parts, residual, inbox):
        def again(turn, residual):
            return step(parts * (turn + 1).astype(parts.dtype), residual, inbox)

        with partitioned(mesh, heads=("tensor",)):
            return jax.lax.fori_loop(0, turns, again, residual)

    return run


def oracle(parts, residual, turns):
    """Parts in the order of the devices in float32, rounded, and the residual added in its dtype."""
    dtype = residual.dtype
    for turn in turns:
        total = np.zeros(residual.shape, np.float32)
        for part in parts:
            total = total + np.asarray(part * np.asarray(turn + 1, dtype), np.float32)
        residual = (residual.astype(np.float32) + total.astype(dtype).astype(np.float32)).astype(dtype)
    return residual


def draw(rng, devices, rows, width, dtype):
    return [rng.normal(size=shape).astype(jnp.dtype(dtype)) for shape in ((devices, rows, width), (rows, width))]


def gpu_mesh(name):
    axes = MESHES[name]
    if len(jax.devices()) < math.prod(axes.values()):
        pytest.skip(f"needs {math.prod(axes.values())} GPUs, found {len(jax.devices())}")
    return make_mesh(axes, jax.devices()[: math.prod(axes.values())])


def same_everywhere(got, want):
    for device in got.addressable_shards:
        np.testing.assert_array_equal(np.asarray(device.data, np.float32), np.asarray(want, np.float32))


def at_rest(inbox):
    return bool((np.asarray(inbox)[:, :-1] == np.int32(EMPTY_BITS)).all())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"shape": (1, 4104)}, None),
        ({"platform": "tpu"}, "needs an NVIDIA GPU, got platform 'tpu'"),
        ({"dtype": jnp.float16}, "needs bfloat16 or float32, got float16"),
        ({"shape": (65, 4096)}, "at most 64 rows, got 65"),
        ({"shape": (8, 4100)}, "a multiple of 8, and 256 numbers, got 8 x 4100"),
        ({"shape": (1, 128)}, "a multiple of 8, and 256 numbers, got 1 x 128"),
        ({"numbers": [1, 0]}, "the first devices, in the order of their numbers, to share layers, got [1, 0]"),
        ({"numbers": []}, None),  # of a mesh that is only described
        ({"inbox": None}, "needs an inbox that is an argument of the program"),
        ({"inbox": (2, 9, 128, 8, 256)}, "an inbox for 2 devices and a width of 4096, got one of shape"),
        ({"capability": "8.0"}, "needs a Hopper GPU (compute capability 9.0), got 8.0"),
        ({"processes": 2}, "needs devices of one process to share layers, got 2 processes"),
    ],
    ids=str,
)
@needs_mosaic
def test_the_kernel_says_why_it_cannot_serve(monkeypatch, change, reason):
    one = SimpleNamespace(compute_capability=change.get("capability", "9.0"))
    monkeypatch.setattr(jax, "local_devices", lambda: [one])
    monkeypatch.setattr(jax, "process_count", lambda: change.get("processes", 1))
    width = change.get("shape", (8, 4096))[1]
    found = mosaic_gpu.refuse(**FACTS | {"inbox": mosaic_gpu.inbox_shape(2, 2, width)} | change)
    assert found is None if reason is None else reason in found


@pytest.mark.skipif(jax.__version_info__ >= MOSAIC_GPU_JAX, reason="needs a jax that cannot run the kernel")
def test_an_older_jax_is_a_reason():
    assert "needs jax 0.11.2 or newer" in mosaic_gpu.refuse(**FACTS)


def test_an_inbox_has_room_for_64_rows():
    """By hand: 64 x 4096 numbers are 1024 pieces of 256, 8 for each of 128 blocks; two sets of 2 slots and turns."""
    assert mosaic_gpu.inbox_shape(4, 2, 4096) == (4, 5, 128, 8, 256)
    assert mosaic_gpu.inbox_shape(4, 2, 4104) == (4, 5, 128, 9, 256)


def test_only_gpus_get_an_inbox():
    assert make_inbox(make_mesh({"tensor": 2}), ("tensor",), 4096) is None
    assert make_inbox(make_mesh({"tensor": 1}), (), 4096) is None


@needs_mosaic
@pytest.mark.parametrize(
    ("axes", "rows", "width", "dtype"),
    [
        ({"data": 2, "tensor": 2}, 9, 4104, "bfloat16"),
        ({"tensor": 8}, 64, 8192, "float32"),
        pytest.param({"tensor": 2}, 1, 4096, "bfloat16", marks=pytest.mark.slow),
        pytest.param({"tensor": 32}, 64, 4096, "bfloat16", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_kernel_lowers_for_hopper_gpus(monkeypatch, axes, rows, width, dtype):
    """Layouts and transfers are checked while lowering; the machine code is not."""
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    mesh = AbstractMesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), abstract_device=device
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability="9.0", core_count=132)])
    monkeypatch.setattr(importlib.import_module("pallas_kernels.add_devices"), "platform", lambda: "gpu")
    inbox = mosaic_gpu.inbox_shape(mesh.size, axes["tensor"], width)
    given = [
        jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, kind, spec in (
            ((axes["tensor"], rows, width), dtype, ("tensor",)),
            ((rows, width), dtype, ()),
            (inbox, "int32", (tuple(axes),)),
        )
    ]
    allowed = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(chain(mesh, turns=3), platforms=["cuda"], disabled_checks=allowed)(*given)
    text = exported.mlir_module()
    assert text.count("@mosaic_gpu_v2") == 1 and "skip_device_barrier = true" in text and "all_reduce" not in text
    assert "output_operand_aliases" not in text  # the inbox is read, as far as XLA knows


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [4096, 4104, 8192])
@pytest.mark.parametrize("rows", [1, 8, 9, 64])
@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpus) for name in MESHES])
def test_many_calls_agree_with_numpy_and_between_devices(rng, name, rows, width, dtype):
    mesh, turns = gpu_mesh(name), 200 if rows < 64 else 20
    parts, residual = draw(rng, mesh.shape["tensor"], rows, width, dtype)
    inbox = make_inbox(mesh, ("tensor",), width)
    got = chain(mesh, turns=turns)(parts, residual, inbox)
    same_everywhere(got, oracle(parts, residual, range(turns)))
    assert at_rest(inbox)


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpus) for name in MESHES])
def test_programs_of_other_sizes_and_odd_counts_share_an_inbox(rng, name):
    """The blocks of a small call have had more turns than those that only large calls use."""
    mesh = gpu_mesh(name)
    inbox = make_inbox(mesh, ("tensor",), 4096)
    for rows, turns in [(1, 1), (64, 3), (8, 1), (1, 7), (9, 2), (64, 1), (33, 5), (1, 3), (64, 2)] * 3:
        parts, residual = draw(rng, mesh.shape["tensor"], rows, 4096, "bfloat16")
        same_everywhere(chain(mesh, turns=turns)(parts, residual, inbox), oracle(parts, residual, range(turns)))
    assert at_rest(inbox)


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpus) for name in MESHES])
def test_calls_in_loops_and_branches_agree_with_numpy(rng, name):
    """Every third turn makes one call, the others none or two, until a number that the loop counts is reached."""
    mesh, turns = gpu_mesh(name), 60
    parts, residual = draw(rng, mesh.shape["tensor"], 8, 4096, "float32")
    inbox = make_inbox(mesh, ("tensor",), 4096)

    @jax.jit
    def run(parts, residual, inbox):
        def call(residual, turn):
            return summed(parts * (turn + 1).astype(parts.dtype), residual, inbox)

        def body(state):
            turn, residual = state
            branches = [
                lambda residual: call(residual, turn),
                lambda residual: residual,
                lambda residual: call(call(residual, turn), turn),
            ]
            return turn + 1, jax.lax.switch(turn % 3, branches, residual)

        with partitioned(mesh, heads=("tensor",)):
            return jax.lax.while_loop(lambda state: state[0] < turns, body, (jnp.int32(0), residual))[1]

    order = [turn for turn in range(turns) for _ in range((1, 0, 2)[turn % 3])]
    want = oracle(parts, residual, order)
    for _ in range(5):
        same_everywhere(run(parts, residual, inbox), want)
    assert at_rest(inbox)


@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("heads", [False, True], ids=["mlp", "heads"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpus) for name in MESHES])
def test_a_product_is_that_of_numpy(rng, monkeypatch, name, dtype, heads, rows):
    """One or two rows in bfloat16 are multiplied as four, of which the kernel adds up those that there are."""
    monkeypatch.setattr(few_rows, "WEIGHTS", range(2**26))
    mesh, width = gpu_mesh(name), 1024
    inner = (8, 64) if heads else (512,)
    y, weights, residual = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((rows, 1, *inner), (*inner, width), (rows, 1, width))
    )
    inbox = make_inbox(mesh, ("tensor",), width)

    @jax.jit
    def run(residual, y, weights, inbox):
        with partitioned(mesh, batch=("data",) if "data" in mesh.shape else (), heads=("tensor",), inbox=inbox):
            return add_product(residual, y, weights)

    assert "mosaic_gpu_v2" in run.lower(residual, y, weights, inbox).as_text()
    wide = [np.asarray(x, np.float64) for x in (residual[:, 0], y.reshape(rows, -1), weights.reshape(-1, width))]
    want = wide[0] + wide[1] @ wide[2]
    for _ in range(10):
        got = np.asarray(run(residual, y, weights, inbox), np.float64)[:, 0]
        # Rounded twice to 8 bits, before and after the residual is added; float32 adds 512 numbers in another order.
        rtol, atol = (2**-7, 0.05) if dtype == "bfloat16" else (1e-5, 1e-3)
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
    assert at_rest(inbox)
