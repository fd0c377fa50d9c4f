"""The Hopper kernel of prefill: lowered for CUDA anywhere, against the reference on a GPU, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockIndex, block_sparse_attention, dispatch, prefill_attention
from pallas_kernels.attention import PREFILL
from pallas_kernels.block_sparse_attention import BLOCK_SPARSE, mosaic_gpu

FACTS = {
    "platform": "gpu",
    "capability": "9.0",
    "dtype": jnp.dtype("bfloat16"),
    "kv_dtype": jnp.dtype("bfloat16"),
    "head_dim": 128,
    "num_queries": 256,
    "num_keys": 256,
    "num_heads": 4,
    "num_kv": 2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one call; keys beyond the lengths are NaN."""

    tokens: int
    keys: int
    heads: int = 4
    kv: int = 2
    dim: int = 128
    entries: int = 3
    offset: int = 0
    lengths: tuple[int, ...] = (0,)
    window: int | None = None
    sinks: int = 0
    dtype: str = "bfloat16"


CASES = {
    "one": Case(tokens=1, keys=1),
    "short": Case(tokens=127, keys=127, dim=256, window=50, sinks=3),
    "long": Case(tokens=129, keys=129),
    "odd": Case(tokens=777, keys=777, heads=8, lengths=(777, 500), window=90),
    "chunk": Case(tokens=256, keys=1000, kv=1, entries=5, offset=512, window=300, sinks=130),
    "between": Case(tokens=300, keys=1000, kv=1, dim=64, entries=5, offset=333, lengths=(600, 1000), dtype="float16"),
    "wide": Case(tokens=1000, keys=1000, heads=6, kv=3, dim=256, entries=5),
    "many": Case(tokens=2048, keys=2048, heads=32, kv=8, entries=9, window=700, sinks=256),
}


def make(case, rng):
    """Queries, keys and values, and lists of blocks: the own one of most rows, some that do not exist, an empty one."""
    batch = len(case.lengths)
    shapes = [(batch, case.tokens, case.heads, case.dim), *[(batch, case.keys, case.kv, case.dim)] * 2]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    lengths = None
    if case.lengths != (0,):
        lengths = jnp.asarray(case.lengths, jnp.int32)
        for sequence, length in enumerate(case.lengths):
            k[sequence, length:], v[sequence, length:] = np.nan, np.nan
    rows, blocks = -(-case.tokens // 128), -(-case.keys // 128)
    counts = rng.integers(1, case.entries + 1, (batch, case.heads, rows)).astype(np.int32)
    listed = np.zeros((*counts.shape, case.entries), np.int32)
    for place in np.ndindex(*counts.shape):
        last = min((case.offset + place[2] * 128 + 127) // 128, blocks - 1)
        others = rng.permutation(blocks + 1)
        others = others[others != last][: counts[place] - 1]  # one of them does not exist
        counts[place] = len(others) + 1
        listed[place][: counts[place]] = np.sort([*others, last])
        listed[place][counts[place] :] = -5
    counts[0, 0, 0] = 0
    index = BlockIndex(counts=jnp.asarray(counts), blocks=jnp.asarray(listed), block_size=128)
    return [jnp.asarray(x, case.dtype) for x in (q, k, v)], index, lengths


@pytest.mark.skipif(jax.__version_info__ < dispatch.MOSAIC_GPU_JAX, reason="Mosaic GPU kernels need jax 0.11.2")
@pytest.mark.parametrize("name", ["odd", *(pytest.param(n, marks=pytest.mark.slow) for n in ("short", "between"))])
def test_lowers_for_cuda(rng, name):
    case = CASES[name]
    (q, k, v), index, lengths = make(case, rng)
    about = {"offset": jnp.int32(case.offset), "window": case.window, "with_lse": True, "cores": 132}

    def run(q, k, v, index):
        sparse = mosaic_gpu.block_sparse_attention(q, k, v, index, lengths, sinks=case.sinks, **about)
        return sparse, mosaic_gpu.prefill_attention(q, k, v, lengths, **about)

    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=checks)(q, k, v, index)
    assert exported.mlir_module().count("mosaic_gpu_v2") >= 2


def within(got, want, low, valid):
    """Whether a result is at most twice as far from the truth as plain maths in the dtype of the inputs."""
    got, want, low = (np.where(valid, np.asarray(x, np.float64), 0.0) for x in (got, want, low))
    assert np.isfinite(got).all()
    return np.abs(got - want).max() <= 2 * np.abs(low - want).max() + float(jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("cores", [None, 2])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(rng, name, cores, monkeypatch):
    if cores is not None:  # every block of threads takes several tiles
        monkeypatch.setattr(mosaic_gpu, "UNEVEN", 1)
        for kernel in ("block_sparse_attention", "prefill_attention"):
            monkeypatch.setattr(mosaic_gpu, kernel, functools.partial(getattr(mosaic_gpu, kernel), cores=cores))
    case = CASES[name]
    arrays, index, lengths = make(case, rng)
    wide = [array.astype(jnp.float32) for array in arrays]
    about = {"offset": case.offset, "window": case.window, "with_lse": True}
    ends = np.full(1, case.keys) if lengths is None else np.array(case.lengths)
    valid = (case.offset + np.arange(case.tokens)[None] < ends[:, None])[:, :, None, None]

    def sparse(arrays, way):
        return block_sparse_attention(*arrays, index, lengths, sinks=case.sinks, **about, implementation=way)

    def dense(arrays, way):
        return prefill_attention(*arrays, lengths, **about, implementation=way)

    for attend in (sparse, dense):
        (got, sums), (again, _) = attend(arrays, "mosaic_gpu"), attend(arrays, "mosaic_gpu")
        want, want_sums = attend(wide, "xla")
        assert within(got, want, attend(arrays, "xla")[0], valid)
        there = np.broadcast_to(valid[..., 0].swapaxes(1, 2), sums.shape)
        np.testing.assert_allclose(np.where(there, sums, 0), np.where(there, want_sums, 0), atol=1e-4)
        same = np.where(valid, np.asarray(got, np.float32) == np.asarray(again, np.float32), True)
        assert same.all()  # the same numbers each time


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["one", "long", "odd", "short", "between"])
def test_small_calls_for_a_memory_checker(rng, name):  # which is slow with anything but the kernels
    case = CASES[name]
    (q, k, v), index, lengths = make(case, rng)
    about = {"offset": jnp.int32(case.offset), "window": case.window, "cores": 2}
    sparse = mosaic_gpu.block_sparse_attention(q, k, v, index, lengths, sinks=case.sinks, **about)
    ends = np.full(1, case.keys) if lengths is None else np.array(case.lengths)
    valid = case.offset + np.arange(case.tokens)[None] < ends[:, None]
    for found in (sparse, mosaic_gpu.prefill_attention(q, k, v, lengths, **about)):
        assert np.isfinite(np.asarray(found, np.float32)[valid]).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu"}, "NVIDIA GPU"),
        ({"capability": "8.0"}, "Hopper"),
        ({"dtype": jnp.dtype("float32")}, "bfloat16 or float16"),
        ({"kv_dtype": jnp.dtype("float16")}, "everywhere"),
        ({"head_dim": 96}, "head_dim 64, 128, 256"),
        ({"block_size": 64}, "blocks of 128"),
        ({"masked": True}, "not a mask"),
    ],
)
def test_refusals(change, reason, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", dispatch.MOSAIC_GPU_JAX)
    kernel = PREFILL[1] if "masked" in change else BLOCK_SPARSE[0]
    assert kernel.refuse(**FACTS) is None
    assert reason in kernel.refuse(**FACTS | change)
