"""Rank layers by how much they change the state, to choose which ones to skip."""

import jax
import jax.numpy as jnp

from dyninf.depth.static import SkipLayers


def block_influence(states_LBTD: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Return the influence of each layer on a calibration text, float32 ``[L]``; low means safe to skip.

    ``BI_l = 1 - mean cosine(state into layer l, state out of it)`` over all tokens.

    Source: ShortGPT (Men et al. 2024), equation 1.

    Args:
        states_LBTD: what enters each layer, then the last layer's output ``[L+1, B, T, D]``: what
            ``dyninf.layer_states(model, tokens)`` returns.
        lengths: tokens of each sequence ``[B]``; ``None`` for T.
    """
    states_LBTD = states_LBTD.astype(jnp.float32)
    before, after = states_LBTD[:-1], states_LBTD[1:]
    norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    cosine_LBT = jnp.sum(before * after, axis=-1) / jnp.maximum(norms, 1e-30)
    _, batch, length = cosine_LBT.shape
    live_BT = jnp.ones((batch, length), bool) if lengths is None else jnp.arange(length)[None] < lengths[:, None]
    return 1.0 - jnp.sum(jnp.where(live_BT[None], cosine_LBT, 0.0), axis=(1, 2)) / jnp.sum(live_BT)


def least_influential(influence_L: jax.Array, num_skipped: int) -> SkipLayers:
    """Return the schedule that skips the ``num_skipped`` layers of least influence.

    Raises:
        ValueError: if no layer would be left.
    """
    num_layers = len(influence_L)
    if not 0 <= num_skipped < num_layers:
        raise ValueError(f"expected to skip 0 to {num_layers - 1} of {num_layers} layers, got {num_skipped}")
    order = jnp.argsort(jnp.asarray(influence_L))
    return SkipLayers(layers=tuple(sorted(int(layer) for layer in order[:num_skipped])))
