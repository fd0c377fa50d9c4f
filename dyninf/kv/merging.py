"""Merge what a cache evicts into what it keeps, by :func:`pallas_kernels.merge_victims` and ``merge_tokens``.

In a cache that merges the filled slots are the first ones, as many for every head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dyninf.cache import LayerCache
from pallas_kernels import merge_tokens, merge_victims


def merge_prompt(
    cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, evicted_BKE: jax.Array, momentum: float
) -> LayerCache:
    """Return the cache of a layer, filled with what is kept of a prompt, with the rest of the prompt merged into it.

    Args:
        evicted_BKE: positions of the tokens that are not kept, ascending, as many for each head of a sequence; ``T``
            and above where there is none.
        momentum: how much of the threshold is kept where another ``1 - momentum`` of the similarity comes in.
    """
    arrays = (cache.k, cache.v, k_BTKH, v_BTKH, evicted_BKE, _filled(cache), cache.threshold)
    k, v, threshold_B = merge_tokens(*arrays, momentum=momentum)
    return dataclasses.replace(cache, k=k, v=v, threshold=threshold_B)


def merge_victim(cache: LayerCache, victim_BK: jax.Array, evicted_B: jax.Array, momentum: float) -> LayerCache:
    """Return the cache of a layer with the entries that are about to be overwritten merged into the others.

    Args:
        victim_BK: their slots.
        evicted_B: sequences that lose an entry.
        momentum: see :func:`merge_prompt`.
    """
    arrays = (cache.k, cache.v, victim_BK, evicted_B, _filled(cache), cache.threshold)
    k, v, threshold_B = merge_victims(*arrays, momentum=momentum)
    return dataclasses.replace(cache, k=k, v=v, threshold=threshold_B)


def _filled(cache: LayerCache) -> jax.Array:
    return jnp.sum(cache.positions[:, :, 0] >= 0, axis=1)
