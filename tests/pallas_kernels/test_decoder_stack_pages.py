"""The decoder stack's kernel where layers choose pages, interpreted and on GPUs, against the loop in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.models import make_mesh
from pallas_kernels.decoder_stack import Selection, decode_layers
from pallas_kernels.dispatch import MOSAIC_GPU_JAX
from pallas_kernels.page_scores import summarize_pages
from pallas_kernels.partition import partitioned

EPS = 1e-5
needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < MOSAIC_GPU_JAX, reason="jax interprets Mosaic GPU kernels from 0.11.2 on"
)
SIZES = {"capacity": 328, "layers": 2, "positions": (300, 70)}


def summaries(k_LBSKH, positions_B, select):
    """Return summaries with room for eight pages at a time; those of pages that are not complete are NaN."""
    size, (_, _, slots, _, _) = select.page_size, k_LBSKH.shape
    made = jax.vmap(lambda k: summarize_pages(k, positions_B, page_size=size, kind=select.kind))(k_LBSKH)
    room = -(-slots // (8 * size)) * 8
    made = jnp.pad(made, ((0, 0), (0, 0), (0, room - made.shape[2]), (0, 0), (0, 0)), constant_values=np.nan)
    complete = jnp.arange(room)[None] < (positions_B // size)[:, None]
    return jnp.where(complete[None, :, :, None, None], made, jnp.nan)


def draw(case, select, rng):
    """Return a case and its summaries.

    With bounds, the keys of as many pages as are chosen are ten times those of the others, so that rounding decides
    nothing.
    """
    x, weights, k, v, positions = case.make(rng)
    if select.kind == "bounds":
        layers, batch, slots, heads, _ = k.shape
        pages = -(-slots // select.page_size)
        loud = np.zeros((layers, batch, pages, heads), bool)
        for layer, b, head in np.ndindex(layers, batch, heads):
            whole = int(positions[b]) // select.page_size
            free = np.arange(select.sinks, max(select.sinks, whole + 1 - select.recent))
            some = rng.permutation(free)[: select.pages - select.sinks - select.recent]
            loud[layer, b, some, head] = True
        loud = np.repeat(loud, select.page_size, axis=2)[:, :, :slots, :, None]
        k = (k * jnp.where(loud, 1.0, 0.1)).astype(k.dtype)
    return x, weights, k, v, positions, summaries(k, positions, select)


def both(case, select, rng, order, planned, run, **options):
    """Return what a kernel gives, what the loop gives in float32, and the positions."""
    x, weights, k, v, positions, summary = draw(case, select, rng)
    frequencies = 1.0 / 10000.0 ** (np.arange(0, case.head_dim, 2) / case.head_dim)
    options |= {
        "order_M": jnp.array(order, jnp.int32),
        "planned_B": jnp.array(planned, jnp.int32),
        "live_B": options.get("live_B", jnp.ones(len(planned), bool)),
        "frequencies": jnp.asarray(frequencies, jnp.float32),
        "eps": EPS,
        "select": select,
    }
    got = run(x, weights, k, v, positions, summary_LBPKX=summary, **options)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (x, weights, k, v, summary))
    *arrays, summary = wide
    want = decode_layers(*arrays, positions, summary_LBPKX=summary, implementation="loop", **options)
    return got, want, positions


def agree(got, want, positions, select, tolerance=0.02):
    x, before, k, v, summary, ran = got
    assert ran.tolist() == want.ran_B.tolist()
    size = select.page_size
    complete = np.arange(summary.shape[2])[None] < (np.array(positions) + 1)[:, None] // size
    pairs = {"x": (x, want.x_BD), "before": (before, want.before_BD), "k": (k, want.k_LBSKH), "v": (v, want.v_LBSKH)}
    pairs["summary"] = (summary[:, complete], want.summary_LBPKX[:, complete])
    for name, (array, expected) in pairs.items():
        array, expected = (np.asarray(a, np.float64) for a in (array, expected))
        assert np.array_equal(np.isnan(array), np.isnan(expected)), name
        assert np.nanmax(np.abs(array - expected)) <= tolerance * np.nanmax(np.abs(expected)), name


CASES = {
    "bounds": ({}, {"page_size": 64, "pages": 2}, (0, 1), (2, 2), {}),
    "means": ({}, {"kind": "mean", "page_size": 16, "pages": 6, "sinks": 1, "recent": 2}, (0, 1), (2, 2), {}),
    "a_page_ends": ({"positions": (255, 64)}, {"page_size": 64, "pages": 3}, (0, 1), (2, 2), {}),
    "large_pages": ({"positions": (256, 255)}, {"page_size": 128, "pages": 2}, (1, 0), (2, 2), {}),
    "a_full_cache": ({"positions": (328, 327)}, {"page_size": 32, "pages": 1, "sinks": 0}, (0, 1), (2, 2), {}),
    "filled": ({"positions": (287, 127)}, {"page_size": 32, "pages": 3}, (0, 1), (1, 0), {}),
    "a_dense_layer": ({"layers": 3}, {"page_size": 32, "pages": 3, "dense_layers": 1}, (0, 2), (2, 2), {}),
    "a_rule": ({"layers": 3}, {"page_size": 64, "pages": 2}, (0, 1, 2), (3, 3), {"threshold": 0.9}),
}
SLOW = ("bounds", "a_page_ends", "large_pages", "a_rule")  # to interpret


@needs_interpreter
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_kernel_agrees_with_the_loop(rng, stack_case, interpret, name):
    changes, chosen, order, planned, options = CASES[name]
    select = Selection(**{"kind": "bounds"} | chosen)

    def kernel(*arrays, **options):
        extra = {"threshold": None, "fill": True, "window": None} | options
        count = len(order)
        asked, length = jnp.ones(count, bool), jnp.int32(count)
        return interpret(*arrays, asked_M=asked, length=length, races=name == "filled", **extra)

    case = stack_case(**SIZES | changes)
    agree(*both(case, select, rng, order, planned, kernel, **options), select)


LONG = {
    "pages_of_64": {"page_size": 64, "pages": 8, "sinks": 1, "recent": 1},
    "pages_of_16": {"page_size": 16, "pages": 32, "dense_layers": 1},
    "pages_of_32": {"page_size": 32, "pages": 20, "sinks": 2, "recent": 3},
    "pages_of_128": {"page_size": 128, "pages": 3},
    "forced_pages": {"page_size": 64, "pages": 3, "sinks": 2, "recent": 1},
    "more_than_there_are": {"page_size": 128, "pages": 40},
}


def run_on_gpus(*arrays, **options):
    """Run the kernel twice, which must give the same bits."""
    step = jax.jit(functools.partial(decode_layers, implementation="mosaic_gpu", **options))
    results = [dataclasses.astuple(step(*arrays)) for _ in range(2)]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.array_equal(np.array(one, np.float32), np.array(other, np.float32), equal_nan=True)
    return results[0]


def long_case(rng, batch, group=4, **changes):
    capacity = changes.get("capacity", 4096)
    ends = [capacity // 2, capacity - 1, 0, 63, capacity, *rng.integers(0, capacity, size=64).tolist()][:batch]
    sizes = {"d_model": 384, "d_ff": 768, "kv_heads": 4, "group": group, "layers": 3, "capacity": capacity}
    return sizes | {"positions": tuple(ends)} | changes


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "batch", "group", "capacity"),
    [
        ("forced_pages", 1, 4, 4096),
        ("pages_of_64", 1, 4, 4096),
        ("pages_of_64", 9, 4, 4056),  # a multiple neither of a page nor of what a transfer brings
        ("pages_of_16", 1, 4, 40960),  # more pages than a thread keeps the scores of
        ("pages_of_16", 64, 8, 1024),
        ("pages_of_32", 5, 9, 4096),
        ("pages_of_32", 33, 4, 1000),
        ("pages_of_128", 2, 1, 4096),
        ("pages_of_128", 8, 20, 4096),
        ("more_than_there_are", 9, 4, 4096),
    ],
)
def test_the_kernel_agrees_with_the_loop_on_a_gpu(rng, stack_case, name, batch, group, capacity):
    select = Selection(kind="bounds", **LONG[name])
    planned = [int(p) for p in rng.integers(1, 4, size=batch)]
    case = stack_case(**long_case(rng, batch, group, capacity=capacity))
    live = jnp.array([True] * (batch - 1) + [batch == 1])
    got, want, positions = both(case, select, rng, (2, 0, 1), planned, run_on_gpus, live_B=live)
    agree(got, want, jnp.where(live, positions, -1), select, 0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 9])
def test_a_rule_and_means_agree_with_the_loop_on_a_gpu(rng, stack_case, batch):
    """Few pages of means, so that no two are worth nearly the same."""
    select = Selection(kind="mean", page_size=64, pages=3)
    case = stack_case(**long_case(rng, batch, capacity=512, positions=(320, 447, *[100] * 7)[:batch]))
    options = {"threshold": 0.9, "fill": True}
    agree(*both(case, select, rng, (0, 1, 2), [3] * batch, run_on_gpus, **options), select, 0.03)


@pytest.mark.gpu
def test_steps_read_the_summaries_that_steps_before_them_wrote(rng, stack_case):
    """Pages end within three steps, at whose end one cache is full; a layer runs twice in each."""
    select = Selection(kind="bounds", **LONG["pages_of_64"])
    case = stack_case(**long_case(rng, 3, capacity=4056, positions=(62, 2046, 4054)))
    x, weights, k, v, positions, summary = draw(case, select, rng)
    frequencies = 1.0 / 10000.0 ** (np.arange(0, case.head_dim, 2) / case.head_dim)
    options = {"order_M": jnp.array([0, 1, 1, 2]), "planned_B": jnp.full(3, 4), "live_B": jnp.ones(3, bool)}
    options |= {"frequencies": jnp.asarray(frequencies, jnp.float32), "eps": EPS, "select": select}

    def decode(implementation, dtype):
        state = jax.tree.map(lambda leaf: leaf.astype(dtype), (x, weights, k, v, summary))
        given, layers, *cache, pages = state
        for step in range(3):
            out = decode_layers(
                given, layers, *cache, positions + step, summary_LBPKX=pages, implementation=implementation, **options
            )
            cache, pages = [out.k_LBSKH, out.v_LBSKH], out.summary_LBPKX
        return out

    got, want = decode("mosaic_gpu", jnp.bfloat16), decode("loop", jnp.float32)
    agree(dataclasses.astuple(got), want, positions + 2, select, 0.04)


@pytest.mark.multigpu
@pytest.mark.parametrize(("name", "batch"), [("pages_of_64", 1), ("pages_of_16", 9)])
def test_devices_that_share_layers_choose_for_their_heads(rng, stack_case, name, batch):
    select = Selection(kind="bounds", **LONG[name])

    def run(*arrays, **options):
        with partitioned(make_mesh({"tensor": 2}, jax.devices()[:2]), heads=["tensor"]):
            return run_on_gpus(*arrays, **options)

    case = stack_case(**long_case(rng, batch))
    agree(*both(case, select, rng, (0, 1, 2), [3] * batch, run), select, 0.03)
