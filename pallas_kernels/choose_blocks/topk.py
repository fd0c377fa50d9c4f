"""The choice of blocks by the kernel that chooses pages, with one row of queries in the place of a sequence.

It finds the budget's best blocks without sorting; those that a mass does not need are then cut from these few.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import refuse_unless_hopper
from pallas_kernels.index import BlockIndex
from pallas_kernels.topk_pages import TOPK_PAGES, topk_pages


def refuse(*, platform: str, capability: str | None, num_blocks: int, budget: int) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if reason := refuse_unless_hopper(platform, capability):
        return reason
    facts = {"platform": platform, "capability": capability, "num_pages": num_blocks, "k": min(budget, num_blocks)}
    return TOPK_PAGES[0].refuse(**facts)


def choose_blocks(scores_BNRC, mass, offset, *, block_size, budget, sinks, recent, implementation=None):
    """See :func:`pallas_kernels.choose_blocks.choose_blocks`; ``implementation`` is that of the pages."""
    batch, heads, rows, blocks = scores_BNRC.shape
    entries = min(budget, blocks)
    first = min(sinks, entries)  # of a prompt of fewer blocks than are forced, all
    last_R = jnp.minimum((offset + (jnp.arange(rows) + 1) * block_size - 1) // block_size, blocks - 1)
    pages = topk_pages(
        scores_BNRC.reshape(-1, 1, blocks),
        jnp.tile(last_R + 1, batch * heads),
        k=entries,
        page_size=block_size,
        sinks=first,
        recent=min(recent, entries - first),
        implementation=implementation,
    )
    counts_BNR = pages.counts.reshape(batch, heads, rows)
    listed_BNRM = pages.pages.reshape(batch, heads, rows, -1)
    exists_BNR = jnp.broadcast_to(last_R[None, None] + 1, counts_BNR.shape)
    if mass is None:
        wanted_BNR = exists_BNR
    else:
        last_1R1 = last_R[None, None, :, None]
        there = jnp.arange(listed_BNRM.shape[3])[None, None, None] < counts_BNR[..., None]
        forced = there & ((listed_BNRM < sinks) | (listed_BNRM > last_1R1 - recent))
        before = jnp.arange(blocks)[None, None, None] <= last_1R1
        total_BNR1 = jnp.sum(jnp.where(before, scores_BNRC, 0.0), axis=3, keepdims=True)
        held_BNRM = jnp.where(there, jnp.take_along_axis(scores_BNRC, listed_BNRM, axis=3), 0.0)
        kept = there & (forced | _needed(held_BNRM, there & ~forced, forced, mass * total_BNR1))
        wanted_BNR = jnp.sum(kept, axis=3, dtype=jnp.int32)
        whole = jnp.sum(held_BNRM, axis=3, keepdims=True) < mass * total_BNR1
        wanted_BNR += (whole[..., 0] & (counts_BNR < exists_BNR)).astype(jnp.int32)
        counts_BNR, listed_BNRM = _compress(listed_BNRM, kept)
    listed_BNRM = jnp.pad(listed_BNRM, [(0, 0)] * 3 + [(0, budget - listed_BNRM.shape[3])])
    return BlockIndex(counts=counts_BNR, blocks=listed_BNRM, block_size=block_size), wanted_BNR.astype(jnp.int32)


def _needed(held_xM: jax.Array, ranked_xM: jax.Array, forced_xM: jax.Array, goal_x1: jax.Array) -> jax.Array:
    """Return which of the ranked entries follow less than ``goal`` in the order of their mass, after the forced ones.

    Floats of at least 0 are ordered as their bits are: these are found from the highest one down, so that the entries
    from the bound on hold the goal, and those above it do not.
    """
    bits_xM = jnp.where(ranked_xM, jax.lax.bitcast_convert_type(held_xM, jnp.int32), -1)
    start_x1 = jnp.sum(jnp.where(forced_xM, held_xM, 0.0), axis=-1, keepdims=True)

    def from_on(bound_x1):
        return start_x1 + jnp.sum(jnp.where(bits_xM >= bound_x1, held_xM, 0.0), axis=-1, keepdims=True)

    def set_bit(i, bound_x1):
        higher = bound_x1 | jnp.left_shift(jnp.int32(1), 30 - i)
        return jnp.where(from_on(higher) >= goal_x1, higher, bound_x1)

    bound_x1 = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros_like(goal_x1, jnp.int32))
    equal_xM = bits_xM == bound_x1
    before_xM = jnp.cumsum(jnp.where(equal_xM, held_xM, 0.0), axis=-1) - held_xM
    return (bits_xM > bound_x1) | (equal_xM & (from_on(bound_x1 + 1) + before_xM < goal_x1))


def _compress(listed_xM: jax.Array, kept_xM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return how many entries are kept, and these first, in their order."""
    entries = listed_xM.shape[-1]
    so_far_xM = jnp.cumsum(kept_xM, axis=-1, dtype=jnp.int32)
    wanted_M = jnp.arange(1, entries + 1)
    low_xM = jnp.zeros_like(so_far_xM)
    for bit in reversed(range((entries - 1).bit_length())):  # the first entry up to which as many are kept
        probe_xM = low_xM + (1 << bit)
        reached = jnp.take_along_axis(so_far_xM, jnp.minimum(probe_xM - 1, entries - 1), axis=-1)
        fewer = (reached < wanted_M.reshape((1,) * (reached.ndim - 1) + (-1,))) & (probe_xM <= entries - 1)
        low_xM = jnp.where(fewer, probe_xM, low_xM)
    return so_far_xM[..., -1], jnp.take_along_axis(listed_xM, low_xM, axis=-1)
