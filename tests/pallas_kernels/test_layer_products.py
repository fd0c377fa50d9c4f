"""Products of one layer among stacked weights: against numpy, a decoder layer, and the programs that TPUs would run.

The TPU kernel is interpreted, with a detector of races, in blocks small enough for every loop to turn, and compiled
for four kinds of TPU where libtpu is installed.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dyninf.models import ModelConfig
from dyninf.models.layers import DecoderLayer
from pallas_kernels import layer_products
from pallas_kernels.layer_products import mosaic_tpu, norm_gate_up, norm_project, project_add

EPS = 0.75  # large, so that it counts
# 2 key/value heads of 32 with 2 query heads each: queries, keys and values are 2·4·32 columns.
L, D, F, QKV = 11, 256, 384, 2 * (2 + 2) * 32
TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@functools.partial(jax.jit, static_argnames="implementation", compiler_options={"xla_backend_optimization_level": 0})
def three(x, norm, qkv, bias, down, hidden, gate_up, layer, implementation):
    """The three operations on inputs of their own."""
    return (
        norm_project(x, norm, qkv, layer, eps=EPS, bias_LF=bias, implementation=implementation),
        project_add(hidden, down, x, layer, implementation=implementation),
        norm_gate_up(x, norm, gate_up, layer, eps=EPS, implementation=implementation),
    )


def arrays(rng, rows, dtype=jnp.float32, num_layers=L):
    """Arguments of :func:`three` but the layer."""
    shapes = {"x": (rows, D), "norm": (num_layers, D), "qkv": (num_layers, D, QKV), "bias": (num_layers, QKV)}
    shapes |= {"down": (num_layers, F, D), "hidden": (rows, F), "gate_up": (num_layers, 2, D, F)}
    scales = {"qkv": D**-0.5, "gate_up": D**-0.5, "down": F**-0.5}
    return [jnp.asarray(scales.get(name, 1) * rng.normal(size=shape), dtype) for name, shape in shapes.items()]


def numpy_three(x, norm, qkv, bias, down, hidden, gate_up, layer):
    """The definition in float64."""
    wide = (np.asarray(array, np.float64) for array in (x, norm, qkv, bias, down, hidden, gate_up))
    x, norm, qkv, bias, down, hidden, gate_up = wide
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * norm[layer]
    gate, up = normed @ gate_up[layer]
    return normed @ qkv[layer] + bias[layer], x + hidden @ down[layer], gate / (1 + np.exp(-gate)) * up


@pytest.fixture
def interpreted(monkeypatch, capfd):
    """Interpret TPU kernels in blocks of 128 x 128, and fail when two accesses raced."""
    monkeypatch.setattr(mosaic_tpu, "MIN_BLOCK_BYTES", 2 * 128 * 128 * 4)
    monkeypatch.setattr(mosaic_tpu, "MAX_BLOCK_BYTES", 2 * 128 * 128 * 4)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, vector_clock_size=128)):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("rows", [17, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 8, 64))])
def test_kernel_against_numpy(rng, interpreted, rows):
    inputs = arrays(rng, rows)
    for layer in (0, L - 1):
        got = three(*inputs, jnp.int32(layer), "mosaic_tpu")
        for result, want in zip(got, numpy_three(*inputs, layer), strict=True):
            np.testing.assert_allclose(result, want, atol=2e-5)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "xla"])
def test_error_in_bfloat16_is_within_twice_that_of_the_same_maths(rng, interpreted, implementation):
    rows, layer = 3, 17  # in the second, incomplete tile of norms and biases
    inputs = arrays(rng, rows, jnp.bfloat16, num_layers=19)
    x, norm, qkv, bias, down, hidden, gate_up = inputs
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + EPS) * norm[layer][None]
    gate, up = (normed @ gate_up[layer, part] for part in (0, 1))
    narrow = (normed @ qkv[layer] + bias[layer][None], x + hidden @ down[layer], jax.nn.silu(gate) * up)
    got = three(*inputs, jnp.int32(layer), implementation)
    for result, same, want in zip(got, narrow, numpy_three(*inputs, layer), strict=True):
        allowed = 2 * np.abs(np.asarray(same, np.float64) - want).max() + float(jnp.finfo(jnp.bfloat16).eps)
        assert result.dtype == jnp.bfloat16 and np.abs(np.asarray(result, np.float64) - want).max() <= allowed


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "xla"])
def test_a_case_by_hand(interpreted, implementation):
    # x = 1/2: mean square 1/4, plus EPS 1, normed 1/2, times the scale 3 is 3/2. Layer 0 holds NaN.
    layers = np.array([np.nan, 1.0], np.float32)
    x, hidden = np.full((1, 128), 0.5, np.float32), np.full((1, 128), 2.0, np.float32)
    vectors, weights = (
        layers[:, None] * np.ones(128, np.float32),
        layers[:, None, None] * np.ones((128, 128), np.float32),
    )
    gate_up = np.stack([weights / 128, weights / 64], axis=1)
    got = three(x, 3 * vectors, weights / 2, vectors, weights / 4, hidden, gate_up, jnp.int32(1), implementation)
    # 128 · 3/2 · 1/2 + 1 = 97;  128 · 2 · 1/4 + 1/2 = 64.5
    # gate 128 · 3/2 / 128 = 3/2, up 3: silu(3/2) · 3 = 3/2 / (1 + e^-3/2) · 3 = 3.6790851
    for result, want in zip(got, (97.0, 64.5, 3.6790851), strict=True):
        np.testing.assert_allclose(result, np.full((1, 128), want), rtol=1e-6)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "xla"])
def test_other_layers_are_not_read_and_the_index_is_clamped(rng, interpreted, implementation):
    inputs = [np.asarray(array) for array in arrays(rng, 3)]  # 3 rows, 11 layers
    for asked, layer in ((-1, 0), (5, 5), (L, L - 1), (2**31 - 1, L - 1)):
        others = np.arange(L) != layer
        spoilt = [np.where(others.reshape(L, *[1] * (a.ndim - 1)), np.nan, a) if len(a) == L else a for a in inputs]
        clean = three(*inputs, jnp.int32(layer), implementation)
        for got, want in zip(three(*spoilt, jnp.int32(asked), implementation), clean, strict=True):
            np.testing.assert_array_equal(got, want)


def test_two_cores_share_the_columns(rng, interpreted):
    x, _, _, _, down, hidden, _ = inputs = arrays(rng, 3)
    with pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=True, vector_clock_size=128, num_cores_or_threads=2)
    ):
        got = project_add(hidden, down, x, 4, implementation="mosaic_tpu")
    np.testing.assert_allclose(got, numpy_three(*inputs, 4)[1], atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_products_make_a_decoder_layer(rng, dtype):
    sizes = {"vocab_size": 7, "num_layers": 3, "d_model": 24, "d_ff": 40, "max_length": 9}
    config = ModelConfig(**sizes, num_heads=6, num_kv_heads=3, head_dim=8, qkv_bias=True, norm_eps=EPS)
    shapes = jax.eval_shape(lambda: DecoderLayer(config, 1, jax.random.key(0), dtype))
    stack = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=(3, *leaf.shape)), dtype), shapes)
    x = jnp.asarray(rng.normal(size=(5, 24)), dtype)

    def values(q_BTNH, k_BTKH, v_BTKH, *, window):
        return jnp.repeat(v_BTKH, 2, axis=2), None

    def whole(x, stack, layer):
        layer = jax.tree.map(lambda leaf: leaf[layer], stack)
        return layer(x[:, None], jnp.zeros((5, 1), jnp.int32), values)[0][:, 0]

    def products(x, stack, layer):
        qkv_BKMH = norm_project(x, stack.norm_attn[...], stack.wqkv[...], layer, eps=EPS, bias_LF=stack.bqkv[...])
        attended = jnp.repeat(qkv_BKMH[:, :, -1], 2, axis=1).reshape(5, 48)
        x = project_add(attended, stack.wo[...].reshape(3, 48, 24), x, layer)
        hidden = norm_gate_up(x, stack.norm_mlp[...], jnp.moveaxis(stack.w_gate_up[...], 2, 1), layer, eps=EPS)
        return project_add(hidden, stack.w_down[...], x, layer)

    got, want = (np.asarray(jax.jit(function)(x, stack, 1)) for function in (products, whole))
    assert got.dtype == want.dtype == dtype
    np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), atol=1e-6)


def loop(x, norm, qkv, wo, gate_up, down, implementation):
    """All layers of a decoder that attends to nothing but the token itself."""
    wo = wo.reshape(wo.shape[0], -1, wo.shape[-1])

    def body(layer, x):
        queries = norm_project(x, norm, qkv, layer, eps=EPS, implementation=implementation)[:, : wo.shape[1]]
        x = project_add(queries, wo, x, layer, implementation=implementation)
        hidden = norm_gate_up(x, norm, gate_up, layer, eps=EPS, implementation=implementation)
        return project_add(hidden, down, x, layer, implementation=implementation)

    return jax.lax.fori_loop(0, norm.shape[0], body, x)


def compile_for(tpu, implementation, *, rows=8, dtype=jnp.bfloat16):
    """Compile :func:`loop`; return the program, the bytes that one layer must read, and those of its least matrix."""
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    # Llama-3-8B's widths. No stack of four layers fits into a TPU's 128 MiB of VMEM, where XLA would keep it.
    layers, d_model, d_ff, heads, kv_heads, dim = 4, 4096, 14336, 32, 8, 128
    qkv, gate_up = (d_model, (heads + 2 * kv_heads) * dim), (2, d_model, d_ff)
    weights = [qkv, (heads, dim, d_model), gate_up, (d_ff, d_model)]
    shapes = [(rows, d_model), (layers, d_model), *((layers, *shape) for shape in weights)]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=tpu)
    mesh = jax.sharding.Mesh(topology.devices[:1], ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]
    function = jax.jit(functools.partial(loop, implementation=implementation), out_shardings=sharding)
    compiled = function.lower(*arguments).compile()
    sizes = [math.prod(shape) * jnp.dtype(dtype).itemsize for shape in weights]
    return compiled, sum(sizes), min(sizes)


def weight_sized(text, num_bytes):
    """Instructions of a compiled program that make an array of at least so many bytes, except inside of fusions."""
    widths = {"bf16": 2, "f32": 4}
    fused, found, computation = set(re.findall(r"calls=%([\w.\-]+)", text)), [], ""
    for line in text.splitlines():
        if header := re.match(r"\s*(?:ENTRY )?%([\w.\-]+) \(.*\{$", line):
            computation = header[1]
        made = re.match(r"\s*(?:ROOT )?%[\w.\-]+ = \(?(bf16|f32)\[([\d,]+)\]\S* .*?([\w\-]+)\(", line)
        if made and computation not in fused and made[3] not in ("parameter", "get-tuple-element", "bitcast"):
            if math.prod(map(int, made[2].split(","))) * widths[made[1]] >= num_bytes:
                found.append(line.strip())
    return found


@pytest.mark.parametrize("tpu", [*(pytest.param(n, marks=pytest.mark.slow) for n in TPUS[:3]), TPUS[3]])
def test_a_loop_over_layers_reads_each_weight_once_and_copies_none(tpu):
    compiled, layer_bytes, least = compile_for(tpu, "mosaic_tpu")
    assert weight_sized(compiled.as_text(), least) == []
    assert compiled.memory_analysis().temp_size_in_bytes < least / 16
    # The body of a loop is counted once.
    assert layer_bytes < compiled.cost_analysis()["bytes accessed"] < 1.02 * layer_bytes


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(1, jnp.bfloat16), pytest.param(64, jnp.float32, marks=pytest.mark.slow)],
    ids=["one", "most"],
)
def test_the_fewest_and_the_most_rows_compile(rows, dtype):
    compiled, layer_bytes, _ = compile_for("v5e:2x2", "mosaic_tpu", rows=rows, dtype=dtype)
    assert layer_bytes < compiled.cost_analysis()["bytes accessed"] < 1.05 * layer_bytes


def test_the_reference_copies_weights_on_a_tpu7x():
    # Why the kernel is there, and the proof that the test above would notice a copy.
    compiled, layer_bytes, least = compile_for("tpu7x:2x2x1", "xla")
    assert weight_sized(compiled.as_text(), least)
    assert compiled.memory_analysis().temp_size_in_bytes > least
    assert compiled.cost_analysis()["bytes accessed"] > 1.5 * layer_bytes


FACTS = {"platform": "tpu", "named": False, "dtype": jnp.bfloat16, "rows": 8, "contraction": 256, "columns": 384}
FACTS |= {"matrices": 1, "flat": True}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"platform": "cpu", "named": True}, None),
        ({"platform": "gpu", "named": True}, "needs a TPU, got platform 'gpu'"),
        ({"dtype": jnp.float16}, "needs bfloat16 or float32, got float16"),
        ({"rows": 65}, "needs 1 to 64 rows, got 65"),
        ({"rows": 0}, "needs 1 to 64 rows, got 0"),
        ({"contraction": 200}, "multiples of 128, got 200 and 384"),
        ({"columns": 64}, "got 256 and 64"),
        ({"flat": False}, "one produced axis"),
        ({"rows": 64, "contraction": 28672, "columns": 8192}, None),
        ({"rows": 64, "contraction": 128 * 1024}, "bytes of VMEM for 64 rows of 131072"),
    ],
    ids=str,
)
def test_the_kernel_says_why_it_cannot_serve(change, reason):
    found = mosaic_tpu.refuse(**FACTS | change)
    assert found is None if reason is None else reason in found


def test_dispatch_takes_the_kernel_on_a_tpu_and_else_the_reference(monkeypatch):
    sizes = {"rows": 8, "d_model": 256, "d_ff": 384, "dtype": "bfloat16"}
    for found in layer_products.explain_layer_products(**sizes).values():
        assert found == [("mosaic_tpu", "needs a TPU, got platform 'cpu'"), ("xla", None)]
    monkeypatch.setattr(layer_products, "platform", lambda: "tpu")
    for found in layer_products.explain_layer_products(**sizes).values():
        assert found == [("mosaic_tpu", None), ("xla", None)]
    x, norm, weights = jnp.ones((2, 128)), jnp.ones((3, 128)), jnp.ones((3, 128, 2, 4, 16))
    assert norm_project(x, norm, weights, 1, eps=EPS).shape == (2, 2, 4, 16)
    with pytest.raises(NotImplementedError, match="one produced axis"):
        norm_project(x, norm, weights, 1, eps=EPS, implementation="mosaic_tpu")


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        ("project", {"x": (2, 1, 8)}, r"expected x \[B, D\], one token of each sequence"),
        ("project", {"x": (2, 9)}, r"one contracted size, got x \(2, 9\) and weights \(3, 8, 4, 5\)"),
        ("project", {"weights": (3, 8)}, "F of one axis or more"),
        ("project", {"weights": (0, 8, 4)}, "at least one layer"),
        ("project", {"norm": (8,)}, r"norm \[L, D\] of shape \(3, 8\), got \(8,\)"),
        ("project", {"bias": (3, 20)}, r"bias \[L, F\] of shape \(3, 4, 5\), got \(3, 20\)"),
        ("project", {"layer": jnp.zeros(1, jnp.int32)}, r"layer to be one integer, got shape \(1,\)"),
        ("project", {"layer": 1.0}, "layer to be one integer"),
        ("project", {"dtype": jnp.bfloat16}, "x bfloat16, norm float32, weights float32"),
        ("project", {"implementation": "triton"}, r"one of \['mosaic_tpu', 'xla'\], got 'triton'"),
        ("add", {"weights": (3, 8, 4, 5)}, r"weights \[L, F, D\]"),
        ("add", {"residual": (1, 4)}, r"residual \[B, D\] of shape \(2, 4\), got \(1, 4\)"),
        ("add", {"dtype": jnp.int32}, "one floating-point dtype everywhere, got x int32"),
        ("gate_up", {"weights": (3, 3, 8, 5)}, r"\[L, 2, D, F\]"),
        ("gate_up", {"weights": (3, 8, 10)}, r"\[L, 2, D, F\]"),
        ("gate_up", {"weights": (3, 2, 8, 5), "norm": (1, 8)}, r"norm \[L, D\] of shape \(3, 8\), got \(1, 8\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(call, change, message):
    axes = {"project": (4, 5), "add": (4,), "gate_up": (5,)}[call]
    shapes = {"x": (2, 8), "norm": (3, 8), "weights": (3, 8, *axes), "bias": (3, *axes), "residual": (2, 4)} | change
    x = jnp.zeros(shapes["x"], change.get("dtype", jnp.float32))
    norm, weights, bias, residual = (jnp.zeros(shapes[name]) for name in ("norm", "weights", "bias", "residual"))
    layer, implementation = change.get("layer", 0), change.get("implementation")
    with pytest.raises(ValueError, match=message):
        if call == "project":
            norm_project(x, norm, weights, layer, eps=EPS, bias_LF=bias, implementation=implementation)
        elif call == "add":
            project_add(x, weights, residual, layer, implementation=implementation)
        else:
            norm_gate_up(x, norm, weights, layer, eps=EPS, implementation=implementation)
