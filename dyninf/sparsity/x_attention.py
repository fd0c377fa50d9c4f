"""Attend to the blocks that sums along antidiagonals say matter (Xu et al. 2025, "XAttention: Block Sparse Attention
with Antidiagonal Scoring").

Vertical lines and diagonals of an attention map cross every antidiagonal of a block, so that a few sums stand for all
of its scores. ``stride`` tokens in a row are one strided row of queries or column of keys; their score is the sum of
the products on the antidiagonal of the square between them (:func:`pallas_kernels.strided_scores`). A block holds the
softmax mass of its strided scores, and a row of blocks takes the first block, its own, and then the best others while
those taken hold less than ``mass`` of its sum.

Scoring takes ``1 / (2 * stride)`` of the FLOPs of dense attention (3 % with 16). Exact with ``mass=None`` and a budget
of all blocks; with ``mass=1`` a row leaves out blocks without which it holds all that float32 can tell.

The rule is that of the authors' code, with these differences. Their code has no budget: here a row takes ``budget``
blocks at most, its forced and best ones, and always as many with ``mass=None``. In the first chunk of a prompt (its
first 2048 tokens, where it has 131072) their code unmarks the first block, and a row then takes up to one block more
than the rule says; in later chunks it chooses the same blocks as here. Their thresholds may differ by head, found
by a search beforehand; here heads share one. Their probabilities are rounded to the dtype of the queries before they
are added up, and are float32 here.
"""

import jax

from dyninf.depth.base import require_number
from dyninf.pytree import pytree
from dyninf.sparsity.base import PromptObs, Selected, SparsityPolicy, require_sizes
from pallas_kernels import choose_blocks, strided_scores


@pytree(static=("stride", "budget", "block_size"))
class XAttention(SparsityPolicy):
    """Choose blocks by their antidiagonals, until they hold a share of a row's mass.

    Args:
        budget: blocks of a row at most, its first and its own included (at least 2).
        stride: tokens of a strided row; divides ``block_size``. The paper has 8 and 16.
        mass: share of the softmax mass of a row that its blocks hold (0 to 1); ``None`` for the budget's best blocks.
        block_size: queries of a row and keys of a block (at least 1).

    Raises:
        ValueError: from :meth:`validate`, if a parameter is out of its range.
    """

    budget: int
    stride: int = 16
    mass: jax.Array | float | None = 0.9
    block_size: int = 128

    def select(self, obs: PromptObs) -> Selected:
        """Return the blocks of each row, and how many its mass asked for."""
        scores_BNRC = strided_scores(
            obs.q_BTNH,
            obs.k_BSKH,
            stride=self.stride,
            block_size=self.block_size,
            offset=obs.offset,
            lengths_B=obs.lengths_B,
        )
        index, wanted = choose_blocks(
            scores_BNRC,
            block_size=self.block_size,
            budget=max(2, min(self.budget, scores_BNRC.shape[3])),
            mass=self.mass,
            sinks=1,
            recent=1,
            offset=obs.offset,
        )
        return Selected(index=index, wanted=wanted)

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if a parameter is out of its range."""
        require_sizes(self, budget=2, stride=1, block_size=1)
        if self.block_size % self.stride:
            raise ValueError(f"expected block_size to be a multiple of stride={self.stride}, got {self.block_size}")
        if self.mass is not None:
            require_number("mass", self.mass, 0.0, 1.0)
