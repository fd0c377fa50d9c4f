"""The choice of blocks by sorting each row: the definition."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.index import BlockIndex


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def choose_blocks(scores_BNRC, mass, offset, *, block_size, budget, sinks, recent):
    """See :func:`pallas_kernels.choose_blocks.choose_blocks`."""
    rows, blocks = scores_BNRC.shape[2:]
    ids_1C = jnp.arange(blocks)[None]
    last_R1 = jnp.minimum((offset + (jnp.arange(rows)[:, None] + 1) * block_size - 1) // block_size, blocks - 1)
    exists = jnp.broadcast_to((ids_1C <= last_R1)[None, None], scores_BNRC.shape)
    forced = exists & ((ids_1C < sinks) | (ids_1C > last_R1 - recent))[None, None]
    scores_BNRC = jnp.where(exists, scores_BNRC, 0.0)
    order = jnp.lexsort((jnp.where(forced, -jnp.inf, -scores_BNRC), ~forced, ~exists), axis=-1)
    is_forced, is_there, held = (jnp.take_along_axis(x, order, axis=-1) for x in (forced, exists, scores_BNRC))
    wanted = is_there
    if mass is not None:
        before = jnp.cumsum(held, axis=-1) - held
        wanted = is_there & (is_forced | (before < mass * jnp.sum(held, axis=-1, keepdims=True)))
    taken = jnp.where(wanted & (ids_1C[None, None] < budget), order, blocks)
    listed = jnp.sort(taken, axis=-1)[..., :budget].astype(jnp.int32)
    listed = jnp.pad(listed, [(0, 0)] * 3 + [(0, max(budget - blocks, 0))], constant_values=blocks)
    counts = jnp.sum(taken < blocks, axis=-1).astype(jnp.int32)
    asked = jnp.sum(wanted, axis=-1).astype(jnp.int32)
    return BlockIndex(counts=counts, blocks=listed, block_size=block_size), asked
