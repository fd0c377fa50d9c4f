"""What the decoder stack refuses and clamps, how its kernel divides the work, and that it lowers for a Hopper GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decoder_stack import DecoderWeights, decode_layers, explain_decode, mosaic_gpu
from pallas_kernels.decoder_stack.geometry import Geometry, refuse_geometry

EPS = 1e-5
needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < mosaic_gpu.NEEDED_JAX, reason="jax interprets and lowers the kernel from 0.11.2 on"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (65, 128)}, "1 to 64 sequences"),
        ({"k": (3, 2, 136, 1, 64)}, r"expected a cache of k, v"),
        ({"wo": (3, 384, 128)}, r"expected wqkv of shape \(3, 128, 640\)"),
        ({"w_down": (3, 255, 128)}, r"expected w_gate_up of shape \(3, 128, 510\)"),
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


def test_units_are_dealt_to_blocks_without_gaps():
    geometry = llama_8b(1)
    assert geometry.products == {"qkv": (48, 32), "out": (32, 32), "gate_up": (224, 32), "down": (32, 112)}
    assert (geometry.rows, geometry.head_rows, geometry.splits, llama_8b(9).rows) == (8, 8, 16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"head_dim": 64}, "head_dim 128"), ({"d_ff": 14400}, "multiples of 128"), ({"capacity": 2047}, "multiple of 8")],
    ids=["head_dim", "d_ff", "capacity"],
)
def test_what_the_kernel_cannot_serve_has_a_reason(changes, message):
    assert message in refuse_geometry(dataclasses.replace(llama_8b(1), **changes))
    assert refuse_geometry(llama_8b(64)) is None


def test_dispatch_names_a_reason_away_from_a_gpu():
    sizes = {"d_model": 256, "d_ff": 256, "kv_heads": 1, "group": 1, "head_dim": 128, "batch": 1, "capacity": 8}
    reasons = dict(explain_decode(**sizes, dtype="bfloat16"))
    assert reasons["loop"] is None and "cpu" in reasons["mosaic_gpu"]


@needs_interpreter
@pytest.mark.parametrize("batch", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_the_kernel_lowers_for_a_hopper_gpu(batch):
    """Shared memory, layouts and transfers are checked while lowering; the machine code is not."""
    g, dtype = llama_8b(batch), jnp.bfloat16
    shape = jax.ShapeDtypeStruct
    weights = DecoderWeights(
        norm_attn=shape((32, 4096), dtype),
        wqkv=shape((32, 4096, 6144), dtype),
        wo=shape((32, 4096, 4096), dtype),
        norm_mlp=shape((32, 4096), dtype),
        w_gate_up=shape((32, 4096, 28672), dtype),
        w_down=shape((32, 14336, 4096), dtype),
    )
    cache = shape((32, batch, g.capacity, 8, 128), dtype)
    leaves, tree = jax.tree.flatten((shape((batch, 4096), dtype), weights, cache, cache, shape((batch,), jnp.int32)))

    def step(*leaves):
        return mosaic_gpu.decode_layers(
            *jax.tree.unflatten(tree, leaves),
            order_M=jnp.arange(32),
            length=jnp.int32(32),
            planned_B=jnp.full(batch, 32),
            live_B=jnp.ones(batch, bool),
            asked_M=jnp.ones(32, bool),
            frequencies=jnp.ones(64),
            eps=EPS,
            threshold=0.9,
            fill=True,
            window=None,
            blocks=g.blocks,
        )

    allowed = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(step), platforms=["cuda"], disabled_checks=allowed)(*leaves)
    assert "mosaic_gpu" in exported.mlir_module()
