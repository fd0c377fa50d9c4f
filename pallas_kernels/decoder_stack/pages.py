"""Scores and summaries of pages within the decoder stack's kernel; see :mod:`pallas_kernels.page_scores`.

Scores are made as those of attention are, with summaries in the place of keys: a head's queries with the means of
pages, or their positive parts with upper bounds and their negative parts with lower ones. Which pages are chosen is the
affair of the warpgroup that reads them. A page is summarised with its last token.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decoder_stack.geometry import ATTENTION, UNIT
from pallas_kernels.decoder_stack.tiles import DTYPE, F32, TILE, load


class Pages:
    """The phase of scores; ``g``, ``r``, ``static``, ``grid`` and ``block`` are the worker's."""

    def score_pages(self, entry, layer, counts):
        """Score the pages of this block's items for the queries of the new tokens."""
        g, grid = self.g, self.grid
        grid.wait(g.phase(entry, ATTENTION), worker=True)

        def turn(turn, count):
            at = grid.score_item(turn)
            return lax.cond(at.active, lambda count: self.score_chunk(at, count), lambda count: count, count)

        return lax.fori_loop(0, grid.num_score_items(layer), turn, counts[0]), counts[1]

    def score_chunk(self, at, count):
        g, r = self.g, self.r
        plgpu.barrier_wait(r.head_full)
        queries = [r.new_k]
        if g.bounds == 2:
            queries = [r.probs, r.new_v]  # whose values nobody reads here
            for i in (0, 1):
                heads = plgpu.load(r.new_k.at[i].T, layout=TILE, optimized=False).astype(F32)
                r.probs.at[i].T[...] = jnp.maximum(heads, 0.0).astype(DTYPE)
                r.new_v.at[i].T[...] = jnp.minimum(heads, 0.0).astype(DTYPE)
            plgpu.commit_smem()
        slots = [lax.rem(count + unit, g.stages) for unit in range(g.bounds)]
        for slot in slots:
            plgpu.barrier_wait(r.ring_full.at[slot])

        def multiply(*sums):
            for part, acc in enumerate(sums):
                for slot, asked in zip(slots, queries, strict=True):
                    for i in (0, 1):
                        plgpu.wgmma(acc, r.ring.at[slot, i, pl.ds(part * 64, 64)], asked.at[i].T)
            plgpu.wgmma_wait(0)
            return [acc[...] for acc in sums]

        sums = plgpu.ACC((64, g.head_rows), F32)
        scores = pl.run_scoped(multiply, *[sums] * (UNIT // 64))
        for slot in slots:
            plgpu.barrier_arrive(r.ring_free.at[slot])
        plgpu.barrier_arrive(r.head_free)
        column = plgpu.broadcasted_iota(jnp.int32, (64, g.head_rows), 1, layout=TILE)
        for part, score in enumerate(scores):
            best = jnp.max(jnp.where(column < g.group, score, -math.inf), axis=1)
            r.scores[at.head, pl.ds(at.chunk * UNIT + part * 64, 64)] = best
        return count + g.bounds

    def summarize(self, layer, batch, kv_head, new):
        """Write the summary of the page that a new key ``[features]`` fills, of which ``new`` holds the halves."""
        g, r, size = self.g, self.r, self.g.select.page_size
        position = r.position[batch]
        begin = position - (size - 1)

        @pl.when(lax.rem(position, jnp.int32(size)) == size - 1)
        def _():
            page = lax.div(position, jnp.int32(size))
            slot = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=TILE)
            for i, key in enumerate(new):
                features = pl.ds(i * 64, 64)
                high = low = total = key.astype(F32)
                for part in range(max(1, size // 64)):
                    first = jnp.maximum(position - 63 - part * 64, 0)
                    keys = load(r.k_cache, (layer, batch, pl.ds(first, 64), kv_head, features)).astype(F32)
                    older = (slot + first >= begin) & (slot + first < position - part * 64 + (part > 0))
                    if g.bounds == 2:
                        high = jnp.maximum(high, jnp.max(jnp.where(older, keys, -math.inf), axis=0))
                        low = jnp.minimum(low, jnp.min(jnp.where(older, keys, math.inf), axis=0))
                    else:
                        total = total + jnp.sum(jnp.where(older, keys, 0.0), axis=0)
                if g.bounds == 2:
                    r.summary[layer, batch, page, kv_head, features] = high.astype(DTYPE)
                    r.summary[layer, batch, page, kv_head, pl.ds(g.head_dim + i * 64, 64)] = low.astype(DTYPE)
                else:
                    r.summary[layer, batch, page, kv_head, features] = (total / size).astype(DTYPE)
