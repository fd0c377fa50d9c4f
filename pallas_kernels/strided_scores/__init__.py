"""Score blocks of keys for blocks of queries from sums of their scores along antidiagonals.

Conventions: queries ``[B, T, N, H]`` at positions ``offset`` to ``offset + T - 1``, keys ``[B, S, K, H]`` at positions
0 to S - 1; query head n reads key head ``n // G`` with ``G = N / K``. ``stride`` tokens in a row are one strided row of
queries or one strided column of keys, and their score is the sum of the ``stride`` products on the antidiagonal of the
square between them, ``sum_s q[i * stride + stride - 1 - s] . k[j * stride + s]``: one product over ``stride * H``
features, and ``stride`` times fewer products than there are pairs of tokens.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import facts
from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.partition import per_device
from pallas_kernels.strided_scores import reference

STRIDED_SCORES = (Implementation(name="xla", refuse=reference.refuse, run=reference.strided_scores),)


@per_device("BNRC")
def strided_scores(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    *,
    stride: int,
    block_size: int,
    offset: jax.Array | int = 0,
    lengths_B: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Return the softmax mass that each row of blocks gives to each block of keys, float32 ``[B, N, R, C]``.

    A strided row i sees the strided columns up to itself, and the mass of a block in it is the part of its softmax that
    falls on the block's columns, ``exp(lse_block - lse_row)`` with the logarithms of the sums of exponentials over
    both; a row of blocks adds up its ``block_size / stride`` strided rows. Blocks thus hold at least 0 and their sum is
    the number of strided rows with a token. Cost: ``2 * T * S * H / stride`` FLOPs a head, half of them causal.

    Args:
        stride: tokens of a strided row; divides ``block_size``.
        block_size: queries of a row and keys of a block.
        offset: position of the first query, an int32 scalar that may be traced, a multiple of ``block_size``; keys
            from ``offset + T`` on are not read.
        lengths_B: tokens of each sequence, 0 to S; ``None`` for all. Queries and keys from there on count as zeros,
            whatever they hold, and strided rows of these alone as nothing.
        scale: multiplies the sums; ``None`` for ``H ** -0.5 / stride``.
        implementation: ``"xla"``; ``None`` takes the fastest that can serve.

    Returns:
        Scores of C blocks of keys for R rows of queries; zeros behind a row, and in rows without a token.

    Raises:
        ValueError: if shapes do not match or a number is out of range.
        NotImplementedError: if the requested implementation cannot serve.

    Source: Xu et al. 2025 (XAttention), section 2.1. Their code pads prompts with zeros as well; it gives each query
    head keys of its own and rounds probabilities to the dtype of the queries, where these are float32.
    """
    check(q_BTNH, k_BSKH, stride, block_size, offset, lengths_B)
    about = facts(q_BTNH, k_BSKH) | {"stride": stride, "block_size": block_size}
    chosen = choose("strided_scores", STRIDED_SCORES, implementation, **about)
    offset = jnp.asarray(offset, jnp.int32)
    ends_B = jnp.full(q_BTNH.shape[0], offset + q_BTNH.shape[1], jnp.int32)
    if lengths_B is not None:
        ends_B = jnp.minimum(ends_B, lengths_B.astype(jnp.int32))
    scale = q_BTNH.shape[3] ** -0.5 / stride if scale is None else scale
    return chosen.run(q_BTNH, k_BSKH, offset, ends_B, stride=stride, block_size=block_size, scale=scale)


def check(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    stride: int,
    block_size: int,
    offset: jax.Array | int,
    lengths_B: jax.Array | None,
) -> None:
    """Raise ValueError if the arguments of :func:`strided_scores` do not fit each other."""
    shapes = f"got q {q_BTNH.shape} and k {k_BSKH.shape}"
    if q_BTNH.ndim != 4 or k_BSKH.ndim != 4 or not q_BTNH.shape[1]:
        raise ValueError(f"expected q [B, T, N, H] with T of at least 1 and k [B, S, K, H], {shapes}")
    if q_BTNH.shape[0] != k_BSKH.shape[0] or q_BTNH.shape[3] != k_BSKH.shape[3] or q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"expected one batch and head_dim, and query heads a multiple of key heads, {shapes}")
    for name, value in (("stride", stride), ("block_size", block_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"expected {name} to be a whole number of at least 1 token, got {value!r}")
    if block_size % stride:
        raise ValueError(f"expected block_size to be a multiple of {stride=}, got {block_size=}")
    if jnp.shape(offset) != ():
        raise ValueError(f"expected a scalar offset, got shape {jnp.shape(offset)}")
    if isinstance(offset, int) and (offset % block_size or not 0 <= offset <= k_BSKH.shape[1] - q_BTNH.shape[1]):
        raise ValueError(
            f"expected a multiple of {block_size=} with the queries' keys among k, got {offset=}, {shapes}"
        )
    if lengths_B is not None and lengths_B.shape != q_BTNH.shape[:1]:
        raise ValueError(f"expected lengths [B] of shape {q_BTNH.shape[:1]}, got {lengths_B.shape}")
