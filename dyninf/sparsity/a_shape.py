"""The A-shape and the tri-shape: the first tokens, the last ones before a query, and no other."""

import jax
import jax.numpy as jnp

from dyninf.depth.base import require_integer
from dyninf.pytree import pytree
from dyninf.sparsity.base import PromptObs, Selected, SparsityPolicy
from pallas_kernels import BlockIndex


@pytree(static=("sinks", "window", "block_size"))
class AShape(SparsityPolicy):
    """Attend to the first ``sinks`` tokens and to the last ``window`` ones, the query's own included.

    Holds to the token: the index names the blocks, and the kernel masks inside of them. All heads of all layers are
    alike, so that nothing is computed to choose. Cost: ``sinks + window`` tokens and about a block for each query,
    whatever the length of the prompt; exact up to ``sinks + window`` tokens.

    Args:
        sinks: first tokens of a prompt that are always seen.
        window: last tokens that are seen (at least 1).
        block_size: queries of a row and keys of a block (tokens).

    Source: MInference 1.0 (Jiang et al. 2024), section 3, whose kernel counts 128 and 3968 tokens in blocks of 64; the
    mask is that of StreamingLLM (Xiao et al. 2023).
    """

    sinks: int = 128
    window: int = 4096
    block_size: int = 128

    def select(self, obs: PromptObs) -> Selected:
        """Return the blocks of sinks and window of each row."""
        counts_R, blocks_RM, _ = _blocks(obs, self.sinks, self.window, self.block_size)
        shape = (obs.q_BTNH.shape[0], obs.q_BTNH.shape[2])
        index = BlockIndex(
            counts=jnp.broadcast_to(counts_R, (*shape, *counts_R.shape)),
            blocks=jnp.broadcast_to(blocks_RM, (*shape, *blocks_RM.shape)),
            block_size=self.block_size,
        )
        return Selected(index=index, window=self.window, sinks=self.sinks)

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if a size is out of its range."""
        _validate(self)


@pytree(static=("sinks", "window", "block_size", "last"))
class TriShape(SparsityPolicy):
    """Attend as :class:`AShape` does, and from the last tokens of a prompt to all of it.

    Works on whole blocks: rows of queries see all keys of the blocks that hold their sinks and windows, and rows that
    hold one of the ``last`` queries see everything before them. Cost: that of the A-shape, and ``last`` dense queries
    rounded up to rows. The index has room for all blocks in every row, ``4 N T S / block_size²`` bytes a sequence: read
    very long prompts in chunks.

    Args:
        sinks: first tokens of a prompt that are always seen.
        window: last tokens that are seen (at least 1).
        block_size: queries of a row and keys of a block (tokens).
        last: last tokens of a prompt that see all of it.

    Source: the tri-shape of MInference's code (Jiang et al. 2024) and of SCBench (Li et al. 2024), there with 100 dense
    queries; here a block of them.
    """

    sinks: int = 128
    window: int = 4096
    block_size: int = 128
    last: int = 128

    def select(self, obs: PromptObs) -> Selected:
        """Return the blocks of sinks and window of each row, all blocks of the last rows."""
        (batch, _, num_heads, _), num_keys = obs.q_BTNH.shape, obs.k_BSKH.shape[1]
        size, num_blocks = self.block_size, -(-num_keys // self.block_size)
        counts_R, blocks_RM, last_R = _blocks(obs, self.sinks, self.window, size)
        blocks_RC = jnp.pad(blocks_RM, ((0, 0), (0, num_blocks - blocks_RM.shape[1])))
        first_R = obs.offset + jnp.arange(len(counts_R)) * size
        lengths_B = jnp.full(batch, num_keys) if obs.lengths_B is None else obs.lengths_B
        end_BR = jnp.minimum(first_R[None] + size, lengths_B[:, None])
        whole_BR = (end_BR > lengths_B[:, None] - self.last) & (first_R[None] < lengths_B[:, None])
        counts_BR = jnp.where(whole_BR, last_R[None] + 1, counts_R[None])
        blocks_BRC = jnp.where(whole_BR[..., None], jnp.arange(num_blocks)[None, None], blocks_RC[None])
        index = BlockIndex(
            counts=jnp.broadcast_to(counts_BR[:, None], (batch, num_heads, *counts_BR.shape[1:])),
            blocks=jnp.broadcast_to(blocks_BRC[:, None], (batch, num_heads, *blocks_BRC.shape[1:])),
            block_size=size,
        )
        return Selected(index=index)

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if a size is out of its range."""
        _validate(self)
        require_integer("last", self.last, 0, float("inf"))


def _blocks(obs: PromptObs, sinks: int, window: int, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return how many blocks each row names ``[R]``, which ``[R, M]``, and the last one that it may name ``[R]``."""
    num_blocks = -(-obs.k_BSKH.shape[1] // size)
    first_R = obs.offset + jnp.arange(-(-obs.q_BTNH.shape[1] // size)) * size
    last_R = jnp.minimum((first_R + size - 1) // size, num_blocks - 1)
    sinks_R = jnp.minimum(-(-sinks // size), last_R + 1)
    begin_R = jnp.maximum((first_R - window + 1) // size, sinks_R)
    # A window of a row is ``window + size - 1`` tokens in a line.
    entries = min(-(-sinks // size) + -(-(window + size - 2) // size) + 1, num_blocks)
    entry_1M = jnp.arange(entries)[None]
    blocks_RM = jnp.where(entry_1M < sinks_R[:, None], entry_1M, (begin_R - sinks_R)[:, None] + entry_1M)
    counts_R = sinks_R + jnp.maximum(last_R - begin_R + 1, 0)
    return counts_R.astype(jnp.int32), blocks_RM.astype(jnp.int32), last_R


def _validate(policy: AShape | TriShape) -> None:
    require_integer("sinks", policy.sinks, 0, float("inf"))
    require_integer("window", policy.window, 1, float("inf"))
    require_integer("block_size", policy.block_size, 1, float("inf"))
