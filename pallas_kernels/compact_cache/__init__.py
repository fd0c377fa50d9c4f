"""Move the slots of a cache that are worth keeping to its front."""

import jax
import jax.numpy as jnp

from pallas_kernels.compact_cache import reference
from pallas_kernels.dispatch import Implementation, capability, choose, kernel, platform
from pallas_kernels.partition import per_device

COMPACT_CACHE = (
    kernel("compact_cache", "mosaic_gpu", "compact_cache"),
    kernel("compact_cache", "mosaic_tpu", "compact_cache"),
    Implementation(name="xla", refuse=reference.refuse, run=reference.compact_cache),
)


@per_device("k v", k="BSKH", v="BSKH")
def compact_cache(
    k: jax.Array,
    v: jax.Array,
    slots_BKM: jax.Array,
    *,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the cache with the given slots of every key/value head in its first M slots, in their order.

    Slots from M on keep what they held. Cost: reads and writes the M chosen slots, nothing else (on TPUs in bfloat16
    reads each with its neighbor, twice the bytes); in place where the arrays are donated.

    Args:
        k, v: the cache of a layer ``[B, S, K, H]``, or the stacked caches of all layers ``[L, B, S, K, H]``.
        slots_BKM: slots to keep, int32, ascending and all different for each head. They are not checked at run time:
            slots outside of the cache are read as the nearest one inside.
        layer: which layer of a stacked cache, an int32 scalar, from 0 to L - 1; beyond it, the nearest one.
        implementation: by name; ``None`` takes the fastest that can serve.

    Raises:
        ValueError: if shapes do not match, or more slots are kept than there are.
        NotImplementedError: if the requested implementation cannot serve.
    """
    shapes = f"got k {k.shape}, v {v.shape} and slots {slots_BKM.shape} of {slots_BKM.dtype}"
    if (layer is not None) != (k.ndim == 5) or (layer is not None and jnp.shape(layer) != ()):
        raise ValueError(f"expected a scalar layer for a cache [L, B, S, K, H] and for no other, {shapes}, {layer=}")
    batch, slots, num_kv, dim = k.shape[-4:]
    kept = slots_BKM.shape[-1]
    if k.shape != v.shape or slots_BKM.shape != (batch, num_kv, kept) or slots_BKM.dtype != jnp.int32:
        raise ValueError(f"expected k, v [B, S, K, H] and slots [B, K, M] of int32, {shapes}")
    if not 1 <= kept <= slots:
        raise ValueError(f"expected 1 to {slots} slots to keep, got {kept}")
    facts = {"platform": platform(), "capability": capability(), "dtype": k.dtype, "value_dtype": v.dtype}
    facts |= {"head_dim": dim, "num_kv": num_kv, "num_slots": slots, "kept": kept}
    chosen = choose("compact_cache", COMPACT_CACHE, implementation, **facts)
    stacked = (k, v) if layer is not None else (k[None], v[None])
    found = chosen.run(*stacked, slots_BKM, jnp.int32(0) if layer is None else layer)
    return found if k.ndim == 5 else tuple(array[0] for array in found)
