"""Attend to the blocks whose mean key points where a row's mean query points (Jiang et al. 2024, "MInference 1.0:
Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", section 3.2, "block-sparse").

The queries of a row and the keys of a block are averaged, and a block is worth the dot product of the two means. Each
row reads the best blocks up to its own.

Differences from the paper's code: it forces no block, not even a row's own (``sinks=0, recent=0``), where this reads
the first and the own block by default; its blocks are of 64 tokens and it reads 100 of them; it counts the zeros that
fill up the last block into its mean, which here is over the tokens that exist; and query heads that share a key/value
head do not copy its keys.
"""

import jax
import jax.numpy as jnp

from dyninf.pytree import pytree
from dyninf.sparsity.base import PromptObs, Selected, SparsityPolicy, require_sizes
from dyninf.sparsity.probes import MOST_SCORES, keys_written
from pallas_kernels import BlockIndex, choose_blocks

LEAST = -1e30  # of blocks without keys: below every score, and finite


@pytree(static=("budget", "sinks", "recent", "block_size"))
class PooledBlocks(SparsityPolicy):
    """Attend to the ``budget`` blocks of the largest products of mean query and mean key.

    Deciding reads queries and keys once and costs ``2 R C N H`` FLOPs for R rows and C blocks; of prompts so long that
    the scores would take more than 1 GB, some rows at a time. Exact when the budget covers all blocks, and
    then nothing is decided.

    Args:
        budget: blocks that a row reads at most, forced ones included.
        sinks: first blocks that are always read.
        recent: last blocks up to a row's own that are always read.
        block_size: queries of a row and keys of a block.
    """

    budget: int = 50  # the paper's 100 blocks of 64 tokens
    sinks: int = 1
    recent: int = 1
    block_size: int = 128

    def select(self, obs: PromptObs) -> Selected | None:
        """Return the best blocks of each row, ``None`` for all; rows of padding get lists as well."""
        if self.budget * self.block_size >= obs.k_BSKH.shape[1]:
            return None
        size, end_B = self.block_size, keys_written(obs)
        batch, _, num_heads, _ = obs.q_BTNH.shape
        q_BRNH, _ = pooled_means(obs.q_BTNH, jnp.maximum(end_B - obs.offset, 0), size)
        k_BCKH, has_keys_BC = pooled_means(obs.k_BSKH, end_B, size)
        q_BNRH = jnp.moveaxis(q_BRNH, 1, 2)
        rows, blocks, num_kv, dim = q_BNRH.shape[2], *k_BCKH.shape[1:]

        def choose(q_BNRH: jax.Array, first: jax.Array | int) -> BlockIndex:
            q_BKXH = q_BNRH.reshape(batch, num_kv, -1, dim)
            scores = jax.lax.dot_general(q_BKXH, k_BCKH, (((3,), (3,)), ((0, 1), (0, 2))))
            scores_BNRC = scores.reshape(batch, num_heads, -1, blocks)
            scores_BNRC = jnp.where(has_keys_BC[:, None, None], scores_BNRC, LEAST)
            forced = {"budget": self.budget, "sinks": self.sinks, "recent": self.recent}
            return choose_blocks(scores_BNRC, block_size=size, offset=obs.offset + first * size, **forced)[0]

        at_once = max(1, MOST_SCORES // (batch * num_heads * blocks))
        if at_once >= rows:
            return Selected(index=choose(q_BNRH, 0))
        pieces = -(-rows // at_once)
        q_BNRH = jnp.pad(q_BNRH, ((0, 0), (0, 0), (0, pieces * at_once - rows), (0, 0)))
        q_PBNRH = jnp.moveaxis(q_BNRH.reshape(batch, num_heads, pieces, at_once, dim), 2, 0)
        firsts_P = jnp.arange(pieces, dtype=jnp.int32) * at_once
        index = jax.lax.map(lambda piece: choose(*piece), (q_PBNRH, firsts_P))
        join = lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, num_heads, -1, *x.shape[4:])[:, :, :rows]  # noqa: E731
        return Selected(index=jax.tree.map(join, index))

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if a parameter is out of its range."""
        require_sizes(self, budget=1, block_size=1, sinks=0, recent=0)
        if self.budget < self.sinks + self.recent:
            raise ValueError(
                f"expected a budget of at least sinks + recent = {self.sinks + self.recent} blocks for PooledBlocks, "
                f"got {self.budget}; raise it, or force fewer"
            )


def pooled_means(x_BTNH: jax.Array, lengths_B: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    """Return the mean of each block over the tokens that exist, float32 ``[B, C, N, H]``, zero where there are none,
    and whether there are any ``[B, C]``."""
    batch, length = x_BTNH.shape[:2]
    blocks = -(-length // block_size)
    exists_BT = jnp.arange(blocks * block_size)[None] < lengths_B[:, None]
    padded = jnp.pad(x_BTNH, ((0, 0), (0, blocks * block_size - length), (0, 0), (0, 0)))
    held = jnp.where(exists_BT[:, :, None, None], padded.astype(jnp.float32), 0.0)
    sums_BCNH = jnp.sum(held.reshape(batch, blocks, block_size, *held.shape[2:]), axis=2)
    counts_BC = jnp.sum(exists_BT.reshape(batch, blocks, block_size), axis=2)
    return sums_BCNH / jnp.maximum(counts_BC, 1)[:, :, None, None], counts_BC > 0
