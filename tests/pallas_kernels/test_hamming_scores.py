"""Scores of hashes against bits counted by NumPy; the TPU kernel interpreted and compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, hamming_scores
from pallas_kernels.hamming_scores import HAMMING_SCORES, mosaic_tpu
from tests.pallas_kernels.tpus import in_turn


def make(rng, words, heads, group, slots, dtype=np.uint32, layers=2):
    """Stacked codes of five sequences, queries alike in some bits, and slots in use: all, one, none, half, too many."""
    codes = rng.integers(0, 2**32, (layers, 5, words, heads, slots), np.uint32)
    queries = rng.integers(0, 2**32, (5, heads * group, words), np.uint32)
    codes[-1, :, :, :, 0] = queries.reshape(5, heads, group, words)[:, :, 0].swapaxes(1, 2)  # differ in no bit
    live = np.array([slots, 1, 0, slots // 2 + 1, slots + 9], np.int32)
    return *(jnp.asarray(array.view(dtype)) for array in (codes, queries)), jnp.asarray(live)


def numpy_scores(codes, queries, live, reduce):
    """One layer, by unpacked bits."""
    codes, queries = (np.ascontiguousarray(np.moveaxis(array, axis, -1)) for array, axis in ((codes, 1), (queries, 2)))
    codes, queries = (np.unpackbits(array.view(np.uint8), axis=-1) for array in (codes, queries))
    batch, heads, slots, bits = codes.shape
    differ = (codes[:, :, None] != queries.reshape(batch, heads, -1, 1, bits)).sum(-1).astype(np.float32)
    scores = -(differ.min(2) if reduce == "max" else differ.sum(2))
    return np.where(np.arange(slots) < np.asarray(live)[:, None, None], scores, -np.inf)


def assert_scores(run, codes, queries, live, reduce):
    got = np.asarray(jax.block_until_ready(run(codes, queries, live)))
    want = numpy_scores(np.asarray(codes[-1]), np.asarray(queries), live, reduce)
    assert (got.dtype == np.float32 and not np.signbit(got[0, :, 0]).any()) or reduce == "sum"
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("sizes", "reduce"),
    [  # each size with one way to reduce by default, and in slow runs with the other
        pytest.param(sizes, reduce, marks=[pytest.mark.slow] * (number % 2 != turn))
        for number, sizes in enumerate([(3, 2, 3, 7), (1, 1, 1, 1), (8, 3, 1, 113), (2, 2, 4, 129)])
        for turn, reduce in enumerate(("max", "sum"))
    ],
    ids=str,
)
def test_scores_are_those_of_counted_bits(rng, sizes, reduce):
    for dtype in (np.uint32, np.int32):
        codes, queries, live = make(rng, *sizes, dtype)
        stacked = jax.jit(functools.partial(hamming_scores, reduce=reduce, layer=jnp.int32(1)))
        assert_scores(stacked, codes, queries, live, reduce)
        assert_scores(lambda codes, *rest: hamming_scores(codes[1], *rest, reduce=reduce), codes, queries, live, reduce)
    nearest = hamming_scores(codes, queries, live, reduce=reduce, layer=jnp.int32(7))
    np.testing.assert_array_equal(nearest, stacked(codes, queries, live))


def test_scores_by_hand():
    # 0b1100 and 0b1010 differ in 2 bits, 0b1100 and 0b1111 in 2; 0b0111 and these in 3 and 1.
    codes = jnp.array([[[[0b1100, 0b0111, 99]]]], jnp.int32)
    queries = jnp.array([[[0b1010], [0b1111]]], jnp.int32)
    run = functools.partial(hamming_scores, codes, queries, jnp.array([2]))
    np.testing.assert_array_equal(run(), [[[-2, -1, -np.inf]]])
    np.testing.assert_array_equal(run(reduce="sum"), [[[-4, -4, -np.inf]]])


@pytest.mark.parametrize(
    ("sizes", "cores"),
    [((3, 2, 3, 1100), 2), ((1, 3, 1, 7), 1), pytest.param((2, 9, 2, 512), 1, marks=pytest.mark.slow)],
    ids=str,
)
def test_the_tpu_kernel_interpreted(rng, sizes, cores):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    params = pltpu.InterpretParams(
        num_cores_or_threads=cores, detect_races=True, vector_clock_size=128, uninitialized_memory="nan"
    )
    for reduce in ("max", "sum"):
        run = jax.jit(functools.partial(mosaic_tpu.hamming_scores, reduce=reduce, tile=512, interpret=params))
        assert_scores(lambda *arrays, run=run: run(*arrays, jnp.int32(1)), *make(rng, *sizes), reduce)
        assert not interpret_pallas_call.races.races_found


SIZES = (
    (4, 8, 4, 32768, jnp.uint32),
    (8, 2, 8, 20001, jnp.int32),
    (1, 8, 1, 65536, jnp.uint32),
    (2, 1, 5, 131072, jnp.uint32),
    (3, 32, 1, 10001, jnp.uint32),
)


@pytest.mark.parametrize(("sizes", "tpu"), in_turn(SIZES))
def test_the_tpu_kernel_compiles_and_copies_no_codes(sizes, tpu):
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=tpu).devices
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices[:1], ("x",)), jax.sharding.PartitionSpec())
    words, heads, group, slots, dtype = sizes
    shapes = [((4, 16, words, heads, slots), dtype), ((16, heads * group, words), dtype)]
    shapes += [((16,), jnp.int32), ((), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    run = jax.jit(functools.partial(mosaic_tpu.hamming_scores, reduce="max"), out_shardings=sharding)
    used = run.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert used < 4 * np.prod(shapes[0][0]) / 10


FACTS = {"platform": "gpu", "words": 4, "group": 4, "num_kv": 8, "num_slots": 4096}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("mosaic_tpu", {"platform": "tpu"}, None),
        ("mosaic_tpu", {}, "needs a TPU, got platform 'gpu'"),
        ("mosaic_tpu", {"platform": "tpu", "group": 129}, "512 words .* got 129 queries of 4 words"),
        ("mosaic_tpu", {"platform": "tpu", "num_kv": 129}, "128 key/value heads, got 129"),
    ],
    ids=str,
)
def test_a_kernel_says_why_it_cannot_serve(name, change, reason):
    found = dict(dispatch.explain(HAMMING_SCORES, **FACTS | change))[name]
    assert found is None if reason is None else re.search(reason, found), found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduce": "vote"}, "'max' or 'sum', got 'vote'"),
        ({"layer": None}, "scalar layer for codes"),
        ({"layer": jnp.zeros(1, jnp.int32)}, "scalar layer for codes"),
        ({"codes": jnp.zeros((2, 5, 3, 2, 9))}, "uint32 or all of int32"),
        ({"queries_BNW": jnp.zeros((5, 4, 3), jnp.int32)}, "uint32 or all of int32"),
        ({"queries_BNW": jnp.zeros((5, 12), jnp.uint32)}, r"queries \[B, N, W\]"),
        ({"queries_BNW": jnp.zeros((5, 4, 2), jnp.uint32)}, "B=5 and W=3"),
        ({"queries_BNW": jnp.zeros((5, 5, 3), jnp.uint32)}, "multiple of K=2"),
        ({"codes": jnp.zeros((2, 5, 9, 2, 9), jnp.uint32)}, "1 to 8 words"),
        ({"codes": jnp.zeros((2, 5, 3, 2, 0), jnp.uint32)}, "no axis of 0"),
        ({"num_slots_B": jnp.zeros(4, jnp.int32)}, r"num_slots \[B\] = \(5,\)"),
        ({"num_slots_B": jnp.zeros(5)}, "of whole numbers, got"),
    ],
    ids=str,
)
def test_bad_input_is_refused(rng, change, message):
    codes, queries, live = make(rng, 3, 2, 2, 9)
    given = {"codes": codes, "queries_BNW": queries, "num_slots_B": live, "layer": jnp.int32(0)}
    with pytest.raises(ValueError, match=message):
        hamming_scores(**given | change)
