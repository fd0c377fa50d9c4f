"""Compaction by a gather: the definition, and what runs where nothing faster can."""

from typing import Any

import jax
import jax.numpy as jnp


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def compact_cache(k, v, slots_BKM, layer):
    """See :func:`pallas_kernels.compact_cache.compact_cache`; the arrays are stacked."""
    layer = jnp.clip(layer, 0, k.shape[0] - 1)
    at_BMK1 = jnp.moveaxis(jnp.clip(slots_BKM, 0, k.shape[2] - 1), 1, 2)[..., None]

    def compact(array):
        held = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
        kept = jnp.take_along_axis(held, at_BMK1, axis=1)
        return jax.lax.dynamic_update_slice(array, kept[None], (layer, 0, 0, 0, 0))

    return compact(k), compact(v)
