"""Attention within the decoder stack's kernel; see :mod:`pallas_kernels.decoder_stack.mosaic_gpu`.

Scores and mixed values are held transposed, 64 slots or features by the rows of one key/value head: its queries, one
column each, beside a column for the new key that nobody reads. The first split of a head begins with the new token. All
hand what they find to the first few of them, each of which combines it for its part of the features: one trip through
memory, however many splits there are.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decoder_stack.geometry import ATTENTION, UNIT
from pallas_kernels.decoder_stack.tiles import DTYPE, F32, PART, ROWS, TILE, divide, load, over_features
from pallas_kernels.exchange import put, take, warm

EMPTY = -1e30  # score of a slot that must not be read: exp2 of its distance to any score is 0
TINY = 1e-30  # below any mass but nothing's
LOG2E = math.log2(math.e)


class Attention:
    """The attention phase; ``g``, ``r``, ``static``, ``grid`` and ``block`` are the worker's."""

    def attention(self, entry, layer, counts):
        """Attend from the new tokens to the cache and to themselves, split by slots; store the new keys and values."""
        g, r = self.g, self.r

        def turn(turn, count):
            at = self.grid.item(turn, layer)
            if g.splits > 1:
                warm([r.split.at[at.head, :, pl.ds(2 * at.split, 2)]])
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
        row = plgpu.broadcasted_iota(jnp.int32, (64, g.head_rows), 1, layout=TILE)
        score, mixed = [], []
        for i in (0, 1):
            heads, values = (
                plgpu.load(new.at[i].T, layout=TILE, optimized=False).astype(F32) for new in (r.new_k, r.new_v)
            )
            key, value = (jnp.sum(jnp.where(row == g.group, part, 0.0), axis=1) for part in (heads, values))
            score.append(heads * over_features(key, g.head_rows))
            mixed.append(over_features(value, g.head_rows) * counts)
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
        """Store the new keys and values, and write what a head attends to.

        Where a head has several splits, each hands its part to the first few, which add some of the features each.
        """
        g, r, grid = self.g, self.r, self.grid
        over = lambda vector: lax.broadcast_in_dim(vector, (64, g.head_rows), [1])  # noqa: E731
        low, high, top, mass = state
        halves = [half / over(jnp.maximum(mass, TINY)) for half in (low, high)]
        if g.splits > 1:
            log_mass = over(jnp.where(mass > 0, top + jnp.log2(jnp.maximum(mass, TINY)), EMPTY))
            self.hand_over(at, at.split, halves, log_mass)
            nothing = plgpu.layout_cast(jnp.zeros((64, g.head_rows), F32), TILE)
            if g.split_places > g.splits:
                pl.when(at.split < g.split_places - g.splits)(
                    lambda: self.hand_over(at, at.split + g.splits, [nothing] * 2, nothing + EMPTY)
                )

        @pl.when(at.split == 0)
        def _():
            grid.wait(g.phase(entry, ATTENTION), worker=True)

            @pl.when(r.writes[at.batch] > 0)
            def _():
                row = (at.batch, at.kv_head, g.group)
                for which, cache in enumerate((r.k_cache, r.v_cache)):
                    cache[layer, at.batch, r.position[at.batch], at.kv_head] = r.heads[which, *row]
                if g.select is not None:
                    new = [load(r.heads, (0, *row, pl.ds(i * 64, 64)), ROWS) for i in (0, 1)]
                    self.summarize(layer, at.batch, at.kv_head, new)

        if g.splits == 1:
            self.write_attended(at, 0, halves)
        else:
            pl.when(at.split < g.sharers)(lambda: self.write_attended(at, at.split, [self.combine(at)]))

    def turns_of_splits(self, at):
        """Return how often splits are asked for until those with anything to read have been."""
        return lax.div(at.splits + self.g.splits_together - 1, self.g.splits_together)

    def hand_over(self, at, place, halves, log_mass):
        """Write a split's mixed values and the logarithm of their mass for those that combine them."""

        @pl.when(place < self.turns_of_splits(at) * self.g.splits_together)
        def _():
            for i, half in enumerate(halves):
                put(self.r.split.at[at.head, i, pl.ds(2 * place, 2)], (half, log_mass))

    def combine(self, at):
        """Return some features of what all splits of a head have mixed, ``[shared_features, rows]``."""
        g, r = self.g, self.r
        layout = TILE if g.shared_features == 64 else PART
        half, first = divide(at.split * g.shared_features, 64)
        full = lambda value: plgpu.layout_cast(jnp.full((g.shared_features, g.head_rows), value, F32), layout)  # noqa: E731

        def turn(turn, state):
            mixed, top, mass = state
            slots = pl.ds(turn * 2 * g.splits_together, 2 * g.splits_together)
            (found,) = take([r.split.at[at.head, half, slots, pl.ds(first, g.shared_features)]], layout=layout)
            parts, logs = found[::2], found[1::2]
            new_top = functools.reduce(jnp.maximum, [top, *logs])
            shares = [jnp.exp2(each - new_top) for each in (top, *logs)]
            parts = [share * part for share, part in zip(shares, (mixed, *parts), strict=True)]
            return functools.reduce(jnp.add, parts), new_top, functools.reduce(jnp.add, [shares[0] * mass, *shares[1:]])

        mixed, _, mass = lax.fori_loop(0, self.turns_of_splits(at), turn, (full(0.0), full(EMPTY), full(0.0)))
        return mixed / mass

    def write_attended(self, at, place, tiles):
        """Write tiles ``[features, rows]`` of what a head attends to, the first of which is the ``place``-th."""
        g, r = self.g, self.r
        for i, tile in enumerate(tiles):
            r.staged_o.at[i].T[...] = tile.astype(DTYPE)
        plgpu.commit_smem()
        queries = pl.ds(at.kv_head * g.group, g.group)
        for i in range(len(tiles)):
            features = pl.ds((place + i) * g.shared_features, g.shared_features)
            plgpu.copy_smem_to_gmem(r.staged_o.at[i, pl.ds(0, g.group)], r.attended.at[at.batch, queries, features])
        plgpu.wait_smem_to_gmem(0)
