"""Attend to columns and to diagonals that the last queries attend to (Jiang et al. 2024, "MInference 1.0: Accelerating
Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", section 3.2).

The attention of the last 64 queries, a softmax over all keys up to each of them, is added up by key, which finds
verticals, and by distance between query and key, which finds slashes. Both choices hold for every row of the prompt.

Here everything is decided on blocks, so that a row's list has a fixed length. Distances are pooled to bands of
``block_size`` of them, band o holding the distances from ``o * block_size`` on, and keys to blocks. A row of queries
that ends with block i meets the distances of band o in the blocks i - o and i - o - 1. **Band rule:** a block offset is
worth the better one of the two bands that touch it, and the best ``slash + 1`` offsets are listed. ``slash`` bands side
by side are then covered whole, and of bands that lie apart half as many, whole but for the last.

Differences from the paper's code, which ranks single distances and single columns, covers each kept distance with tiles
of 64 wherever it meets a row, and adds the columns outside of them one by one:

- Its tiles can come to any number up to all of them; here ``slash`` and ``vertical`` are the cost, in blocks.
- It forces the first 30 columns and the last 100 distances. Forced here are the first block and band 0, with the blocks
  of offsets 0 and 1: more than that with blocks of at least 100 tokens, and the same in kind with smaller ones.
- A chunk of a prompt is judged by its own last queries, a padded text by the last ones that exist. In a chunk that does
  not start with a block, a band meets a row in a third block, which only the next band brings.
"""

import jax
import jax.numpy as jnp

from dyninf.pytree import pytree
from dyninf.sparsity.base import PromptObs, Selected, SparsityPolicy, require_sizes
from dyninf.sparsity.probes import block_attention, keys_written, last_queries, rows_of
from pallas_kernels import BlockIndex


@pytree(static=("vertical", "slash", "last_queries", "block_size"))
class VerticalSlash(SparsityPolicy):
    """Attend to ``vertical`` blocks of keys and ``slash + 1`` block offsets, those of the last queries.

    A row reads at most ``vertical + slash + 1`` blocks, those that are in both parts once. Deciding costs
    ``2 last_queries S N H`` FLOPs and holds ``last_queries S N`` float32 scores; lists take one sort of as many numbers
    as they have. Exact when ``vertical`` or ``slash + 1`` covers all blocks, and then nothing is decided.

    Args:
        vertical: blocks of keys that every row behind them reads, the first one included (at least 1).
        slash: bands of distances that lists have room for when these lie side by side, band 0 included (at least 1).
        last_queries: queries that decide (at least 1).
        block_size: queries of a row and keys of a block.
    """

    vertical: int = 8  # the paper's default for heads without a pattern of their own: 1000 columns, 6096 slashes
    slash: int = 48
    last_queries: int = 64
    block_size: int = 128

    def select(self, obs: PromptObs) -> Selected | None:
        """Return the union of both parts, ``None`` where one has all blocks; rows of padding get lists as well."""
        num_blocks = -(-obs.k_BSKH.shape[1] // self.block_size)
        if max(self.vertical, self.slash + 1) >= num_blocks:
            return None
        columns_BNC, bands_BNC = pooled_sums(obs, self.last_queries, self.block_size)
        columns_BNC = columns_BNC.at[..., 0].set(jnp.inf)
        bands_BNC = bands_BNC.at[..., 0].set(jnp.inf)
        before_BNC = jnp.pad(bands_BNC[..., :-1], ((0, 0), (0, 0), (1, 0)))
        _, vertical_BNV = jax.lax.top_k(columns_BNC, self.vertical)
        _, offset_BND = jax.lax.top_k(jnp.maximum(bands_BNC, before_BNC), self.slash + 1)
        index = _union(vertical_BNV, offset_BND, rows_of(obs, self.block_size)[1], num_blocks, self.block_size)
        return Selected(index=index)

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if a parameter is out of its range."""
        require_sizes(self, vertical=1, slash=1, last_queries=1, block_size=1)


def pooled_sums(obs: PromptObs, count: int, block_size: int) -> tuple[jax.Array, jax.Array]:
    """Return the attention of the last ``count`` queries by block of keys and by band of distances ``[B, N, C]`` each.

    A query at place s of block a has keys at distances of band a - c in block c up to place s, and of band a - c - 1
    behind it. Two sums over each block therefore hold all that is needed, and diagonals are never gathered.
    """
    asking_BW = last_queries(obs, count)
    place_BW, block_BW = asking_BW % block_size, asking_BW // block_size
    up_to_BW1Y = (jnp.arange(block_size)[None, None] <= place_BW[:, :, None])[:, :, None]
    all_BNWC, near_BNWC = block_attention(obs, asking_BW, up_to_BW1Y.astype(jnp.float32), block_size)
    num_blocks = all_BNWC.shape[-1]
    # The queries lie in few blocks: sums by how many blocks before the last one's.
    last_B1 = jnp.maximum(keys_written(obs)[:, None] - 1, 0) // block_size
    in_last = [
        (last_B1 - block_BW == back)[:, None, :, None] for back in range(-(-(asking_BW.shape[1] - 1) // block_size) + 1)
    ]
    near_BNAC, all_BNAC = (
        jnp.stack([jnp.sum(jnp.where(here, x, 0.0), axis=2) for here in in_last], axis=2) for x in (near_BNWC, all_BNWC)
    )
    return jnp.sum(all_BNAC, axis=2), _by_band(near_BNAC, all_BNAC - near_BNAC, last_B1, num_blocks)


def _by_band(near_BNAC: jax.Array, far_BNAC: jax.Array, last_B1: jax.Array, num_blocks: int) -> jax.Array:
    """Return sums by band ``[B, N, C]`` from those by block of keys for queries in the A last blocks."""
    nearest = ((0, 0), (0, 0), (0, 1), (0, 0))
    # What is behind the place of a query of the block ``back`` is as far as what is before it for ``back + 1``.
    sums_BNAC = jnp.pad(near_BNAC, nearest) + jnp.roll(jnp.pad(far_BNAC, nearest), 1, axis=2)
    bands_BNC = jnp.zeros((*near_BNAC.shape[:2], num_blocks), jnp.float32)
    for back in range(sums_BNAC.shape[2]):
        at_BC = last_B1 - back - jnp.arange(num_blocks)[None]
        taken_BNC = jnp.take_along_axis(sums_BNAC[:, :, back], jnp.maximum(at_BC, 0)[:, None], axis=2)
        bands_BNC += jnp.where(at_BC[:, None] >= 0, taken_BNC, 0.0)
    return bands_BNC


def _union(
    vertical_BNV: jax.Array, offset_BND: jax.Array, last_R: jax.Array, num_blocks: int, block_size: int
) -> BlockIndex:
    """Return for each row the blocks at these offsets before its last one and these, ascending, each once."""
    slashes_BNRD = last_R[None, None, :, None] - offset_BND[:, :, None]
    distance_BNRV = last_R[None, None, :, None] - vertical_BNV[:, :, None]
    twice_BNRV = jnp.any(distance_BNRV[..., None] == offset_BND[:, :, None, None], axis=-1)
    listed_BNRM = jnp.concatenate(
        [
            jnp.where((slashes_BNRD >= 0) & (slashes_BNRD < num_blocks), slashes_BNRD, num_blocks),
            jnp.where((distance_BNRV >= 0) & ~twice_BNRV, vertical_BNV[:, :, None], num_blocks),
        ],
        axis=-1,
    )
    blocks_BNRM = jnp.sort(listed_BNRM, axis=-1)[..., :num_blocks].astype(jnp.int32)
    counts_BNR = jnp.sum(blocks_BNRM < num_blocks, axis=-1, dtype=jnp.int32)
    return BlockIndex(counts=counts_BNR, blocks=blocks_BNRM, block_size=block_size)
