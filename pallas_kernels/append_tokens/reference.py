"""Storing new tokens by scatters: the definition, and what runs where nothing faster can."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.page_scores import summarize_page


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def append_tokens(k, v, summary, k_BTKH, v_BTKH, slots_BT, layer, *, kind, page_size):
    """See :func:`pallas_kernels.append_tokens.append_tokens`; the arrays are stacked."""
    layers, batch, num_slots = k.shape[:3]
    layer = jnp.clip(layer, 0, layers - 1)
    rows_B1 = jnp.arange(batch)[:, None]
    inside_BT = (slots_BT >= 0) & (slots_BT < num_slots)
    # Dropped writes go to different places behind the end, so that all of a sequence differ.
    at_BT = jnp.where(inside_BT, slots_BT, num_slots + jnp.arange(slots_BT.shape[1])[None])
    k, v = (
        array.at[layer, rows_B1, at_BT].set(new, mode="drop", unique_indices=True)
        for array, new in ((k, k_BTKH), (v, v_BTKH))
    )
    newest_B = jnp.max(jnp.where(inside_BT, slots_BT, -1), axis=1)
    oldest_B = jnp.min(jnp.where(inside_BT, slots_BT, num_slots), axis=1)
    pages_B2 = jnp.stack([oldest_B, newest_B], axis=1) // page_size
    slots_B2S = pages_B2[..., None] * page_size + jnp.arange(page_size)[None, None]
    k_BSKH = jax.lax.dynamic_index_in_dim(k, layer, keepdims=False)
    keys_BXKH = jnp.take_along_axis(
        k_BSKH, jnp.clip(slots_B2S, 0, num_slots - 1).reshape(batch, -1)[..., None, None], axis=1
    )
    keys_B2SKH = keys_BXKH.reshape(batch, 2, page_size, *keys_BXKH.shape[2:])
    found_B2KX = summarize_page(keys_B2SKH, slots_B2S <= newest_B[:, None, None], kind=kind)
    # Both are the same page unless the tokens cross into the next one; then the same summary is written twice.
    into_B2 = jnp.where(newest_B[:, None] >= 0, pages_B2, summary.shape[2])
    return k, v, summary.at[layer, rows_B1, into_B2].set(found_B2KX.astype(summary.dtype), mode="drop")
