"""Attention that a few queries of a prompt pay to blocks of keys: what policies decide by that look at queries.

A position of -1 stands for a query that does not exist, of a text that is shorter than the batch is wide or has ended
before a chunk. Keys behind a query, written or not, have no influence whatever they hold.
"""

import math

import jax
import jax.numpy as jnp

from dyninf.sparsity.base import PromptObs

MOST_SCORES = 2**28  # float32 scores that exist at once, 1 GB: 64 queries of 32 heads to 128K keys


def keys_written(obs: PromptObs) -> jax.Array:
    """Return how many keys of each sequence exist ``[B]``, int32: those up to its last query."""
    batch, length = obs.q_BTNH.shape[:2]
    end = jnp.asarray(obs.offset + length, jnp.int32)
    return jnp.full(batch, end) if obs.lengths_B is None else jnp.minimum(obs.lengths_B.astype(jnp.int32), end)


def last_queries(obs: PromptObs, count: int) -> jax.Array:
    """Return the positions of the last ``count`` queries of each sequence, at most T, ascending ``[B, W]``."""
    width = min(count, obs.q_BTNH.shape[1])
    at_BW = keys_written(obs)[:, None] - width + jnp.arange(width, dtype=jnp.int32)[None]
    return jnp.where(at_BW >= obs.offset, at_BW, -1)


def spaced_queries(obs: PromptObs, count: int) -> jax.Array:
    """Return as many positions as :func:`last_queries` does, evenly spaced over the queries before those ``[B, W]``."""
    width = min(count, obs.q_BTNH.shape[1])
    earlier_B1 = jnp.maximum(keys_written(obs)[:, None] - width - obs.offset, 0)
    step_W = jnp.arange(width, dtype=jnp.int32)
    at_BW, before_BW = (turn_W[None] * earlier_B1 // width for turn_W in (step_W, step_W - 1))
    return jnp.where(at_BW != before_BW, obs.offset + at_BW, -1).astype(jnp.int32)


def block_attention(
    obs: PromptObs, asking_BW: jax.Array, weight_BWCY: jax.Array, block_size: int
) -> tuple[jax.Array, jax.Array]:
    """Return what each asking query pays to each of C blocks of keys, plain and weighted: twice ``[B, N, W, C]``.

    Softmax in float32 over the keys up to each query, zeros for queries that do not exist. Costs ``2 W S N H`` FLOPs
    and ``W S N`` float32 scores, of some heads at a time where these are more than ``MOST_SCORES``.

    Args:
        weight_BWCY: what the attention to key y of block c is multiplied by for the second sum, float32, of any shape
            that broadcasts.
    """
    (batch, length, num_heads, dim), (num_keys, num_kv) = obs.q_BTNH.shape, obs.k_BSKH.shape[1:3]
    width, num_blocks = asking_BW.shape[1], -(-num_keys // block_size)
    rows_BW = jnp.clip(asking_BW - obs.offset, 0, length - 1)
    q_BWNH = jnp.take_along_axis(obs.q_BTNH, rows_BW[:, :, None, None], axis=1)
    q_BKXH = jnp.moveaxis(q_BWNH, 1, 2).reshape(batch, num_kv, num_heads // num_kv * width, dim)
    k_BSKH = jnp.pad(obs.k_BSKH, ((0, 0), (0, num_blocks * block_size - num_keys), (0, 0), (0, 0)))
    keys_CY = jnp.arange(num_blocks * block_size).reshape(num_blocks, block_size)
    seen_BWCY = keys_CY[None, None] <= asking_BW[:, :, None, None]
    heads = num_kv
    while heads > 1 and batch * num_heads * width * num_keys // num_kv * heads > MOST_SCORES:
        heads = max(part for part in range(1, heads) if num_kv % part == 0)

    def attend(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = jax.lax.dynamic_slice_in_dim(q_BKXH, first, heads, axis=1)
        k = jax.lax.dynamic_slice_in_dim(k_BSKH, first, heads, axis=2)
        # Not einsum, which writes them in another order and transposes them.
        scores = jax.lax.dot_general(q, k, (((3,), (3,)), ((0, 1), (0, 2))), preferred_element_type=jnp.float32)
        scores = (scores * dim**-0.5).reshape(batch, heads, -1, width, num_blocks, block_size)
        scores = jnp.where(seen_BWCY[:, None, None], scores, -jnp.inf)
        peak = jnp.max(scores, axis=(4, 5), keepdims=True)
        weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
        plain, weighted = jnp.sum(weights, axis=5), jnp.sum(weights * weight_BWCY[:, None, None], axis=5)
        total = jnp.sum(plain, axis=4, keepdims=True)
        total = jnp.where(total > 0, total, 1.0)
        return plain / total, weighted / total

    if heads == num_kv:
        parts = attend(jnp.int32(0))
    else:
        mapped = jax.lax.map(attend, jnp.arange(0, num_kv, heads, dtype=jnp.int32))
        parts = tuple(jnp.moveaxis(part, 0, 1) for part in mapped)
    plain, weighted = (part.reshape(batch, num_heads, width, num_blocks) for part in parts)
    return plain, weighted


def rows_of(obs: PromptObs, block_size: int) -> tuple[jax.Array, jax.Array]:
    """Return the first and the last block of the queries of each row, int32 ``[R]`` each: one and the same if the
    offset is a multiple of ``block_size``."""
    rows = math.ceil(obs.q_BTNH.shape[1] / block_size)
    start_R = jnp.asarray(obs.offset, jnp.int32) + jnp.arange(rows, dtype=jnp.int32) * block_size
    return start_R // block_size, (start_R + block_size - 1) // block_size
