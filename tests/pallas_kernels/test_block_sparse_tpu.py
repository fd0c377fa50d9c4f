"""Block-sparse and dense prefill on TPUs: interpreted with a detector of races, compiled, and refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockIndex, block_sparse_attention, dispatch
from pallas_kernels.block_sparse_attention import BLOCK_SPARSE, mosaic_tpu
from tests.pallas_kernels.test_block_sparse import make_case
from tests.pallas_kernels.test_selection_tpu import compile_for, interpreted
from tests.pallas_kernels.tpus import TPUS

SIZES = {"tokens": 200, "keys": 300, "heads": 4, "kv": 2, "dim": 64, "size": 128, "entries": 3, "offset": 0}
STREAMED = {"vmem": 0}  # no room for all keys of a head

# sizes, options, options of the kernel
CASES = {
    "lengths": (SIZES | {"lengths": (300, 170), "dtype": "bfloat16"}, {}, {"cores": 2}),
    "window": (
        SIZES | {"keys": 1301, "heads": 2, "kv": 1, "dim": 256, "entries": 12, "offset": 1000, "lengths": (1301, 1040)},
        {"window": 150, "sinks": 3},
        STREAMED,
    ),
}
SLOW = {
    "one_token": (SIZES | {"tokens": 1, "heads": 2, "offset": 200, "dim": 256, "entries": 1}, {}, {"cores": 2}),
    "units": (SIZES | {"tokens": 1400, "keys": 1400, "heads": 2, "kv": 1, "entries": 11, "dtype": "bfloat16"}, {}, {}),
    "streamed_units": (
        SIZES | {"keys": 4000, "heads": 2, "kv": 1, "dim": 256, "entries": 27, "offset": 3700},
        {"window": 1500},
        STREAMED | {"cores": 2},
    ),
    "large_blocks": (
        SIZES | {"tokens": 520, "keys": 1100, "size": 256, "entries": 4, "offset": 555, "dtype": "bfloat16"},
        {"window": 700, "sinks": 300},
        {"cores": 2},
    ),
    "no_keys": (SIZES | {"lengths": (0, 299), "dtype": "bfloat16"}, {}, STREAMED),
    "long_rows": (SIZES | {"tokens": 1100, "keys": 1100, "heads": 1, "kv": 1, "entries": 2}, {}, {"cores": 2}),
}


def close(got, arrays, attend, rows=None):
    """Results are as exact as the same maths in the dtype of the inputs; sums of exponentials in float32."""
    attend = jax.jit(attend)
    (want, sums), (same, _) = (
        jax.tree.map(lambda x: np.asarray(x, np.float32), attend(*(array.astype(dtype) for array in arrays)))
        for dtype in (jnp.float32, arrays[0].dtype)
    )
    out, lse = got
    rows = np.ones(sums.shape, bool) if rows is None else np.broadcast_to(rows[:, None], sums.shape)
    error = lambda found: np.linalg.norm((found - want)[rows.swapaxes(1, 2)]) / np.linalg.norm(want)  # noqa: E731
    assert np.isfinite(out).all() and error(out) <= 2 * error(same) + 1e-5
    np.testing.assert_allclose(lse[rows], sums[rows], atol=2e-5)


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_blocks_interpreted(rng, name):
    sizes, options, kernel = (CASES | SLOW)[name]
    (q, k, v), index, about = make_case(rng, **sizes)
    lengths, options = jnp.asarray(about["lengths"], jnp.int32), options | {"with_lse": True}
    offset = jnp.int32(about["offset"])
    run = lambda *arrays, **kernel: mosaic_tpu.block_sparse_attention(  # noqa: E731
        *arrays, index, lengths, offset=offset, **options, **kernel
    )
    plain = functools.partial(block_sparse_attention, offset=offset, implementation="xla", **options)
    got = interpreted(run, q, k, v, **kernel)
    close(got, (q, k, v), lambda *arrays: plain(*arrays, index, lengths))
    assert not got[0][0, :128, 0].any() and np.isneginf(got[1][0, 0, :128]).all()  # a row that names nothing


@pytest.mark.parametrize(
    ("tokens", "keys", "offset", "lengths", "window", "dtype", "kernel"),
    [
        (600, 600, 0, (600, 130), None, "bfloat16", {}),
        (130, 700, 555, (700, 600), 140, "float32", STREAMED),
        pytest.param(1, 1, 0, None, None, "float32", {}, marks=pytest.mark.slow),
        pytest.param(700, 1500, 800, None, 300, "bfloat16", {"cores": 2}, marks=pytest.mark.slow),
        pytest.param(100, 1500, 1300, (0, 1500), None, "bfloat16", STREAMED, marks=pytest.mark.slow),
    ],
    ids=["prompt", "window", "one_token", "large_chunk", "small_chunk"],
)
def test_all_blocks_interpreted(rng, tokens, keys, offset, lengths, window, dtype, kernel):
    sizes = {"tokens": tokens, "keys": keys, "offset": offset, "lengths": lengths, "dtype": dtype, "heads": 2, "kv": 1}
    arrays, _, about = make_case(rng, **SIZES | sizes)
    options = {"offset": offset, "window": window, "with_lse": True}
    got = interpreted(functools.partial(mosaic_tpu.prefill_attention, **options), *arrays, about["lengths"], **kernel)
    rows, blocks = -(-tokens // 128), -(-keys // 128)
    index = BlockIndex(
        counts=jnp.full((2, 2, rows), blocks),
        blocks=jnp.broadcast_to(jnp.arange(blocks), (2, 2, rows, blocks)),
        block_size=128,
    )
    plain = functools.partial(block_sparse_attention, implementation="xla", **options)
    exist = offset + np.arange(tokens)[None] < about["lengths"][:, None]
    close(got, arrays, lambda *arrays: plain(*arrays, index, jnp.asarray(about["lengths"])), exist)


def test_by_hand():
    # Queries of zero weigh alike what they see; values are positions, NaN where no query sees them.
    # Head 0: row 0 names block 0, so that query t sees 0 to t, mean t / 2; row 1 names block 1 and one that does not
    # exist, so that query 128 + i sees 128 to 128 + i, mean 128 + i / 2. Head 1: row 0 names nothing; row 1 names
    # block 0, all of which it sees: mean 63.5.
    positions = np.arange(384.0)
    values = np.where(positions < 256, positions, np.nan)[None, :, None, None] * np.ones((1, 1, 1, 64))
    index = BlockIndex(
        counts=jnp.array([[[1, 2], [0, 1]]]), blocks=jnp.array([[[[0, 2], [1, 3]], [[0, 1], [0, 2]]]]), block_size=128
    )
    k_BSKH = jnp.asarray(values, jnp.float32)
    run = lambda q, k, v, **kernel: mosaic_tpu.block_sparse_attention(  # noqa: E731
        q, k, v, index, None, offset=jnp.int32(0), with_lse=True, **kernel
    )
    out, lse = interpreted(run, jnp.zeros((1, 256, 2, 64)), k_BSKH, k_BSKH)
    i = np.arange(128)
    want = np.array([[*(i / 2), *(128 + i / 2)], [*(0 * i), *(0 * i + 63.5)]])
    sums = np.array([[*np.log(i + 1), *np.log(i + 1)], [*np.full(128, -np.inf), *np.full(128, np.log(128))]])
    np.testing.assert_allclose(out, np.broadcast_to(want.T[None, :, :, None], out.shape), rtol=1e-5)
    np.testing.assert_allclose(lse[0], sums, rtol=1e-5, atol=1e-5)


def compiled_bytes(tpu, *, length, dim, dtype="bfloat16", entries=None, window=None, with_lse=True, **kernel):
    """Compile for 8 query heads of 2; return the bytes of intermediate arrays and of queries, keys, values, results."""
    dtype = jnp.dtype(dtype)
    shapes = [((1, length, heads, dim), dtype) for heads in (8, 2, 2)] + [((1,), jnp.int32), ((), jnp.int32)]
    rows = (1, 8, length // 128)
    shapes += [] if entries is None else [(rows, jnp.int32), ((*rows, entries), jnp.int32)]

    def run(q, k, v, lengths, offset, *index):
        options = {"window": window, "with_lse": with_lse, "offset": offset, **kernel}
        if not index:
            return mosaic_tpu.prefill_attention(q, k, v, lengths, **options)
        index = BlockIndex(counts=index[0], blocks=index[1], block_size=128)
        return mosaic_tpu.block_sparse_attention(q, k, v, index, lengths, **options)

    given = 24 * length * max(dim, 128) * dtype.itemsize  # keys and values twice: XLA may also bring them to VMEM
    return compile_for(tpu, run, *shapes), given + 8 * length * 16  # with an index and sums of exponentials


COMPILED = {
    "128": {"length": 2048, "dim": 128, "entries": 4},
    "64": {"length": 2048, "dim": 64, "entries": 6, "window": 500},
    "256": {"length": 2048, "dim": 256, "entries": 16, "with_lse": False},
    "long": {"length": 65536, "dim": 128, "entries": 128},
    "lists": {"length": 4096, "dim": 128, "entries": 8192},
    "streamed": {"length": 131072, "dim": 128, "entries": 64},
    "float32": {"length": 32768, "dim": 256, "dtype": "float32", "entries": 128},
    "dense": {"length": 8192, "dim": 128, "with_lse": False},
    "dense_64": {"length": 32768, "dim": 64, "window": 4096},
    "dense_256": {"length": 8192, "dim": 256, "vmem": 0},
    "dense_float32": {"length": 16384, "dim": 128, "dtype": "float32", "vmem": 0},
}
DEFAULT = {("64", "v5e:2x2"), ("streamed", "tpu7x:2x2x1"), ("dense_64", "v5p:2x2x1")}


@pytest.mark.parametrize(
    ("name", "tpu"),
    [
        pytest.param(name, tpu, marks=[] if (name, tpu) in DEFAULT else pytest.mark.slow)
        for name in COMPILED
        for tpu in TPUS
    ],
)
def test_compiles_and_copies_only_once(name, tpu):
    took, given = compiled_bytes(tpu, **COMPILED[name])
    assert took <= given  # heads come before tokens in the copies


@pytest.mark.slow
@pytest.mark.parametrize("tpu", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("length", [98304, 196608], ids=["two_buffers", "one_buffer"])
def test_longer_heads_stay_in_larger_vmem(tpu, length):
    took, given = compiled_bytes(tpu, length=length, dim=128, entries=128, vmem=128 * 2**20)
    assert took <= given


FACTS = {"platform": "tpu", "capability": None, "dtype": jnp.bfloat16, "kv_dtype": jnp.bfloat16, "head_dim": 128}
FACTS |= {"num_queries": 2048, "num_keys": 2048, "num_heads": 8, "num_kv": 2, "block_size": 128}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": jnp.float32, "kv_dtype": jnp.float32, "head_dim": 256, "block_size": 512}, None),
        ({"num_queries": 1, "num_keys": 3, "head_dim": 64}, None),
        ({"platform": "gpu"}, "needs a TPU, got platform 'gpu'"),
        ({"dtype": jnp.float16, "kv_dtype": jnp.float16}, "float16 queries and float16 keys"),
        ({"kv_dtype": jnp.float32}, "bfloat16 queries and float32 keys"),
        ({"head_dim": 96}, "head_dim 64, 128, 256, got 96"),
        ({"block_size": 64}, "blocks of 128, 256, 512 keys, got 64"),
        ({"num_keys": 2**20 + 1}, "at most 8192 blocks of keys, got 1048577 keys in blocks of 128"),
    ],
    ids=str,
)
def test_reasons_to_refuse(change, reason):
    found = dict(dispatch.explain(BLOCK_SPARSE[1:], **FACTS | change))["mosaic_tpu"]
    assert found is None if reason is None else re.search(reason, found), found


def test_a_mask_of_keys_is_refused():
    dense = {name: fact for name, fact in FACTS.items() if name != "block_size"}
    assert mosaic_tpu.refuse(**dense) is None
    assert "not a mask" in mosaic_tpu.refuse(**dense, masked=True)
    arrays = [jnp.zeros((1, 8, 2, 64))] * 3
    with pytest.raises(NotImplementedError, match="not a mask"):
        mosaic_tpu.prefill_attention(*arrays, None, keep_BT=jnp.ones((1, 8), bool))
