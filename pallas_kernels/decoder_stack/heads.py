"""Attention within the decoder stack's kernel; see :mod:`pallas_kernels.decoder_stack.mosaic_gpu`.

Scores and mixed values are held transposed, 64 slots or features by the rows of one key/value head: its queries, one
column each, beside a column for the new key that nobody reads. The first split of a head begins with the new token and
combines what the others find; of many splits the first of each group does so before.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decoder_stack.geometry import ATTENTION, UNIT
from pallas_kernels.decoder_stack.tiles import DTYPE, F32, ROWS, TILE, keep_if, load
from pallas_kernels.exchange import put, take, warm

EMPTY = -1e30  # score of a slot that must not be read: exp2 of its distance to any score is 0
LOG2E = math.log2(math.e)


class Attention:
    """The attention phase; ``g``, ``r``, ``static``, ``grid`` and ``block`` are the worker's."""

    def attention(self, entry, layer, counts):
        """Attend from the new tokens to the cache and to themselves, split by slots; store the new keys and values."""
        g, r = self.g, self.r

        def turn(turn, count):
            at = self.grid.item(turn, layer)
            if g.splits > 1:
                pl.when(at.split != 0)(lambda: warm([r.split.at[at.item, i] for i in range(4)]))
            plgpu.barrier_wait(r.head_full)
            slot = plgpu.broadcasted_iota(jnp.int32, (64, g.head_rows), 0, layout=TILE)
            kept = r.position[at.batch] < g.capacity  # the new token of a full cache is seen by nobody
            state = self.attend_itself(((at.split == 0) & kept).astype(F32))

            def chunk(c, carry):
                count, state = carry
                keys, values = lax.rem(count, g.stages), lax.rem(count + 1, g.stages)
                self.await_slots(at, keys, values)
                older = at.older - c * UNIT
                self.clear(values, older)
                tiles = []
                for part in range(UNIT // 64):
                    rows = pl.ds(part * 64, 64)
                    seen = slot < older - part * 64
                    if self.static.window is not None:
                        seen = seen & (slot + part * 64 > older - self.static.window)
                    tiles.append((r.ring.at[keys, :, rows], r.ring.at[values, :, rows], seen))
                state = self.attend(tiles, state)
                plgpu.barrier_arrive(r.ring_free.at[keys])
                plgpu.barrier_arrive(r.ring_free.at[values])
                return count + 2, state

            count, state = lax.fori_loop(at.start, at.stop, chunk, (count, state))
            plgpu.barrier_arrive(r.head_free)
            self.finish_item(entry, layer, at, state)
            return count

        items = self.grid.num_items()

        @pl.when(items == 0)
        def _():  # a block that leaves a phase before all have entered it would be counted for one that has not
            self.grid.wait(g.phase(entry, ATTENTION) if g.select is None else g.scored(entry), worker=True)

        return lax.fori_loop(0, items, turn, counts[0]), counts[1]

    def await_slots(self, at, *units):
        """Wait for units of cache slots, which pages bring in other pieces than all slots."""
        g, r = self.g, self.r

        def wait(full):
            for unit in units:
                plgpu.barrier_wait(full.at[unit])

        if g.select is None:
            wait(r.ring_full)
            return
        pl.when(at.chooses)(lambda: wait(r.pages_full))
        if g.select.dense_layers:
            pl.when(~at.chooses)(lambda: wait(r.ring_full))

    def attend_itself(self, counts):
        """Return the state of an online softmax over the new token alone, or over nothing if ``counts`` is 0."""
        g, r = self.g, self.r
        over_features = lambda vector: lax.broadcast_in_dim(vector, (64, g.head_rows), [0])  # noqa: E731
        row = plgpu.broadcasted_iota(jnp.int32, (64, g.head_rows), 1, layout=TILE)
        score, mixed = [], []
        for i in (0, 1):
            heads, values = (
                plgpu.load(new.at[i].T, layout=TILE, optimized=False).astype(F32) for new in (r.new_k, r.new_v)
            )
            key, value = (jnp.sum(jnp.where(row == g.group, part, 0.0), axis=1) for part in (heads, values))
            score.append(heads * over_features(key))
            mixed.append(over_features(value) * counts)
        score = jnp.sum(score[0] + score[1], axis=0) * (LOG2E / math.sqrt(g.head_dim))
        mass = plgpu.layout_cast(jnp.full((g.head_rows,), 1.0, F32), ROWS) * counts
        return *mixed, score * counts + EMPTY * (1 - counts), mass

    def clear(self, values, older):
        """Zero the values of slots that hold nothing yet: whatever they hold must not reach a product."""
        r = self.r

        @pl.when(older < UNIT)
        def _():
            slot = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=TILE)
            for part in range(UNIT // 64):
                for i in (0, 1):
                    at = (values, i, pl.ds(part * 64, 64))
                    held = plgpu.load(r.ring.at[at], layout=TILE)
                    r.ring[at] = jnp.where(slot < older - part * 64, held, jnp.zeros((), DTYPE))
            plgpu.commit_smem()

    def attend(self, tiles, state):
        """Add tiles of 64 slots, each ``(keys, values, which slots count)``, to an online softmax."""
        g, r = self.g, self.r
        low, high, top, mass = state
        over = lambda vector: lax.broadcast_in_dim(vector, (64, g.head_rows), [1])  # noqa: E731
        queries = [r.new_k.at[i] for i in (0, 1)]

        def score(*sums):
            for acc, (keys, _, _) in zip(sums, tiles, strict=True):
                for i in (0, 1):
                    plgpu.wgmma(acc, keys.at[i], queries[i].T)
            plgpu.wgmma_wait(0)
            return [acc[...] for acc in sums]

        sums = plgpu.ACC((64, g.head_rows), F32)
        scores = pl.run_scoped(score, *[sums] * len(tiles))
        scale = LOG2E / math.sqrt(g.head_dim)
        scores = [jnp.where(seen, s * scale, EMPTY) for s, (_, _, seen) in zip(scores, tiles, strict=True)]
        new_top = jnp.maximum(top, jnp.max(functools.reduce(jnp.maximum, scores), axis=0))
        probs = [
            jnp.where(seen, jnp.exp2(s - over(new_top)), 0.0) for s, (_, _, seen) in zip(scores, tiles, strict=True)
        ]
        decay = jnp.exp2(top - new_top)
        mass = mass * decay + jnp.sum(functools.reduce(jnp.add, probs), axis=0)
        for part, prob in enumerate(probs):
            r.probs.at[part].T[...] = prob.astype(DTYPE)
        plgpu.commit_smem()

        def mix(low, high):
            for part, (_, values, _) in enumerate(tiles):
                plgpu.wgmma(low, values.at[0].T, r.probs.at[part].T)
                plgpu.wgmma(high, values.at[1].T, r.probs.at[part].T)
            plgpu.wgmma_wait(0)
            return low[...], high[...]

        mixed = pl.run_scoped(mix, sums, sums)
        return low * over(decay) + mixed[0], high * over(decay) + mixed[1], new_top, mass

    def finish_item(self, entry, layer, at, state):
        """Combine the splits of a head: those of a group in its first one, and the groups in the first of all."""
        g, r, grid = self.g, self.r, self.grid
        over = lambda vector: lax.broadcast_in_dim(vector, (64, g.head_rows), [1])  # noqa: E731
        state = *state[:2], *(over(vector) for vector in state[2:])

        size, last = self.group(at)
        combine_group = lambda: self.merge(at, state, 1, last)  # noqa: E731
        if g.splits > 1:
            pl.when((at.split != 0) & (at.split < at.splits))(lambda: put(r.split.at[at.item], combine_group()))

        @pl.when(at.split == 0)
        def _():
            grid.wait(g.phase(entry, ATTENTION), worker=True)

            @pl.when(r.writes[at.batch] > 0)
            def _():
                for which, cache in enumerate((r.k_cache, r.v_cache)):
                    cache[layer, at.batch, r.position[at.batch], at.kv_head] = r.heads[which, at.head, g.group]
                if g.select is not None:
                    new = [load(r.heads, (0, at.head, g.group, pl.ds(i * 64, 64)), ROWS) for i in (0, 1)]
                    self.summarize(layer, at.batch, at.kv_head, new)

            merged = state
            if g.splits > 1:
                merged = self.merge(at, combine_group(), size, lax.div(at.splits - 1, size) * size)
            low, high, _, mass = merged
            for i, mixed in enumerate((low, high)):
                r.staged_o.at[i].T[...] = (mixed / mass).astype(DTYPE)
            plgpu.commit_smem()
            for query in range(g.group):
                for i in (0, 1):
                    features = pl.ds((at.kv_head * g.group + query) * g.head_dim + i * 64, 64)
                    plgpu.copy_smem_to_gmem(r.staged_o.at[i, query], r.attended.at[at.batch, features])
            plgpu.wait_smem_to_gmem(0)

    def group(self, at):
        """Return how many splits make a group, and the last one of it where this is the first, else this one."""
        few = 2 * self.g.splits_together + 1  # are combined as fast without groups
        size = jnp.where(at.splits <= few, few, self.g.split_group)
        last = jnp.minimum(at.split + size, at.splits) - 1
        return size, jnp.where(lax.rem(at.split, size) == 0, last, at.split)

    def merge(self, at, state, step, last):
        """Combine a split with those behind it, so many apart, until the last one."""
        g = self.g

        def turn(turn, state):
            others = [at.split + step * (turn * g.splits_together + i + 1) for i in range(g.splits_together)]
            found = take([self.r.split.at[at.item - at.split + jnp.minimum(other, last)] for other in others])
            splits = [state]
            for other, (low, high, top, mass) in zip(others, found, strict=True):
                splits.append((low, high, keep_if(other <= last, top, EMPTY), mass))
            top = functools.reduce(jnp.maximum, [split[2] for split in splits])
            shares = [jnp.exp2(split[2] - top) for split in splits]
            add = lambda i: functools.reduce(  # noqa: E731
                jnp.add, [share * split[i] for share, split in zip(shares, splits, strict=True)]
            )
            return add(0), add(1), top, add(3)

        turns = lax.div(last - at.split + step * g.splits_together - 1, step * g.splits_together)
        return lax.fori_loop(0, turns, turn, state)
