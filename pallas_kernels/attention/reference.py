"""Attention in plain JAX: the definition, and what runs where nothing faster can.

Slots that may not be read are replaced before the second product, so that whatever they hold (NaN included) changes
nothing.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

# [B, K, X, H] with [B, S, K, H], and [B, K, X, S] with [B, S, K, H]
SCORES = (((3,), (3,)), ((0, 1), (0, 2)))
VALUES = (((3,), (1,)), ((0, 1), (0, 2)))


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def prefill_attention(q_BTNH, k_BSKH, v_BSKH, lengths_B, *, window=None, keep_BT=None, offset=None, with_lse=False):
    """See :func:`pallas_kernels.attention.prefill_attention`."""
    (batch, length), num_keys = q_BTNH.shape[:2], k_BSKH.shape[1]
    slots, queries = jnp.arange(num_keys), (0 if offset is None else offset) + jnp.arange(length)
    mask_BTS = jnp.broadcast_to(_seen(slots[None], queries[:, None], window)[None], (batch, length, num_keys))
    if lengths_B is not None:
        mask_BTS &= slots[None, None, :] < lengths_B[:, None, None]
    if keep_BT is not None:
        mask_BTS &= keep_BT[:, None, :]
    o_BTNH, lse_BNT = _attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
    return (o_BTNH, lse_BNT) if with_lse else o_BTNH


def decode_attention(q_BTNH, k, v, positions_BT, *, layer=None, index=None, window=None, valid_BS=None):
    """See :func:`pallas_kernels.attention.decode_attention`."""
    k_BSKH, v_BSKH = (array if layer is None else jnp.take(array, layer, axis=0, mode="clip") for array in (k, v))
    if index is not None:
        return _attend_pages(q_BTNH, k_BSKH, v_BSKH, positions_BT, index, window, valid_BS)
    slots = jnp.arange(k_BSKH.shape[1])[None, None, :]
    mask_BTS = _seen(slots, positions_BT[:, :, None], window)
    if valid_BS is not None:
        mask_BTS &= valid_BS[:, None, :]
    return _attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS)[0]


def _seen(slots, positions, window):
    """Return which slots a query at a position sees."""
    seen = slots <= positions
    return seen if window is None else seen & (slots > positions - window)


def _attend_pages(q_BTNH, k_BSKH, v_BSKH, positions_BT, index, window, valid_BS):
    """Attend to the slots of an index, which are copied first: one key/value head is one sequence of its own."""
    batch, num_slots, num_kv, dim = k_BSKH.shape
    length, num_heads = q_BTNH.shape[1:3]
    entries, page_size = index.pages.shape[2], index.page_size
    slots_BKMS = index.pages[..., None] * page_size + jnp.arange(page_size)[None, None, None]
    exists_BKM = jnp.arange(entries)[None, None] < index.counts[..., None]
    exists_BKMS = exists_BKM[..., None] & (slots_BKMS >= 0) & (slots_BKMS < num_slots)
    slots_BKX, exists_BKX = (x.reshape(batch, num_kv, entries * page_size) for x in (slots_BKMS, exists_BKMS))
    if valid_BS is not None:
        exists_BKX &= jnp.take_along_axis(valid_BS[:, None], jnp.clip(slots_BKX, 0, num_slots - 1), axis=2)
    mask_BKTX = exists_BKX[:, :, None] & _seen(slots_BKX[:, :, None], positions_BT[:, None, :, None], window)
    at_BXK1 = jnp.moveaxis(jnp.clip(slots_BKX, 0, num_slots - 1), 1, 2)[..., None]
    k_CX1H, v_CX1H = (
        jnp.moveaxis(jnp.take_along_axis(array, at_BXK1, axis=1), 2, 1).reshape(batch * num_kv, -1, 1, dim)
        for array in (k_BSKH, v_BSKH)
    )
    q_CTGH = jnp.moveaxis(q_BTNH.reshape(batch, length, num_kv, -1, dim), 2, 1).reshape(batch * num_kv, length, -1, dim)
    o_CTGH, _ = _attend(q_CTGH, k_CX1H, v_CX1H, mask_BKTX.reshape(batch * num_kv, length, -1))
    o_BKTGH = o_CTGH.reshape(batch, num_kv, length, num_heads // num_kv, dim)
    return jnp.moveaxis(o_BKTGH, 1, 2).reshape(q_BTNH.shape)


def _attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    """Return outputs and the logarithms of the sums of exponentials ``[B, N, T]``, -inf where nothing is seen."""
    (batch, length, num_heads, dim), (num_slots, num_kv) = q_BTNH.shape, k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(batch, length, num_kv, num_heads // num_kv, dim)
    q_BKXH = jnp.moveaxis(q_BTKGH, 1, 3).reshape(batch, num_kv, -1, dim)
    # Not einsum, which writes scores in another order: on a CPU their softmax then takes four times as long.
    scores_BKXS = lax.dot_general(q_BKXH, k_BSKH, SCORES, preferred_element_type=jnp.float32) * dim**-0.5
    mask = mask_BTS[:, None, None]
    scores = jnp.where(mask, scores_BKXS.reshape(batch, num_kv, -1, length, num_slots), -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    lse = jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    weights = weights / jnp.where(total > 0, total, 1.0)
    readable_BS = jnp.any(mask_BTS, axis=1)
    v_BSKH = jnp.where(readable_BS[:, :, None, None], v_BSKH, jnp.zeros((), v_BSKH.dtype))
    weights_BKXS = weights.astype(v_BSKH.dtype).reshape(scores_BKXS.shape)
    o_BKXH = lax.dot_general(weights_BKXS, v_BSKH, VALUES)
    o_BTNH = jnp.moveaxis(o_BKXH.reshape(batch, num_kv, -1, length, dim), 3, 1).reshape(q_BTNH.shape)
    return o_BTNH.astype(q_BTNH.dtype), lse.reshape(batch, num_heads, length)
