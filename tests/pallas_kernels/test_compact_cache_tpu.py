"""The TPU kernel that keeps the best slots of a cache: interpreted with a detector of races, compiled, and refused."""

import functools
import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compact_cache, dispatch
from pallas_kernels.compact_cache import COMPACT_CACHE, mosaic_tpu
from tests.pallas_kernels.tpus import TPUS

L, B, LAYER = 2, 2, 1
# By default all DMAs of a core count on one clock, by which those under way at once look as if one followed the other.
DETECT = {"detect_races": True, "vector_clock_size": 128, "uninitialized_memory": "nan"}


def choose_slots(rng, slots, heads, kept):
    """Slots to keep; those of one head are its first ones, which stay, and of another the last ones."""
    chosen = np.array([[np.sort(rng.permutation(slots)[:kept]) for _ in range(heads)] for _ in range(B)], np.int32)
    chosen[0, 0], chosen[1, -1] = np.arange(kept), np.arange(slots - kept, slots)
    return chosen


def make(rng, chosen, slots, dim, dtype):
    """A stacked cache that is NaN but for the chosen slots of a layer."""
    arrays = []
    for _ in "kv":
        array = np.full((L, B, slots, chosen.shape[1], dim), np.nan)
        for b, head in np.ndindex(chosen.shape[:2]):
            inside = np.unique(np.clip(chosen[b, head], 0, slots - 1))
            array[LAYER, b, inside, head] = rng.normal(size=(len(inside), dim))
        arrays.append(jnp.asarray(array, dtype))
    return arrays


def by_loops(array, chosen):
    """The same by loops."""
    old = np.asarray(array)
    new = old.copy()
    for b, head, m in np.ndindex(chosen.shape):
        new[LAYER, b, m, head] = old[LAYER, b, min(max(chosen[b, head, m], 0), old.shape[2] - 1), head]
    return new


def interpreted(capfd, arrays, chosen, *, unit, cores=1, dma="on_wait"):
    """Run the kernel without a TPU, and say whether anything raced."""
    params = pltpu.InterpretParams(num_cores_or_threads=cores, dma_execution_mode=dma, **DETECT)
    run = jax.jit(functools.partial(mosaic_tpu.compact_cache, unit=unit, interpret=params))
    found = jax.block_until_ready(run(*arrays, jnp.asarray(chosen), jnp.int32(LAYER)))
    return found, "RACE DETECTED" in capfd.readouterr().out


SIZES = (  # slots, key/value heads, head_dim, kept, dtype, unit, cores
    (24, 2, 64, 19, "bfloat16", 4, 2),
    (40, 1, 128, 35, "bfloat16", 4, 1),
    (40, 3, 64, 16, "float32", 8, 1),
    (40, 2, 128, 40, "float32", 8, 2),
    (48, 1, 256, 48, "float32", 8, 1),
    (48, 1, 256, 48, "bfloat16", 8, 2),
    (48, 3, 128, 41, "bfloat16", 8, 2),
    (40, 8, 64, 25, "bfloat16", 8, 2),
    (40, 8, 128, 33, "float32", 8, 1),
    (40, 2, 256, 1, "bfloat16", 64, 1),
    (40, 1, 64, 1, "bfloat16", 64, 1),
    (40, 3, 256, 1, "float32", 64, 1),
    (160, 2, 128, 131, "bfloat16", 32, 1),
    (280, 1, 64, 279, "bfloat16", 64, 1),
)


@pytest.mark.parametrize("sizes", [pytest.param(s, marks=[pytest.mark.slow] * (i > 1)) for i, s in enumerate(SIZES)])
def test_slots_are_those_of_loops(rng, capfd, sizes):
    slots, heads, dim, kept, dtype, unit, cores = sizes
    chosen = choose_slots(rng, slots, heads, kept)
    arrays = make(rng, chosen, slots, dim, dtype)
    got, raced = interpreted(capfd, arrays, chosen, unit=unit, cores=cores)
    assert not raced
    for old, new in zip(arrays, got, strict=True):
        np.testing.assert_array_equal(np.asarray(new, np.float32), by_loops(old, chosen).astype(np.float32))
        assert new.dtype == old.dtype and np.isfinite(np.asarray(new, np.float32)[LAYER, :, :kept]).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_slots_outside_of_the_cache_are_the_nearest_inside(rng, capfd, heads, dtype):
    chosen = choose_slots(rng, 40, heads, 19)
    chosen[:, :, -2:] = 40, 2**30
    chosen[1, :, 0] = -7
    arrays = make(rng, chosen, 40, 128, dtype)
    got, raced = interpreted(capfd, arrays, chosen, unit=8, dma="eager")
    assert not raced
    for old, new in zip(arrays, got, strict=True):
        np.testing.assert_array_equal(np.asarray(new, np.float32), by_loops(old, chosen).astype(np.float32))


@pytest.mark.parametrize("heads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_detector_sees_slots_that_move_back(rng, capfd, heads):
    chosen = np.broadcast_to(np.arange(24, dtype=np.int32)[::-1], (B, heads, 24))
    assert interpreted(capfd, make(rng, chosen, 24, 64, jnp.float32), chosen, unit=8)[1]


def compile_for(monkeypatch, tpu, function, sizes):
    """Compile for a described TPU: a function of a stacked cache, slots and a layer."""
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    monkeypatch.setattr(importlib.import_module("pallas_kernels.compact_cache"), "platform", lambda: "tpu")
    layers, batch, slots, heads, dim, kept, dtype = sizes
    cache, chosen = ((layers, batch, slots, heads, dim), dtype), ((batch, heads, kept), jnp.int32)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=tpu).devices
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices[:1], ("x",)), jax.sharding.PartitionSpec())
    shapes = [cache, cache, chosen, ((), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    return jax.jit(function, out_shardings=sharding, donate_argnums=(0, 1)).lower(*arguments).compile()


def made(compiled, size):
    """The operations of a program whose result has ``size`` numbers, or more."""
    found = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:\S+\) )?([\w-]+)\(", compiled.as_text())
    return {name for shape, name in found if math.prod(int(n) for n in shape.split(",") if n) >= size}


COMPILED = (  # layers, batch, slots, key/value heads, head_dim, kept, dtype
    (4, 4, 4096, 8, 128, 1000, "bfloat16"),
    (2, 4, 4096, 1, 128, 1001, "bfloat16"),
    (2, 2, 4096, 3, 256, 65, "bfloat16"),
    (2, 4, 4096, 2, 128, 37, "bfloat16"),
    (2, 2, 4096, 4, 256, 4096, "bfloat16"),
    (2, 2, 4099, 24, 128, 130, "bfloat16"),
    (2, 2, 4104, 6, 128, 67, "bfloat16"),
    (1, 2, 65536, 8, 128, 32768, "bfloat16"),
    (1, 2, 65536, 1, 128, 65536, "bfloat16"),
    (2, 2, 4096, 12, 1024, 100, "bfloat16"),
    (4, 4, 4096, 8, 128, 1024, "float32"),
    (2, 4, 4096, 1, 128, 1000, "float32"),
    (2, 4, 4096, 3, 512, 1001, "float32"),
    (2, 2, 4096, 16, 1024, 1, "float32"),
    (1, 2, 65536, 8, 128, 65536, "float32"),
)
TARGETS = [(tpu, sizes) for sizes in COMPILED for tpu in TPUS]


@pytest.mark.parametrize(
    ("tpu", "sizes"), [pytest.param(*case, marks=[pytest.mark.slow] * (i > 0)) for i, case in enumerate(TARGETS)]
)
def test_it_compiles_in_place(monkeypatch, tpu, sizes):
    run = functools.partial(compact_cache, implementation="mosaic_tpu")
    compiled = compile_for(monkeypatch, tpu, lambda k, v, slots, layer: run(k, v, slots, layer=layer), sizes)
    used, cache = compiled.memory_analysis(), math.prod(sizes[:5])
    assert compiled.as_text().count("tpu_custom_call") == 1
    assert used.alias_size_in_bytes >= 2 * cache * jnp.dtype(sizes[-1]).itemsize
    assert used.temp_size_in_bytes < 2**23 and used.alias_size_in_bytes > 0.999 * used.output_size_in_bytes
    assert made(compiled, cache) <= {"parameter", "bitcast", "custom-call", "get-tuple-element", "tuple"}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", COMPILED[:4], ids=str)
def test_a_loop_over_layers_copies_nothing(monkeypatch, sizes):
    def loop(k, v, slots, layers):
        step = lambda layer, cache: compact_cache(*cache, slots, layer=layer, implementation="mosaic_tpu")  # noqa: E731
        return jax.lax.fori_loop(0, layers, step, (k, v))

    compiled = compile_for(monkeypatch, "v6e:2x2", loop, sizes)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
    assert not made(compiled, math.prod(sizes[:5])) & {"copy", "copy-start", "transpose", "fusion"}


FACTS = {"platform": "tpu", "capability": None, "dtype": jnp.bfloat16, "value_dtype": jnp.bfloat16, "head_dim": 128}
FACTS |= {"num_kv": 8, "num_slots": 4096, "kept": 1000}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"num_kv": 1, "kept": 1}, None),
        ({"num_kv": 3, "dtype": jnp.float32, "value_dtype": jnp.float32}, None),
        ({"num_kv": 1, "num_slots": 65536, "kept": 65536}, None),
        ({"platform": "cpu"}, "needs a TPU, got platform 'cpu'"),
        ({"dtype": jnp.float16, "value_dtype": jnp.float16}, "bfloat16 or float32 everywhere, got float16 keys"),
        ({"value_dtype": jnp.float32}, "bfloat16 keys and float32 values"),
        ({"head_dim": 64}, "multiple of 128 up to 1024, got 64"),
        ({"head_dim": 1152}, "multiple of 128 up to 1024, got 1152"),
        ({"num_kv": 1, "num_slots": 4100}, "multiple of 8 slots .* got 4100 slots of 1 heads"),
        ({"num_slots": 65536, "kept": 32769}, "up to 32768 slots of 8 heads, got 32769"),
        ({"num_slots": 2**17, "kept": 65537, "num_kv": 1}, "up to 65536 slots of 1 heads, got 65537"),
    ],
    ids=str,
)
def test_reasons_to_refuse(change, reason):
    found = dict(dispatch.explain(COMPACT_CACHE, **FACTS | change))["mosaic_tpu"]
    assert found is None if reason is None else re.search(reason, found), found
    chosen = dispatch.choose("compact_cache", COMPACT_CACHE, None, **FACTS | change)
    assert chosen.name == ("mosaic_tpu" if reason is None else "xla")
    if reason is not None:
        with pytest.raises(NotImplementedError, match=reason):
            dispatch.choose("compact_cache", COMPACT_CACHE, "mosaic_tpu", **FACTS | change)
