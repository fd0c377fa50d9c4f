"""Merge what a cache evicts into what it keeps: the most similar key of the same head takes it up, with its value.

The similarity of two keys is their cosine. A token is merged if it is at least as similar to what is kept as evicted
tokens have been so far: a threshold for each sequence follows the similarities, and heads, each with its own nearest
key, share the decision. A kept entry becomes the mean of itself and of what it takes up, each weighted by its
similarity. Source: Wan et al. 2024 (D2O), section 3.3.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, capability, choose, kernel, platform
from pallas_kernels.merge_tokens import reference
from pallas_kernels.partition import per_device

MERGE_VICTIMS = (
    kernel("merge_tokens", "mosaic_gpu", "merge_victims"),
    Implementation(name="xla", refuse=reference.refuse, run=reference.merge_victims),
)


@per_device("k v B", k="BSKH", v="BSKH")
def merge_victims(
    k: jax.Array,
    v: jax.Array,
    victims_BK: jax.Array,
    evicted_B: jax.Array,
    num_slots_B: jax.Array,
    threshold_B: jax.Array,
    *,
    momentum: jax.Array | float,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the cache with one entry of each head, about to be overwritten, merged into the others; and thresholds.

    With the cosine c of the victim's key and the nearest other one, averaged over heads to m, the threshold t becomes
    ``momentum * t + (1 - momentum) * m``, or m where it was -inf; if m reaches it, the nearest entry becomes
    ``(entry + c * victim) / 2``. Cost: reads the keys of sequences that lose an entry once; in place where the arrays
    are donated. Of equally similar keys the first is taken.

    Args:
        k, v: the cache of a layer ``[B, S, K, H]``, or the stacked caches of all layers ``[L, B, S, K, H]``.
        victims_BK: slots of the entries, int32, 0 to S - 1; beyond, the nearest of these.
        evicted_B: sequences that lose an entry, bool; the others stay as they are, threshold included.
        num_slots_B: slots in use of each sequence; the others are not looked at.
        threshold_B: of similarities, float32, -inf where nothing was evicted so far.
        momentum: how much of the threshold is kept, 0 to 1.
        layer: which layer of a stacked cache, an int32 scalar, from 0 to L - 1; beyond it, the nearest one.
        implementation: by name; ``None`` takes the fastest that can serve.

    Raises:
        ValueError: if shapes or dtypes do not match.
        NotImplementedError: if the requested implementation cannot serve.
    """
    _check(k, v, evicted_B.shape, num_slots_B, threshold_B, layer)
    batch, slots, num_kv, dim = k.shape[-4:]
    if victims_BK.shape != (batch, num_kv) or victims_BK.dtype != jnp.int32 or evicted_B.dtype != bool:
        given = f"{victims_BK.shape} of {victims_BK.dtype} and evicted of {evicted_B.dtype}"
        raise ValueError(f"expected victims [B, K] = {(batch, num_kv)} of int32 and evicted of bool, got {given}")
    facts = {"platform": platform(), "capability": capability(), "dtype": k.dtype, "head_dim": dim, "num_slots": slots}
    chosen = choose("merge_victims", MERGE_VICTIMS, implementation, **facts)
    stacked = (k, v) if layer is not None else (k[None], v[None])
    at = jnp.int32(0) if layer is None else layer
    k_new, v_new, threshold_B = chosen.run(
        *stacked, victims_BK, evicted_B, num_slots_B, threshold_B, at, momentum=momentum
    )
    return (k_new, v_new, threshold_B) if layer is not None else (k_new[0], v_new[0], threshold_B)


def merge_tokens(
    k: jax.Array,
    v: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    evicted_BKE: jax.Array,
    num_slots_B: jax.Array,
    threshold_B: jax.Array,
    *,
    momentum: jax.Array | float,
    layer: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the cache, which holds what is kept of a prompt, with the rest of it merged into it; and thresholds.

    The i-th evicted tokens of all heads share a decision; the threshold follows the mean of all similarities, and then
    every token that reaches it is merged at once: an entry becomes ``(entry + sum c_i token_i) / (1 + n)``. Cost: a
    product of every evicted with every kept key, and one of their shares with the evicted entries; plain JAX.

    Args:
        k_BTKH, v_BTKH: keys and values of the prompt.
        evicted_BKE: positions of the tokens that are not kept, int32, ascending, as many for each head of a sequence;
            T and above where there is none.

    Other arguments, returns and errors are those of :func:`merge_victims`.
    """
    _check(k, v, evicted_BKE.shape[:1], num_slots_B, threshold_B, layer)
    batch, _, num_kv, dim = k.shape[-4:]
    new = (batch, *k_BTKH.shape[1:2], num_kv, dim)
    if k_BTKH.shape != new or v_BTKH.shape != new or not new[1]:
        raise ValueError(f"expected tokens [B, T, K, H] = {new}, got {k_BTKH.shape} and {v_BTKH.shape}")
    if evicted_BKE.ndim != 3 or evicted_BKE.shape[:2] != (batch, num_kv) or evicted_BKE.dtype != jnp.int32:
        given = f"{evicted_BKE.shape} of {evicted_BKE.dtype}"
        raise ValueError(f"expected evicted [B, K, E] of int32 with B={batch} and K={num_kv}, got {given}")
    if not evicted_BKE.shape[2]:
        return k, v, threshold_B
    stacked = (k, v) if layer is not None else (k[None], v[None])
    at = jnp.int32(0) if layer is None else layer
    k_new, v_new, threshold_B = reference.merge_tokens(
        *stacked, k_BTKH, v_BTKH, evicted_BKE, num_slots_B, threshold_B, at, momentum=momentum
    )
    return (k_new, v_new, threshold_B) if layer is not None else (k_new[0], v_new[0], threshold_B)


def _check(k, v, evicted, num_slots_B, threshold_B, layer) -> None:
    shapes = f"got k {k.shape} of {k.dtype} and v {v.shape} of {v.dtype}"
    if (layer is not None) != (k.ndim == 5) or (layer is not None and jnp.shape(layer) != ()):
        raise ValueError(f"expected a scalar layer for a cache [L, B, S, K, H] and for no other, {shapes}, {layer=}")
    if k.ndim not in (4, 5) or k.shape != v.shape or k.dtype != v.dtype or 0 in k.shape:
        raise ValueError(f"expected k, v [B, S, K, H] of one shape and dtype and no axis of 0, {shapes}")
    batch = k.shape[-4]
    if evicted != (batch,) or num_slots_B.shape != (batch,) or threshold_B.shape != (batch,):
        given = f"{evicted}, {num_slots_B.shape} and {threshold_B.shape}"
        raise ValueError(f"expected evicted, num_slots and threshold of B={batch} sequences, got {given}")
    if not jnp.issubdtype(num_slots_B.dtype, jnp.integer) or threshold_B.dtype != jnp.float32:
        given = f"{num_slots_B.dtype} and {threshold_B.dtype}"
        raise ValueError(f"expected num_slots of whole numbers and a threshold of float32, got {given}")
