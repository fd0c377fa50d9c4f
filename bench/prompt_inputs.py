"""Queries, keys, values and lists of blocks for ``bench/prefill.py``."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import BlockIndex

BLOCK = 128


def random_inputs(tokens: int, arguments: Any) -> tuple[jax.Array, ...]:
    """Return random queries, keys and values."""
    shapes = [(1, tokens, heads, arguments.head_dim) for heads in (arguments.heads, *[arguments.kv_heads] * 2)]
    return tuple(jax.random.normal(jax.random.key(i), shape, arguments.dtype) for i, shape in enumerate(shapes))


def planted_inputs(tokens: int, arguments: Any) -> tuple[jax.Array, ...]:
    """Return random queries, keys and values that attend to neighbours, to the first tokens and to stripes of blocks.

    A part of the features turns with the position, so that products fall with the distance; one more is large in every
    query, and in the keys of the first block and of one block in 64, by the head.
    """
    dim = arguments.head_dim
    turning = dim // 4
    angles = jnp.arange(tokens)[:, None] * jnp.geomspace(1 / 8, 1 / 2048, turning)[None]
    near = 2.0 * (dim / 128) ** 0.5 * jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)[None, :, None]

    def plant(seed, heads, stripes):
        rest = jax.random.normal(jax.random.key(seed), (1, tokens, heads, dim - 2 * turning - 1))
        parts = [jnp.broadcast_to(near, (1, tokens, heads, 2 * turning)), stripes[None, :, :, None], rest]
        return jnp.concatenate(parts, axis=-1).astype(arguments.dtype)

    block = jnp.arange(tokens)[:, None] // BLOCK
    marked = (block == 0) | (block % 64 == 7 * jnp.arange(arguments.kv_heads)[None] % 64)
    q = plant(0, arguments.heads, jnp.full((tokens, arguments.heads), 10.0))
    k = plant(1, arguments.kv_heads, jnp.where(marked, 10.0, 0.0))
    return q, k, random_inputs(tokens, arguments)[2]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random_index(tokens: int, percent: int, heads: int) -> BlockIndex:
    blocks = -(-tokens // BLOCK)
    ids, rows = jnp.arange(blocks)[None, None, None], jnp.arange(blocks)[None, None, :, None]
    scores = jax.random.uniform(jax.random.key(9), (1, heads, blocks, blocks))
    scores = jnp.where((ids == 0) | (ids == rows), 2.0, jnp.where(ids < rows, scores, -1.0))
    own = jnp.minimum(jnp.maximum(jnp.round((rows + 1) * percent / 100).astype(jnp.int32), 2), rows + 1)
    most = max(2, -(-blocks * percent // 100))
    best = jnp.argsort(-scores, axis=3)[..., :most]
    listed = jnp.sort(jnp.where(ids[..., :most] < own, best, blocks), axis=3)
    counts = jnp.broadcast_to(own[..., 0], (1, heads, blocks))
    return BlockIndex(counts=counts, blocks=listed.astype(jnp.int32), block_size=BLOCK)


def random_index(tokens: int, percent: int, arguments: Any) -> BlockIndex:
    """Return lists of about this share of the causal blocks, the first and the last one of each row among them."""
    return _random_index(tokens, percent, arguments.heads)
