"""The decoder stack as a loop over layers in plain JAX, around products that read a layer's weights in place on TPU.

The reference of :func:`pallas_kernels.decoder_stack.decode_layers`, and what runs where no kernel can. On a mesh each
device runs it with its heads and its part of the MLP, and what they project is added up; where that cannot be, JAX
partitions it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.add_devices import add_devices
from pallas_kernels.append_tokens import append_tokens
from pallas_kernels.attention import decode_attention
from pallas_kernels.decoder_stack.geometry import refuse_parts
from pallas_kernels.layer_products import norm_gate_up, norm_project, project_add
from pallas_kernels.norms import rms_norm
from pallas_kernels.page_scores import page_scores
from pallas_kernels.partition import num_devices, sharing
from pallas_kernels.topk_pages import topk_pages


def refuse(**facts: Any) -> None:
    """Return ``None``: serves every call."""


def refuse_per_device(*, parts: dict, sizes: dict, **facts: Any) -> str | None:
    """Return why the loop cannot run on each device of a mesh with its heads, or ``None``."""
    if num_devices() == 1:
        return "needs a mesh of several devices"
    return refuse_parts(parts, sizes)


def decode_layers(
    x_BD,
    weights,
    k_LBSKH,
    v_LBSKH,
    positions_B,
    *,
    order_M,
    length,
    planned_B,
    live_B,
    frequencies,
    eps,
    threshold,
    asked_M,
    fill,
    window,
    summary_LBPKX=None,
    select=None,
):
    """See :func:`pallas_kernels.decoder_stack.decode_layers`."""
    cache = (k_LBSKH, v_LBSKH, summary_LBPKX)
    kv_heads, head_dim = k_LBSKH.shape[3:]
    project = functools.partial(_project, weights, positions_B, frequencies, eps, (kv_heads, -1, head_dim))
    store = functools.partial(_store, positions_B, live_B, select)
    attend = functools.partial(_attend, jnp.where(live_B, positions_B, -1), select, window)

    def going(state):
        entry, _, _, _, exited_B, _, go = state
        return (entry < length) & go & ~jnp.all(exited_B)

    def body(state):
        entry, x_BD, before_BD, cache, exited_B, ran_B, _ = state
        leaves_B = planned_B <= entry
        if threshold is not None:
            asked = (entry > 0) & asked_M[entry]
            leaves_B = leaves_B | (asked & (_cosine(x_BD, before_BD) > threshold))
        ran_B = jnp.where(leaves_B & ~exited_B, entry, ran_B)
        exited_B = exited_B | leaves_B
        layer = order_M[entry]

        def run(x_BD, cache):
            q_BNH, k_BKH, v_BKH = project(x_BD, layer)
            cache = store(cache, layer, k_BKH, v_BKH)
            o_BF = attend(q_BNH[:, None], cache, layer).reshape(x_BD.shape[0], -1)
            y_BD = _project_add(o_BF, weights.wo, x_BD, layer)
            hidden_BF = norm_gate_up(y_BD, weights.norm_mlp, weights.w_gate_up, layer, eps=eps)
            y_BD = _project_add(hidden_BF, weights.w_down, y_BD, layer)
            return jnp.where(exited_B[:, None], x_BD, y_BD), cache

        go = ~jnp.all(exited_B)
        new_BD, cache = lax.cond(go, run, lambda x_BD, cache: (x_BD, cache), x_BD, cache)
        before_BD = jnp.where(go, x_BD, before_BD)
        return entry + go, new_BD, before_BD, cache, exited_B, ran_B, go

    zeros_B = jnp.zeros(planned_B.shape, jnp.int32)
    state = (jnp.int32(0), x_BD, x_BD, cache, jnp.zeros(planned_B.shape, bool), zeros_B, jnp.bool_(True))
    ran, x_BD, before_BD, cache, exited_B, ran_B, _ = lax.while_loop(going, body, state)
    ran_B = jnp.where(exited_B, ran_B, ran)
    if fill:

        def fill_entry(entry, cache):
            _, k_BKH, v_BKH = project(x_BD, order_M[entry])
            return store(cache, order_M[entry], k_BKH, v_BKH)

        cache = lax.fori_loop(ran, length, fill_entry, cache)
    return x_BD, before_BD, *cache, ran_B


def _project_add(x_BF, weights_LFD, residual_BD, layer) -> jax.Array:
    """Add a projection to the states, with the parts that other devices have of it."""
    if sharing() is None:
        return project_add(x_BF, weights_LFD, residual_BD, layer)
    part_BD = project_add(x_BF, weights_LFD, jnp.zeros_like(residual_BD), layer)
    return add_devices(part_BD, residual_BD)


def _project(weights, positions_B, frequencies, eps, heads, x_BD, layer) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return rotated queries ``[B, N, H]`` and keys, and values ``[B, K, H]``, of a layer."""
    qkv_BF = norm_project(x_BD, weights.norm_attn, weights.wqkv, layer, eps=eps, bias_LF=weights.bqkv)
    qkv_BKMH = qkv_BF.reshape(x_BD.shape[0], *heads)
    q_BKGH, k_BKH, v_BKH = qkv_BKMH[..., :-2, :], qkv_BKMH[..., -2, :], qkv_BKMH[..., -1, :]
    if weights.norm_q is not None:
        q_BKGH = rms_norm(q_BKGH, weights.norm_q[layer], eps)
        k_BKH = rms_norm(k_BKH, weights.norm_k[layer], eps)
    angles_BH = positions_B[:, None].astype(jnp.float32) * frequencies[None]
    q_BNH = q_BKGH.reshape(q_BKGH.shape[0], -1, q_BKGH.shape[-1])
    return _rotate(q_BNH, angles_BH), _rotate(k_BKH, angles_BH), v_BKH


def _attend(positions_B, select, window, q_BTNH, cache, layer) -> jax.Array:
    """Attend from the new tokens to a layer's cache, or to the pages of it that are selected; -1 reads nothing."""
    k_LBSKH, v_LBSKH, summary_LBPKX = cache
    layers, _, capacity = k_LBSKH.shape[:3]

    def read_all() -> jax.Array:
        return decode_attention(q_BTNH, k_LBSKH, v_LBSKH, positions_B[:, None], layer=layer, window=window)

    def read_pages() -> jax.Array:
        size = select.page_size
        whole_B = jnp.clip(positions_B, 0, capacity - 1) // size
        scores_BKP = page_scores(q_BTNH, summary_LBPKX, whole_B, layer=layer)
        about = {"page_size": size, "sinks": select.sinks, "recent": select.recent}
        index = topk_pages(scores_BKP, whole_B + 1, k=select.pages, **about)
        return decode_attention(q_BTNH, k_LBSKH, v_LBSKH, positions_B[:, None], layer=layer, index=index)

    if select is None or select.pages * select.page_size >= capacity or select.dense_layers >= layers:
        return read_all()
    if select.dense_layers == 0:
        return read_pages()
    return lax.cond(layer < select.dense_layers, read_all, read_pages)


def _store(positions_B, live_B, select, cache, layer, k_BKH, v_BKH):
    """Write the new keys and values of a layer, and with a selection the summary of the page they fall into.

    Sequences that do not exist and full caches are left alone.
    """
    k_LBSKH, v_LBSKH, summary_LBPKX = cache
    batch, capacity = k_LBSKH.shape[1:3]
    slots_B = jnp.where(live_B & (positions_B >= 0), positions_B, capacity)
    if select is not None:
        new = (part_BKH[:, None] for part_BKH in (k_BKH, v_BKH))
        about = {"kind": select.kind, "page_size": select.page_size, "layer": layer}
        return append_tokens(*cache, *new, slots_B[:, None], **about)
    at = (layer, jnp.arange(batch), slots_B)
    k_LBSKH, v_LBSKH = (
        part.at[at].set(new.astype(part.dtype), mode="drop", unique_indices=True)
        for part, new in ((k_LBSKH, k_BKH), (v_LBSKH, v_BKH))
    )
    return k_LBSKH, v_LBSKH, summary_LBPKX


def _cosine(x_BD, before_BD) -> jax.Array:
    """Return the cosine of two states, at most 1, NaN where one is not finite."""
    x, before = x_BD.astype(jnp.float32), before_BD.astype(jnp.float32)
    norms_B = jnp.sqrt(jnp.sum(x * x, axis=-1) * jnp.sum(before * before, axis=-1))
    return jnp.minimum(jnp.sum(x * before, axis=-1) / jnp.maximum(norms_B, 1e-30), 1.0)


def _rotate(x_BNH, angles_BH) -> jax.Array:
    """Rotate the halves of each head by its position."""
    cos, sin = jnp.cos(angles_BH)[:, None], jnp.sin(angles_BH)[:, None]
    first, second = jnp.split(x_BNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BNH.dtype)
