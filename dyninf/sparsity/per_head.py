"""A pattern of its own for every head, found offline (Jiang et al. 2024, "MInference 1.0: Accelerating Pre-filling for
Long-Context LLMs via Dynamic Sparse Attention", section 3.2).

:mod:`dyninf.sparsity.pattern_search` finds them. Differences from the paper's code: A-shape and pooled blocks stay what
they are, where its search replaces the one by vertical-slash and the other by vertical-slash of a fixed size; a head
without a pattern is refused, where there it is vertical-slash with 1000 columns and 6096 slashes; and the heads of a
layer go to one kernel, not one after another.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.pytree import pytree
from dyninf.sparsity.base import PromptObs, Selected, SparsityPolicy
from dyninf.sparsity.probes import rows_of
from pallas_kernels import BlockIndex


@pytree(static=("heads",))
class PerHead(SparsityPolicy):
    """Attend in every head as its own pattern says.

    A pattern decides for the key/value heads that one of its heads belongs to. The lists of all heads are as long as
    the longest; what a shorter one leaves over costs nothing in the kernel.

    Patterns that limit what is seen within blocks (:attr:`dyninf.sparsity.Selected.window`) do so only in layers whose
    heads all have the same limits; beside others their blocks are seen whole.

    Args:
        patterns: policies of one block size; :class:`dyninf.sparsity.Dense` for heads that attend to everything.
        heads: for each layer, the number of the pattern of each query head.
    """

    patterns: tuple[SparsityPolicy, ...]
    heads: tuple[tuple[int, ...], ...]

    def select(self, obs: PromptObs) -> Selected | None:
        """Return the lists of all heads; ``None`` in a layer where all attend to everything."""
        numbers = np.asarray(self.heads[obs.layer])
        group = len(numbers) // obs.k_BSKH.shape[2]
        parts = {}
        for number in np.unique(numbers).tolist():
            (mine,) = np.nonzero(numbers == number)
            kv = np.unique(mine // group)
            asked = (kv[:, None] * group + np.arange(group)[None]).ravel()
            seen = dataclasses.replace(obs, q_BTNH=_take(obs.q_BTNH, asked), k_BSKH=_take(obs.k_BSKH, kv))
            parts[number] = mine, np.searchsorted(asked, mine), self.patterns[number].select(seen)
        found = [selected for _, _, selected in parts.values() if selected is not None]
        if not found:
            return None
        everything = None if len(found) == len(parts) else _everything(obs, found[0].index.block_size)
        chosen = [
            (mine, everything if selected is None else selected, mine if selected is None else at)
            for mine, at, selected in parts.values()
        ]
        entries = max(selected.index.blocks.shape[3] for _, selected, _ in chosen)
        whose = np.argsort(np.concatenate([mine for mine, _, _ in chosen]))

        def join(part):
            return jnp.concatenate([part(selected)[:, at] for _, selected, at in chosen], axis=1)[:, whose]

        def padded(selected):
            blocks_BNRM = selected.index.blocks
            return jnp.pad(blocks_BNRM, ((0, 0), (0, 0), (0, 0), (0, entries - blocks_BNRM.shape[3])))

        index = BlockIndex(
            counts=join(lambda selected: selected.index.counts),
            blocks=join(padded),
            block_size=found[0].index.block_size,
        )
        limits = {(selected.window, selected.sinks) for _, selected, _ in chosen}
        window, sinks = limits.pop() if len(limits) == 1 else (None, 0)
        wanted = None
        if any(selected.wanted is not None for selected in found):
            wanted = join(lambda selected: selected.index.counts if selected.wanted is None else selected.wanted)
        order = None
        if any(selected.order is not None for selected in found):
            batch, length, num_heads, _ = obs.q_BTNH.shape
            text_BNT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, num_heads, length))
            order = join(lambda selected: text_BNT if selected.order is None else selected.order)
        return Selected(index=index, window=window, sinks=sinks, wanted=wanted, order=order)

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if heads and patterns do not fit each other or the model."""
        shape = (len(self.heads), {len(numbers) for numbers in self.heads})
        if shape != (num_layers, {num_heads}):
            raise ValueError(
                f"expected the patterns of {num_heads} heads in each of {num_layers} layers for PerHead, got "
                f"{shape[0]} layers of {sorted(shape[1])} heads"
            )
        numbers = {number for layer in self.heads for number in layer}
        if not numbers <= set(range(len(self.patterns))):
            raise ValueError(
                f"expected numbers of the {len(self.patterns)} patterns of PerHead, got {sorted(numbers)}; add patterns"
            )
        sizes = {pattern.block_size for pattern in self.patterns if hasattr(pattern, "block_size")}
        if len(sizes) > 1:
            raise ValueError(f"expected patterns of one block_size for PerHead, got {sorted(sizes)}")
        for pattern in self.patterns:
            if pattern.stages:
                raise ValueError(f"expected patterns that drop no tokens for PerHead, got {pattern!r}")
            pattern.validate(num_layers, num_heads)


def _take(x_BTNH: jax.Array, heads: np.ndarray) -> jax.Array:
    return x_BTNH if len(heads) == x_BTNH.shape[2] else x_BTNH[:, :, heads]


def _everything(obs: PromptObs, block_size: int) -> Selected:
    last_R = rows_of(obs, block_size)[1]
    every_C = jnp.arange(-(-obs.k_BSKH.shape[1] // block_size), dtype=jnp.int32)
    shape = (obs.q_BTNH.shape[0], obs.q_BTNH.shape[2], len(last_R))
    counts_BNR = jnp.broadcast_to(jnp.minimum(last_R + 1, len(every_C))[None, None], shape).astype(jnp.int32)
    blocks_BNRC = jnp.broadcast_to(every_C[None, None, None], (*shape, len(every_C)))
    return Selected(index=BlockIndex(counts=counts_BNR, blocks=blocks_BNRC, block_size=block_size))
