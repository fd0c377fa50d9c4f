"""Dense attention of new tokens over themselves (prefill) or over a cache (decode).

Conventions: queries ``[B, T, N, H]``, keys and values ``[B, S, K, H]``; query head n reads key/value head ``n // G``
with ``G = N / K``; slot s of a cache holds position s; scores are scaled by ``H ** -0.5`` and computed in float32; a
row that may attend to nothing gives zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import cudnn, reference
from pallas_kernels.dispatch import Implementation, capability, choose, explain, kernel, platform
from pallas_kernels.index import KVIndex, check_index
from pallas_kernels.partition import per_device

PREFILL = (
    Implementation(name="cudnn", refuse=cudnn.refuse_prefill, run=cudnn.prefill_attention),
    kernel("block_sparse_attention", "mosaic_gpu", "prefill_attention"),
    kernel("block_sparse_attention", "mosaic_tpu", "prefill_attention"),
    Implementation(name="xla", refuse=reference.refuse, run=reference.prefill_attention),
)
LONG_PREFILL = (PREFILL[1], PREFILL[0], *PREFILL[2:])
LONG = 16384  # tokens of 128 features, from which the Hopper kernel is the faster one (bench/prefill.py)
DECODE = (
    kernel("attention", "mosaic_gpu", "decode_attention"),
    kernel("attention", "mosaic_tpu", "decode_attention"),
    Implementation(name="cudnn", refuse=cudnn.refuse_decode, run=cudnn.decode_attention),
    Implementation(name="xla", refuse=reference.refuse, run=reference.decode_attention),
)


@per_device("BTNH with_lse:BNT", prompts=True, keep_BT="B_")
def prefill_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    lengths_B: jax.Array | None,
    *,
    window: int | None = None,
    keep_BT: jax.Array | None = None,
    offset: jax.Array | int | None = None,
    with_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attend causally among T new tokens that start at position 0, or from a chunk of T tokens to S keys.

    Cost: 4·T²·N·H/2 FLOPs per sequence. Exact.

    Args:
        lengths_B: keys that exist of each sequence; later ones are padding. ``None`` when nothing is padded.
        window: attend to the last ``window`` tokens only (the query's own included).
        keep_BT: tokens whose keys may be attended; ``None`` for all.
        offset: position of the first query, an int32 scalar that may be traced; its S keys are at 0 to S - 1. ``None``
            for S = T queries from position 0 on.
        with_lse: also return the logarithms of the sums of exponentials.
        implementation: ``"mosaic_gpu"``, ``"mosaic_tpu"``, ``"cudnn"`` or ``"xla"``; ``None`` takes the fastest that
            can serve.

    Returns:
        ``[B, T, N, H]`` in q's dtype; with ``with_lse`` also float32 ``[B, N, T]``. Rows of padding are meaningless.

    Raises:
        ValueError: if shapes do not match or the window is empty.
        NotImplementedError: if the requested implementation cannot serve.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, window)
    if offset is None and q_BTNH.shape[1] != k_BSKH.shape[1]:
        raise ValueError(f"expected as many keys as queries, got {k_BSKH.shape[1]} and {q_BTNH.shape[1]}")
    if offset is not None and (jnp.shape(offset) != () or q_BTNH.shape[1] > k_BSKH.shape[1]):
        shapes = f"got offset {jnp.shape(offset)}, q {q_BTNH.shape}, k {k_BSKH.shape}"
        raise ValueError(f"expected a scalar offset and the keys of all queries among those given, {shapes}")
    _check_shape("lengths [B]", lengths_B, q_BTNH.shape[:1])
    _check_shape("keep [B, T]", keep_BT, k_BSKH.shape[:2])
    facts = _facts(q_BTNH, k_BSKH, window=window, masked=keep_BT is not None)
    facts |= {"chunked": offset is not None, "with_lse": with_lse}
    chosen = choose("prefill_attention", _prefill_ways(**facts), implementation, **facts)
    offset = None if offset is None else jnp.asarray(offset, jnp.int32)
    about = {"window": window, "keep_BT": keep_BT, "offset": offset, "with_lse": with_lse}
    return chosen.run(q_BTNH, k_BSKH, v_BSKH, lengths_B, **about)


@per_device("BTNH", k="BSKH", v="BSKH", index="BK BKM")
def decode_attention(
    q_BTNH: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions_BT: jax.Array,
    *,
    layer: jax.Array | None = None,
    index: KVIndex | None = None,
    window: int | None = None,
    valid_BS: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attend from T tokens at given positions over a cache whose slot s holds position s.

    The query at position p reads slots 0 to p, or those of them that lie in the pages of an index. Cost: reads K and V
    once, ``2·S·K·H`` entries per sequence, or ``2·counts·page_size·H`` of every key/value head. Exact without an index.

    Args:
        k, v: the cache of a layer ``[B, S, K, H]``, or the stacked caches of all layers ``[L, B, S, K, H]``.
        positions_BT: position of each query; its own key must already be in the cache. Negative: reads nothing.
        layer: which layer of a stacked cache, an int32 scalar, from 0 to L - 1; beyond it, the nearest one is read.
        index: pages that may be read; ``None`` for all.
        window: attend to the last ``window`` positions only (the query's own included).
        valid_BS: slots that may be read; ``None`` for all.
        implementation: ``"mosaic_gpu"``, ``"mosaic_tpu"``, ``"cudnn"`` or ``"xla"``; ``None`` takes the fastest that
            can serve.

    Returns:
        ``[B, T, N, H]`` in q's dtype; zeros where a query may read nothing.

    Raises:
        ValueError: if shapes do not match or the window is empty.
        NotImplementedError: if the requested implementation cannot serve.
    """
    if (layer is not None) != (k.ndim == 5) or (layer is not None and jnp.shape(layer) != ()):
        raise ValueError(
            f"expected a scalar layer for a cache [L, B, S, K, H] and for no other, got {layer=}, k {k.shape}"
        )
    k_BSKH, v_BSKH = (jax.ShapeDtypeStruct(array.shape[-4:], array.dtype) for array in (k, v))
    _check(q_BTNH, k_BSKH, v_BSKH, window)
    _check_shape("positions [B, T]", positions_BT, q_BTNH.shape[:2])
    _check_shape("valid [B, S]", valid_BS, k_BSKH.shape[:2])
    if index is not None:
        check_index(index, batch=k_BSKH.shape[0], num_kv=k_BSKH.shape[2])
    facts = _facts(q_BTNH, k_BSKH, window=window, masked=valid_BS is not None)
    facts |= {"page_size": None if index is None else index.page_size}
    facts |= {"num_entries": None if index is None else index.pages.shape[2]}
    chosen = choose("decode_attention", DECODE, implementation, **facts)
    return chosen.run(q_BTNH, k, v, positions_BT, layer=layer, index=index, window=window, valid_BS=valid_BS)


def explain_attention(*, head_dim: int, dtype: str, num_queries: int) -> dict[str, list[tuple[str, str | None]]]:
    """Say for both operations which implementation could serve a plain call here, and why the others could not."""
    dtype = jnp.dtype(dtype)
    common = {"platform": platform(), "dtype": dtype, "kv_dtype": dtype, "head_dim": head_dim}
    common |= {"window": None, "masked": False, "capability": capability(), "num_heads": 1, "num_kv": 1}
    return {
        "prefill_attention": explain(
            _prefill_ways(head_dim=head_dim, num_queries=num_queries),
            **common,
            num_queries=num_queries,
            num_keys=num_queries,
        ),
        "decode_attention": explain(
            DECODE,
            **common,
            num_queries=1,
            num_keys=num_queries,
            page_size=None,
            num_entries=None,
        ),
    }


def _prefill_ways(*, head_dim: int, num_queries: int, **_: Any) -> tuple[Implementation, ...]:
    """Return the implementations of a prefill, the fastest first."""
    long = head_dim == 128 and num_queries >= LONG and num_queries % 8 == 0
    return LONG_PREFILL if long else PREFILL


def _facts(q_BTNH: jax.Array, k_BSKH: jax.Array, *, window: int | None, masked: bool) -> dict:
    num_keys = k_BSKH.shape[1]
    return {
        "platform": platform(),
        "capability": capability(),
        "dtype": q_BTNH.dtype,
        "kv_dtype": k_BSKH.dtype,
        "head_dim": q_BTNH.shape[-1],
        "window": None if window is not None and window >= num_keys else window,
        "masked": masked,
        "num_queries": q_BTNH.shape[1],
        "num_keys": num_keys,
        "num_heads": q_BTNH.shape[2],
        "num_kv": k_BSKH.shape[2],
    }


def _check(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"expected a window of at least 1 token, got {window}; use None for full attention")
    shapes = f"got q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}"
    if q_BTNH.ndim != 4 or k_BSKH.ndim != 4 or k_BSKH.shape != v_BSKH.shape:
        raise ValueError(f"expected q [B, T, N, H] and k, v of one shape [B, S, K, H], {shapes}")
    if q_BTNH.shape[0] != k_BSKH.shape[0] or q_BTNH.shape[3] != k_BSKH.shape[3] or q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"expected one batch and head_dim, and query heads a multiple of key/value heads, {shapes}")


def _check_shape(name: str, array: jax.Array | None, shape: tuple[int, ...]) -> None:
    if array is not None and array.shape != shape:
        raise ValueError(f"expected {name} of shape {shape}, got {array.shape}")
