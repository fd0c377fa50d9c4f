"""The TPU kernels that score pages and read them: interpreted with a detector of races, compiled, and refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import KVIndex, decode_attention, dispatch, page_scores
from pallas_kernels.attention import DECODE
from pallas_kernels.attention import mosaic_tpu as attention_kernel
from pallas_kernels.page_scores import PAGE_SCORES
from pallas_kernels.page_scores import mosaic_tpu as scores_kernel
from tests.pallas_kernels.tpus import in_turn

INTERPRET = {"detect_races": True, "vector_clock_size": 128, "uninitialized_memory": "nan"}


def interpreted(function, *arguments, cores=1, **options):
    """Run a kernel without a TPU; nothing may race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    params = pltpu.InterpretParams(num_cores_or_threads=cores, **INTERPRET)
    result = jax.block_until_ready(jax.jit(functools.partial(function, interpret=params, **options))(*arguments))
    assert not interpret_pallas_call.races.races_found
    return jax.tree.map(lambda array: np.asarray(array, np.float32), result)


def read_case(rng, *, tokens, heads, kv, dim, slots, dtype, page=None, entries=None):
    """Two sequences and two layers of a cache; NaN in every slot that no query may read. Positions, an index."""
    batch, dtype = 2, jnp.dtype(dtype)
    q, k, v = (rng.normal(size=shape) for shape in ((batch, tokens, heads, dim), *[(2, batch, slots, kv, dim)] * 2))
    positions = np.stack([np.arange(slots - tokens, slots), np.arange(tokens) - 1 + slots // 3])
    read = np.broadcast_to(
        np.arange(slots)[None, :, None] <= positions.max(1)[:, None, None], (batch, slots, kv)
    ).copy()
    index = None
    if page is not None:
        numbers = -(-slots // page)
        pages = np.array([[np.sort(rng.permutation(numbers)[:entries]) for _ in range(kv)] for _ in range(batch)])
        pages[0, 0, -1] = numbers - 1  # cut off by the end of the cache where page does not divide slots
        counts = rng.integers(1, entries + 1, (batch, kv))
        counts[0, 0], counts[1, kv - 1] = entries, 0
        pages[1, kv - 1] = np.array([-1, numbers, 2**30])[np.arange(entries) % 3]  # padding
        if kv > 1:
            counts[1, 0], pages[1, 0, -1] = entries, numbers + 5  # beyond the cache: reads nothing
        for b, head in np.ndindex(batch, kv):
            read[b, :, head] &= np.isin(np.arange(slots) // page, pages[b, head, : counts[b, head]])
        index = KVIndex(counts=jnp.asarray(counts, jnp.int32), pages=jnp.asarray(pages, jnp.int32), page_size=page)
    for array in (k, v):
        array[0], array[1][~read] = np.nan, np.nan
    return *(jnp.asarray(array, dtype) for array in (q, k, v)), jnp.asarray(positions, jnp.int32), index


READS = {
    "pairs": ({"tokens": 1, "heads": 8, "kv": 2, "dim": 64, "slots": 264, "dtype": "bfloat16"}, None, 2),
    "pages": (
        {"tokens": 3, "heads": 6, "kv": 2, "dim": 128, "slots": 152, "dtype": "bfloat16", "page": 32, "entries": 5},
        50,
        1,
    ),
    "float32": (
        {"tokens": 1, "heads": 3, "kv": 3, "dim": 64, "slots": 160, "dtype": "float32", "page": 16, "entries": 9},
        None,
        1,
    ),
    "one_head": (
        {"tokens": 1, "heads": 3, "kv": 1, "dim": 64, "slots": 208, "dtype": "bfloat16", "page": 128, "entries": 2},
        90,
        1,
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "float32")) for n in READS])
def test_attention_interpreted(rng, name):
    sizes, window, cores = READS[name]
    q, k, v, positions, index = read_case(rng, **sizes)
    about = {"layer": jnp.int32(1), "window": window, "index": index}
    got = interpreted(attention_kernel.decode_attention, q, k, v, positions, cores=cores, unit=128, **about)
    plain = jax.jit(functools.partial(decode_attention, implementation="xla", **about))
    want = np.asarray(plain(*(array.astype(jnp.float32) for array in (q, k, v)), positions))
    same = np.asarray(plain(q, k, v, positions), np.float32)  # the same maths in the dtype of the inputs
    error = lambda found: np.linalg.norm(found - want) / np.linalg.norm(want)  # noqa: E731
    assert np.isfinite(got).all() and error(got) <= 2 * error(same) + 1e-5
    assert index is None or name == "one_head" or not got[1, :, -1].any()  # a head that reads no pages


def test_attention_by_hand():
    # Queries of zero weigh alike what they read; values are slot numbers, NaN where nothing may be read.
    # Head 0 reads pages 0 and 2 of 8 slots, up to slot 20: (0 + ... + 7 + 16 + ... + 20) / 13 = (28 + 90) / 13.
    # Head 1 reads page 1: (8 + ... + 15) / 8 = 11.5. The second token, at position 3, reads 0 to 3 with head 0: 1.5.
    slots = np.arange(24.0)
    values = np.full((1, 24, 2, 64), np.nan, np.float32)
    for head, read in enumerate(((slots < 8) | ((slots >= 16) & (slots <= 20)), (slots >= 8) & (slots < 16))):
        values[0, read, head] = slots[read][:, None]
    index = KVIndex(counts=jnp.array([[2, 1]]), pages=jnp.array([[[0, 2], [1, 7]]]), page_size=8)
    arguments = jnp.zeros((1, 2, 2, 64)), jnp.asarray(values), jnp.asarray(values), jnp.array([[20, 3]])
    got = interpreted(attention_kernel.decode_attention, *arguments, index=index)
    want = np.array([[118 / 13, 11.5], [1.5, 0.0]])[None, :, :, None]
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=1e-6)


@pytest.mark.parametrize(
    ("reduce", "kind", "tokens", "heads", "kv", "pages", "dtype"),
    [
        ("max", "bounds", 1, 8, 2, 300, "bfloat16"),
        ("sum", "mean", 3, 3, 3, 41, "float32"),
        ("max", "mean", 2, 3, 1, 136, "bfloat16"),
    ],
    ids=["pairs", "float32", "one_head"],
)
def test_scores_interpreted(rng, reduce, kind, tokens, heads, kv, pages, dtype):
    summary = rng.normal(size=(2, 3, pages, kv, 128 if kind == "bounds" else 64))
    used = np.array([pages, 5, 0])
    for row, count in enumerate(used):
        summary[:, row, count:] = np.nan
    summary[0] = np.nan
    q, summary = (jnp.asarray(x, dtype) for x in (rng.normal(size=(3, tokens, heads, 64)), summary))
    about = {"reduce": reduce, "scale": 0.3}
    got = interpreted(scores_kernel.page_scores, q, summary, jnp.asarray(used), jnp.int32(1), tile=128, **about)
    q, summary = q.astype(jnp.float32), summary.astype(jnp.float32)
    plain = jax.jit(functools.partial(page_scores, layer=jnp.int32(1), implementation="xla", **about))
    want = plain(q, summary, jnp.asarray(used))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def compile_for(tpu, function, *shapes, donated=()):
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=tpu).devices
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices[:1], ("x",)), jax.sharding.PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    compiled = jax.jit(function, out_shardings=sharding, donate_argnums=donated).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def read_shapes(batch, tokens, heads, kv, dim, slots, dtype, page, entries):
    cache = ((4, batch, slots, kv, dim), dtype)
    shapes = [((batch, tokens, heads, dim), dtype), cache, cache, ((batch, tokens), jnp.int32), ((), jnp.int32)]
    return shapes + ([] if page is None else [((batch, kv), jnp.int32), ((batch, kv, entries), jnp.int32)])


def attend(q, k, v, positions, layer, *pages, page, window=None):
    index = KVIndex(counts=pages[0], pages=pages[1], page_size=page) if pages else None
    return attention_kernel.decode_attention(q, k, v, positions, layer=layer, index=index, window=window)


COMPILED = (
    ((16, 1, 32, 8, 128, 8192, jnp.bfloat16, None, None), None),
    ((16, 1, 32, 8, 128, 8192, jnp.bfloat16, 16, 128), None),
    ((16, 3, 8, 2, 128, 32784, jnp.bfloat16, 128, 16), 4096),
    ((4, 8, 16, 4, 256, 8200, jnp.bfloat16, 8, 512), None),
    ((64, 1, 3, 1, 128, 8208, jnp.bfloat16, 32, 64), None),
    ((8, 1, 8, 2, 128, 8192, jnp.float32, 64, 20), None),
)


@pytest.mark.parametrize(("case", "tpu"), in_turn(COMPILED))
def test_attention_compiles_and_gathers_nothing(case, tpu):
    sizes, window = case
    shapes = read_shapes(*sizes)
    cache = 2 * np.prod(shapes[1][0]) * shapes[1][1].dtype.itemsize
    assert compile_for(tpu, functools.partial(attend, page=sizes[-2], window=window), *shapes) < cache / 100


@pytest.mark.parametrize(("heads", "dim", "page"), [(8, 64, 16), (8, 128, None)], ids=str)
def test_a_loop_that_appends_copies_the_cache_no_more_for_the_kernel(heads, dim, page):
    def loop(q, k, v, positions, layer, *pages, attends):
        rows = jnp.arange(q.shape[0])[:, None]

        def body(at, carry):
            x, k, v = carry
            k, v = (array.at[at, rows, positions].set(x[:, :, :heads]) for array in (k, v))
            return attend(x, k, v, positions, at, *pages, page=page) if attends else x + k[at, 0, 0, 0, 0], k, v

        return jax.lax.fori_loop(0, layer, body, (q, k, v))

    shapes = read_shapes(16, 1, 4 * heads, heads, dim, 8192, jnp.bfloat16, page, 64)
    without, kernel = (
        compile_for("v6e:2x2", functools.partial(loop, attends=attends), *shapes, donated=(1, 2)) for attends in (0, 1)
    )
    assert kernel <= without + 2**24


SCORED = (
    (1, 32, 8, 128, 256, 4096, jnp.bfloat16),
    (3, 8, 2, 64, 128, 20001, jnp.bfloat16),
    (1, 3, 1, 128, 256, 16384, jnp.bfloat16),
    (1, 8, 4, 256, 512, 4001, jnp.float32),
)


@pytest.mark.parametrize(("sizes", "tpu"), in_turn(SCORED))
def test_scores_compile_and_copy_nothing(sizes, tpu):
    tokens, heads, kv, dim, width, pages, dtype = sizes
    shapes = [((8, tokens, heads, dim), dtype), ((8, 8, pages, kv, width), dtype), ((8,), jnp.int32)]
    run = functools.partial(scores_kernel.page_scores, reduce="max", scale=0.5)
    summaries = 64 * pages * kv * width * jnp.dtype(dtype).itemsize
    assert compile_for(tpu, run, *shapes, ((), jnp.int32)) < summaries / 40


FACTS = {"platform": "tpu", "capability": None, "dtype": jnp.bfloat16, "head_dim": 128, "num_queries": 1, "num_kv": 8}
ATTENTION = FACTS | {"kv_dtype": jnp.bfloat16, "masked": False, "num_heads": 32, "num_keys": 4096, "window": None}
ATTENTION |= {"page_size": 16, "num_entries": 64}
SCORES = FACTS | {"summary_dtype": jnp.bfloat16, "group": 4, "width": 256, "num_pages": 512, "reduce": "max"}


@pytest.mark.parametrize(
    ("operation", "change", "reason"),
    [
        ("attention", {}, None),
        ("attention", {"dtype": jnp.float32, "kv_dtype": jnp.float32, "num_kv": 1, "page_size": 8}, None),
        ("attention", {"platform": "cpu"}, "needs a TPU, got platform 'cpu'"),
        ("attention", {"dtype": jnp.float16}, "float16 queries and bfloat16 keys"),
        ("attention", {"head_dim": 96}, "head_dim 64, 128, 256, got 96"),
        ("attention", {"masked": True}, "not a mask"),
        ("attention", {"page_size": 24}, "pages of 8, 16, 32, 64, 128 slots, got 24"),
        ("attention", {"num_kv": 1, "page_size": 8}, "at least 16 slots for a single key/value head"),
        ("attention", {"num_kv": 3, "num_heads": 3}, "even number of key/value heads in bfloat16, or one, .* got 3"),
        ("attention", {"num_keys": 4097}, "multiple of 8 slots, got 4097"),
        ("attention", {"num_queries": 33}, "128 rows .* got 132"),
        ("attention", {"num_entries": 8193}, "65536 pages of a sequence, got 8193 for each of 8"),
        ("attention", {"num_kv": 64, "num_heads": 512, "num_queries": 16, "head_dim": 256}, "bytes of queries"),
        ("scores", {}, None),
        ("scores", {"platform": "gpu"}, "needs a TPU, got platform 'gpu'"),
        ("scores", {"summary_dtype": jnp.float32}, "float32 summaries"),
        ("scores", {"reduce": "vote"}, "max or sum"),
        ("scores", {"width": 192}, "multiple of 128, got 192"),
        ("scores", {"num_kv": 5}, "even number of key/value heads in bfloat16, or one, .* got 5"),
        ("scores", {"group": 129}, "128 rows .* got 129"),
        ("scores", {"num_kv": 128}, "got 8388608 for 128 pages of 128 heads of 256"),
    ],
    ids=str,
)
def test_reasons_to_refuse(operation, change, reason):
    implementations, facts = {"attention": (DECODE, ATTENTION), "scores": (PAGE_SCORES, SCORES)}[operation]
    facts = facts | {"num_keys": 4096} | change
    chosen = dispatch.choose(operation, implementations, None, **facts)
    assert chosen.name == ("mosaic_tpu" if reason is None else "xla")
    found = dict(dispatch.explain(implementations, **facts))["mosaic_tpu"]
    assert found is None if reason is None else re.search(reason, found), found
