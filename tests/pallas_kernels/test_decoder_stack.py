"""The decoder stack against float64 NumPy: the loop on every lane, the Hopper kernel where jax can interpret it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decoder_stack import decode_layers, mosaic_gpu
from pallas_kernels.dispatch import MOSAIC_GPU_JAX

EPS = 1e-5
needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < MOSAIC_GPU_JAX, reason="jax interprets Mosaic GPU kernels from 0.11.2 on"
)


def rotate(x, position, frequencies):
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(position * frequencies), np.sin(position * frequencies)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def norm(x, weight):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * weight


def project(state, w, layer, heads, position, frequencies):
    """Return queries ``[K, G, H]``, key and value ``[K, H]`` of a state, where heads are ``(K, H)``."""
    qkv = norm(state, w["norm_attn"][layer]) @ w["wqkv"][layer]
    qkv = qkv if w["bqkv"] is None else qkv + w["bqkv"][layer]
    qkv = qkv.reshape(heads[0], -1, heads[1])
    q, key, value = qkv[:, :-2], qkv[:, -2], qkv[:, -1]
    if w["norm_q"] is not None:
        q, key = norm(q, w["norm_q"][layer]), norm(key, w["norm_k"][layer])
    return rotate(q, position, frequencies), rotate(key, position, frequencies), value


def slots_in_window(window, layer, keys, q, position):
    """Return the slots that each key/value head of queries ``[K, G, H]`` reads: all, or those of a window."""
    first = 0 if window is None else max(0, position - window + 1)
    return [list(range(first, min(position + 1, len(keys))))] * len(q)


def oracle(
    x,
    weights,
    k,
    v,
    positions,
    order,
    planned,
    frequencies,
    *,
    threshold=None,
    fill=True,
    window=None,
    live=None,
    read=None,
):
    """One sequence and key/value head at a time, in float64.

    ``read`` gives the slots that each head reads in a layer, of its keys ``[S, K, H]``, queries and the position.
    """
    read = read or functools.partial(slots_in_window, window)
    x, k, v = (np.array(a, np.float64) for a in (x, k, v))
    w = {f.name: getattr(weights, f.name) for f in dataclasses.fields(weights)}
    w = {name: None if leaf is None else np.array(leaf, np.float64) for name, leaf in w.items()}
    ran, entered, held = [], np.zeros((len(order), *x.shape)), (k.copy(), v.copy())
    for b, position in enumerate(np.array(positions)):
        state, before, stopped = x[b], None, None if live is None or live[b] else 0
        for entry, layer in enumerate(order):
            entered[entry, b] = state
            if live is not None and not live[b]:
                continue
            q, key, value = project(state, w, layer, k.shape[3:], position, frequencies)
            if stopped is None and entry and threshold is not None:
                cosine = state @ before / np.sqrt((state @ state) * (before @ before))
                stopped = entry if cosine > threshold else None
            if stopped is None and entry >= planned[b]:
                stopped = entry
            if position < k.shape[2]:  # else the cache is full
                k[layer, b, position], v[layer, b, position] = key, value
            if stopped is not None:
                continue
            attended = []
            for head, slots in enumerate(read(layer, k[layer, b], q, position)):
                scores = q[head] @ k[layer, b, slots, head].T / np.sqrt(q.shape[-1])
                probs = np.exp(scores - scores.max(-1, keepdims=True))
                attended.append(probs / probs.sum(-1, keepdims=True) @ v[layer, b, slots, head])
            before = state
            state = state + np.reshape(attended, -1) @ w["wo"][layer]
            gate, up = norm(state, w["norm_mlp"][layer]) @ w["w_gate_up"][layer]
            state = state + (gate / (1 + np.exp(-gate)) * up) @ w["w_down"][layer]
        x[b] = state
        ran.append(len(order) if stopped is None else stopped)
    for layer in () if fill else set(order) - set(order[: max(ran)]):
        k[layer], v[layer] = held[0][layer], held[1][layer]
    return x, entered[max(ran) - 1], k, v, ran


def frequencies_of(case):
    return 1.0 / 10000.0 ** (np.arange(0, case.head_dim, 2) / case.head_dim)


def run(case, rng, order, planned, *, kernel=None, threshold=None, window=None, fill=True):
    """Return what an implementation gives and what the oracle gives."""
    x, weights, k, v, positions = case.make(rng)
    frequencies = frequencies_of(case)
    options = {
        "order_M": jnp.array(order, jnp.int32),
        "planned_B": jnp.array(planned, jnp.int32),
        "live_B": jnp.ones(len(planned), bool),
        "frequencies": jnp.asarray(frequencies, jnp.float32),
        "eps": EPS,
        "threshold": threshold,
        "fill": fill,
        "window": window,
    }
    if kernel is not None:
        *got, no_summaries, ran = kernel(
            x, weights, k, v, positions, asked_M=jnp.ones(len(order), bool), length=jnp.int32(len(order)), **options
        )
        assert no_summaries is None
        got = (*got, ran)
    else:
        decoded = decode_layers(x, weights, k, v, positions, implementation="loop", **options)
        got = (decoded.x_BD, decoded.before_BD, decoded.k_LBSKH, decoded.v_LBSKH, decoded.ran_B)
    want = oracle(
        x, weights, k, v, positions, order, planned, frequencies, threshold=threshold, fill=fill, window=window
    )
    return got, want


def close(got, want, tolerance):
    *arrays, ran = got
    *wanted, wanted_ran = want
    assert ran.tolist() == wanted_ran
    for array, expected in zip(arrays, wanted, strict=True):
        array = np.array(array, np.float64)
        assert np.array_equal(np.isnan(array), np.isnan(expected))
        assert np.nanmax(np.abs(array - expected)) <= tolerance * np.nanmax(np.abs(expected))


CASES = {
    "every_layer": ({}, (0, 1, 2), (3, 3), {}),
    "biases_and_norms": ({"bias": True, "qk_norm": True, "layers": 1}, (0,), (1, 1), {}),
    "an_order_with_gaps": ({"positions": (0, 135)}, (2, 0), (2, 2), {}),
    "a_full_cache": ({"positions": (136, 135), "capacity": 136}, (0, 1), (2, 2), {"window": 4}),
    "planned_depths_filled": ({"layers": 4}, (0, 1, 2, 3), (1, 2), {}),
    "planned_depths_left": ({"layers": 2}, (0, 1), (1, 1), {"fill": False}),
    "a_layer_twice": ({"layers": 2}, (1, 0, 1), (1, 1), {}),
    "more_than_the_ring_holds": ({"layers": 1, "d_ff": 640}, (0,), (1, 1), {}),
    "a_rule": ({"layers": 4, "positions": (3, 128)}, (0, 1, 2, 3), (4, 4), {"threshold": 0.9}),
    "a_window": ({"positions": (134, 5)}, (0, 1), (2, 2), {"window": 130}),
    "many_queries": ({"group": 9, "layers": 2}, (0, 1), (2, 2), {}),
    "most_queries": ({"group": 23, "layers": 2, "positions": (3, 135)}, (0, 1), (2, 2), {}),
}
SLOW = ("every_layer", "an_order_with_gaps", "a_window", "many_queries", "most_queries")  # to interpret


@pytest.mark.parametrize("name", CASES)
def test_loop_agrees_with_numpy(rng, stack_case, name):
    changes, order, planned, options = CASES[name]
    sizes = {"dtype": "float32", "head_dim": 16, "d_model": 24, "d_ff": 40, "kv_heads": 2, "capacity": 137}
    case = stack_case(**sizes | changes)
    close(*run(case, rng, order, planned, **options), 1e-5)


@needs_interpreter
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_kernel_agrees_with_numpy(rng, stack_case, interpret, name):
    changes, order, planned, options = CASES[name]
    kernel = functools.partial(interpret, races=name == "planned_depths_filled")
    # bfloat16 keeps 8 bits: 2**-8 a rounding, of which a layer makes several.
    close(*run(stack_case(**changes), rng, order, planned, kernel=kernel, **options), 0.03)


@needs_interpreter
@pytest.mark.parametrize("batch", [9, 20, pytest.param(33, marks=pytest.mark.slow)])
def test_kernel_fills_layers_of_more_rows(rng, stack_case, interpret, batch):
    case = stack_case(layers=3, positions=tuple(rng.integers(0, 20, size=batch).tolist()))
    close(*run(case, rng, (0, 1, 2), [1] * batch, kernel=functools.partial(interpret, races=False)), 0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 3, 9, 20, 33, 64])
def test_the_kernel_agrees_with_numpy_on_a_gpu(rng, stack_case, name, batch):
    changes, order, planned, options = CASES[name]
    positions = [0, 135, 136, *rng.integers(0, 136, size=64).tolist()][:batch]
    sizes = {"d_model": 384, "d_ff": 640, "kv_heads": 3, "positions": tuple(positions)}
    case = stack_case(**changes | sizes)
    planned = (
        [int(p) for p in rng.integers(1, len(order) + 1, size=batch)] if "planned" in name else [len(order)] * batch
    )
    x, weights, k, v, positions = case.make(rng)
    frequencies = frequencies_of(case)
    step = jax.jit(
        functools.partial(
            decode_layers,
            order_M=jnp.array(order),
            planned_B=jnp.array(planned),
            live_B=jnp.ones(batch, bool),
            frequencies=jnp.asarray(frequencies, jnp.float32),
            eps=EPS,
            implementation="mosaic_gpu",
            **options,
        )
    )
    first, second = step(x, weights, k, v, positions), step(x, weights, k, v, positions)
    close(
        (first.x_BD, first.before_BD, first.k_LBSKH, first.v_LBSKH, first.ran_B),
        oracle(x, weights, k, v, positions, order, planned, frequencies, **options),
        0.03,
    )
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.array_equal(np.array(one, np.float32), np.array(other, np.float32), equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["a_rule", "planned_depths_filled"])
@pytest.mark.parametrize("batch", [2, 9, 20, 33, 64])
def test_few_blocks_with_many_units_each_agree_with_numpy_on_a_gpu(rng, stack_case, name, batch):
    """Five blocks read 4 to 15 units of a product each: more than those that are waited for one by one."""
    changes, order, _, options = CASES[name]
    positions = tuple(rng.integers(0, 136, size=batch).tolist())
    case = stack_case(**changes | {"d_model": 384, "d_ff": 1536, "kv_heads": 3, "positions": positions})
    kernel = jax.jit(functools.partial(mosaic_gpu.decode_layers, blocks=5), static_argnames=("eps", "fill", "window"))
    close(*run(case, rng, order, [len(order)] * batch, kernel=kernel, **options), 0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [4, 9, 20])
@pytest.mark.parametrize("positions", [(12000,), (900, 5000), (1023, 1024, 0, 2049)], ids=len)
def test_many_splits_of_a_head_agree_with_numpy_on_a_gpu(rng, stack_case, group, positions):
    """As many as 64, which are combined in groups, or few enough to go without."""
    sizes = {"layers": 2, "d_model": 256, "d_ff": 256, "kv_heads": 2, "capacity": 12288}
    case = stack_case(**sizes, group=group, positions=positions)
    kernel = jax.jit(mosaic_gpu.decode_layers, static_argnames=("eps", "fill", "window"))
    close(*run(case, rng, (1, 0), [2] * len(positions), kernel=kernel), 0.03)
