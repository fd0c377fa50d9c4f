"""PowerAttention: blocks at distances that are powers of two."""

import jax.numpy as jnp

from dyninf.depth.base import require_integer
from dyninf.pytree import pytree
from dyninf.sparsity.base import PromptObs, Selected, SparsityPolicy
from pallas_kernels import BlockIndex


@pytree(static=("window", "unit", "block_size", "dense_layers", "period"))
class PowerAttention(SparsityPolicy):
    """Attend to the first unit of tokens, to the nearest ones, and to those whose distance is a power of two.

    A token may then reach every other within as many layers as the distance has binary digits. Units are named by their
    positions, for all heads alike, so that nothing is computed to choose. Cost: for each row of queries ``window + 1``
    units and the binary logarithm of the prompt's. Works on whole blocks.

    Args:
        window: nearest units that are seen, the query's own included (at least 1).
        unit: tokens that are seen, or not, together; a multiple of ``block_size``.
        block_size: queries of a row and keys of a block of the kernel (tokens).
        dense_layers: of every ``period`` layers the first ones that attend to everything; 0 for none.
        period: layers after which dense ones come again.

    Source: PowerAttention (Chen et al. 2025): units of 256, five of them near, two dense layers of seven in the runs on
    RULER, where in the seven is not said. A chunk that begins within a block has rows that reach over two units and see
    what either of them sees.
    """

    window: int = 5
    unit: int = 256
    block_size: int = 128
    dense_layers: int = 2
    period: int = 7

    def select(self, obs: PromptObs) -> Selected | None:
        """Return the blocks of each row, ``None`` in dense layers."""
        if obs.layer % self.period < self.dense_layers:
            return None
        (batch, length, num_heads, _), num_keys, size = obs.q_BTNH.shape, obs.k_BSKH.shape[1], self.block_size
        num_units, num_blocks = -(-num_keys // self.unit), -(-num_keys // size)
        powers = [1 << digits for digits in range(num_units.bit_length())]
        distances_1D = jnp.array([*range(self.window), *(power for power in powers if power >= self.window)])[None]
        first_R1 = (obs.offset + jnp.arange(-(-length // size)) * size)[:, None]
        own_R1, next_R1 = first_R1 // self.unit, (first_R1 + size - 1) // self.unit
        units_RU = jnp.concatenate([jnp.zeros_like(own_R1), own_R1 - distances_1D, next_R1 - distances_1D], axis=1)
        units_RU = jnp.sort(jnp.where(units_RU < 0, num_units, units_RU), axis=1)
        again_RU = jnp.pad(units_RU[:, 1:] == units_RU[:, :-1], ((0, 0), (1, 0)))
        units_RU = jnp.sort(jnp.where(again_RU, num_units, units_RU), axis=1)[:, :num_units]
        parts = self.unit // size
        blocks_RM = (units_RU[:, :, None] * parts + jnp.arange(parts)[None, None]).reshape(len(units_RU), -1)
        blocks_RM = blocks_RM[:, :num_blocks].astype(jnp.int32)
        last_R1 = jnp.minimum((first_R1 + size - 1) // size, num_blocks - 1)
        counts_R = jnp.sum(blocks_RM <= last_R1, axis=1, dtype=jnp.int32)
        index = BlockIndex(
            counts=jnp.broadcast_to(counts_R, (batch, num_heads, *counts_R.shape)),
            blocks=jnp.broadcast_to(blocks_RM, (batch, num_heads, *blocks_RM.shape)),
            block_size=size,
        )
        return Selected(index=index)

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if a size is out of its range."""
        require_integer("window", self.window, 1, float("inf"))
        require_integer("block_size", self.block_size, 1, float("inf"))
        require_integer("period", self.period, 1, float("inf"))
        require_integer("dense_layers", self.dense_layers, 0, self.period - 1)
        if not isinstance(self.unit, int) or self.unit < 1 or self.unit % self.block_size:
            raise ValueError(f"expected a unit that is a multiple of block_size={self.block_size}, got {self.unit!r}")
