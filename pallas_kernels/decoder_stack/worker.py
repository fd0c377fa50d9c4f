"""The warpgroup of the decoder stack's kernel that computes; see :mod:`pallas_kernels.decoder_stack.mosaic_gpu`."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decoder_stack.geometry import DOWN, GATE_UP, OUT, QKV, UNIT
from pallas_kernels.decoder_stack.heads import Attention
from pallas_kernels.decoder_stack.pages import Pages
from pallas_kernels.decoder_stack.tiles import (
    DOT,
    DTYPE,
    F32,
    FEATURES,
    INPUT,
    MIDDLE,
    ROWS,
    divide,
    fill_tile,
    fill_units,
    keep_if,
    load,
    over_features,
)
from pallas_kernels.exchange import empty, put, send, take, warm


class Worker(Attention, Pages):
    """Multiply, attend, and finish tiles."""

    def __init__(self, g, r, static, grid, block):
        self.g, self.r, self.static, self.grid, self.block = g, r, static, grid, block

    def run(self):
        g, r, static = self.g, self.r, self.static
        plgpu.set_max_registers(240, action="increase")
        self.begin()
        self.grid.finish_phase()
        rows = lambda value, dtype: plgpu.layout_cast(jnp.full((g.rows,), value, dtype), ROWS)  # noqa: E731
        counts = (jnp.int32(0), jnp.int32(0))
        if static.rule:
            state = (jnp.int32(0), counts, rows(0, jnp.int32), rows(0, jnp.int32), rows(0, F32), jnp.int32(1))
            going = lambda state: (state[0] < r.count[0]) & (state[-1] > 0)  # noqa: E731
            ran, counts, exited, ended, *_ = lax.while_loop(going, self.ruled_layer, state)
            pl.when(r.count[0] > 0)(lambda: plgpu.barrier_wait(r.taken))

            @pl.when(self.block == 0)
            def _():
                r.ended[...] = jnp.where(exited > 0, ended, jnp.zeros_like(ended) + ran)
        else:
            ran = r.count[0]

            def planned_layer(entry, counts):
                self.grid.wait(self.g.phase(entry, QKV), worker=True)
                return self.layer(entry, counts, (load(r.planned, (), ROWS) <= entry).astype(jnp.int32))

            counts = lax.fori_loop(0, ran, planned_layer, counts)
        if static.fill:
            self.fill(ran, counts)

    def begin(self):
        g, r = self.g, self.r
        for free in (r.ring_free, r.feed_free):
            for slot in range(free.shape[0]):
                plgpu.barrier_arrive(free.at[slot])
        plgpu.barrier_arrive(r.head_free)
        if g.blocks > 1:
            empty(r.partial.at[self.block])
        if g.splits > 1:

            def empty_split(turn, _):
                head, place = divide(self.block + turn * g.blocks, g.split_places)
                empty(r.split.at[head, :, pl.ds(2 * place, 2)])
                return 0

            lax.fori_loop(0, self.grid.turns(g.batch * g.kv_heads * g.split_places), empty_split, 0)

        def enter(turn, _):
            tile = self.block + turn * g.blocks

            @pl.when(tile < g.tiles)
            def _():
                halves = [pl.ds(tile * 128 + i * 64, 64) for i in (0, 1)]
                states = [load(r.x, (half,)) for half in halves]
                norms = [load(r.norm_attn, (r.order[0], half), FEATURES) for half in halves]
                self.stage(
                    [state * over_features(norm, self.g.rows) for state, norm in zip(states, norms, strict=True)]
                )
                self.put_sum(INPUT, tile, states, states)
                for half, state in zip(halves, states, strict=True):
                    r.layer_input[half] = state
                self.put_residual((0, tile, None), states)

            nothing = plgpu.layout_cast(jnp.zeros((g.rows,), F32), ROWS)
            for which in (MIDDLE, DOT):
                r.sums[which, tile] = nothing

            @pl.when(tile >= g.tiles)
            def _():
                r.sums[INPUT, tile] = nothing

            return 0

        lax.fori_loop(0, self.grid.turns(g.padded_tiles), enter, 0)

    def ruled_layer(self, state):
        """Ask the rule which rows leave before an entry; run it if any row stays.

        The state holds the squares of the states that entered the last entry, which the rule compares with.
        """
        g, r = self.g, self.r
        entry, counts, exited, ended, before, _ = state
        self.grid.wait(self.g.phase(entry, QKV), worker=True)
        squares = self.total(INPUT)
        norm = jnp.sqrt(squares * before)
        cosine = jnp.minimum(self.total(DOT) / jnp.maximum(norm, 1e-30), 1.0)
        asked = ((entry > 0) & (r.asked[entry] > 0)).astype(F32)
        leaves = (jnp.where(cosine > r.threshold[0], 1.0, 0.0) * asked).astype(jnp.int32)
        leaves = jnp.maximum(leaves, (load(r.planned, (), ROWS) <= entry).astype(jnp.int32))
        ended = jnp.where((leaves > 0) & (exited == 0), jnp.zeros_like(ended) + entry, ended)
        exited = jnp.maximum(exited, leaves)
        r.flags[...] = exited
        staying = g.batch - sum(r.flags[b] for b in range(g.batch))
        go = (staying > 0).astype(jnp.int32)
        pl.when(entry > 0)(lambda: plgpu.barrier_wait(r.taken))  # what was decided before
        r.go[0] = go
        plgpu.barrier_arrive(r.decided)
        counts = lax.cond(go > 0, lambda c: self.layer(entry, c, exited), self.drain, counts)
        return entry + go, counts, exited, ended, squares, go

    def drain(self, counts):
        """Take the weights and states that were read for a layer that does not run."""
        g, r = self.g, self.r
        first, stop = self.grid.product("qkv")

        def take(full, free, slots, count):
            def one(_, count):
                slot = lax.rem(count, slots)
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(free.at[slot])
                return count + 1

            return lax.fori_loop(0, jnp.minimum(stop - first, slots), one, count)

        return (
            take(r.ring_full, r.ring_free, g.stages, counts[0]),
            take(r.feed_full, r.feed_free, g.feeds, counts[1]),
        )

    def layer(self, entry, counts, exited):
        layer = self.r.order[entry]
        counts = self.product("qkv", entry, counts, None, self.begin_heads, self.finish_qkv)
        self.grid.finish_phase()
        if self.g.select is not None:
            counts = self.score_pages(entry, layer, counts)
            self.grid.finish_phase(scores=True)
        counts = self.attention(entry, layer, counts)
        self.grid.finish_phase()
        self.grid.wait(self.g.phase(entry, OUT), worker=True)
        counts = self.product("out", entry, counts, exited, self.begin_residual, self.finish_out)
        self.grid.finish_phase()
        self.grid.wait(self.g.phase(entry, GATE_UP), worker=True)
        counts = self.product("gate_up", entry, counts, None, self.begin_gate_up, self.finish_gate_up)
        self.grid.finish_phase()
        self.grid.wait(self.g.phase(entry, DOWN), worker=True)
        counts = self.product("down", entry, counts, exited, self.begin_residual, self.finish_down)
        self.grid.finish_phase()
        return counts

    # ------------------------------------------------------------------ products

    def product(self, name, entry, counts, exited, begin, finish, fill_from=None):
        """Multiply this block's units, and finish the tiles that it begins.

        ``begin`` loads what ``finish`` needs before the other blocks' sums are asked for.
        """
        g, r, grid = self.g, self.r, self.grid
        if fill_from is None:
            tiles, contraction = g.products[name]
            units = jnp.int32(tiles * contraction)
        else:
            contraction = g.d_model // UNIT
            units = fill_units(g, r, fill_from)
        first, stop = grid.share(units)
        matrices = g.mlp_features // 64 if name == "gate_up" else 1

        def multiply(tile, counts):
            sums, part = [], contraction // matrices
            for i in range(matrices):
                start = tile * contraction + i * part
                low, high, counts = self.multiply(jnp.maximum(first, start), jnp.minimum(stop, start + part), counts)
                sums += [low, high]
            return sums, counts

        def tile_loop(tile, counts):
            at = (entry, tile, exited)
            if g.blocks == 1:
                sums, counts = multiply(tile, counts)
                finish(at, begin(at, name), *sums)
                return counts
            owner, last = grid.owners(tile, contraction, units)
            pl.when(owner == self.block)(lambda: warm(self.needed(at, name)))
            pl.when(owner != self.block)(lambda: warm([r.partial.at[self.block, pl.ds(0, 2 * matrices)]]))
            sums, counts = multiply(tile, counts)

            @pl.when(owner != self.block)
            def _():
                put(r.partial.at[self.block, pl.ds(0, 2 * matrices)], sums)

            @pl.when(owner == self.block)
            def _():
                finish(at, begin(at, name), *self.collect(sums, owner, last))

            return counts

        tiles_end = jnp.where(stop > first, lax.div(stop + contraction - 1, contraction), lax.div(first, contraction))
        return lax.fori_loop(lax.div(first, contraction), tiles_end, tile_loop, counts)

    def collect(self, sums, owner, last):
        """Add the other blocks' sums of a tile, in the order of the blocks."""
        g, pairs = self.g, len(sums) // 2
        others = max(1, g.together // pairs)

        def add(turn, sums):
            sums = list(sums)
            asked = [(owner + 1 + turn * others + i, pair) for i in range(others) for pair in range(pairs)]
            for first in range(0, len(asked), g.together):
                some = asked[first : first + g.together]
                slots = [self.r.partial.at[jnp.minimum(other, last), pl.ds(2 * pair, 2)] for other, pair in some]
                for (other, pair), part in zip(some, take(slots), strict=True):
                    for i in (0, 1):
                        sums[2 * pair + i] += keep_if(other <= last, part[i], 0.0)
            return tuple(sums)

        return lax.fori_loop(0, lax.div(last - owner + others - 1, others), add, tuple(sums))

    def multiply(self, start, end, counts):
        """Return a tile's two halves [64, rows], summed over the units from ``start`` to ``end``."""
        g, r = self.g, self.r

        def accumulate(low, high):
            def unit(_, counts):
                ring, feed = lax.rem(counts[0], g.stages), lax.rem(counts[1], g.feeds)
                plgpu.barrier_wait(r.ring_full.at[ring])
                plgpu.barrier_wait(r.feed_full.at[feed])
                plgpu.wgmma(low, r.ring.at[ring, 0].T, r.feed.at[feed].T)
                plgpu.wgmma(high, r.ring.at[ring, 1].T, r.feed.at[feed].T)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(r.ring_free.at[ring])
                plgpu.barrier_arrive(r.feed_free.at[feed])
                return counts[0] + 1, counts[1] + 1

            counts_ = lax.fori_loop(start, end, unit, counts)
            return low[...], high[...], counts_

        sums = plgpu.ACC((64, g.rows), F32)
        return pl.run_scoped(accumulate, sums, sums)

    def over_rows(self, vector):
        return lax.broadcast_in_dim(vector, (64, self.g.rows), [1])

    def total(self, which):
        """Return the sum over tiles, [rows]."""
        parts = [
            jnp.sum(load(self.r.sums, (which, pl.ds(part * 64, 64))), axis=0)
            for part in range(self.g.padded_tiles // 64)
        ]
        return functools.reduce(jnp.add, parts)

    def total_rms(self, which):
        return lax.rsqrt(self.total(which) / self.g.d_model + self.static.eps)

    def stage(self, halves):
        for i, half in enumerate(halves):
            self.r.staged.at[i].T[...] = half.astype(DTYPE)
        plgpu.commit_smem()

    def needed(self, at, name):
        """Return what finishing a tile will read, tiles ``[64, rows]``."""
        g, r = self.g, self.r
        if name in ("out", "down"):
            states = [r.stream, r.layer_input] if self.static.rule and name == "down" else [r.stream]
            return [state.at[pl.ds(at[1] * 128 + i * 64, 64)] for state in states for i in (0, 1)]
        sums = r.sums.at[INPUT if name in ("qkv", "fill") else MIDDLE]
        angles = [r.cos, r.sin] if name in ("qkv", "fill") else []
        return [*angles, *(sums.at[pl.ds(part * 64, 64)] for part in range(g.padded_tiles // 64))]

    def begin_heads(self, at, name):
        return self.total_rms(INPUT), load(self.r.cos), load(self.r.sin)

    def finish_qkv(self, at, begun, low, high):
        g, r = self.g, self.r
        entry, tile, _ = at
        kv_head, head = divide(tile, g.group + 2)
        self.stage(self.project_head(r.order[entry], tile, head, begun, low, high))
        there = r.heads.at[lax.div(head, g.group + 1), :, kv_head, jnp.minimum(head, g.group)]
        for i in (0, 1):
            plgpu.copy_smem_to_gmem(r.staged.at[i, pl.ds(0, g.batch)], there.at[:, pl.ds(i * 64, 64)])
        plgpu.wait_smem_to_gmem(0)

    def project_head(self, layer, tile, head, begun, low, high):
        """Scale a head's product by the RMS norm of its input; add its bias, normalise and rotate it."""
        g, r, static = self.g, self.r, self.static
        scale, cos, sin = begun
        halves = [half * self.over_rows(scale) for half in (low, high)]
        if "bqkv" in static.inputs:
            bias = [load(r.bqkv, (layer, pl.ds(tile * 128 + i * 64, 64)), FEATURES) for i in (0, 1)]
            halves = [half + over_features(b, self.g.rows) for half, b in zip(halves, bias, strict=True)]
        turned = (head <= g.group).astype(F32)
        if "norm_q" in static.inputs:
            squares = jnp.sum(halves[0] * halves[0] + halves[1] * halves[1], axis=0)
            scale = self.over_rows(lax.rsqrt(squares / g.head_dim + static.eps))
            query, key = ((head < g.group).astype(F32), (head == g.group).astype(F32))
            for i in (0, 1):
                weight = [load(n, (layer, pl.ds(i * 64, 64)), FEATURES).astype(F32) for n in (r.norm_q, r.norm_k)]
                factor = scale * over_features(weight[0] * query + weight[1] * key, self.g.rows) + (1 - turned)
                halves[i] = halves[i] * (factor * turned + (1 - turned))
        cos, sin = cos * turned + (1 - turned), sin * turned
        return halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin

    def begin_residual(self, at, name):
        r = self.r
        entry, tile, _ = at
        norm, layer = r.norm_mlp, r.order[entry]
        if name == "down":
            norm, layer = r.norm_attn, r.order[jnp.minimum(entry + 1, r.order.shape[0] - 1)]
        begun = []
        for i in (0, 1):
            features = pl.ds(tile * 128 + i * 64, 64)
            before = load(r.layer_input, (features,)) if self.static.rule and name == "down" else None
            begun.append((load(r.stream, (features,)), load(norm, (layer, features), FEATURES), before))
        return begun

    def add_devices(self, at, which, low, high):
        """Add the sums of a tile of all devices that share the layer, in their order, one's own among them."""
        g, r = self.g, self.r
        if g.peers == 1:
            return low, high
        rank, devices = self.static.devices
        for device in devices:
            send(r.inbox.at[which, rank, at[1]], (low, high), device)
        for first in range(0, g.peers, g.together):
            senders = range(first, min(first + g.together, g.peers))
            parts = take([r.inbox.at[which, sender, at[1]] for sender in senders], scope="sys")
            if first == 0:
                (low, high), *parts = parts
            for part in parts:
                low, high = low + part[0], high + part[1]
        return low, high

    def finish_out(self, at, begun, low, high):
        news = self.add_residual(at, begun, *self.add_devices(at, 0, low, high), MIDDLE)
        for i, (old, _, _) in enumerate(begun):
            self.r.layer_input[pl.ds(at[1] * 128 + i * 64, 64)] = old
        self.put_residual(at, news)

    def finish_down(self, at, begun, low, high):
        news = self.add_residual(at, begun, *self.add_devices(at, 1, low, high), INPUT)
        if self.static.rule:
            self.put_sum(DOT, at[1], news, [before for _, _, before in begun])
        self.put_residual(at, news)

    def add_residual(self, at, begun, low, high, which):
        """Return the new states of a tile, rounded as the model rounds them; rows that have left keep theirs."""
        stays = self.over_rows(at[2]) == 0
        news, inputs = [], []
        for (old, norm, _), half in zip(begun, (low, high), strict=True):
            new = (old + half.astype(DTYPE).astype(F32)).astype(DTYPE).astype(F32)
            news.append(jnp.where(stays, new, old))
            inputs.append(news[-1] * over_features(norm, self.g.rows))
        self.stage(inputs)
        self.put_sum(which, at[1], news, news)
        return news

    def put_sum(self, which, tile, left, right):
        self.r.sums[which, tile] = jnp.sum(left[0] * right[0] + left[1] * right[1], axis=0)

    def put_residual(self, at, news):
        r = self.r
        for i, new in enumerate(news):
            features = pl.ds(at[1] * 128 + i * 64, 64)
            plgpu.copy_smem_to_gmem(r.staged.at[i], r.norm_input.at[:, features])
            r.stream[features] = new
        plgpu.wait_smem_to_gmem(0)

    def begin_gate_up(self, at, name):
        return self.total_rms(MIDDLE)

    def finish_gate_up(self, at, begun, *halves):
        scale = self.over_rows(begun)
        halves = [half * scale for half in halves]
        pairs = list(zip(halves[: len(halves) // 2], halves[len(halves) // 2 :], strict=True))
        self.stage([gate / (1 + jnp.exp(-gate)) * up for gate, up in pairs])
        for i in range(len(pairs)):
            features = pl.ds(at[1] * self.g.mlp_features + i * 64, 64)
            plgpu.copy_smem_to_gmem(self.r.staged.at[i], self.r.hidden.at[:, features])
        plgpu.wait_smem_to_gmem(0)

    # ------------------------------------------------------------------ layers that did not run

    def fill(self, ran, counts):
        """Store the keys and values that the layers behind the last one would project from the final states."""
        self.grid.wait(self.g.phase(ran, QKV), worker=True)
        self.product("fill", ran, counts, None, self.begin_heads, self.finish_fill, fill_from=ran)

    def finish_fill(self, at, begun, low, high):
        g, r = self.g, self.r
        ran, tile, _ = at
        entry, kv_head, which = fill_tile(g, tile)
        layer, column = r.order[ran + entry], kv_head * (g.group + 2) + g.group + which
        self.stage(self.project_head(layer, column, g.group + which, begun, low, high))

        def put(b, _):
            for number, cache in enumerate((r.k_cache, r.v_cache)):

                @pl.when((which == number) & (r.writes[b] > 0))
                def _(cache=cache):
                    slot = cache.at[layer, b, r.position[b], kv_head]
                    for i in (0, 1):
                        plgpu.copy_smem_to_gmem(r.staged.at[i, b], slot.at[pl.ds(i * 64, 64)])

            if g.select is not None:

                @pl.when((which == 0) & (r.writes[b] > 0))
                def _():
                    plgpu.wait_smem_to_gmem(0)  # the new key, among those that are read
                    self.summarize(layer, b, kv_head, [load(r.staged, (i, b), ROWS) for i in (0, 1)])

            return 0

        lax.fori_loop(0, g.batch, put, 0)
        plgpu.wait_smem_to_gmem(0)
