"""Storing and scoring at once: against the two operations apart, its kernel interpreted, lowered and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import append_and_score, page_scores
from pallas_kernels.append_and_score import apart, mosaic_gpu, whole_pages
from tests.pallas_kernels.test_append_tokens import PAGE, SLOTS, B, H, K, L, S, append, make

G = 3
# Compiled as one program, as there.
both = jax.jit(append_and_score, static_argnames=("kind", "page_size", "reduce"))
scores = jax.jit(page_scores)
needs_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the GPU kernel needs jax 0.11.2")


def arguments(rng, slots, kind, dtype=jnp.float32, head_dim=H, pages=8):
    """What the operation takes; summaries of pages that are not scored are NaN."""
    k, v, summary, *new, slots_BT = make(rng, slots, kind, dtype, head_dim)
    summary = jnp.pad(summary, ((0, 0), (0, 0), (0, pages - S // PAGE), (0, 0), (0, 0)))
    dead_BP = jnp.arange(pages)[None] >= whole_pages(slots_BT, S, PAGE)[:, None]
    summary = jnp.where(dead_BP[None, :, :, None, None], jnp.nan, summary)
    q = jnp.asarray(rng.normal(size=(B, slots_BT.shape[1], K * G, head_dim)), dtype)
    return k, v, summary, *new, slots_BT, q


def kernel(kind, reduce, **options):
    """The kernel as a function of what the operation takes."""

    def run(*arrays):
        counts = whole_pages(arrays[5], S, PAGE)
        return mosaic_gpu.append_and_score(
            *arrays, counts, jnp.int32(1), kind=kind, page_size=PAGE, reduce=reduce, **options
        )

    return jax.jit(run)


def compare(got, want, tolerance):
    *cache, scores = (np.asarray(one, np.float32) for one in got)
    *other_cache, other_scores = (np.asarray(one, np.float32) for one in want)
    for one, other in zip(cache, other_cache, strict=True):
        np.testing.assert_allclose(one, other, rtol=0.01)
    np.testing.assert_array_equal(np.isneginf(scores), np.isneginf(other_scores))
    np.testing.assert_allclose(scores, other_scores, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["mean", "bounds"])
@pytest.mark.parametrize("slots", SLOTS)
def test_pages_before_the_new_tokens_are_scored(rng, slots, kind):
    arrays = arguments(rng, SLOTS[slots], kind)
    *cache, scores_BKP = both(*arrays, kind=kind, page_size=PAGE, layer=jnp.int32(1))
    for one, other in zip(cache, append(*arrays[:6], kind=kind, page_size=PAGE, layer=jnp.int32(1)), strict=True):
        np.testing.assert_array_equal(one, other)
    counts = {"one": [1, 0, 2], "crossing": [0, 2, 2], "outside": [0, 0, 0]}[slots]
    np.testing.assert_array_equal((np.asarray(scores_BKP) > -np.inf).sum(axis=2), np.repeat(counts, K).reshape(B, K))
    np.testing.assert_array_equal(scores_BKP, scores(arrays[6], arrays[2], jnp.array(counts), layer=jnp.int32(1)))


@needs_mosaic_gpu
@pytest.mark.parametrize(("slots", "kind", "reduce"), [("crossing", "mean", "max"), ("outside", "bounds", "vote")])
def test_the_kernel_interpreted(rng, slots, kind, reduce):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    arrays = arguments(rng, SLOTS[slots], kind, jnp.bfloat16, pages=64)
    counts, layer = whole_pages(arrays[5], S, PAGE), jnp.int32(1)
    plain = jax.jit(functools.partial(apart.append_and_score, kind=kind, page_size=PAGE, reduce=reduce))
    want = plain(*arrays, counts, layer)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=1)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = jax.block_until_ready(kernel(kind, reduce, cores=1)(*arrays))
    compare(got, want, 0.02)


@needs_mosaic_gpu
@pytest.mark.parametrize(
    ("kind", "reduce", "calls"),
    [("mean", "max", 1), pytest.param("bounds", "sum", 1, marks=pytest.mark.slow), ("bounds", "vote", 2)],
)
def test_the_kernel_lowers_for_cuda(rng, kind, reduce, calls):
    arrays = arguments(rng, SLOTS["one"], kind, jnp.bfloat16, head_dim=128)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(kernel(kind, reduce, cores=132), platforms=["cuda"], disabled_checks=unchecked)(
            *arrays
        )
    assert exported.mlir_module().count("@mosaic_gpu_v2") == calls


@pytest.mark.gpu
@pytest.mark.parametrize("reduce", ["max", "sum", "vote"])
@pytest.mark.parametrize("kind", ["mean", "bounds"])
@pytest.mark.parametrize("slots", SLOTS)
def test_the_kernel_on_a_gpu(rng, slots, kind, reduce):
    arrays = arguments(rng, SLOTS[slots], kind, jnp.bfloat16, head_dim=128, pages=200)
    got, want = (
        jax.jit(functools.partial(append_and_score, kind=kind, page_size=PAGE, reduce=reduce, implementation=name))(
            *arrays, layer=jnp.int32(1)
        )
        for name in ("mosaic_gpu", "apart")
    )
    compare(got, want, 0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "median"}, "'mean' or 'bounds'"),
        ({"reduce": "least"}, "'max', 'sum' or 'vote'"),
        ({"layer": None}, "scalar layer"),
        ({"implementation": "xla"}, "one of"),
    ],
    ids=str,
)
def test_bad_input_is_refused(rng, change, message):
    options = {"kind": "bounds", "page_size": PAGE, "layer": jnp.int32(0)} | change
    with pytest.raises(ValueError, match=message):
        append_and_score(*arguments(rng, SLOTS["one"], "bounds"), **options)


def test_layers_are_optional_and_the_number_of_layers_does_not_matter(rng):
    arrays = arguments(rng, SLOTS["one"], "mean")
    assert arrays[0].shape[0] == L
    stacked = both(*arrays, kind="mean", page_size=PAGE, layer=jnp.int32(1))
    single = both(*(a[1] for a in arrays[:3]), *arrays[3:], kind="mean", page_size=PAGE)
    for one, other in zip(single[:3], stacked[:3], strict=True):
        np.testing.assert_array_equal(one, other[1])
    np.testing.assert_array_equal(single[3], stacked[3])
