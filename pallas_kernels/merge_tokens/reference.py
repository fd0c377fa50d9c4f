"""Merging in plain JAX: the definition, and what runs where nothing faster can."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.partition import mean_of_devices

# Evicted tokens whose similarities exist at once: more of them are fewer steps, of less use the more heads there are.
LEAST_CHUNK, MOST_CHUNK, CHUNK_BYTES = 128, 1024, 2**26


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def merge_victims(k, v, victims_BK, evicted_B, num_slots_B, threshold_B, layer, *, momentum):
    """See :func:`pallas_kernels.merge_tokens.merge_victims`; the arrays are stacked."""
    _, batch, slots, num_kv, _ = k.shape
    layer = jnp.clip(layer, 0, k.shape[0] - 1)
    rows, heads = jnp.arange(batch)[:, None], jnp.arange(num_kv)[None]
    k_BSKH = jax.lax.dynamic_index_in_dim(k, layer, keepdims=False)
    victims_BK = jnp.clip(victims_BK, 0, slots - 1)
    slot_1S1 = jnp.arange(slots)[None, :, None]
    others_BSK = (slot_1S1 < num_slots_B[:, None, None]) & (slot_1S1 != victims_BK[:, None])
    gone_BKH = k_BSKH[rows, victims_BK, heads].astype(jnp.float32)
    cosine_BSK = jnp.einsum("bkh,bskh->bsk", _unit(gone_BKH), _unit(k_BSKH.astype(jnp.float32)))
    cosine_BSK = jnp.where(others_BSK, cosine_BSK, -jnp.inf)
    like_BK, best_BK = jnp.max(cosine_BSK, axis=1), jnp.argmax(cosine_BSK, axis=1)
    merged_B, threshold_B = decide(like_BK, evicted_B, threshold_B, momentum)
    target_BK = jnp.where(merged_B[:, None], best_BK, slots)

    def put(part: jax.Array) -> jax.Array:
        kept_BKH, gone_BKH = (part[layer, rows, at, heads].astype(jnp.float32) for at in (best_BK, victims_BK))
        merged_BKH = ((kept_BKH + like_BK[..., None] * gone_BKH) / 2).astype(part.dtype)
        return part.at[layer, rows, target_BK, heads].set(merged_BKH, mode="drop", unique_indices=True)

    return put(k), put(v), threshold_B


def decide(like_BK, evicted_B, threshold_B, momentum):
    """Return which sequences merge what they evict, with these similarities, and the thresholds after it."""
    level_B = mean_of_devices(jnp.mean(like_BK, axis=1))
    followed_B = _follow(threshold_B, level_B, momentum)
    return evicted_B & (level_B >= followed_B), jnp.where(evicted_B, followed_B, threshold_B)


def merge_tokens(k, v, k_BTKH, v_BTKH, evicted_BKE, num_slots_B, threshold_B, layer, *, momentum):
    """See :func:`pallas_kernels.merge_tokens.merge_tokens`; the arrays are stacked."""
    length, slots = k_BTKH.shape[1], k.shape[2]
    layer = jnp.clip(layer, 0, k.shape[0] - 1)
    held_B1S = (jnp.arange(slots)[None] < num_slots_B[:, None])[:, None]
    k_BSKH, v_BSKH = (jax.lax.dynamic_index_in_dim(part, layer, keepdims=False) for part in (k, v))
    k_BKTH, v_BKTH = (jnp.moveaxis(part.astype(jnp.float32), 2, 1) for part in (k_BTKH, v_BTKH))
    k_BKSH, v_BKSH = (jnp.moveaxis(part.astype(jnp.float32), 2, 1) for part in (k_BSKH, v_BSKH))
    unit_BKSH = _unit(k_BKSH)
    batch, num_kv, count = evicted_BKE.shape
    chunk = min(MOST_CHUNK, max(LEAST_CHUNK, CHUNK_BYTES // (4 * batch * num_kv * slots)), count)
    padded_BKE = jnp.pad(evicted_BKE, ((0, 0), (0, 0), (0, -count % chunk)), constant_values=length)
    at_CBKW = jnp.moveaxis(padded_BKE.reshape(batch, num_kv, -1, chunk), 2, 0)

    def entries(part_BKTH: jax.Array, at_BKW: jax.Array) -> jax.Array:
        return jnp.take_along_axis(part_BKTH, jnp.minimum(at_BKW, length - 1)[..., None], axis=2)

    def nearest(at_BKW: jax.Array) -> tuple[jax.Array, jax.Array]:
        cosine_BKWS = jnp.einsum("bkwh,bksh->bkws", _unit(entries(k_BKTH, at_BKW)), unit_BKSH)
        cosine_BKWS = jnp.where(held_B1S[:, :, None], cosine_BKWS, -jnp.inf)
        return jnp.max(cosine_BKWS, axis=-1), jnp.argmax(cosine_BKWS, axis=-1)

    like_CBKW, best_CBKW = jax.lax.map(nearest, at_CBKW)
    exists_CBW = at_CBKW[:, :, 0] < length
    mean_CBW = jnp.where(exists_CBW, jnp.mean(like_CBKW, axis=2), 0.0)
    count_B = jnp.sum(exists_CBW, axis=(0, 2))
    level_B = jnp.sum(mean_CBW, axis=(0, 2)) / jnp.maximum(count_B, 1)
    threshold_B = jnp.where(count_B > 0, _follow(threshold_B, level_B, momentum), threshold_B)
    merged_CBW = exists_CBW & (mean_CBW >= threshold_B[None, :, None])

    def add(totals, chunk):
        at_BKW, like_BKW, best_BKW, merged_BW = chunk
        taken_BKWS = jax.nn.one_hot(best_BKW, slots) * merged_BW[:, None, :, None]
        weights_BKWS = taken_BKWS * jnp.where(merged_BW[:, None], like_BKW, 0.0)[..., None]
        # Entries that do not merge weigh nothing, whatever they hold (NaN included).
        chosen = (jnp.where(merged_BW[:, None, :, None], entries(part, at_BKW), 0.0) for part in (k_BKTH, v_BKTH))
        k, v = (jnp.einsum("bkws,bkwh->bksh", weights_BKWS, part_BKWH) for part_BKWH in chosen)
        return (totals[0] + k, totals[1] + v, totals[2] + jnp.sum(taken_BKWS, axis=2)), None

    zeros = (jnp.zeros_like(k_BKSH), jnp.zeros_like(v_BKSH), jnp.zeros(k_BKSH.shape[:3], jnp.float32))
    (k_sum, v_sum, taken_BKS), _ = jax.lax.scan(add, zeros, (at_CBKW, like_CBKW, best_CBKW, merged_CBW))

    def put(part: jax.Array, kept_BKSH: jax.Array, sum_BKSH: jax.Array) -> jax.Array:
        mean_BSKH = jnp.moveaxis((kept_BKSH + sum_BKSH) / (1 + taken_BKS[..., None]), 1, 2).astype(part.dtype)
        return jax.lax.dynamic_update_slice(part, mean_BSKH[None], (layer, 0, 0, 0, 0))

    return put(k, k_BKSH, k_sum), put(v, v_BKSH, v_sum), threshold_B


def _unit(keys: jax.Array) -> jax.Array:
    return keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-20)


def _follow(threshold_B: jax.Array, level_B: jax.Array, momentum: float) -> jax.Array:
    """Return the threshold after similarities of this level; the first level itself."""
    return jnp.where(jnp.isneginf(threshold_B), level_B, momentum * threshold_B + (1 - momentum) * level_B)
