"""Causal attention of a prompt to those blocks of keys that an index names: sparse prefill.

Conventions: queries ``[B, T, N, H]`` at positions ``offset`` to ``offset + T - 1``, keys and values ``[B, S, K, H]``
at positions 0 to S - 1; query head n reads key/value head ``n // G`` with ``G = N / K``; scores are scaled by
``H ** -0.5`` and computed in float32. A query sees the keys up to its own position, within the blocks of its row.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.dispatch import Implementation, capability, choose, kernel, platform
from pallas_kernels.index import BlockIndex, check_blocks
from pallas_kernels.partition import per_device

BLOCK_SPARSE = (
    kernel("block_sparse_attention", "mosaic_gpu", "block_sparse_attention"),
    kernel("block_sparse_attention", "mosaic_tpu", "block_sparse_attention"),
    Implementation(name="xla", refuse=reference.refuse, run=reference.block_sparse_attention),
)


@per_device("BTNH with_lse:BNT", prompts=True, index="BNR BNRM")
def block_sparse_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    index: BlockIndex,
    lengths_B: jax.Array | None = None,
    *,
    offset: jax.Array | int = 0,
    window: int | None = None,
    sinks: int = 0,
    order_BNT: jax.Array | None = None,
    with_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attend causally from T tokens to the blocks of keys that the row of each of them names.

    Cost: ``4 * counts * block_size² * H`` FLOPs a row; padding of the index costs nothing. Exact when every row names
    all blocks up to its own.

    Args:
        index: blocks for each row of ``block_size`` queries, by query head.
        lengths_B: keys that exist of each sequence, 0 to S; ``None`` for all.
        offset: position of the first query, an int32 scalar that may be traced: a chunk of a longer prompt.
        window: of the blocks that are named, see only keys of the last ``window`` positions (the query's own
            included), and sinks.
        sinks: first positions that are seen whatever the window.
        order_BNT: of a whole prompt, its positions in the order in which rows and blocks of each query head take them,
            int32, every position once; ``None`` for the order of the text. Who sees whom stays a matter of positions,
            and the output is in the order of the text.
        with_lse: also return the logarithms of the sums of exponentials.
        implementation: ``"mosaic_gpu"``, ``"mosaic_tpu"`` or ``"xla"``; ``None`` takes the fastest that can serve.

    Returns:
        ``[B, T, N, H]`` in q's dtype, zeros where a query sees nothing; with ``with_lse`` also float32 ``[B, N, T]``,
        -inf where a query sees nothing.

    Raises:
        ValueError: if shapes do not match, or a window, sinks or a static offset is out of range, or an order is given
            for a part of a prompt.
        NotImplementedError: if the requested implementation cannot serve.
    """
    check(q_BTNH, k_BSKH, v_BSKH, lengths_B, offset, window, sinks)
    check_blocks(index, batch=q_BTNH.shape[0], num_heads=q_BTNH.shape[2], num_queries=q_BTNH.shape[1])
    options = {"offset": jnp.asarray(offset, jnp.int32), "window": window, "sinks": sinks, "with_lse": with_lse}
    about = facts(q_BTNH, k_BSKH) | {"block_size": index.block_size, "ordered": order_BNT is not None}
    if order_BNT is not None:
        _check_order(q_BTNH, k_BSKH, offset, order_BNT)
        options["order_BNT"] = order_BNT
    chosen = choose("block_sparse_attention", BLOCK_SPARSE, implementation, **about)
    return chosen.run(q_BTNH, k_BSKH, v_BSKH, index, lengths_B, **options)


def check(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    lengths_B: jax.Array | None,
    offset: jax.Array | int,
    window: int | None,
    sinks: int,
) -> None:
    """Raise ValueError if the arguments of a prefill do not fit each other."""
    shapes = f"got q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}"
    if q_BTNH.ndim != 4 or k_BSKH.ndim != 4 or k_BSKH.shape != v_BSKH.shape or not q_BTNH.shape[1]:
        raise ValueError(f"expected q [B, T, N, H] with T of at least 1 and k, v of one shape [B, S, K, H], {shapes}")
    if q_BTNH.shape[0] != k_BSKH.shape[0] or q_BTNH.shape[3] != k_BSKH.shape[3] or q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"expected one batch and head_dim, and query heads a multiple of key/value heads, {shapes}")
    if lengths_B is not None and lengths_B.shape != q_BTNH.shape[:1]:
        raise ValueError(f"expected lengths [B] of shape {q_BTNH.shape[:1]}, got {lengths_B.shape}")
    if jnp.shape(offset) != ():
        raise ValueError(f"expected a scalar offset, got shape {jnp.shape(offset)}")
    if isinstance(offset, int) and not 0 <= offset <= k_BSKH.shape[1] - q_BTNH.shape[1]:
        raise ValueError(f"expected the queries' own keys among the {k_BSKH.shape[1]}, got {offset=}, {shapes}")
    if window is not None and window < 1:
        raise ValueError(f"expected a window of at least 1 token, got {window}; use None for full attention")
    if not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"expected sinks to be a whole number of at least 0 tokens, got {sinks!r}")
    if sinks and window is None:
        raise ValueError(f"expected a window beside {sinks=}; without one every key is seen anyway")


def _check_order(q_BTNH: jax.Array, k_BSKH: jax.Array, offset: jax.Array | int, order_BNT: jax.Array) -> None:
    """Raise ValueError unless an order fits queries of a whole prompt."""
    batch, length, num_heads, _ = q_BTNH.shape
    if k_BSKH.shape[1] != length or not isinstance(offset, int) or offset:
        raise ValueError(f"expected a whole prompt for an order, got {length} queries of {k_BSKH.shape[1]} keys")
    if order_BNT.shape != (batch, num_heads, length) or order_BNT.dtype != "int32":
        raise ValueError(
            f"expected an order [B, N, T] = {(batch, num_heads, length)} of int32, got {order_BNT.shape} of "
            f"{order_BNT.dtype}"
        )


def facts(q_BTNH: jax.Array, k_BSKH: jax.Array) -> dict[str, Any]:
    """Return what implementations look at to say whether they can serve."""
    return {
        "platform": platform(),
        "capability": capability(),
        "dtype": q_BTNH.dtype,
        "kv_dtype": k_BSKH.dtype,
        "head_dim": q_BTNH.shape[3],
        "num_queries": q_BTNH.shape[1],
        "num_keys": k_BSKH.shape[1],
        "num_heads": q_BTNH.shape[2],
        "num_kv": k_BSKH.shape[2],
    }
