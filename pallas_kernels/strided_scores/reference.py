"""Strided scores in plain JAX: some rows of blocks at a time, and of the columns those up to the last of them.

All ``[B, N, T / stride, S / stride]`` scores at once would be 8.6 GB for 131072 tokens, 32 heads and a stride of 16.
"""

from typing import Any

import jax
import jax.numpy as jnp

ENTRIES = 2**27  # scores at once: 512 MB
UNROLLED = 32  # pieces at most that are programs of their own, each with as many columns as it needs


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def strided_scores(q_BTNH, k_BSKH, offset, ends_B, *, stride, block_size, scale):
    """See :func:`pallas_kernels.strided_scores.strided_scores`; ``ends_B`` are the tokens read so far."""
    (batch, length, num_heads, _), num_kv, ratio = q_BTNH.shape, k_BSKH.shape[2], block_size // stride
    rows, blocks = -(-length // block_size), -(-k_BSKH.shape[1] // block_size)
    at_once = min(rows, max(1, ENTRIES // (batch * num_heads * ratio * blocks * ratio)))
    pieces = -(-rows // at_once)
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, pieces * at_once * block_size - length), (0, 0), (0, 0)))
    q_BPYNH = q_BTNH.reshape(batch, pieces, at_once * block_size, num_heads, -1)
    k_BSKH = jnp.pad(k_BSKH, ((0, 0), (0, blocks * block_size - k_BSKH.shape[1]), (0, 0), (0, 0)))
    k_BKJX = jnp.moveaxis(_concatenate(k_BSKH, ends_B, stride), 2, 1)

    def score(piece, columns):
        """Return the scores of a piece of rows for the first ``columns`` blocks ``[B, N, at_once, columns]``."""
        first = piece * at_once * ratio
        q_BYNH = jax.lax.dynamic_index_in_dim(q_BPYNH, piece, 1, keepdims=False)
        q_BINX = _concatenate(q_BYNH, ends_B - offset - first * stride, stride, reverse=True)
        q_BIKGX = q_BINX.reshape(batch, at_once * ratio, num_kv, num_heads // num_kv, -1)
        columns_11J = jnp.arange(columns * ratio)[None, None]
        rows_1I1 = (offset // stride + first + jnp.arange(at_once * ratio))[None, :, None]
        # The first token of a column is not behind that of its row, so that the columns seen by a row with a token
        # have one too.
        seen = (columns_11J <= rows_1I1) & (rows_1I1 * stride < ends_B[:, None, None])
        seen = seen[:, None, None]
        keys_BKJX = k_BKJX[:, :, : columns * ratio]
        scores = jnp.einsum("BIKGX,BKJX->BKGIJ", q_BIKGX, keys_BKJX, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(seen, scores, -jnp.inf)
        peak = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.where(seen, jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0)), 0.0)
        held_BKGIC = jnp.sum(weights.reshape(*weights.shape[:-1], columns, ratio), axis=-1)
        total_BKGI1 = jnp.sum(held_BKGIC, axis=-1, keepdims=True)
        held_BKGIC /= jnp.where(total_BKGI1 > 0, total_BKGI1, 1.0)
        return jnp.sum(held_BKGIC.reshape(batch, num_heads, at_once, ratio, columns), axis=3)

    if length == k_BSKH.shape[1] and pieces <= UNROLLED:  # a whole prompt, which begins at position 0
        reach = [min((piece + 1) * at_once, blocks) for piece in range(pieces)]
        found = [
            jnp.pad(score(piece, end), ((0, 0), (0, 0), (0, 0), (0, blocks - end))) for piece, end in enumerate(reach)
        ]
        return jnp.concatenate(found, axis=2)[:, :, :rows]
    scores_PBNRC = jax.lax.map(lambda piece: score(piece, blocks), jnp.arange(pieces))
    return jnp.moveaxis(scores_PBNRC, 0, 2).reshape(batch, num_heads, -1, blocks)[:, :, :rows]


def _concatenate(x_BTNH, lengths_B, stride, reverse=False):
    """Return ``stride`` tokens in a row as one, ``[B, T / stride, N, stride * H]``; zeros from the lengths on."""
    batch, length, heads, dim = x_BTNH.shape
    live_BT = jnp.arange(length)[None] < lengths_B[:, None]
    x_BTNH = jnp.where(live_BT[:, :, None, None], x_BTNH, jnp.zeros((), x_BTNH.dtype))
    x_BISNH = x_BTNH.reshape(batch, -1, stride, heads, dim)
    x_BISNH = x_BISNH[:, :, ::-1] if reverse else x_BISNH
    return jnp.moveaxis(x_BISNH, 2, 3).reshape(batch, -1, heads, stride * dim)
