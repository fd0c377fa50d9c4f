"""Ask a learned gate which blocks matter (Gao et al. 2024, "SeerAttention: Learning Intrinsic Sparse Attention in Your
LLMs").

The queries of a block are pooled to their mean, its keys to their largest, smallest and mean entries; a linear map of
each head takes both to D features, and the score of a block of keys for a row is their product. A row takes its
``budget`` best blocks. The gate is trained to give the softmax of its scores the shape of the pooled attention map; its
weights are handed in. With maps that pass the means on, it scores a block by mean query times mean key.

Cost: reads queries and keys once, and ``2 * R * C * D`` FLOPs a head. Exact with a budget of all blocks.

The paper pools queries and keys before their rotation and rotates the pooled ones by the position of their block; here
they are pooled as they are attended with, rotated, so that weights of the authors' checkpoints do not fit. Of the two
rules of their code, a share of blocks that is the same for all rows and a threshold, this is the first; it forces no
blocks (``sinks=0, recent=0``) and then chooses the same ones.
"""

import jax
import jax.numpy as jnp

from dyninf.pytree import pytree
from dyninf.sparsity.base import PromptObs, Selected, SparsityPolicy, require_sizes
from pallas_kernels import choose_blocks, summarize_pages


@pytree(static=("budget", "sinks", "recent", "block_size"))
class SeerAttention(SparsityPolicy):
    """Choose the blocks that a learned gate scores highest.

    Args:
        query_LNHD: maps of the mean queries of each layer and head.
        key_LKYD: maps of the largest, smallest and mean keys, Y = 3H in this order, of each layer and key head.
        budget: blocks of a row (at least ``sinks + recent`` and 1).
        sinks: first blocks that are always taken.
        recent: last blocks of a row that are always taken.
        block_size: queries of a row and keys of a block (at least 1).

    Raises:
        ValueError: from :meth:`validate`, if the maps do not fit the model or a parameter is out of its range.
    """

    query_LNHD: jax.Array
    key_LKYD: jax.Array
    budget: int
    sinks: int = 1
    recent: int = 1
    block_size: int = 128

    def select(self, obs: PromptObs) -> Selected:
        """Return the best blocks of each row."""
        num_kv = obs.k_BSKH.shape[2]
        ends_B = jnp.full(obs.q_BTNH.shape[0], obs.offset + obs.q_BTNH.shape[1], jnp.int32)
        if obs.lengths_B is not None:
            ends_B = jnp.minimum(ends_B, obs.lengths_B)
        pool = {"page_size": self.block_size}
        q_BRNH = summarize_pages(obs.q_BTNH, ends_B - obs.offset, kind="mean", **pool)
        bounds, means = (summarize_pages(obs.k_BSKH, ends_B, kind=kind, **pool) for kind in ("bounds", "mean"))
        k_BCKY = jnp.concatenate([bounds, means], axis=3)
        precise = {"preferred_element_type": jnp.float32}
        q_BRND = jnp.einsum("BRNH,NHD->BRND", q_BRNH, self.query_LNHD[obs.layer], **precise)
        k_BCKD = jnp.einsum("BCKY,KYD->BCKD", k_BCKY, self.key_LKYD[obs.layer], **precise)
        batch, rows, num_heads, features = q_BRND.shape
        q_BRKGD = q_BRND.reshape(batch, rows, num_kv, num_heads // num_kv, features)
        scores_BKGRC = jnp.einsum("BRKGD,BCKD->BKGRC", q_BRKGD, k_BCKD, **precise)
        index, _ = choose_blocks(
            scores_BKGRC.reshape(batch, num_heads, rows, -1),
            block_size=self.block_size,
            budget=max(1, self.sinks + self.recent, min(self.budget, k_BCKD.shape[1])),
            sinks=self.sinks,
            recent=self.recent,
            offset=obs.offset,
        )
        return Selected(index=index)

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if a parameter is out of its range."""
        require_sizes(self, budget=1, sinks=0, recent=0, block_size=1)
        if self.budget < self.sinks + self.recent:
            raise ValueError(
                f"expected a budget of at least sinks + recent = {self.sinks + self.recent}, got {self.budget}"
            )
        query, key = jnp.shape(self.query_LNHD), jnp.shape(self.key_LKYD)
        if len(query) != 4 or len(key) != 4 or query[:2] != (num_layers, num_heads) or key[0] != num_layers:
            raise ValueError(
                f"expected maps of {num_layers} layers and {num_heads} heads, [L, N, H, D] and [L, K, 3H, D], got "
                f"{query} and {key}"
            )
        if num_heads % key[1] or key[2:] != (3 * query[2], query[3]):
            raise ValueError(f"expected maps [L, N, H, D] and [L, K, 3H, D] with N a multiple of K, got {query}, {key}")
