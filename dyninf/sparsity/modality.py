"""Take the tokens of a prompt group by group, so that patterns between groups become blocks (Li et al. 2025,
"MMInference: Accelerating Pre-filling for Long-Context VLMs via Modality-Aware Permutation Sparse Attention").

Frames of a video are the same grid of tokens again and again: what some heads attend to lies on lines a fixed stride
apart, of which every block of the text holds some. Where text and video alternate, each sees the own kind and the other
in its own way. Rows and blocks of tokens that are sorted by group read such lines and kinds whole and leave the others
out. Positions stay what they are: a query sees the keys up to its own position, whatever the order.

- :class:`Grid`: the groups are a grid of every stride-th token and the rest; each head finds its stride and where the
  grid begins from the attention of the last queries.
- :class:`ByModality`: groups are given with the prompt, as the modality of each token (the paper's 2D-boundary; its
  Q-boundary is one width for all groups of keys). Heads that it counts as without boundary, or with one between keys
  only, need no other order: they have the patterns of text.

Differences from the paper:

- Between two groups a row reads all blocks, the last few, or none. There each pair of modalities has a pattern of its
  own (A-shape, vertical-slash or grid).
- A block that holds the end of one group and the start of the next is read for either, so that a little more is seen.
- Which grid is the best is decided by mean attention to a token of the grid; there it is the largest sum.
- Its kernel reads and writes tokens where they lie. Here they are gathered in their order first, which copies queries,
  keys and values once, and attention runs in plain JAX: no kernel takes an order yet
  (:func:`pallas_kernels.block_sparse_attention`). Less is computed, and nothing was measured to be faster.
"""

import jax
import jax.numpy as jnp

from dyninf.pytree import pytree
from dyninf.sparsity.base import PromptObs, Selected, SparsityPolicy, require_sizes
from dyninf.sparsity.probes import block_attention, keys_written, last_queries
from pallas_kernels import BlockIndex

Near = tuple[tuple[int | None, ...], ...]


@pytree(static=("near", "block_size"))
class ByModality(SparsityPolicy):
    """Attend from each modality to each modality in its own width.

    Exact where every width is ``None``. Nothing is computed to choose but a sort of the tokens; the index has room for
    all blocks in every row.

    Args:
        groups: the modality of each token of the prompts, int32 ``[B, T]``, from 0 on; padding may hold anything, and
            what is neither sees nothing and is not seen.
        near: ``near[a][b]`` is how many of the last blocks of group b queries of group a read: ``None`` for all, 0 for
            none. Queries read at least one block of their own group.
        block_size: queries of a row and keys of a block.
    """

    groups: jax.Array
    near: Near
    block_size: int = 128

    def select(self, obs: PromptObs) -> Selected:
        """Return the blocks of the groups that each row may see."""
        if jnp.shape(self.groups) != obs.q_BTNH.shape[:2]:
            raise ValueError(
                f"expected a group for each token of prompts [B, T] = {obs.q_BTNH.shape[:2]}, got "
                f"{jnp.shape(self.groups)}; ByModality takes whole prompts"
            )
        return _by_group(obs, jnp.asarray(self.groups)[:, None], self.near, self.block_size)

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if the widths are not a square of them, or leave a query nothing to read."""
        require_sizes(self, block_size=1)
        count = len(self.near)
        widths = [width for row in self.near for width in row if width is not None]
        whole = all(isinstance(width, int) and not isinstance(width, bool) and width >= 0 for width in widths)
        if not count or any(len(row) != count for row in self.near) or not whole:
            raise ValueError(
                "expected near of ByModality to have a row and a column for each group, None or whole numbers of at "
                f"least 0, got {self.near!r}"
            )
        if any(self.near[group][group] == 0 for group in range(count)):
            raise ValueError(f"expected queries to read their own group, got 0 on the diagonal of {self.near!r}")


@pytree(static=("strides", "near", "probes", "block_size"))
class Grid(SparsityPolicy):
    """Attend to a grid of every stride-th token, from its tokens to everything, and else to what is near.

    Each head takes the stride and the first token of the grid to whose tokens its last queries pay most on average.
    Deciding costs ``2 probes T N H`` FLOPs, and the sums over grids next to nothing. For stride s a row reads about a
    share 1/s of the tokens before it and ``near`` blocks, and a share 1/s of the rows reads everything. Exact
    where tokens off the grid fill no more than ``near`` blocks.

    Args:
        strides: candidates (at least 1 token each): tokens of a row of patches, of a frame.
        near: last blocks of tokens off the grid that are read, the own one included (at least 1).
        probes: last queries that are asked (at least 1).
        block_size: queries of a row and keys of a block.
    """

    strides: tuple[int, ...]
    near: int = 8
    probes: int = 64  # the paper's
    block_size: int = 128

    def select(self, obs: PromptObs) -> Selected:
        """Return the blocks of the grid, and the near ones of the rest, for each row."""
        stride_BN, first_BN = self.find(obs)
        at_T = jnp.arange(obs.q_BTNH.shape[1], dtype=jnp.int32)
        off_BNT = at_T[None, None] % stride_BN[..., None] != first_BN[..., None]
        return _by_group(obs, off_BNT.astype(jnp.int32), ((None, None), (None, self.near)), self.block_size)

    def find(self, obs: PromptObs) -> tuple[jax.Array, jax.Array]:
        """Return the stride and the first token of the grid of each head, int32 ``[B, N]`` each."""
        asking_BW = last_queries(obs, self.probes)
        paid_BNWS, _ = block_attention(obs, asking_BW, jnp.ones((1, 1, 1, 1)), 1)
        paid_BNS, length = jnp.sum(paid_BNWS, axis=2), obs.k_BSKH.shape[1]
        exists_BS = jnp.arange(length)[None] < keys_written(obs)[:, None]
        means, strides, firsts = [], [], []
        for stride in self.strides:
            width = ((0, 0),) * (paid_BNS.ndim - 1) + ((0, -length % stride),)
            sums_BNP = jnp.sum(jnp.pad(paid_BNS, width).reshape(*paid_BNS.shape[:2], -1, stride), axis=2)
            there_BP = jnp.sum(jnp.pad(exists_BS, width[1:]).reshape(len(exists_BS), -1, stride), axis=1)
            means.append(sums_BNP / jnp.maximum(there_BP, 1)[:, None])
            strides += [stride] * stride
            firsts += range(stride)
        best_BN = jnp.argmax(jnp.concatenate(means, axis=2), axis=2)
        return jnp.array(strides, jnp.int32)[best_BN], jnp.array(firsts, jnp.int32)[best_BN]

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if a size is out of its range."""
        require_sizes(self, near=1, probes=1, block_size=1)
        if not self.strides or not all(isinstance(stride, int) and stride >= 1 for stride in self.strides):
            raise ValueError(f"expected strides of Grid to be whole numbers of at least 1, got {self.strides!r}")


def _by_group(obs: PromptObs, group_BXT: jax.Array, near: Near, size: int) -> Selected:
    """Return what rows read of tokens that are sorted by group; X is the number of heads, or 1 for all alike."""
    batch, length, num_heads, _ = obs.q_BTNH.shape
    exists_B1T = (jnp.arange(length)[None] < keys_written(obs)[:, None])[:, None]
    group_BXT = jnp.where(exists_B1T, group_BXT, len(near))  # padding comes last
    order_BXT = jnp.argsort(group_BXT, axis=2, stable=True).astype(jnp.int32)
    spare = ((0, 0), (0, 0), (0, -length % size))
    sorted_BXT = jnp.pad(jnp.take_along_axis(group_BXT, order_BXT, axis=2), spare, constant_values=len(near))
    shape = (*order_BXT.shape[:2], -1, size)
    group_BXCY, at_BXCY = sorted_BXT.reshape(shape), jnp.pad(order_BXT, spare).reshape(shape)
    blocks = group_BXCY.shape[2]
    number_C = jnp.arange(blocks, dtype=jnp.int32)
    # Of each group: the first position in a block, and the last one in a row.
    begin = [jnp.min(jnp.where(group_BXCY == b, at_BXCY, length), axis=3) for b in range(len(near))]
    end = [jnp.max(jnp.where(group_BXCY == a, at_BXCY, -1), axis=3) for a in range(len(near))]
    named_BXRC = jnp.zeros((*group_BXCY.shape[:2], blocks, blocks), bool)
    for a, widths in enumerate(near):
        for b, width in enumerate(widths):
            seen_BXRC = begin[b][:, :, None] <= end[a][..., None]
            if width is not None:
                last_BXR1 = jnp.max(jnp.where(seen_BXRC, number_C[None, None, None], -1), axis=3, keepdims=True)
                seen_BXRC &= number_C[None, None, None] > last_BXR1 - width
            named_BXRC |= seen_BXRC
    blocks_BXRC = jnp.sort(jnp.where(named_BXRC, number_C[None, None, None], blocks), axis=3)
    counts_BXR = jnp.sum(named_BXRC, axis=3, dtype=jnp.int32)
    spread = lambda x: jnp.broadcast_to(x, (batch, num_heads, *x.shape[2:]))  # noqa: E731
    index = BlockIndex(counts=spread(counts_BXR), blocks=spread(blocks_BXRC), block_size=size)
    return Selected(index=index, order=spread(order_BXT))
