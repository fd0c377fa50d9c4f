"""Attention in plain JAX: the definition, and what runs where nothing faster can.

Slots that may not be read are replaced before the second product, so that whatever they hold (NaN included) changes
nothing.
"""

from typing import Any

import jax.numpy as jnp


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def prefill_attention(q_BTNH, k_BTKH, v_BTKH, lengths_B, *, window=None, keep_BT=None):
    """See :func:`pallas_kernels.attention.prefill_attention`."""
    length = q_BTNH.shape[1]
    slots = jnp.arange(length)
    mask_BTS = jnp.broadcast_to(slots[None, :] <= slots[:, None], (q_BTNH.shape[0], length, length))
    if lengths_B is not None:
        mask_BTS &= slots[None, None, :] < lengths_B[:, None, None]
    if window is not None:
        mask_BTS &= slots[None, None, :] > slots[None, :, None] - window
    if keep_BT is not None:
        mask_BTS &= keep_BT[:, None, :]
    return _attend(q_BTNH, k_BTKH, v_BTKH, mask_BTS)


def decode_attention(q_BTNH, k_BSKH, v_BSKH, positions_BT, *, window=None, valid_BS=None):
    """See :func:`pallas_kernels.attention.decode_attention`."""
    slots = jnp.arange(k_BSKH.shape[1])[None, None, :]
    mask_BTS = slots <= positions_BT[:, :, None]
    if window is not None:
        mask_BTS &= slots > positions_BT[:, :, None] - window
    if valid_BS is not None:
        mask_BTS &= valid_BS[:, None, :]
    return _attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS)


def _attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    batch, length, num_heads, dim = q_BTNH.shape
    num_kv = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, num_kv, num_heads // num_kv, dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * dim**-0.5
    mask = mask_BTS[:, None, None]
    scores = jnp.where(mask, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    readable_BS = jnp.any(mask_BTS, axis=1)
    v_BSKH = jnp.where(readable_BS[:, :, None, None], v_BSKH, jnp.zeros((), v_BSKH.dtype))
    o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH)
    return o_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)
