"""Attention of prompts whose tokens lie on several devices: equal to one device, and what is sent for it."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pallas_kernels import BlockIndex, block_sparse_attention, prefill_attention
from pallas_kernels.partition import partitioned

B, T, N, K, H, BLOCK = 2, 32, 4, 2, 8, 4
LENGTHS = np.array([32, 19])
COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def run(operation, *arrays):
    """What an operation gives on eight devices, and what it sends."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(-1, 2), ("sequence", "tensor"))

    def traced(*arrays):
        with partitioned(mesh, heads=("tensor",), length=("sequence",)):
            return operation(*arrays)

    compiled = jax.jit(traced).lower(*arrays).compile()
    for leaf in jax.tree.leaves(compiled.output_shardings):
        assert "sequence" in str(leaf.spec)
    return compiled(*arrays), collections.Counter(COLLECTIVE.findall(compiled.as_text()))


def attention_inputs(rng):
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def same(got, want):
    """Outputs and sums of the rows that exist."""
    real = np.arange(T)[None] < LENGTHS[:, None]
    np.testing.assert_allclose(np.asarray(got[0])[real], np.asarray(want[0])[real], rtol=1e-5, atol=1e-6)
    if len(got) > 1:
        rows = np.moveaxis(np.stack([got[1], want[1]]), 2, 3)[:, real]
        np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("window", "masked", "sent"),
    [
        (None, False, {"all-gather": 2}),
        (6, False, {"collective-permute": 2}),  # five tokens of the device before
        pytest.param(14, False, {"collective-permute": 4}, marks=pytest.mark.slow),  # thirteen of the two before
        pytest.param(30, False, {"all-gather": 2}, marks=pytest.mark.slow),  # nearly all
        pytest.param(6, True, {"all-gather": 2}, marks=pytest.mark.slow),
    ],
)
def test_dense_attention(rng, window, masked, sent):
    keep = jnp.asarray(rng.random((B, T)) < 0.7) if masked else None

    def operation(q, k, v):
        return prefill_attention(q, k, v, jnp.asarray(LENGTHS), window=window, keep_BT=keep, with_lse=True)

    arrays = attention_inputs(rng)
    got, found = run(operation, *arrays)
    same(got, operation(*arrays))
    assert found == sent


def random_index(rng, entries=5):
    """Up to five of the blocks up to that of each row, its own and the first among them."""
    rows = T // BLOCK
    counts, blocks = np.zeros((B, N, rows), np.int32), np.full((B, N, rows, entries), 99, np.int32)
    for b, n, row in np.ndindex(B, N, rows):
        chosen = np.unique([0, row, *rng.integers(0, row + 1, entries - 2)])
        counts[b, n, row], blocks[b, n, row, : len(chosen)] = len(chosen), chosen
    return BlockIndex(counts=jnp.asarray(counts), blocks=jnp.asarray(blocks), block_size=BLOCK)


@pytest.mark.parametrize(
    ("window", "sinks", "sent"),
    [
        pytest.param(None, 0, {"all-gather": 2}, marks=pytest.mark.slow),
        # By hand: a window of seven reaches six tokens back, two blocks; the first block is sent to all.
        (7, 3, {"collective-permute": 2, "all-reduce": 1}),
        pytest.param(7, 0, {"collective-permute": 2}, marks=pytest.mark.slow),
        pytest.param(11, 5, {"collective-permute": 4, "all-reduce": 1}, marks=pytest.mark.slow),
    ],
)
def test_blocks(rng, window, sinks, sent):
    """Blocks beyond the window, which an index may name, are neither sent nor seen."""
    index = random_index(rng)

    def operation(q, k, v):
        about = {"window": window, "sinks": sinks, "with_lse": True}
        return block_sparse_attention(q, k, v, index, jnp.asarray(LENGTHS), **about)

    arrays = attention_inputs(rng)
    got, found = run(operation, *arrays)
    same(got, operation(*arrays))
    assert found == sent or (sinks and found == sent | {"all-reduce": 2})  # keys and values in one, or not


@pytest.mark.slow
def test_gradients_are_those_of_one_device(rng):
    arrays = attention_inputs(rng)
    operation = functools.partial(prefill_attention, lengths_B=None, window=6)
    gradient = lambda operation: jax.grad(lambda *qkv: jnp.sum(jnp.sin(operation(*qkv))), argnums=(0, 1, 2))  # noqa: E731
    mesh = Mesh(np.array(jax.devices()[:4]), ("sequence",))
    with partitioned(mesh, length=("sequence",)):
        got = jax.jit(gradient(operation))(*arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, gradient(operation)(*arrays))


def test_prompts_that_do_not_divide_are_refused(rng):
    q, k, v = (array[:, :30] for array in attention_inputs(rng))
    mesh = Mesh(np.array(jax.devices()[:4]), ("sequence",))
    with partitioned(mesh, length=("sequence",)):
        with pytest.raises(ValueError, match="a multiple of 4 tokens on 4 devices of the sequence axis, got 30; pad"):
            prefill_attention(q, k, v, None)
        index = random_index(rng)
        with pytest.raises(
            ValueError, match="a multiple of 16 tokens on 4 devices of the sequence axis with blocks of 4"
        ):
            block_sparse_attention(q, k, v, index)
