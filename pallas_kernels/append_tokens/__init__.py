"""Store the keys and values of new tokens in a cache, and bring the summaries of their pages up to date."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.append_tokens import reference
from pallas_kernels.dispatch import Implementation, capability, choose, kernel, platform
from pallas_kernels.partition import per_device

APPEND_TOKENS = (
    kernel("append_tokens", "mosaic_gpu", "append_tokens"),
    kernel("append_tokens", "mosaic_tpu", "append_tokens"),
    Implementation(name="xla", refuse=reference.refuse, run=reference.append_tokens),
)


@per_device("k v summary", k="BSKH", v="BSKH", summary="BPKX")
def append_tokens(
    k: jax.Array,
    v: jax.Array,
    summary: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    slots_BT: jax.Array,
    *,
    kind: Literal["mean", "bounds"],
    page_size: int,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the cache and its page summaries with T new tokens of each sequence in consecutive slots.

    The summary of every page that a token falls into is computed anew from its keys, those of slots up to the newest
    token, so that it is exact even after slots were given up and taken again. Cost: reads one page of keys of each
    sequence and key/value head, two where the tokens cross into the next. In place where the arguments are donated.

    Args:
        k, v: the cache of a layer ``[B, S, K, H]``, or the stacked caches of all layers ``[L, B, S, K, H]``.
        summary: of its pages ``[B, P, K, X]`` or ``[L, B, P, K, X]``, see :func:`pallas_kernels.summarize_pages`; P may
            be more than there are pages.
        k_BTKH, v_BTKH: keys and values of the new tokens, cast to the cache's dtype.
        slots_BT: the slot of each token, ascending by one; tokens with slots outside of the cache are not stored.
        kind: of the summaries.
        page_size: slots of a page, at least T.
        layer: which layer of a stacked cache, an int32 scalar, from 0 to L - 1; beyond it, the nearest one.
        implementation: by name; ``None`` takes the fastest that can serve.

    Raises:
        ValueError: if shapes do not match.
        NotImplementedError: if the requested implementation cannot serve.
    """
    check(k, v, summary, k_BTKH, v_BTKH, slots_BT, kind, page_size, layer)
    chosen = choose("append_tokens", APPEND_TOKENS, implementation, **facts(k, summary, slots_BT, page_size))
    k_BTKH, v_BTKH = k_BTKH.astype(k.dtype), v_BTKH.astype(v.dtype)
    stacked = (k, v, summary) if layer is not None else (k[None], v[None], summary[None])
    layer = jnp.int32(0) if layer is None else layer
    found = chosen.run(*stacked, k_BTKH, v_BTKH, slots_BT, layer, kind=kind, page_size=page_size)
    return found if k.ndim == 5 else tuple(array[0] for array in found)


def check(k, v, summary, k_BTKH, v_BTKH, slots_BT, kind: str, page_size: int, layer: jax.Array | None) -> None:
    """Raise ValueError if the arguments of :func:`append_tokens` do not fit each other."""
    shapes = f"got k {k.shape}, v {v.shape}, summary {summary.shape}, new {k_BTKH.shape} and {v_BTKH.shape}"
    if (layer is not None) != (k.ndim == 5) or (layer is not None and jnp.shape(layer) != ()):
        raise ValueError(f"expected a scalar layer for a cache [L, B, S, K, H] and for no other, {shapes}, {layer=}")
    batch, slots, num_kv, dim = k.shape[-4:]
    new = (batch, *slots_BT.shape[1:], num_kv, dim)
    if k.shape != v.shape or k.dtype != v.dtype or k_BTKH.shape != new or v_BTKH.shape != new:
        raise ValueError(f"expected k, v [B, S, K, H] and new tokens [B, T, K, H], {shapes}, slots {slots_BT.shape}")
    width = {"mean": dim, "bounds": 2 * dim}.get(kind)
    if width is None:
        raise ValueError(f"expected kind 'mean' or 'bounds', got {kind!r}")
    if not 1 <= slots_BT.shape[1] <= page_size:
        raise ValueError(f"expected 1 to page_size={page_size} new tokens, got {slots_BT.shape[1]}")
    pages = -(-slots // page_size)
    if summary.shape[-3:-2] < (pages,) or summary.shape != (*k.shape[:-3], summary.shape[-3], num_kv, width):
        raise ValueError(f"expected summaries [B, P, K, X] with P of at least {pages} and X = {width}, {shapes}")


def facts(k: jax.Array, summary: jax.Array, slots_BT: jax.Array, page_size: int) -> dict[str, Any]:
    """Return what implementations look at to say whether they can serve."""
    return {
        "platform": platform(),
        "capability": capability(),
        "dtype": k.dtype,
        "summary_dtype": summary.dtype,
        "head_dim": k.shape[-1],
        "num_kv": k.shape[-2],
        "num_slots": k.shape[-3],
        "page_size": page_size,
        "num_new": slots_BT.shape[1],
    }
