"""Barriers over all blocks of the decoder stack's kernel, and how its work is divided among them."""

from types import SimpleNamespace

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decoder_stack.geometry import UNIT
from pallas_kernels.decoder_stack.tiles import divide


class Grid:
    """What the three warpgroups of a block must agree on."""

    def __init__(self, g, r, static, block):
        self.g, self.r, self.static, self.block = g, r, static, block
        if g.blocks > 1:
            self.arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)

    def wait(self, phase, *, worker=False):
        """Wait until every block has finished ``phase`` phases."""
        if self.g.blocks > 1:
            target = (phase + 1) * self.g.blocks
            plgpu.semaphore_wait(self.arrived, target, decrement=False, memory_scope="gpu")
        elif not worker:
            plgpu.barrier_wait(self.r.phase)

    def finish_phase(self, *, scores=False):
        if self.g.blocks > 1:
            plgpu.semaphore_signal(self.arrived, 1, memory_scope="gpu")
            return
        plgpu.barrier_arrive(self.r.phase)
        if scores:
            plgpu.barrier_arrive(self.r.scored)

    def share(self, units):
        """Return the first unit of this block and the one behind its last."""
        workers = jnp.clip(units, 1, self.g.blocks)
        index = jnp.minimum(self.block, workers)
        return lax.div(index * units, workers), lax.div(jnp.minimum(index + 1, workers) * units, workers)

    def product(self, name):
        """Return this block's units of a product, the first and the one behind the last."""
        tiles, contraction = self.g.products[name]
        return self.share(jnp.int32(tiles * contraction))

    def owners(self, tile, contraction, units):
        """Return the first and the last block that work on a tile."""
        workers = jnp.minimum(units, self.g.blocks)
        first = lax.div((tile * contraction + 1) * workers - 1, units)
        return first, lax.div((tile + 1) * contraction * workers - 1, units)

    def turns(self, items):
        """Return how many of so many items are this block's, which takes one where all blocks take one each."""
        return jnp.maximum(0, lax.div(items - self.block + self.g.blocks - 1, self.g.blocks))

    def num_items(self):
        return self.turns(self.g.items)

    def item(self, turn, layer):
        """Return what this block attends to in a turn: sequence, head, split, first chunk and end of the chunks.

        Chunks are of the slots that a layer reads, one behind the other: all, those in a window, or those of the
        ``count`` pages it chooses among ``live``, of which the last holds the tokens before the new one.
        """
        g, window, select = self.g, self.static.window, self.g.select
        head, split = divide(self.block + turn * g.blocks, g.splits)
        batch, kv_head = divide(head, g.kv_heads)
        older = self.r.position[batch]
        live, chooses = jnp.int32(1), jnp.bool_(False)
        count = live
        if select is not None:
            whole, chooses = self.whole_pages(older), layer >= select.dense_layers
            live = whole + 1
            count = jnp.minimum(live, select.pages)
            held = (count - 1) * select.page_size + older - whole * select.page_size
            older = jnp.where(chooses, held, older)
        first = 0 if window is None else lax.div(jnp.maximum(older - window + 1, 0), UNIT)
        chunks = lax.div(older + UNIT - 1, UNIT) - first
        splits = jnp.clip(chunks, 1, g.splits)  # those with anything to read
        bound = lambda split: first + lax.div(jnp.minimum(split, splits) * chunks, splits)  # noqa: E731
        return SimpleNamespace(
            head=head, batch=batch, kv_head=kv_head, split=split, splits=splits, older=older,
            start=bound(split), stop=bound(split + 1), live=live, count=count, chooses=chooses,
        )  # fmt: skip

    def whole_pages(self, older):
        """Return the pages before that of the new token, or the last one of a full cache."""
        return lax.div(jnp.minimum(older, self.g.capacity - 1), jnp.int32(self.g.select.page_size))

    def num_score_items(self, layer):
        return jnp.where(layer >= self.g.select.dense_layers, self.turns(self.g.score_items), 0)

    def score_item(self, turn):
        """Return sequence, head and chunk of pages that this block scores in a turn, and whether there are any."""
        head, chunk = divide(self.block + turn * self.g.blocks, self.g.score_chunks)
        batch, kv_head = divide(head, self.g.kv_heads)
        active = chunk * UNIT < self.whole_pages(self.r.position[batch])
        return SimpleNamespace(head=head, batch=batch, kv_head=kv_head, chunk=chunk, active=active)
