"""How much of a prompt a sparsity policy attends to."""

import jax
import jax.numpy as jnp

from dyninf.pytree import pytree
from dyninf.sparsity.base import PromptObs, Selected


@pytree()
class Density:
    """What the rows of a prompt, or of a chunk, attend to in a layer.

    Attributes:
        attended: share of the blocks up to a row's last token that are attended to, over all rows ``[B, N]``.
        overflow: share of the rows whose rule asked for more blocks than its budget had ``[B, N]``.
    """

    attended: jax.Array
    overflow: jax.Array


def density(selected: Selected, obs: PromptObs) -> Density:
    """Return what is attended to of what a dense layer attends to, counted in blocks.

    Rows of padding are left out; a sequence without others gives zeros. A window inside of the blocks is not counted.

    Raises:
        NotImplementedError: if the blocks are not of the text in its order.
    """
    if selected.order is not None:
        raise NotImplementedError("expected blocks of the text in its order, got others; count index.counts instead")
    index, num_keys = selected.index, obs.k_BSKH.shape[1]
    first_R = obs.offset + jnp.arange(index.counts.shape[2]) * index.block_size
    lengths_B = jnp.full(obs.k_BSKH.shape[0], num_keys) if obs.lengths_B is None else obs.lengths_B
    live_BR = first_R[None] < lengths_B[:, None]
    last_BR = jnp.minimum(first_R[None] + index.block_size, lengths_B[:, None]) - 1
    causal_BR = jnp.where(live_BR, last_BR // index.block_size + 1, 0)
    listed_BNRM = jnp.arange(index.blocks.shape[3])[None, None, None] < index.counts[..., None]
    named_BNRM = listed_BNRM & (index.blocks >= 0) & (index.blocks < causal_BR[:, None, :, None])
    cut_BNR = live_BR[:, None] & (False if selected.wanted is None else selected.wanted > index.counts)
    rows_B1, blocks_B1 = (jnp.maximum(jnp.sum(x, axis=1), 1)[:, None] for x in (live_BR, causal_BR))
    attended_BN = jnp.sum(named_BNRM, axis=(2, 3)) / blocks_B1
    overflow_BN = jnp.broadcast_to(jnp.sum(cut_BNR, axis=2) / rows_B1, attended_BN.shape)
    return Density(attended=attended_BN, overflow=overflow_BN)
