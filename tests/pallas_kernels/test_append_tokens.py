"""Storing new tokens and the summaries of their pages, against loops in NumPy; its kernels interpreted and compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import append_tokens, dispatch
from pallas_kernels.append_tokens import APPEND_TOKENS, mosaic_gpu, mosaic_tpu, reference
from pallas_kernels.attention import mosaic_tpu as attention
from tests.pallas_kernels.tpus import in_turn

L, B, K, H, S, PAGE = 2, 3, 2, 64, 48, 16
# Compiled as one program: op by op, every shape would compile twenty.
append = jax.jit(append_tokens, static_argnames=("kind", "page_size"))
refer = jax.jit(reference.append_tokens, static_argnames=("kind", "page_size"))
needs_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the GPU kernel needs jax 0.11.2")


def make(rng, slots, kind, dtype=jnp.float32, head_dim=H):
    """A stacked cache whose empty slots are NaN, new tokens, and where they go."""
    width = head_dim * (2 if kind == "bounds" else 1)
    slots = np.asarray(slots, np.int32)
    k, v = (rng.normal(size=(L, B, S, K, head_dim)).astype(np.float32) for _ in "kv")
    for row, first in enumerate(slots[:, 0]):
        k[:, row, max(first, 0) :], v[:, row, max(first, 0) :] = np.nan, np.nan
    summary = rng.normal(size=(L, B, S // PAGE, K, width))
    new = [jnp.asarray(rng.normal(size=(B, slots.shape[1], K, head_dim)), dtype) for _ in "kv"]
    return *(jnp.asarray(array, dtype) for array in (k, v, summary)), *new, jnp.asarray(slots)


def numpy_append(k, v, summary, k_new, v_new, slots, layer, kind):
    """The same by loops, in float64 where sums are taken."""
    k, v, summary, k_new, v_new, slots = (np.array(array) for array in (k, v, summary, k_new, v_new, slots))
    for b in range(B):
        stored = [(t, s) for t, s in enumerate(slots[b]) if 0 <= s < S]
        for t, s in stored:
            k[layer, b, s], v[layer, b, s] = k_new[b, t], v_new[b, t]
        for page in {s // PAGE for _, s in stored}:
            keys = k[layer, b, page * PAGE : min((page + 1) * PAGE, stored[-1][1] + 1)].astype(np.float64)
            mean, bounds = keys.mean(0), np.concatenate([keys.max(0), keys.min(0)], axis=-1)
            summary[layer, b, page] = mean if kind == "mean" else bounds
    return k, v, summary


SLOTS = {
    "one": [[20], [0], [47]],
    "crossing": [[14, 15, 16, 17], [32, 33, 34, 35], [45, 46, 47, 48]],
    "outside": [[48], [-1], [7]],
}


@pytest.mark.parametrize("kind", ["mean", "bounds"])
@pytest.mark.parametrize("slots", SLOTS)
def test_tokens_and_summaries_are_those_of_loops(rng, slots, kind):
    arrays = make(rng, SLOTS[slots], kind)
    got = append(*arrays, kind=kind, page_size=PAGE, layer=jnp.int32(1))
    for one, other in zip(got, numpy_append(*arrays, 1, kind), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    single = append(*(a[1] for a in arrays[:3]), *arrays[3:], kind=kind, page_size=PAGE)
    for one, other in zip(single, got, strict=True):
        np.testing.assert_array_equal(one, other[1])


@needs_mosaic_gpu
@pytest.mark.parametrize(("slots", "kind"), [("crossing", "mean"), ("outside", "bounds")])
def test_the_kernel_interpreted(rng, slots, kind):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    arrays = make(rng, SLOTS[slots], kind, jnp.bfloat16)
    want = refer(*arrays, jnp.int32(1), kind=kind, page_size=PAGE)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=1)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    run = jax.jit(functools.partial(mosaic_gpu.append_tokens, kind=kind, page_size=PAGE))
    with jax.sharding.use_abstract_mesh(mesh), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = jax.block_until_ready(run(*arrays, jnp.int32(1)))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=0.01)


@needs_mosaic_gpu
@pytest.mark.parametrize("kind", ["mean", "bounds"])
def test_the_kernel_lowers_for_cuda(rng, kind):
    arrays = make(rng, SLOTS["crossing"], kind, jnp.bfloat16, head_dim=256)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    run = jax.jit(functools.partial(mosaic_gpu.append_tokens, kind=kind, page_size=PAGE))
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(run, platforms=["cuda"], disabled_checks=unchecked)(*arrays, jnp.int32(1))
    assert "mosaic_gpu_v2" in exported.mlir_module()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mean", "bounds"])
@pytest.mark.parametrize("slots", SLOTS)
def test_the_kernel_on_a_gpu(rng, slots, kind):
    arrays = make(rng, SLOTS[slots], kind, jnp.bfloat16, head_dim=128)
    got, want = (
        jax.jit(functools.partial(append_tokens, kind=kind, page_size=PAGE, implementation=name))(
            *arrays, layer=jnp.int32(1)
        )
        for name in ("mosaic_gpu", "xla")
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "median"}, "'mean' or 'bounds'"),
        ({"page_size": 8}, "P of at least 6 and X = 128"),
        ({"page_size": 0}, "1 to page_size=0"),
        ({"layer": None}, "scalar layer"),
    ],
    ids=str,
)
def test_bad_input_is_refused(rng, change, message):
    options = {"kind": "bounds", "page_size": PAGE, "layer": jnp.int32(0)} | change
    with pytest.raises(ValueError, match=message):
        append_tokens(*make(rng, SLOTS["one"], "bounds"), **options)


@pytest.mark.parametrize(
    ("slots", "together", "kind"),
    [
        ("crossing", 3, "mean"),
        ("outside", 1, "bounds"),
        ("one", 1, "mean"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("crossing", 3, "bounds"), ("one", 1, "bounds"))),
        pytest.param("outside", 1, "mean", marks=pytest.mark.slow),
    ],
)
def test_the_tpu_kernel_interpreted(rng, slots, together, kind):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    dtype = jnp.float32 if slots == "one" else jnp.bfloat16
    arrays = make(rng, SLOTS[slots], kind, dtype, head_dim=128)
    want = refer(*arrays, jnp.int32(1), kind=kind, page_size=PAGE)
    params = pltpu.InterpretParams(detect_races=True, vector_clock_size=128, uninitialized_memory="nan")
    about = {"kind": kind, "page_size": PAGE, "together": together, "interpret": params}
    got = jax.block_until_ready(jax.jit(functools.partial(mosaic_tpu.append_tokens, **about))(*arrays, jnp.int32(1)))
    assert not interpret_pallas_call.races.races_found
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=0.01)


def compile_for(tpu, function, shapes, donated):
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=tpu).devices
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices[:1], ("x",)), jax.sharding.PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    return jax.jit(function, out_shardings=sharding, donate_argnums=donated).lower(*arguments).compile()


def shapes_of(layers, batch, slots, heads, dim, page, tokens, kind, dtype):
    width = dim * (2 if kind == "bounds" else 1)
    cache, new = ((layers, batch, slots, heads, dim), dtype), ((batch, tokens, heads, dim), dtype)
    return [cache, cache, ((layers, batch, slots // page, heads, width), dtype), new, new, ((batch, tokens), jnp.int32)]


SIZES = (
    (4, 16, 4096, 8, 128, 16, 1, "bounds", jnp.bfloat16),
    (4, 16, 4096, 2, 128, 64, 4, "mean", jnp.bfloat16),
    (4, 6, 4096, 4, 256, 128, 8, "bounds", jnp.bfloat16),
    (2, 4, 4096, 16, 128, 32, 2, "bounds", jnp.bfloat16),
    (4, 8, 4096, 24, 128, 8, 1, "mean", jnp.float32),
    (2, 32, 4096, 1, 128, 8, 1, "bounds", jnp.float32),
)


@pytest.mark.parametrize(("sizes", "tpu"), in_turn(SIZES))
def test_the_tpu_kernel_compiles_in_place(sizes, tpu):
    run = functools.partial(mosaic_tpu.append_tokens, kind=sizes[-2], page_size=sizes[5])
    used = compile_for(tpu, run, [*shapes_of(*sizes), ((), jnp.int32)], (0, 1, 2)).memory_analysis()
    assert used.temp_size_in_bytes < 2**20 and used.alias_size_in_bytes > 0.999 * used.output_size_in_bytes


def test_a_loop_that_appends_and_attends_copies_nothing():
    def loop(k, v, summary, k_new, v_new, slots):
        def body(layer, carry):
            x, *cache = carry
            cache = mosaic_tpu.append_tokens(*cache, x, v_new, slots, layer, kind="bounds", page_size=16)
            return attention.decode_attention(x, *cache[:2], slots, layer=layer), *cache

        return jax.lax.fori_loop(0, 4, body, (k_new, k, v, summary))

    shapes = shapes_of(4, 16, 4096, 8, 128, 16, 1, "bounds", jnp.bfloat16)
    assert compile_for("v6e:2x2", loop, shapes, (0, 1, 2)).memory_analysis().temp_size_in_bytes < 2**24


FACTS = {"platform": "tpu", "capability": None, "dtype": jnp.bfloat16, "summary_dtype": jnp.bfloat16, "head_dim": 128}
FACTS |= {"num_kv": 8, "num_slots": 4096, "page_size": 16, "num_new": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"num_kv": 1, "dtype": jnp.float32, "summary_dtype": jnp.float32}, None),
        ({"platform": "cpu"}, "needs a TPU, got platform 'cpu'"),
        ({"summary_dtype": jnp.float32}, "bfloat16 keys and float32 summaries"),
        ({"head_dim": 64}, "multiple of 128, got 64"),
        ({"num_kv": 1}, "2, 4, a multiple of 8, or 1 in float32; got 1"),
        ({"num_kv": 6}, "2, 4, a multiple of 8, or 1 in float32; got 6"),
        ({"num_slots": 4100}, "4100 slots in pages of 16"),
        ({"page_size": 256}, "4096 slots in pages of 256"),
        ({"num_new": 9}, "up to 8 tokens at a time, got 9"),
        ({"page_size": 128, "num_kv": 128}, "two pages .* got 128 slots of 128 heads of 128"),
    ],
    ids=str,
)
def test_reasons_of_the_tpu_kernel_to_refuse(change, reason):
    found = dict(dispatch.explain(APPEND_TOKENS, **FACTS | change))["mosaic_tpu"]
    assert found is None if reason is None else re.search(reason, found), found
