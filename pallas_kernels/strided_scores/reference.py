"""Strided scores in plain JAX: the definition, row of blocks by row of blocks.

One row of blocks holds its ``[B, N, block_size / stride, S / stride]`` scores; those of all rows at once would be 8.6
GB for 131072 tokens, 32 heads and a stride of 16.
"""

from typing import Any

import jax
import jax.numpy as jnp


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def strided_scores(q_BTNH, k_BSKH, offset, ends_B, *, stride, block_size, scale):
    """See :func:`pallas_kernels.strided_scores.strided_scores`; ``ends_B`` are the tokens read so far."""
    batch, length, num_heads, dim = q_BTNH.shape
    num_kv, ratio = k_BSKH.shape[2], block_size // stride
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, -length % block_size), (0, 0), (0, 0)))
    q_BRYNH = q_BTNH.reshape(batch, -1, block_size, num_heads, dim)
    k_BSKH = jnp.pad(k_BSKH, ((0, 0), (0, -k_BSKH.shape[1] % block_size), (0, 0), (0, 0)))
    k_BKJX = jnp.moveaxis(_concatenate(k_BSKH, ends_B, stride), 2, 1)
    columns_11J = jnp.arange(k_BKJX.shape[2])[None, None]

    def score_row(row):
        q_BYNH = jax.lax.dynamic_index_in_dim(q_BRYNH, row, 1, keepdims=False)
        q_BINX = _concatenate(q_BYNH, ends_B - offset - row * block_size, stride, reverse=True)
        q_BIKGX = q_BINX.reshape(batch, ratio, num_kv, num_heads // num_kv, -1)
        rows_1I1 = (offset // stride + row * ratio + jnp.arange(ratio))[None, :, None]
        # The first token of a column is not behind that of its row, so that the columns seen by a row with a token
        # have one too.
        seen = (columns_11J <= rows_1I1) & (rows_1I1 * stride < ends_B[:, None, None])
        seen = seen[:, None, None]
        scores = jnp.einsum("BIKGX,BKJX->BKGIJ", q_BIKGX, k_BKJX, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(seen, scores, -jnp.inf)
        peak = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.where(seen, jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0)), 0.0)
        total_BKGI1 = jnp.sum(weights, axis=-1, keepdims=True)
        held_BKGIC = jnp.sum(weights.reshape(*weights.shape[:-1], -1, ratio), axis=-1)
        return jnp.sum(held_BKGIC / jnp.where(total_BKGI1 > 0, total_BKGI1, 1.0), axis=-2)

    scores_RBKGC = jax.lax.map(score_row, jnp.arange(q_BRYNH.shape[1]))
    return jnp.moveaxis(scores_RBKGC.reshape(q_BRYNH.shape[1], batch, num_heads, -1), 0, 2)


def _concatenate(x_BTNH, lengths_B, stride, reverse=False):
    """Return ``stride`` tokens in a row as one, ``[B, T / stride, N, stride * H]``; zeros from the lengths on."""
    batch, length, heads, dim = x_BTNH.shape
    live_BT = jnp.arange(length)[None] < lengths_B[:, None]
    x_BTNH = jnp.where(live_BT[:, :, None, None], x_BTNH, jnp.zeros((), x_BTNH.dtype))
    x_BISNH = x_BTNH.reshape(batch, -1, stride, heads, dim)
    x_BISNH = x_BISNH[:, :, ::-1] if reverse else x_BISNH
    return jnp.moveaxis(x_BISNH, 2, 3).reshape(batch, -1, heads, stride * dim)
