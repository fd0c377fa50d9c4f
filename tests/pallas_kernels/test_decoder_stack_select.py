"""Page selection in the decoder stack: the loop against float64 NumPy, on one device and on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dyninf.models import make_mesh
from pallas_kernels import Selection, decode_layers, summarize_pages
from pallas_kernels.partition import partitioned
from tests.pallas_kernels.test_decoder_stack import EPS, close, frequencies_of, oracle, slots_in_window

SMALL = {"dtype": "float32", "head_dim": 16, "d_model": 24, "d_ff": 40, "kv_heads": 2, "capacity": 137}
BOUNDS_16 = Selection(kind="bounds", page_size=16, pages=3)
MEAN_64 = Selection(kind="mean", page_size=64, pages=2)


def summary_of(keys, kind):
    """Return the summary of the keys ``[S, K, H]`` of a page ``[K, X]``."""
    return keys.mean(0) if kind == "mean" else np.concatenate([keys.max(0), keys.min(0)], axis=-1)


def slots_to_read(select, layer, keys, q, position):
    """Return the slots that each key/value head reads, from keys ``[S, K, H]`` and queries ``[K, G, H]``."""
    if layer < select.dense_layers:
        return slots_in_window(None, layer, keys, q, position)
    size = select.page_size
    whole = position // size
    scores = np.zeros((whole, q.shape[0]))
    for page in range(whole):
        summary = summary_of(keys[page * size : (page + 1) * size], select.kind)[:, None]
        if select.kind == "mean":
            products = q * summary
        else:
            high, low = np.split(summary, 2, axis=-1)
            products = np.maximum(q * high, q * low)
        scores[page] = products.sum(-1).max(-1)
    read = []
    for head in range(q.shape[0]):
        forced = set(range(min(select.sinks, whole + 1))) | set(range(max(0, whole + 1 - select.recent), whole + 1))
        others = sorted(set(range(whole)) - forced, key=lambda page, head=head: (-scores[page, head], page))
        pages = sorted(forced | set(others[: select.pages - len(forced)]))
        read.append([slot for page in pages for slot in range(page * size, (page + 1) * size) if slot <= position])
    return read


def summarize_older(k, positions, select, extra=2):
    """Return summaries of the pages before those of new tokens, NaN for all others, ``extra`` ones among them."""
    summarize = functools.partial(summarize_pages, page_size=select.page_size, kind=select.kind)
    made = np.array(jax.vmap(summarize, in_axes=(0, None))(k, positions))
    made = np.pad(made, ((0, 0), (0, 0), (0, extra), (0, 0), (0, 0)))
    whole = np.arange(made.shape[2])[None] < np.array(positions)[:, None] // select.page_size
    return jnp.asarray(np.where(whole[None, :, :, None, None], made, np.nan), k.dtype)


def options_of(case, order, planned, live=None, **options):
    """Return the keyword arguments of a step but for the selection."""
    live = [True] * len(planned) if live is None else live
    return {
        "order_M": jnp.array(order, jnp.int32),
        "planned_B": jnp.array(planned, jnp.int32),
        "live_B": jnp.array(live),
        "frequencies": jnp.asarray(frequencies_of(case), jnp.float32),
        "eps": EPS,
        **options,
    }


BORDERS_16, BORDERS_64 = (96, 95, 136, 70), (256, 255, 300)
EVERY = (0, 1, 2)
CASES = {
    "bounds_of_16": ({"positions": BORDERS_16}, BOUNDS_16, EVERY, (3,) * 4, {}),
    "means_of_16": ({"positions": BORDERS_16}, dataclasses.replace(BOUNDS_16, kind="mean"), EVERY, (3,) * 4, {}),
    "bounds_of_64": (
        {"positions": BORDERS_64, "capacity": 330, "bias": True, "qk_norm": True},
        dataclasses.replace(MEAN_64, kind="bounds"),
        EVERY,
        (3,) * 3,
        {},
    ),
    "means_of_64": ({"positions": BORDERS_64, "capacity": 330, "group": 3}, MEAN_64, EVERY, (3,) * 3, {}),
    "one_page": ({"positions": (96, 95)}, dataclasses.replace(BOUNDS_16, pages=1), EVERY, (3, 3), {}),
    "shorter_than_the_budget": ({"positions": (0, 7, 15, 16, 47)}, BOUNDS_16, EVERY, (3,) * 5, {}),
    "a_budget_of_the_whole_cache": ({}, dataclasses.replace(BOUNDS_16, pages=9), EVERY, (3, 3), {}),
    "more_pages_than_there_are": ({}, dataclasses.replace(BOUNDS_16, pages=99, sinks=50), EVERY, (3, 3), {}),
    "sinks_and_recent": (
        {"positions": (*BORDERS_16, 20)},
        dataclasses.replace(BOUNDS_16, pages=5, sinks=2, recent=2),
        EVERY,
        (3,) * 5,
        {},
    ),
    "forced_pages_alone": (
        {"positions": BORDERS_16},
        dataclasses.replace(BOUNDS_16, sinks=1, recent=2),
        EVERY,
        (3,) * 4,
        {},
    ),
    "a_dense_layer": (
        {"positions": BORDERS_16},
        dataclasses.replace(BOUNDS_16, dense_layers=1),
        (1, 0, 2),
        (3,) * 4,
        {},
    ),
    "dense_layers_alone": (
        {"positions": BORDERS_16},
        dataclasses.replace(BOUNDS_16, dense_layers=3),
        EVERY,
        (3,) * 4,
        {},
    ),
    "an_absent_sequence": (
        {"positions": (95, 111, 120)},
        BOUNDS_16,
        EVERY,
        (3,) * 3,
        {"live": (True, False, True)},
    ),
    "planned_depths_filled": (
        {"layers": 4, "positions": (95, 111, 130)},
        dataclasses.replace(BOUNDS_16, dense_layers=1),
        (0, 1, 2, 3),
        (1, 2, 2),
        {},
    ),
    "planned_depths_left": (
        {"layers": 4, "positions": (95, 111)},
        BOUNDS_16,
        (0, 1, 2, 3),
        (1, 2),
        {"fill": False},
    ),
    "a_layer_twice": ({"layers": 2, "positions": BORDERS_16}, BOUNDS_16, (1, 0, 1), (3,) * 4, {}),
    "a_rule": (
        {"layers": 4, "positions": (95, 130, 128, 3)},
        BOUNDS_16,
        (0, 1, 2, 3),
        (4,) * 4,
        {"threshold": 0.95},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_selection_agrees_with_numpy(rng, stack_case, name):
    changes, select, order, planned, options = CASES[name]
    case = stack_case(**SMALL | changes)
    x, weights, k, v, positions = case.make(rng)
    given = options_of(case, order, planned, **options)
    summary = summarize_older(k, positions, select)
    found = decode_layers(
        x, weights, k, v, positions, summary_LBPKX=summary, select=select, implementation="loop", **given
    )
    read = functools.partial(slots_to_read, select)
    wanted = oracle(x, weights, k, v, positions, order, planned, frequencies_of(case), read=read, **options)
    stored = set(order) if options.get("fill", True) else set(order[: max(wanted[-1])])
    close((found.x_BD, found.before_BD, found.k_LBSKH, found.v_LBSKH, found.ran_B), wanted, 1e-5)
    size, live = select.page_size, options.get("live", (True,) * len(planned))
    for layer in range(case.layers):
        for b, position in enumerate(case.positions):
            for page in range((position + (live[b] and layer in stored)) // size):
                expected = summary_of(wanted[2][layer, b, page * size : (page + 1) * size], select.kind)
                np.testing.assert_allclose(found.summary_LBPKX[layer, b, page], expected, atol=1e-5)


def test_what_is_selected_matters(rng, stack_case):
    """The tolerance of the comparison with NumPy would not hide that everything is read."""
    case = stack_case(**SMALL | {"positions": BORDERS_16})
    x, weights, k, v, positions = case.make(rng)
    step = functools.partial(decode_layers, x, weights, k, v, positions, **options_of(case, EVERY, (3,) * 4))
    selected = step(summary_LBPKX=summarize_older(k, positions, BOUNDS_16), select=BOUNDS_16, implementation="loop")
    everything = step(implementation="loop")
    assert np.all(np.max(np.abs(selected.x_BD - everything.x_BD), axis=1) > 1e-2)
    assert everything.summary_LBPKX is None


def test_a_full_cache_is_left_alone_and_its_last_page_is_read(rng, stack_case):
    case = stack_case(**SMALL | {"positions": (137, 200)})
    x, weights, k, v, positions = case.make(rng)
    summary = summarize_older(k, jnp.array([128, 128]), BOUNDS_16)
    arrays = {"summary_LBPKX": summary, "select": BOUNDS_16, "implementation": "loop"}
    found = decode_layers(x, weights, k, v, positions, **arrays, **options_of(case, EVERY, (3, 3)))
    for new, old in ((found.k_LBSKH, k), (found.v_LBSKH, v), (found.summary_LBPKX, summary)):
        assert np.array_equal(new, old, equal_nan=True)
    assert np.all(np.isfinite(found.x_BD))


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {"summary_LBPKX": None}, "got a selection alone; give both or neither"),
        ({}, {"select": None}, "got summaries alone; give both or neither"),
        ({}, {"window": 100}, "no window with a selection, got a window of 100"),
        ({"kind": "sum"}, {}, "expected kind 'mean' or 'bounds', got 'sum'"),
        ({"page_size": 0}, {}, "pages of at least 1 slot, got page_size=0"),
        ({"recent": 0}, {}, "recent of at least 1"),
        ({"sinks": -1}, {}, "sinks and dense_layers of at least 0"),
        ({"dense_layers": -1}, {}, "sinks and dense_layers of at least 0"),
        ({"sinks": 2, "recent": 2}, {}, r"at most 3 pages, got 2 \+ 2; raise pages"),
        ({"kind": "mean"}, {}, r"expected summaries \[L, B, P, K, X\] of shape \(3, 2, 9, 2, 16\).*\(3, 2, 9, 2, 32\)"),
        ({"page_size": 8}, {}, r"of shape \(3, 2, 18, 2, 32\) or of more pages"),
        ({}, {"summary_LBPKX": jnp.zeros((3, 9, 2, 32))}, r"expected summaries \[L, B, P, K, X\]"),
        ({}, {"summary_LBPKX": jnp.zeros((3, 2, 9, 2, 32), jnp.bfloat16)}, "dtype float32, got bfloat16; cast them"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value) or "same",
)
def test_what_does_not_fit_is_refused(rng, stack_case, changes, given, message):
    case = stack_case(**SMALL)
    x, weights, k, v, positions = case.make(rng)
    select = dataclasses.replace(BOUNDS_16, **changes)
    options = options_of(case, EVERY, (3, 3)) | {"summary_LBPKX": jnp.zeros((3, 2, 9, 2, 32)), "select": select}
    with pytest.raises(ValueError, match=message):
        decode_layers(x, weights, k, v, positions, **options | given)


def test_a_window_of_the_whole_cache_is_none(rng, stack_case):
    case = stack_case(**SMALL)
    x, weights, k, v, positions = case.make(rng)
    options = options_of(case, EVERY, (3, 3)) | {"implementation": "loop", "select": BOUNDS_16}
    step = functools.partial(decode_layers, x, weights, k, v, positions, **options)
    summary = summarize_older(k, positions, BOUNDS_16)
    wide, none = step(window=137, summary_LBPKX=summary), step(summary_LBPKX=summary)
    assert np.array_equal(wide.x_BD, none.x_BD)


@pytest.mark.parametrize("implementation", ["loop_per_device", "loop"])
@pytest.mark.parametrize("name", ["a_dense_layer", "planned_depths_filled", "a_rule"])
def test_a_mesh_gives_what_one_device_does(rng, stack_case, name, implementation):
    changes, select, order, planned, options = CASES[name]
    case = stack_case(**SMALL | changes)
    arrays = case.make(rng)
    summary = summarize_older(arrays[2], arrays[4], select)
    given = options_of(case, order, planned, **options) | {"select": select}

    @jax.jit
    def step(arrays, summary):
        with partitioned(make_mesh({"tensor": 2}, jax.devices()[:2]), heads=["tensor"]):
            return decode_layers(*arrays, summary_LBPKX=summary, implementation=implementation, **given)

    found = step(arrays, summary)
    one = decode_layers(*arrays, summary_LBPKX=summary, implementation="loop", **given)
    if implementation == "loop_per_device":
        assert found.summary_LBPKX.sharding.spec == PartitionSpec(None, None, None, "tensor")
    for mine, its in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-5)
    without = {name: value for name, value in given.items() if name != "select"}
    with partitioned(make_mesh({"tensor": 2}, jax.devices()[:2]), heads=["tensor"]):
        assert decode_layers(*arrays, implementation=implementation, **without).summary_LBPKX is None
