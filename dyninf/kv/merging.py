"""Merge what a cache evicts into what it keeps: the most similar key of the same head takes it up, with its value.

The similarity of two keys is their cosine. A token is merged if it is at least as similar to what is kept as evicted
tokens have been so far: a threshold for each sequence follows the similarities, and heads, each with its own nearest
key, share the decision. A kept entry becomes the mean of itself and of what it takes up, each weighted by its
similarity.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dyninf.cache import LayerCache

CHUNK = 128  # evicted tokens whose similarities exist at once


def merge_prompt(
    cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, evicted_BKE: jax.Array, momentum: float
) -> LayerCache:
    """Return the cache of a layer, filled with what is kept of a prompt, with the rest of the prompt merged into it.

    The i-th evicted tokens of all heads share a decision. Cost: a product of every evicted with every kept key.

    Args:
        evicted_BKE: positions of the tokens that are not kept, ascending, as many for each head of a sequence; ``T``
            and above where there is none.
        momentum: see :func:`merge_victim`.
    """
    length, slots = k_BTKH.shape[1], cache.k.shape[1]
    k_BKTH, v_BKTH = (jnp.moveaxis(part.astype(jnp.float32), 2, 1) for part in (k_BTKH, v_BTKH))
    k_BKSH, v_BKSH = (jnp.moveaxis(part.astype(jnp.float32), 2, 1) for part in (cache.k, cache.v))
    held_BKS = jnp.moveaxis(cache.positions >= 0, 2, 1)
    unit_BKSH = _unit(k_BKSH)
    batch, num_kv, count = evicted_BKE.shape
    padded_BKE = jnp.pad(evicted_BKE, ((0, 0), (0, 0), (0, -count % CHUNK)), constant_values=length)
    at_CBKW = jnp.moveaxis(padded_BKE.reshape(batch, num_kv, -1, min(CHUNK, padded_BKE.shape[2])), 2, 0)

    def entries(part_BKTH: jax.Array, at_BKW: jax.Array) -> jax.Array:
        return jnp.take_along_axis(part_BKTH, jnp.minimum(at_BKW, length - 1)[..., None], axis=2)

    def nearest(at_BKW: jax.Array) -> tuple[jax.Array, jax.Array]:
        cosine_BKWS = jnp.einsum("bkwh,bksh->bkws", _unit(entries(k_BKTH, at_BKW)), unit_BKSH)
        cosine_BKWS = jnp.where(held_BKS[:, :, None], cosine_BKWS, -jnp.inf)
        return jnp.max(cosine_BKWS, axis=-1), jnp.argmax(cosine_BKWS, axis=-1)

    like_CBKW, best_CBKW = jax.lax.map(nearest, at_CBKW)
    exists_CBW = at_CBKW[:, :, 0] < length
    mean_CBW = jnp.where(exists_CBW, jnp.mean(like_CBKW, axis=2), 0.0)
    count_B = jnp.sum(exists_CBW, axis=(0, 2))
    level_B = jnp.sum(mean_CBW, axis=(0, 2)) / jnp.maximum(count_B, 1)
    threshold_B = jnp.where(count_B > 0, _follow(cache.threshold, level_B, momentum), cache.threshold)
    merged_CBW = exists_CBW & (mean_CBW >= threshold_B[None, :, None])

    def add(totals, chunk):
        at_BKW, like_BKW, best_BKW, merged_BW = chunk
        taken_BKWS = jax.nn.one_hot(best_BKW, slots) * merged_BW[:, None, :, None]
        weights_BKWS = taken_BKWS * jnp.where(merged_BW[:, None], like_BKW, 0.0)[..., None]
        k, v = (jnp.einsum("bkws,bkwh->bksh", weights_BKWS, entries(part, at_BKW)) for part in (k_BKTH, v_BKTH))
        return (totals[0] + k, totals[1] + v, totals[2] + jnp.sum(taken_BKWS, axis=2)), None

    zeros = (jnp.zeros_like(k_BKSH), jnp.zeros_like(v_BKSH), jnp.zeros(held_BKS.shape, jnp.float32))
    (k_sum, v_sum, taken_BKS), _ = jax.lax.scan(add, zeros, (at_CBKW, like_CBKW, best_CBKW, merged_CBW))

    def mean(kept_BKSH: jax.Array, sum_BKSH: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.moveaxis((kept_BKSH + sum_BKSH) / (1 + taken_BKS[..., None]), 1, 2).astype(dtype)

    k, v = mean(k_BKSH, k_sum, cache.k.dtype), mean(v_BKSH, v_sum, cache.v.dtype)
    return dataclasses.replace(cache, k=k, v=v, threshold=threshold_B)


def merge_victim(cache: LayerCache, victim_BK: jax.Array, evicted_B: jax.Array, momentum: float) -> LayerCache:
    """Return the cache of a layer with the entries that are about to be overwritten merged into the others.

    Cost: one pass over the keys.

    Args:
        victim_BK: their slots.
        evicted_B: sequences that lose an entry.
        momentum: how much of the threshold is kept where another ``1 - momentum`` of the similarity comes in.
    """
    batch, slots, num_kv, _ = cache.k.shape
    rows, heads = jnp.arange(batch)[:, None], jnp.arange(num_kv)[None]
    k_BKH, v_BKH = (part[rows, victim_BK, heads].astype(jnp.float32) for part in (cache.k, cache.v))
    others_BSK = (cache.positions >= 0) & (jnp.arange(slots)[None, :, None] != victim_BK[:, None])
    cosine_BSK = jnp.einsum("bkh,bskh->bsk", _unit(k_BKH), _unit(cache.k.astype(jnp.float32)))
    cosine_BSK = jnp.where(others_BSK, cosine_BSK, -jnp.inf)
    like_BK, best_BK = jnp.max(cosine_BSK, axis=1), jnp.argmax(cosine_BSK, axis=1)
    level_B = jnp.mean(like_BK, axis=1)
    threshold_B = _follow(cache.threshold, level_B, momentum)
    target_BK = jnp.where((evicted_B & (level_B >= threshold_B))[:, None], best_BK, slots)

    def put(part: jax.Array, gone_BKH: jax.Array) -> jax.Array:
        kept_BKH = part[rows, best_BK, heads].astype(jnp.float32)
        merged_BKH = ((kept_BKH + like_BK[..., None] * gone_BKH) / 2).astype(part.dtype)
        return part.at[rows, target_BK, heads].set(merged_BKH, mode="drop", unique_indices=True)

    threshold_B = jnp.where(evicted_B, threshold_B, cache.threshold)
    return dataclasses.replace(cache, k=put(cache.k, k_BKH), v=put(cache.v, v_BKH), threshold=threshold_B)


def _unit(keys: jax.Array) -> jax.Array:
    return keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-20)


def _follow(threshold_B: jax.Array, level_B: jax.Array, momentum: float) -> jax.Array:
    """Return the threshold after similarities of this level; the first level itself."""
    return jnp.where(jnp.isneginf(threshold_B), level_B, momentum * threshold_B + (1 - momentum) * level_B)
