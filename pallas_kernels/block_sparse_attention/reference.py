"""Block-sparse attention in plain JAX: the definition, row of blocks by row of blocks.

Keys that a query does not see are replaced before the second product, so that whatever they hold (NaN included)
changes nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.index import BlockIndex


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def block_sparse_attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    index: BlockIndex,
    lengths_B,
    *,
    offset,
    window=None,
    sinks=0,
    order_BNT=None,
    with_lse=False,
):
    """See :func:`pallas_kernels.block_sparse_attention.block_sparse_attention`."""
    batch, length, num_heads, dim = q_BTNH.shape
    if order_BNT is not None:
        order_BTN = jnp.moveaxis(order_BNT, 1, 2)
        q_BTNH, k_BSKH, v_BSKH = (
            jnp.take_along_axis(jnp.repeat(x, num_heads // x.shape[2], axis=2), order_BTN[..., None], axis=1)
            for x in (q_BTNH, k_BSKH, v_BSKH)
        )
    size, rows, group = index.block_size, index.counts.shape[2], num_heads // k_BSKH.shape[2]
    padding = ((0, 0), (0, rows * size - length), (0, 0), (0, 0))
    q_RBNXH = jnp.moveaxis(jnp.pad(q_BTNH, padding).reshape(batch, rows, size, num_heads, dim), (1, 3), (0, 2))
    lengths_B = jnp.full(batch, k_BSKH.shape[1]) if lengths_B is None else lengths_B
    padding = ((0, 0), (0, -k_BSKH.shape[1] % size), (0, 0), (0, 0))
    k_BNPYH, v_BNPYH = (
        jnp.repeat(jnp.moveaxis(jnp.pad(array, padding), 2, 1), group, axis=1).reshape(batch, num_heads, -1, size, dim)
        for array in (k_BSKH, v_BSKH)
    )
    num_blocks = k_BNPYH.shape[2]
    if order_BNT is not None:  # what fills up the last block comes behind all tokens
        at_BNS = jnp.pad(order_BNT, ((0, 0), (0, 0), (0, rows * size - length)), constant_values=rows * size)
        at_BNPY = at_BNS.reshape(batch, num_heads, rows, size)
    entries_M = jnp.arange(index.blocks.shape[3])

    def attend_row(inputs):
        row, q_BNXH, counts_BN, blocks_BNM = inputs
        named_BNM = (entries_M[None, None] < counts_BN[..., None]) & (blocks_BNM >= 0) & (blocks_BNM < num_blocks)
        at_BNM11 = jnp.clip(blocks_BNM, 0, num_blocks - 1)[..., None, None]
        k_BNMYH, v_BNMYH = (jnp.take_along_axis(array, at_BNM11, axis=2) for array in (k_BNPYH, v_BNPYH))
        if order_BNT is None:
            keys_BNMY = blocks_BNM[..., None] * size + jnp.arange(size)[None, None, None]
            queries_BNX = (offset + row * size + jnp.arange(size))[None, None]
        else:
            keys_BNMY = jnp.take_along_axis(at_BNPY, at_BNM11[..., 0], axis=2)
            queries_BNX = at_BNPY[:, :, row]
        keys_BN1MY, queries_BNX11 = keys_BNMY[:, :, None], queries_BNX[..., None, None]
        seen_BNXMY = (keys_BN1MY <= queries_BNX11) & (keys_BN1MY < lengths_B[:, None, None, None, None])
        if window is not None:
            seen_BNXMY &= (keys_BN1MY > queries_BNX11 - window) | (keys_BN1MY < sinks)
        seen_BNXMY &= named_BNM[:, :, None, :, None]
        scores = jnp.einsum("BNXH,BNMYH->BNXMY", q_BNXH, k_BNMYH, preferred_element_type=jnp.float32) * dim**-0.5
        scores = jnp.where(seen_BNXMY, scores, -jnp.inf)
        peak = jnp.max(scores, axis=(3, 4), keepdims=True)
        weights = jnp.where(seen_BNXMY, jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0)), 0.0)
        total = jnp.sum(weights, axis=(3, 4), keepdims=True)
        lse_BNX = jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)[..., 0, 0]
        weights = (weights / jnp.where(total > 0, total, 1.0)).astype(v_BSKH.dtype)
        read_BNMY = jnp.any(seen_BNXMY, axis=2)[..., None]
        v_BNMYH = jnp.where(read_BNMY, v_BNMYH, jnp.zeros((), v_BSKH.dtype))
        return jnp.einsum("BNXMY,BNMYH->BNXH", weights, v_BNMYH).astype(q_BTNH.dtype), lse_BNX

    lists = (jnp.moveaxis(index.counts, 2, 0), jnp.moveaxis(index.blocks, 2, 0))
    o_RBNXH, lse_RBNX = jax.lax.map(attend_row, (jnp.arange(rows), q_RBNXH, *lists))
    o_BTNH = jnp.moveaxis(o_RBNXH, (0, 2), (1, 3)).reshape(batch, rows * size, num_heads, dim)[:, :length]
    lse_BNT = jnp.moveaxis(lse_RBNX, 0, 2).reshape(batch, num_heads, rows * size)[:, :, :length]
    if order_BNT is not None:
        back_BNT = jnp.argsort(order_BNT, axis=2)
        o_BTNH = jnp.take_along_axis(o_BTNH, jnp.moveaxis(back_BNT, 1, 2)[..., None], axis=1)
        lse_BNT = jnp.take_along_axis(lse_BNT, back_BNT, axis=2)
    return (o_BTNH, lse_BNT) if with_lse else o_BTNH
