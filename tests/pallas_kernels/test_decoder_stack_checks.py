"""What the decoder stack refuses and clamps, how its kernel divides the work, and that it lowers for a Hopper GPU."""

import contextlib
import dataclasses
import functools
import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_kernels import decoder_stack
from pallas_kernels.decoder_stack import DecoderWeights, decode_layers, explain_decode, mosaic_gpu
from pallas_kernels.decoder_stack.geometry import Geometry, Selection, refuse_geometry
from pallas_kernels.decoder_stack.grid import Grid
from pallas_kernels.dispatch import MOSAIC_GPU_JAX
from pallas_kernels.partition import partitioned

EPS = 1e-5
needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < MOSAIC_GPU_JAX, reason="jax interprets and lowers the kernel from 0.11.2 on"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (65, 128)}, "1 to 64 sequences"),
        ({"k": (3, 2, 136, 1, 64)}, r"expected a cache of k, v"),
        ({"wo": (3, 384, 128)}, r"expected wqkv of shape \(3, 128, 640\)"),
        ({"w_down": (3, 255, 128)}, r"expected w_gate_up of shape \(3, 2, 128, 255\)"),
        ({"positions": (3,)}, r"expected positions \[B\] of shape \(2,\), got \(3,\)"),
        ({"order": ()}, r"expected an order \[M\]"),
        ({"window": 0}, "window of at least 1"),
    ],
    ids=["rows", "cache", "heads", "mlp", "positions", "order", "window"],
)
def test_bad_shapes_are_refused(rng, stack_case, changes, message):
    x, weights, k, v, positions = stack_case().make(rng)
    arrays = {"x": x, "k": k, "positions": positions, "order": jnp.arange(3)}
    for name, shape in changes.items():
        if name in arrays:
            arrays[name] = jnp.zeros(shape, arrays[name].dtype)
        elif name != "window":
            weights = dataclasses.replace(weights, **{name: jnp.zeros(shape, jnp.bfloat16)})
    with pytest.raises(ValueError, match=message):
        decode_layers(
            arrays["x"],
            weights,
            arrays["k"],
            v,
            arrays["positions"],
            order_M=arrays["order"],
            planned_B=jnp.array([3, 3]),
            live_B=jnp.ones(2, bool),
            frequencies=jnp.ones(64),
            eps=EPS,
            window=changes.get("window"),
        )


def test_a_layer_out_of_range_is_clamped_and_an_absent_row_stores_nothing(rng, stack_case):
    case = stack_case(layers=2, dtype="float32")
    x, weights, k, v, positions = case.make(rng)
    step = functools.partial(
        decode_layers, x, weights, k, v, positions, planned_B=jnp.array([2, 2]), frequencies=jnp.ones(64), eps=EPS
    )
    far = step(order_M=jnp.array([-5, 9]), live_B=jnp.ones(2, bool))
    near = step(order_M=jnp.array([0, 1]), live_B=jnp.ones(2, bool))
    assert np.array_equal(far.x_BD, near.x_BD)
    one = step(order_M=jnp.array([0, 1]), live_B=jnp.array([True, False]))
    assert np.array_equal(one.x_BD[1], x[1]) and one.ran_B.tolist() == [2, 0]
    assert np.array_equal(one.k_LBSKH[:, 1], k[:, 1], equal_nan=True)
    assert np.array_equal(one.x_BD[0], near.x_BD[0])


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_interpreter)], ids=["loop", "kernel"])
def test_a_state_that_is_not_a_number_never_ends_early(rng, stack_case, interpret, kernel):
    case = stack_case(layers=2)
    x, weights, k, v, positions = case.make(rng)
    options = {
        "order_M": jnp.arange(2),
        "planned_B": jnp.array([2, 2]),
        "live_B": jnp.ones(2, bool),
        "frequencies": jnp.ones(64),
        "eps": EPS,
        "threshold": -2.0,  # every cosine is above it
    }
    x = x.at[0].set(jnp.nan)
    if kernel:
        *_, ran = interpret(
            x,
            weights,
            k,
            v,
            positions,
            asked_M=jnp.ones(2, bool),
            length=jnp.int32(2),
            fill=False,
            window=None,
            **options,
        )
    else:
        ran = decode_layers(x, weights, k, v, positions, implementation="loop", **options).ran_B
    assert ran.tolist() == [2, 1]


def llama_8b(batch, **changes):
    sizes = {"layers": 32, "d_model": 4096, "d_ff": 14336, "kv_heads": 8, "group": 4, "head_dim": 128}
    return Geometry(**sizes, batch=batch, capacity=2048, blocks=132, **changes)


@pytest.mark.parametrize("units", [0, 1, 131, 132, 133, 1024, 1536, 7168])
def test_units_are_dealt_to_blocks_without_gaps(units):
    geometry, contraction = llama_8b(1), 32
    grids = [SimpleNamespace(g=geometry, block=block) for block in range(geometry.blocks)]
    shares = [tuple(map(int, Grid.share(grid, jnp.int32(units)))) for grid in grids]
    if not units:
        assert all(first == stop for first, stop in shares)
        return
    assert shares[0][0] == 0 and shares[-1][1] == units
    assert all(stop == first for (_, stop), (first, _) in itertools.pairwise(shares))
    assert {stop - first for first, stop in shares} <= {units // geometry.blocks, -(-units // geometry.blocks)}
    for tile in range(units // contraction):
        begin, end = tile * contraction, (tile + 1) * contraction
        working = [block for block, (first, stop) in enumerate(shares) if first < end and stop > begin]
        found = Grid.owners(grids[0], jnp.int32(tile), contraction, jnp.int32(units))
        assert tuple(map(int, found)) == (working[0], working[-1])


def test_sizes_of_a_model_of_eight_billion_weights():
    geometry = llama_8b(1)
    assert geometry.products == {"qkv": (48, 32), "out": (32, 32), "gate_up": (112, 64), "down": (32, 112)}
    assert (geometry.rows, geometry.head_rows, geometry.splits, llama_8b(9).rows) == (8, 8, 16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 64}, "head_dim 128"),
        ({"d_ff": 14400}, "multiples of 128"),
        ({"capacity": 2047}, "multiple of 8"),
        ({"group": 24}, "at most 23 query heads"),
    ],
    ids=["head_dim", "d_ff", "capacity", "group"],
)
def test_what_the_kernel_cannot_serve_has_a_reason(changes, message):
    assert message in refuse_geometry(dataclasses.replace(llama_8b(1), **changes))
    assert refuse_geometry(llama_8b(64)) is None and refuse_geometry(dataclasses.replace(llama_8b(1), group=23)) is None


@pytest.mark.parametrize(
    ("changes", "num_pages", "message"),
    [
        ({}, 32, None),
        ({"page_size": 48}, 48, "pages of 16, 32, 64, 128 slots"),
        ({}, 25, "room for a multiple of 8 pages, got 25"),
        ({}, 8200, "at most 8192 pages, got 8200; use larger pages"),
        ({"pages": 120}, 1024, "at most 112 pages beside at most 16 that are always read, got 117 and 3"),
        ({"pages": 115}, 1024, None),
        ({"sinks": 16}, 1024, "got 15 and 17"),
    ],
)
def test_what_the_kernel_cannot_select_has_a_reason(changes, num_pages, message):
    select = Selection(**{"kind": "bounds", "page_size": 64, "pages": 32, "sinks": 2, "recent": 1} | changes)
    found = refuse_geometry(llama_8b(1, select=select, num_pages=num_pages))
    assert found is None if message is None else message in found


def test_dispatch_names_a_reason_away_from_a_gpu():
    sizes = {"d_model": 256, "d_ff": 256, "kv_heads": 1, "group": 1, "head_dim": 128, "batch": 1, "capacity": 8}
    reasons = dict(explain_decode(**sizes, dtype="bfloat16"))
    assert reasons["loop"] is None and "cpu" in reasons["mosaic_gpu"]


@needs_interpreter
@pytest.mark.parametrize(
    ("batch", "axes", "select"),
    [
        pytest.param(8, {}, None, marks=pytest.mark.slow),
        pytest.param(64, {}, None, marks=pytest.mark.slow),
        pytest.param(8, {}, Selection(kind="mean", page_size=128, pages=4), marks=pytest.mark.slow),
        pytest.param(8, {"data": 2, "tensor": 2}, None, marks=pytest.mark.slow),
        (8, {"data": 2, "tensor": 2}, Selection(kind="bounds", page_size=16, pages=32, dense_layers=2)),
        pytest.param(8, {"tensor": 8}, None, marks=pytest.mark.slow),
    ],
    ids=["8", "64", "8-select", "2x2", "2x2-select", "1x8"],
)
def test_the_kernel_lowers_for_hopper_gpus(monkeypatch, batch, axes, select):
    """Shared memory, layouts and transfers are checked while lowering; the machine code is not."""
    dtype, shape = jnp.bfloat16, jax.ShapeDtypeStruct
    weights = DecoderWeights(
        norm_attn=shape((32, 4096), dtype),
        wqkv=shape((32, 4096, 6144), dtype),
        wo=shape((32, 4096, 4096), dtype),
        norm_mlp=shape((32, 4096), dtype),
        w_gate_up=shape((32, 2, 4096, 14336), dtype),
        w_down=shape((32, 14336, 4096), dtype),
    )
    cache = shape((32, batch, 2048, 8, 128), dtype)
    summary = None if select is None else shape((32, batch, 128, 8, {"mean": 128, "bounds": 256}[select.kind]), dtype)
    given = (shape((batch, 4096), dtype), weights, cache, cache, shape((batch,), jnp.int32), summary)
    leaves, tree = jax.tree.flatten(given)
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    kinds = (AxisType.Auto,) * len(axes)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=kinds, abstract_device=device)
    one = SimpleNamespace(compute_capability="9.0", core_count=132)
    monkeypatch.setattr(jax, "local_devices", lambda: [one])
    monkeypatch.setattr(decoder_stack, "platform", lambda: "gpu")

    def step(*leaves):
        data = ["data"] if "data" in axes else []
        with partitioned(mesh, batch=data, heads=["tensor"]) if axes else contextlib.nullcontext():
            *arrays, summary = jax.tree.unflatten(tree, leaves)
            return decode_layers(
                *arrays,
                summary_LBPKX=summary,
                select=select,
                order_M=jnp.arange(32),
                planned_B=jnp.full(batch, 32),
                live_B=jnp.ones(batch, bool),
                frequencies=jnp.ones(64),
                eps=EPS,
                threshold=0.9,
                implementation="mosaic_gpu",
            )

    whole = NamedSharding(mesh, PartitionSpec()) if axes else None
    given = [shape(leaf.shape, leaf.dtype, sharding=whole) for leaf in leaves]
    allowed = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(step), platforms=["cuda"], disabled_checks=allowed)(*given)
    assert exported.mlir_module().count("@mosaic_gpu_v2") == 1
    assert exported.nr_devices == math.prod(axes.values())
    assert "all_reduce" not in exported.mlir_module()


@needs_interpreter
@pytest.mark.parametrize(
    ("parts", "devices", "message"),
    [
        ({"width": 2}, [0, 1], "whole rows of weights on each device, got a mesh that splits them in 2"),
        ({"heads": 3}, [0, 1, 2], "divide by the 3 devices that share them, got 8 and 14336"),
        ({"heads": 2}, [2, 3], "the first devices, in the order of their numbers, to share layers, got [2, 3]"),
        ({"batch": 2}, [2, 3], None),
        ({"heads": 8, "batch": 3}, list(range(24)), None),
    ],
    ids=["width", "heads", "order", "apart", "fits"],
)
def test_a_mesh_that_the_kernel_cannot_serve_has_a_reason(monkeypatch, parts, devices, message):
    one = SimpleNamespace(compute_capability="9.0", core_count=132)
    monkeypatch.setattr(jax, "local_devices", lambda: [one])
    facts = {"platform": "gpu", "dtypes": {jnp.dtype(jnp.bfloat16)}, "devices": devices}
    sizes = {"layers": 32, "d_model": 4096, "d_ff": 14336, "kv_heads": 8, "group": 4, "head_dim": 128}
    facts |= {"parts": {"batch": 1, "heads": 1, "width": 1} | parts, "sizes": sizes | {"batch": 8, "capacity": 2048}}
    found = mosaic_gpu.refuse(**facts)
    assert found is None if message is None else message in found
