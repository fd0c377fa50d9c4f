"""Attend to what holds most of the attention of probe queries, as much of it as they need (He et al. 2024, "ZipVL:
Efficient Large Vision-Language Models with Dynamic Token Sparsification").

The attention of some queries is added up by key. As many keys are important as it takes for the largest sums to hold
``mass`` of it all; important are those with the largest sums over the number of probes that can see them, for late keys
are seen by few. How much is read follows the text, the layer and the head, up to a budget.

The paper drops tokens; this reads blocks. In detail it differs in this:

- Sums and normalized sums are pooled to blocks of keys, and blocks are ranked, counted and kept.
- Queries of tokens that are not important are computed as well, and their rows read the important blocks before them
  and their own block. In the paper such tokens take no part in attention.
- Nothing is evicted from the cache; ``Plan(evict=...)`` does that.
- Each query head has its own blocks, where the paper has one ratio for a layer.
- Probes are the last queries and as many evenly spaced ones, which the paper draws at random; 64 of each is a choice
  made here.
- The budget caps what is read, for lists have a fixed length; :attr:`dyninf.sparsity.Selected.wanted` tells where it
  did.
"""

import jax
import jax.numpy as jnp

from dyninf.depth.base import require_number
from dyninf.pytree import pytree
from dyninf.sparsity.base import PromptObs, Selected, SparsityPolicy, require_sizes
from dyninf.sparsity.probes import block_attention, last_queries, rows_of, spaced_queries
from pallas_kernels import BlockIndex


@pytree(static=("budget", "probes", "block_size"))
class ZipVL(SparsityPolicy):
    """Attend to the important blocks that together hold ``mass`` of the attention of probe queries.

    Deciding costs ``4 probes S N H`` FLOPs and holds ``2 probes S N`` float32 scores, some heads at a time where they
    are many. Exact when ``mass`` is 1 and the budget covers all blocks.

    Args:
        mass: share of the attention of the probes that is enough (0 to 1); 1 takes every block that the budget allows.
        budget: important blocks that a row reads at most; its own block comes on top.
        probes: last queries that are asked, and evenly spaced ones before them (at least 1 each).
        block_size: queries of a row and keys of a block.
    """

    mass: float = 0.975  # the paper's, beside 0.96
    budget: int = 64
    probes: int = 64
    block_size: int = 128

    def select(self, obs: PromptObs) -> Selected:
        """Return the important blocks before each row and its own; that one alone without any query."""
        important_BNI, asked_BN = self._rank(obs)
        first_R, last_R = rows_of(obs, self.block_size)
        num_blocks, kept = important_BNI.shape[-1], min(self.budget, important_BNI.shape[-1])
        own_R = last_R - first_R + 1
        asked_BNC = jnp.argsort(important_BNI, axis=-1) < asked_BN[..., None]
        up_to_BNC = jnp.pad(jnp.cumsum(asked_BNC, axis=-1, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
        wanted_BNR = jnp.take(up_to_BNC, first_R, axis=-1, mode="clip") + own_R[None, None]
        asked_BNI = jnp.arange(kept)[None, None] < asked_BN[..., None]
        listed_BNI = jnp.where(asked_BNI, important_BNI[..., :kept], num_blocks)
        # Rows at an offset between two blocks have two of their own.
        aligned = isinstance(obs.offset, int) and obs.offset % self.block_size == 0
        spare = ((0, 0), (0, 0), (0, 1 if aligned else 2))
        listed_BNM = jnp.pad(jnp.sort(listed_BNI, axis=-1), spare, constant_values=num_blocks)
        earlier_BNRM = listed_BNM[:, :, None] < first_R[None, None, :, None]
        counts_BNR = jnp.sum(earlier_BNRM, axis=-1, dtype=jnp.int32)
        place_M = jnp.arange(listed_BNM.shape[-1], dtype=jnp.int32)
        own_BNRM = first_R[None, None, :, None] + place_M[None, None, None] - counts_BNR[..., None]
        blocks_BNRM = jnp.where(earlier_BNRM, listed_BNM[:, :, None], own_BNRM).astype(jnp.int32)
        index = BlockIndex(counts=counts_BNR + own_R[None, None], blocks=blocks_BNRM, block_size=self.block_size)
        return Selected(index=index, wanted=wanted_BNR)

    def _rank(self, obs: PromptObs) -> tuple[jax.Array, jax.Array]:
        """Return all blocks, the most important one first ``[B, N, C]``, and how many of them are needed ``[B, N]``."""
        asking_BW = jnp.concatenate([spaced_queries(obs, self.probes), last_queries(obs, self.probes)], axis=1)
        num_keys, size = obs.k_BSKH.shape[1], self.block_size
        keys_CY = jnp.arange(-(-num_keys // size) * size).reshape(-1, size)
        seen_by_BCY = jnp.sum(asking_BW[:, :, None, None] >= keys_CY[None, None], axis=1)
        share_BCY = 1.0 / jnp.maximum(seen_by_BCY, 1)
        plain_BNWC, normal_BNWC = block_attention(obs, asking_BW, share_BCY[:, None], size)
        sums_BNC, ranks_BNC = jnp.sum(plain_BNWC, axis=2), jnp.sum(normal_BNWC, axis=2)
        largest_BNC = -jnp.sort(-sums_BNC, axis=-1)
        before_BNC = jnp.cumsum(largest_BNC, axis=-1) - largest_BNC
        mass = jnp.asarray(self.mass, jnp.float32)
        needed_BNC = (before_BNC < mass * jnp.sum(sums_BNC, axis=-1, keepdims=True)) | (mass >= 1)
        order_BNC = jnp.argsort(-ranks_BNC, axis=-1, stable=True)
        return order_BNC.astype(jnp.int32), jnp.sum(needed_BNC, axis=-1, dtype=jnp.int32)

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if a parameter is out of its range."""
        require_number("mass of ZipVL", self.mass, 0.0, 1.0)
        require_sizes(self, budget=1, probes=1, block_size=1)
