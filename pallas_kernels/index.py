"""Which pages of a KV cache a key/value head reads, and which blocks of keys a block of queries attends to.

The contracts between policies and kernels.
"""

import functools
from dataclasses import dataclass

import jax


@functools.partial(jax.tree_util.register_dataclass, data_fields=["counts", "pages"], meta_fields=["page_size"])
@dataclass(frozen=True, kw_only=True)
class KVIndex:
    """Pages of ``page_size`` slots; page p holds the slots from ``p * page_size`` on.

    Attributes:
        counts: how many pages each sequence and key/value head reads, int32 ``[B, K]``, 0 to M.
        pages: their numbers, int32 ``[B, K, M]``, ascending and all different among the first ``counts``; the rest is
            padding and is never read. Numbers beyond the cache read nothing.
        page_size: slots of a page, static.
    """

    counts: jax.Array
    pages: jax.Array
    page_size: int


def check_index(index: KVIndex, *, batch: int, num_kv: int) -> None:
    """Raise ValueError if an index does not fit a cache of this batch and these key/value heads."""
    if not isinstance(index, KVIndex):
        raise ValueError(f"expected index to be a KVIndex, got {type(index).__name__}")
    if not isinstance(index.page_size, int) or index.page_size < 1:
        raise ValueError(f"expected page_size to be a whole number of at least 1 slot, got {index.page_size!r}")
    shapes = f"got counts {index.counts.shape} and pages {index.pages.shape}"
    if index.pages.ndim != 3 or index.pages.shape[:2] != (batch, num_kv) or index.counts.shape != (batch, num_kv):
        raise ValueError(f"expected counts [B, K] = {(batch, num_kv)} and pages [B, K, M] for this cache, {shapes}")
    if not index.pages.shape[2]:
        raise ValueError(f"expected pages for at least one entry, {shapes}")
    if index.counts.dtype != "int32" or index.pages.dtype != "int32":
        raise ValueError(f"expected an index of int32, got {index.counts.dtype} and {index.pages.dtype}")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["counts", "blocks"], meta_fields=["block_size"])
@dataclass(frozen=True, kw_only=True)
class BlockIndex:
    """Blocks of ``block_size`` keys for rows of as many queries; block b holds the keys from ``b * block_size`` on.

    Attributes:
        counts: how many blocks each row attends to, int32 ``[B, N, R]``, 0 to M; R rows cover the T queries.
        blocks: their numbers, int32 ``[B, N, R, M]``, ascending and all different among the first ``counts``; the rest
            is padding and is never read. Numbers beyond the keys read nothing.
        block_size: queries of a row and keys of a block, static.
    """

    counts: jax.Array
    blocks: jax.Array
    block_size: int


def check_blocks(index: BlockIndex, *, batch: int, num_heads: int, num_queries: int) -> None:
    """Raise ValueError if an index does not fit queries ``[B, T, N, H]``."""
    if not isinstance(index, BlockIndex):
        raise ValueError(f"expected index to be a BlockIndex, got {type(index).__name__}")
    if not isinstance(index.block_size, int) or index.block_size < 1:
        raise ValueError(f"expected block_size to be a whole number of at least 1 token, got {index.block_size!r}")
    rows = (batch, num_heads, -(-num_queries // index.block_size))
    shapes = f"got counts {index.counts.shape} and blocks {index.blocks.shape}"
    if index.blocks.ndim != 4 or index.blocks.shape[:3] != rows or index.counts.shape != rows:
        raise ValueError(f"expected counts [B, N, R] = {rows} and blocks [B, N, R, M] for these queries, {shapes}")
    if not index.blocks.shape[3]:
        raise ValueError(f"expected blocks for at least one entry, {shapes}")
    if index.counts.dtype != "int32" or index.blocks.dtype != "int32":
        raise ValueError(f"expected an index of int32, got {index.counts.dtype} and {index.blocks.dtype}")
