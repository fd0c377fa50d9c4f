"""Merging of what a cache evicts against loops in NumPy; the kernels interpreted, lowered, and on a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, merge_tokens, merge_victims
from pallas_kernels.merge_tokens import MERGE_VICTIMS, mosaic_gpu, reference

needs_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the GPU kernel needs jax 0.11.2")
MOMENTUM = 0.25


def make(rng, slots, heads, dim, dtype=jnp.float32):
    """Two layers of a cache, NaN in slots not in use; victims, who loses one, slots in use, thresholds.

    Sequences: full and new; in part, with a threshold in reach; full, with one out of reach; not evicting.
    """
    live = np.array([slots, slots // 2 + 2, slots, slots], np.int32)
    k, v = (rng.normal(size=(2, 4, slots, heads, dim)).astype(np.float32) for _ in "kv")
    k += 0.5
    for row, used in enumerate(live):
        k[:, row, used:], v[:, row, used:] = np.nan, np.nan
    k[0], v[0] = np.nan, np.nan
    victims = np.array([rng.integers(0, used, heads) for used in live], np.int32)
    victims[0, 0], victims[1, 0] = slots - 1, 0
    evicted, threshold = np.array([True, True, True, False]), np.array([-np.inf, 0.01, 1.0, 0.5], np.float32)
    rest = (jnp.asarray(array) for array in (victims, evicted, live, threshold))
    return *(jnp.asarray(array, dtype) for array in (k, v)), *rest


def unit(keys):
    return keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-20)


def follow(threshold, level):
    return level if np.isneginf(threshold) else MOMENTUM * threshold + (1 - MOMENTUM) * level


def numpy_victims(k, v, victims, evicted, live, threshold):
    """The second layer after the step, by loops, in float64; and thresholds."""
    k, v = (np.asarray(array[1], np.float64) for array in (k, v))
    new, threshold = (k.copy(), v.copy()), np.array(threshold, np.float64)
    for b in np.flatnonzero(evicted):
        best, like = [], []
        for head, victim in enumerate(np.asarray(victims)[b]):
            cosine = unit(k[b, : live[b], head]) @ unit(k[b, victim, head])
            cosine[victim] = -np.inf
            best.append(cosine.argmax())
            like.append(cosine.max())
        threshold[b] = follow(threshold[b], np.mean(like))
        if np.mean(like) >= threshold[b]:
            for head, victim in enumerate(np.asarray(victims)[b]):
                for array, old in zip(new, (k, v), strict=True):
                    array[b, best[head], head] = (old[b, best[head], head] + like[head] * old[b, victim, head]) / 2
    return *new, threshold


def assert_merges(run, arrays, rtol):
    k, v, threshold = jax.block_until_ready(run(*arrays))
    want = numpy_victims(*arrays)
    for got, other, old in zip((k, v), want, arrays, strict=False):
        np.testing.assert_array_equal(got[0].astype(jnp.float32), old[0].astype(jnp.float32))
        np.testing.assert_allclose(got[1].astype(jnp.float32), other, rtol=rtol, atol=rtol)
        changed = (other != np.asarray(old[1], np.float64)) & ~np.isnan(other)
        assert changed[:2].any((1, 3)).all() and not changed[2:].any()
    np.testing.assert_allclose(threshold, want[2], rtol=1e-4)


@pytest.mark.parametrize("sizes", [(7, 1, 4), (113, 3, 8), pytest.param((64, 2, 64), marks=pytest.mark.slow)], ids=str)
def test_victims_merge_as_loops_merge_them(rng, sizes):
    arrays = make(rng, *sizes)
    run = jax.jit(functools.partial(merge_victims, momentum=MOMENTUM, layer=jnp.int32(1)))
    assert_merges(run, arrays, 1e-5)
    alone = jax.jit(merge_victims)
    single = alone(*(array[1] for array in arrays[:2]), *arrays[2:], momentum=jnp.float32(MOMENTUM))
    for one, other in zip(single, run(*arrays), strict=True):
        np.testing.assert_allclose(one, other if one.ndim == 1 else other[1], rtol=1e-6)


def test_victims_outside_are_the_nearest_ones(rng):
    arrays = list(make(rng, 9, 2, 4))
    arrays[2] = jnp.array([[-3, 0], [0, 0], [8, 8], [99, 8]], jnp.int32)
    run = jax.jit(functools.partial(merge_victims, momentum=MOMENTUM, layer=jnp.int32(5)))
    far = run(*arrays)
    arrays[2] = jnp.clip(arrays[2], 0, 8)
    for one, other in zip(far, run(*arrays), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_step_by_hand():
    # (2, 0) meets (0, 3) and (1, 1): cosines 0 and 0.7071; the threshold 0.5 becomes (0.5 + 0.7071) / 2.
    k = jnp.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])[None, :, None]
    arguments = jnp.zeros((1, 1), jnp.int32), jnp.array([True]), jnp.array([3]), jnp.array([0.5])
    k_new, v_new, threshold = merge_victims(k, 10 * k, *arguments, momentum=0.5)
    np.testing.assert_allclose(k_new[0, :, 0], [[2, 0], [0, 3], [1.2071068, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(v_new[0, 2, 0], [12.071068, 5], rtol=1e-6)
    np.testing.assert_allclose(threshold, [0.6035534], rtol=1e-6)


@pytest.mark.parametrize(
    ("count", "chunk_bytes"),
    [
        (1, 2**26),
        (7, 0),
        (reference.LEAST_CHUNK + 1, 0),
        (reference.LEAST_CHUNK + 1, 2**26),
        pytest.param(1, 0, marks=pytest.mark.slow),
        pytest.param(7, 2**26, marks=pytest.mark.slow),
    ],
)
def test_a_prompt_merges_as_loops_merge_it(rng, monkeypatch, count, chunk_bytes):
    """Two sequences, of which one evicts fewer tokens and has slots that hold nothing."""
    monkeypatch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
    length, slots, heads, dim = count + 20, 11, 2, 8
    new = [rng.normal(size=(2, length, heads, dim)).astype(np.float32) for _ in "kv"]
    held = [rng.normal(size=(2, 2, slots, heads, dim)).astype(np.float32) for _ in "kv"]
    for array in (*new, *held):
        array += 0.3
    fewer, live = count // 2, np.array([slots, slots - 4], np.int32)
    for array in held:
        array[:, 1, live[1] :] = np.nan
    evicted = np.array([[np.sort(rng.permutation(length)[:count]) for _ in range(heads)] for _ in range(2)], np.int32)
    evicted[1, :, fewer:] = length + 3
    for array in new:
        array[1, -1] = np.nan  # where what does not exist is read from
        evicted[1, :, :fewer] = np.minimum(evicted[1, :, :fewer], length - 2)
    threshold = np.array([0.4, -np.inf], np.float32)
    arrays = [jnp.asarray(array) for array in (*held, *new, evicted, live, threshold)]
    got = jax.jit(functools.partial(merge_tokens, momentum=MOMENTUM, layer=jnp.int32(1)))(*arrays)
    for b, number in enumerate((count, fewer)):
        tokens = [(new[0][b, evicted[b, h, :number], h], new[1][b, evicted[b, h, :number], h]) for h in range(heads)]
        like = np.array([unit(keys) @ unit(held[0][1, b, : live[b], h]).T for h, (keys, _) in enumerate(tokens)])
        best, most = like.argmax(-1), like.max(-1)
        level = follow(threshold[b], most.mean()) if number else threshold[b]
        np.testing.assert_allclose(got[2][b], level, rtol=1e-5)
        for h, pair in enumerate(tokens):
            for part in range(2):
                total, taken = held[part][1, b, :, h].astype(np.float64), np.ones((slots, 1))
                for i in np.flatnonzero(most.mean(0) >= level):
                    total[best[h, i]] += most[h, i] * pair[part][i]
                    taken[best[h, i]] += 1
                np.testing.assert_allclose(got[part][1, b, :, h], total / taken, rtol=2e-5, atol=1e-5)
    for part in range(2):
        np.testing.assert_array_equal(got[part][0], held[part][0])
    alone = jax.jit(functools.partial(merge_tokens, momentum=MOMENTUM))
    single = alone(*(array[1] for array in arrays[:2]), *arrays[2:])
    np.testing.assert_allclose(single[0], got[0][1], rtol=1e-5, atol=1e-6)


def test_a_prompt_that_evicts_nothing_stays(rng):
    k, v, _, _, live, threshold = make(rng, 9, 2, 4)
    none = jnp.zeros((4, 2, 0), jnp.int32)
    got = jax.jit(functools.partial(merge_tokens, momentum=0.5))(k[1], v[1], k[1], v[1], none, live, threshold)
    for one, other in zip(got, (k[1], v[1], threshold), strict=True):
        np.testing.assert_array_equal(one, other)


LOWERED = (((512, 8, 128), jnp.bfloat16), ((64, 1, 64), jnp.float16))  # by default


def hopper(cores):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=cores)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@needs_mosaic_gpu
@pytest.mark.parametrize(
    ("sizes", "dtype", "cores"),
    [
        ((136, 2, 64), jnp.bfloat16, 1),
        pytest.param((72, 1, 128), jnp.float16, 1, marks=pytest.mark.slow),
        ((328, 1, 64), jnp.float16, 6),
    ],
    ids=str,
)
def test_the_kernels_interpreted(rng, sizes, dtype, cores):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    run = jax.jit(functools.partial(mosaic_gpu.merge_victims, momentum=MOMENTUM, cores=cores))
    with hopper(1), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        assert_merges(lambda *arrays: run(*arrays, jnp.int32(1)), make(rng, *sizes, dtype), 0.01)
    assert not gpu_callbacks.get_races().races_found


@needs_mosaic_gpu
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        pytest.param(sizes, dtype, marks=[pytest.mark.slow] * ((sizes, dtype) not in LOWERED))
        for sizes in ((512, 8, 128), (64, 1, 64), (4104, 2, 256))
        for dtype in (jnp.bfloat16, jnp.float16)
    ],
    ids=str,
)
def test_the_kernels_lower_for_cuda(sizes, dtype):
    shapes = jax.eval_shape(lambda: make(np.random.default_rng(0), *sizes, dtype))
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    run = jax.jit(functools.partial(mosaic_gpu.merge_victims, momentum=MOMENTUM, cores=132))
    with hopper(132):
        exported = jax.export.export(run, platforms=["cuda"], disabled_checks=unchecked)(
            *shapes, jax.ShapeDtypeStruct((), jnp.int32)
        )
    assert exported.mlir_module().count("@mosaic_gpu_v2") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(8, 1, 64), (136, 2, 128), (1000, 8, 128), (4104, 3, 256)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_the_kernels_on_a_gpu(rng, sizes, dtype):
    arrays = make(rng, *sizes, dtype)
    options = {"momentum": MOMENTUM, "layer": jnp.int32(1)}
    kernel = jax.jit(functools.partial(merge_victims, implementation="mosaic_gpu", **options))
    assert_merges(kernel, arrays, 0.01)
    donated = jax.jit(functools.partial(merge_victims, implementation="mosaic_gpu", **options), donate_argnums=(0, 1))
    want = jax.jit(functools.partial(merge_victims, implementation="xla", **options))(*arrays)
    for got in (kernel(*arrays), donated(*(array + 0 for array in arrays[:2]), *arrays[2:])):
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=0.01, atol=1e-3)


FACTS = {"platform": "gpu", "capability": "9.0", "dtype": jnp.bfloat16, "head_dim": 128, "num_slots": 512}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"platform": "tpu"}, "needs an NVIDIA GPU, got platform 'tpu'"),
        ({"capability": "10.0"}, "Hopper GPU .* got 10.0"),
        ({"dtype": jnp.float32}, "bfloat16 or float16, got float32"),
        ({"head_dim": 96}, "multiple of 64 up to 256, got 96"),
        ({"head_dim": 320}, "multiple of 64 up to 256, got 320"),
        ({"num_slots": 500}, "multiple of 8 slots, got 500"),
    ],
    ids=str,
)
def test_reasons_to_refuse(monkeypatch, change, reason):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    found = dict(dispatch.explain(MERGE_VICTIMS, **FACTS | change))["mosaic_gpu"]
    assert found is None if reason is None else re.search(reason, found), found


STEP = ("victims_BK", "evicted_B", "num_slots_B", "threshold_B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": None}, "scalar layer for a cache"),
        ({"v": jnp.zeros((2, 4, 9, 2, 5))}, "one shape and dtype"),
        ({"v": jnp.zeros((2, 4, 9, 2, 4), jnp.bfloat16)}, "one shape and dtype"),
        ({"victims_BK": jnp.zeros((4, 3), jnp.int32)}, r"victims \[B, K\] = \(4, 2\)"),
        ({"victims_BK": jnp.zeros((4, 2))}, "of int32 and evicted of bool, got .* of float32"),
        ({"evicted_B": jnp.zeros(4, jnp.int32)}, "evicted of bool, got .* evicted of int32"),
        ({"evicted_B": jnp.zeros(3, bool)}, "of B=4 sequences"),
        ({"num_slots_B": jnp.zeros(4)}, "whole numbers .* got float32"),
        ({"threshold_B": jnp.zeros(4, jnp.bfloat16)}, "threshold of float32, got int32 and bfloat16"),
    ],
    ids=str,
)
def test_a_bad_step_is_refused(rng, change, message):
    given = dict(zip(("k", "v", *STEP), make(rng, 9, 2, 4), strict=True))
    with pytest.raises(ValueError, match=message):
        merge_victims(**given | {"momentum": 0.5, "layer": jnp.int32(0)} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": jnp.int32(0)}, "scalar layer for a cache"),
        ({"k_BTKH": jnp.zeros((4, 6, 2, 5))}, r"tokens \[B, T, K, H\] = \(4, 6, 2, 4\)"),
        ({"v_BTKH": jnp.zeros((4, 7, 2, 4))}, r"tokens \[B, T, K, H\] = \(4, 6, 2, 4\)"),
        ({"evicted_BKE": jnp.zeros((4, 3, 1), jnp.int32)}, "B=4 and K=2"),
        ({"evicted_BKE": jnp.zeros((4, 2, 1))}, "of int32 .* got .* of float32"),
        ({"threshold_B": jnp.zeros(5)}, "of B=4 sequences"),
    ],
    ids=str,
)
def test_a_bad_prompt_is_refused(rng, change, message):
    k, v, _, _, live, threshold = make(rng, 9, 2, 4)
    given = {"k": k[1], "v": v[1], "k_BTKH": k[1, :, :6], "v_BTKH": v[1, :, :6], "num_slots_B": live}
    given |= {"evicted_BKE": jnp.zeros((4, 2, 3), jnp.int32), "threshold_B": threshold, "momentum": 0.5}
    with pytest.raises(ValueError, match=message):
        merge_tokens(**given | change)
