"""The Hopper kernels that score pages and read them: interpreted and lowered on a CPU, run on a GPU, and refused."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KVIndex, decode_attention, page_scores
from pallas_kernels.attention import mosaic_gpu as attention_kernel
from pallas_kernels.page_scores import mosaic_gpu as scores_kernel

needs_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the GPU kernels need jax 0.11.2")
SIZES = {"batch": 2, "tokens": 1, "heads": 8, "kv": 2, "dim": 128, "slots": 304, "page": None, "entries": 5}


def hopper(cores):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=cores)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@contextlib.contextmanager
def interpreted(races=False):
    """Interpret Mosaic GPU kernels, and look for races."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with hopper(1), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=races)):
        yield
    assert not races or not gpu_callbacks.get_races().races_found


def lowered(function, *arguments):
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with hopper(132):
        exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=unchecked)(*arguments)
    return exported.mlir_module()


def read_case(rng, dtype="bfloat16", **sizes):
    """Queries, two layers of a cache, positions and an index; whatever must not be read is NaN."""
    c = SIZES | sizes
    shapes = [(c["batch"], c["tokens"], c["heads"], c["dim"])]
    shapes += [(2, c["batch"], c["slots"], c["kv"], c["dim"])] * 2
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    positions = np.sort(rng.integers(0, c["slots"], (c["batch"], c["tokens"])), axis=1).astype(np.int32)
    positions[0] = np.arange(c["slots"] - c["tokens"], c["slots"])
    read = np.broadcast_to(np.arange(c["slots"]) <= positions.max(1)[:, None], (c["kv"], *k.shape[1:3])).copy()
    index = None
    if c["page"] is not None:
        pages = -(-c["slots"] // c["page"])
        entries = min(c["entries"], pages)
        chosen = np.array([[np.sort(rng.permutation(pages)[:entries]) for _ in range(c["kv"])] for _ in k[0]])
        chosen[0, 0, -1] = pages - 1
        counts = rng.integers(0, entries + 1, chosen.shape[:2])
        counts[0, 0], counts[-1, -1] = entries, 0
        for b, head in np.ndindex(*counts.shape):
            there = np.isin(np.arange(c["slots"]) // c["page"], chosen[b, head, : counts[b, head]])
            read[head, b] &= there
        chosen[-1, -1] = pages + 7  # padding that must not be read
        index = KVIndex(
            counts=jnp.asarray(counts, jnp.int32), pages=jnp.asarray(chosen, jnp.int32), page_size=c["page"]
        )
    hidden = ~np.moveaxis(read, 0, 2)
    for array in (k, v):
        array[0], array[1][hidden] = np.nan, np.nan
    return *(jnp.asarray(array, dtype) for array in (q, k, v)), jnp.asarray(positions), index


def assert_reads(run, case, window):
    """Compare with float32, within twice the error of plain JAX in the input dtype."""
    q, k, v, positions, index = case
    about = {"layer": jnp.int32(1), "index": index, "window": window, "implementation": "xla"}
    plain = jax.jit(functools.partial(decode_attention, **about))
    with jax.default_matmul_precision("highest"):
        want = np.asarray(plain(*(x.astype(jnp.float32) for x in (q, k, v)), positions))
    error = lambda got: np.linalg.norm(np.asarray(got, np.float32) - want) / max(np.linalg.norm(want), 1e-9)  # noqa: E731
    got = run(q, k, v, positions, layer=jnp.int32(1), index=index)
    assert np.isfinite(np.asarray(got, np.float32)).all() and got.dtype == q.dtype
    assert error(got) <= 2 * error(plain(q, k, v, positions)) + 1e-3
    return got


INTERPRETED = {
    "dense": {"batch": 2},
    "group_of_three": {"heads": 6, "dim": 64, "window": 50, "tokens": 2},
    "pages_of_16": {"heads": 4, "page": 16, "entries": 9, "dim": 64},
    "pages_of_128": {"heads": 2, "page": 128, "entries": 2, "dim": 256, "window": 70},
}
QUICK = ("group_of_three", "pages_of_16")  # all slots and pages; the others in slow runs


@needs_mosaic_gpu
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in INTERPRETED])
def test_attention_interpreted(rng, name):
    sizes = dict(INTERPRETED[name])
    window = sizes.pop("window", None)
    run = jax.jit(functools.partial(attention_kernel.decode_attention, window=window, cores=0))
    with interpreted(races=name in ("dense", "group_of_three")):
        assert_reads(run, read_case(rng, **sizes), window)


@needs_mosaic_gpu
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"page": 16}, marks=pytest.mark.slow),
        {"dim": 256, "tokens": 8, "page": 64},
        pytest.param({"dim": 64, "batch": 40}, marks=pytest.mark.slow),
    ],
    ids=["dense", "pages", "eight_tokens", "many"],
)
def test_attention_lowers_for_cuda(rng, sizes):
    q, k, v, positions, index = read_case(rng, **sizes)
    run = lambda *a: attention_kernel.decode_attention(*a[:4], layer=a[4], index=a[5], cores=132)  # noqa: E731
    assert "mosaic_gpu_v2" in lowered(
        lambda *a: run(*a[:5], index and KVIndex(counts=a[5], pages=a[6], page_size=index.page_size)),
        *(q, k, v, positions, jnp.int32(1)),
        *([] if index is None else [index.counts, index.pages]),
    )


ON_A_GPU = {
    **INTERPRETED,
    "many_splits": {"batch": 1, "slots": 40000},
    "many_sequences": {"batch": 40, "heads": 32, "kv": 8, "slots": 512},
    "three_tokens": {"batch": 3, "tokens": 3, "heads": 4, "kv": 1, "page": 64, "entries": 3},
    "eight_tokens": {"tokens": 8, "heads": 8, "kv": 1, "page": 8, "entries": 90, "slots": 1000},
    "wide_heads": {"dim": 256, "page": 128, "entries": 20, "slots": 5000, "heads": 4},
    "half": {"dtype": "float16", "page": 32, "entries": 60, "slots": 4096, "heads": 32, "kv": 8},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_attention_on_a_gpu(rng, name):
    sizes = dict(ON_A_GPU[name])
    window = sizes.pop("window", None)
    run = jax.jit(functools.partial(decode_attention, window=window, implementation="mosaic_gpu"))
    case = read_case(rng, **sizes)
    got = assert_reads(run, case, window)
    np.testing.assert_array_equal(got, run(*case[:4], layer=jnp.int32(1), index=case[4]))


def score_case(rng, *, batch=2, tokens=1, heads=6, kv=2, dim=64, pages=136, kind="bounds", dtype="bfloat16"):
    """Queries, two layers of summaries of which those of pages not in use are NaN, and pages in use."""
    summary = rng.normal(size=(2, batch, pages, kv, dim * (2 if kind == "bounds" else 1))).astype(np.float32)
    used = np.array([pages, *[pages // 2 + 1] * (batch - 1)], np.int32)
    for row, count in enumerate(used):
        summary[:, row, count:] = np.nan
    summary[0] = np.nan
    q = rng.normal(size=(batch, tokens, heads, dim))
    return jnp.asarray(q, dtype), jnp.asarray(summary, dtype), jnp.asarray(used)


def assert_scores(run, case, reduce):
    q, summary, used = case
    about = {"reduce": reduce, "scale": 0.3, "layer": jnp.int32(1), "implementation": "xla"}
    with jax.default_matmul_precision("highest"):
        plain = jax.jit(functools.partial(page_scores, **about))
        want = plain(*(x.astype(jnp.float32) for x in (q, summary)), used)
    np.testing.assert_allclose(run(*case), want, rtol=2e-3, atol=1e-4)


@needs_mosaic_gpu
@pytest.mark.parametrize(
    ("kind", "reduce", "tokens"), [("bounds", "max", 1), ("mean", "sum", 2), ("bounds", "vote", 1)]
)
def test_scores_interpreted(rng, kind, reduce, tokens):
    run = jax.jit(functools.partial(scores_kernel.page_scores, reduce=reduce, scale=0.3, cores=3))
    with interpreted(races=reduce == "max"):
        assert_scores(lambda *case: run(*case, jnp.int32(1)), score_case(rng, kind=kind, tokens=tokens), reduce)


@needs_mosaic_gpu
@pytest.mark.parametrize(
    "sizes",
    [pytest.param({"dim": 128}, marks=pytest.mark.slow), {"dim": 256, "tokens": 4}, {"kind": "mean", "dim": 64}],
    ids=["128", "256", "mean"],
)
def test_scores_lower_for_cuda(rng, sizes):
    for reduce in ("max", "vote"):
        run = functools.partial(scores_kernel.page_scores, reduce=reduce, scale=0.3, cores=132)
        assert "mosaic_gpu_v2" in lowered(run, *score_case(rng, **sizes), jnp.int32(1))


@pytest.mark.gpu
@pytest.mark.parametrize("reduce", ["max", "sum", "vote"])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"kind": "mean", "dim": 128, "tokens": 3}, {"dim": 128, "pages": 8192, "batch": 3}, {"dim": 256, "heads": 16}],
    ids=["small", "mean", "long", "wide"],
)
def test_scores_on_a_gpu(rng, sizes, reduce):
    run = functools.partial(page_scores, reduce=reduce, scale=0.3, layer=jnp.int32(1), implementation="mosaic_gpu")
    assert_scores(jax.jit(run), score_case(rng, **sizes), reduce)


FACTS = {"platform": "gpu", "capability": "9.0", "dtype": jnp.bfloat16, "head_dim": 128}
READS = FACTS | {"kv_dtype": jnp.bfloat16, "masked": False, "num_queries": 1, "num_heads": 32, "num_kv": 8}
READS |= {"num_keys": 4096, "page_size": 16}
SCORES = FACTS | {"summary_dtype": jnp.bfloat16, "num_queries": 1, "group": 4, "width": 256, "num_pages": 512}


@needs_mosaic_gpu
@pytest.mark.parametrize(
    ("kernel", "facts", "change", "reason"),
    [
        (attention_kernel, READS, {}, None),
        (attention_kernel, READS, {"platform": "tpu"}, "NVIDIA GPU"),
        (attention_kernel, READS, {"capability": "8.0"}, "Hopper"),
        (attention_kernel, READS, {"dtype": jnp.float32}, "float32 queries"),
        (attention_kernel, READS, {"head_dim": 96}, "head_dim 64, 128, 256, got 96"),
        (attention_kernel, READS, {"masked": True}, "not a mask"),
        (attention_kernel, READS, {"page_size": 24}, "pages of 8, 16, 32, 64, 128 slots, got 24"),
        (attention_kernel, READS, {"num_queries": 9}, "64 rows .* got 72"),
        (attention_kernel, READS, {"num_keys": 4097}, "multiple of 8 slots, got 4097"),
        (scores_kernel, SCORES, {}, None),
        (scores_kernel, SCORES, {"platform": "cpu"}, "NVIDIA GPU"),
        (scores_kernel, SCORES, {"capability": "10.0"}, "Hopper"),
        (scores_kernel, SCORES, {"summary_dtype": jnp.float32}, "float32 summaries"),
        (scores_kernel, SCORES, {"width": 192, "head_dim": 192}, "got 192"),
        (scores_kernel, SCORES, {"num_pages": 7}, "multiple of 8 pages, got 7"),
        (scores_kernel, SCORES, {"group": 65}, "64 rows .* got 72"),
    ],
)
def test_reasons_to_refuse(kernel, facts, change, reason):
    got = kernel.refuse(**(facts | change))
    assert (got is None) == (reason is None) and (reason is None or re.search(reason, got)), got
