"""The warpgroups of the decoder stack's kernel that read; see :mod:`pallas_kernels.decoder_stack.mosaic_gpu`."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decoder_stack.geometry import ATTENTION, DOWN, GATE_UP, OUT, QKV, UNIT
from pallas_kernels.decoder_stack.tiles import DTYPE, FEATURES, divide, fill_tile, fill_units, load, over_features
from pallas_kernels.topk_pages.mosaic_gpu import choose_in_warpgroup

REGISTERS, CHOOSING = 104, 152  # beside the worker's 240, of 504 for three threads


def stream(g, r, static, grid):
    """Read weights and cache into the ring, in the order in which the worker takes them."""
    plgpu.set_max_registers(REGISTERS if g.select is None else CHOOSING, action="decrease")

    def await_units(arrived, wanted, pages):
        """Wait until ``wanted`` units have arrived, of which ``arrived`` are known to have."""

        def one(number, _):
            slot = lax.rem(number, g.stages)
            if g.select is None:
                plgpu.barrier_wait(r.ring_full.at[slot])
                return 0
            of_pages = (lax.shift_right_logical(pages, slot) & 1) > 0
            pl.when(of_pages)(lambda: plgpu.barrier_wait(r.pages_full.at[slot]))
            pl.when(~of_pages)(lambda: plgpu.barrier_wait(r.ring_full.at[slot]))
            return 0

        lax.fori_loop(arrived, wanted, one, 0)
        return jnp.maximum(arrived, wanted)

    def put(counts, ask, first, *, of_pages=False):
        """Ask for a unit of a phase, whose first was the ``first`` of all, once few enough are on their way.

        ``ask(slot)`` starts the transfers into a slot of the ring.
        """
        count, arrived, pages = counts
        slot = lax.rem(count, g.stages)
        plgpu.barrier_wait(r.ring_free.at[slot])
        early = jnp.where(count == first, g.in_flight - 1, 1)
        arrived = await_units(arrived, count + 1 - jnp.where(count < first + g.stages, early, g.in_flight), pages)
        ask(slot)
        if g.select is not None:
            bit = lax.shift_left(jnp.int32(1), slot)
            pages = pages | bit if of_pages else pages & ~bit
        return count + 1, arrived, pages

    def put_halves(counts, halves, first):
        def ask(slot):
            for i, half in enumerate(halves):
                plgpu.copy_gmem_to_smem(half, r.ring.at[slot, i], r.ring_full.at[slot])

        return put(counts, ask, first)

    def ask_pages(cache, pages, slot):
        """Ask for pages of a head; every warp asks for some of them, as a transfer holds up whoever asks for it."""
        size = g.select.page_size

        @plgpu.warp_map
        def _(warp):
            half = pl.ds(lax.rem(warp, 2) * 64, 64)
            for place in range(0, len(pages), 2):
                own = place + warp // 2

                @pl.when(own < len(pages))
                def _(place=place, own=own):
                    page = jnp.where(warp < 2, pages[place], pages[min(place + 1, len(pages) - 1)])
                    there = r.ring.at[slot, lax.rem(warp, 2), pl.ds(own * size, size)]
                    plgpu.copy_gmem_to_smem(cache.at[pl.ds(page * size, size), half], there, r.pages_full.at[slot])

    def source(name, layer, unit):
        tile, k = divide(unit, g.products[name][1])
        weights = {"qkv": r.wqkv, "out": r.wo, "gate_up": r.w_gate_up, "down": r.w_down}[name].at[layer]
        if name == "gate_up" and g.mlp_features == 64:
            return [weights.at[i, pl.ds(k * UNIT, UNIT), pl.ds(tile * 64, 64)] for i in (0, 1)]
        if name == "gate_up":
            which, k = divide(k, g.d_model // UNIT)
            weights = weights.at[which]
        return [weights.at[pl.ds(k * UNIT, UNIT), pl.ds(tile * 128 + i * 64, 64)] for i in (0, 1)]

    def units(name, entry, first, stop, counts):
        phase = counts[0] - (first - grid.product(name)[0])

        def unit(u, counts):
            return put_halves(counts, source(name, r.order[entry], u), phase)

        return lax.fori_loop(first, stop, unit, counts)

    def scores(entry, counts):
        phase, layer = counts[0], r.order[entry]

        def turn(turn, counts):
            at = grid.score_item(turn)

            def read(counts):
                rows = r.summary.at[layer, at.batch, pl.ds(at.chunk * UNIT, UNIT), at.kv_head]
                for which in range(g.bounds):
                    features = [pl.ds(which * g.head_dim + i * 64, 64) for i in (0, 1)]
                    counts = put_halves(counts, [rows.at[:, half] for half in features], phase)
                return counts

            return lax.cond(at.active, read, lambda counts: counts, counts)

        return lax.fori_loop(0, grid.num_score_items(layer), turn, counts)

    def attention(entry, counts):
        phase, layer = counts[0], r.order[entry]

        def turn(turn, counts):
            at = grid.item(turn, layer)

            def slots(c, counts):
                for cache in (r.k_cache, r.v_cache):
                    rows = cache.at[layer, at.batch, pl.ds(c * UNIT, UNIT), at.kv_head]
                    counts = put_halves(counts, [rows.at[:, pl.ds(i * 64, 64)] for i in (0, 1)], phase)
                return counts

            def pages(c, counts):
                size = g.select.page_size
                # Behind the last page it is read again, and counts for nothing.
                chosen = [r.chosen[jnp.minimum(c * (UNIT // size) + i, at.count - 1)] for i in range(UNIT // size)]
                begun = counts[0] - g.stages  # nothing could be read before the phase had begun
                for cache in (r.k_cache, r.v_cache):
                    ask = functools.partial(ask_pages, cache.at[layer, at.batch, :, at.kv_head], chosen)
                    counts = put(counts, ask, begun, of_pages=True)
                return counts

            def choose(counts):
                if g.blocks > 1:
                    grid.wait(g.scored(entry))
                choose_in_warpgroup(static.choice, r.scores, at.head, at.live, r.chosen, r.choosing)
                return lax.fori_loop(at.start, at.stop, pages, counts)

            read_all = lambda counts: lax.fori_loop(at.start, at.stop, slots, counts)  # noqa: E731
            if g.select is None:
                return read_all(counts)
            chooses = at.chooses & (at.stop > at.start)
            if g.select.dense_layers == 0:
                return lax.cond(chooses, choose, lambda counts: counts, counts)
            return lax.cond(chooses, choose, read_all, counts)

        return lax.fori_loop(0, grid.num_items(), turn, counts)

    def rest(entry, counts, qkv_from):
        counts = units("qkv", entry, qkv_from, grid.product("qkv")[1], counts)
        if g.select is not None:
            counts = scores(entry, counts)
            if g.blocks == 1:
                plgpu.barrier_wait(r.scored)
        counts = attention(entry, counts)
        for name in ("out", "gate_up", "down"):
            first, stop = grid.product(name)
            counts = units(name, entry, first, stop, counts)
        return counts

    def before_decision(entry, counts):
        first, stop = grid.product("qkv")
        early = jnp.minimum(stop, first + g.stages)
        return units("qkv", entry, first, early, counts), early

    counts = (jnp.int32(0),) * 3  # units asked for, units known to have arrived, and which slots hold pages, in bits
    counts, ran, _ = _layers(r, static, counts, rest, before_decision, lambda: grid.product("qkv")[0])
    if static.fill:
        phase = counts[0]

        def unit(u, counts):
            tile, k = divide(u, g.d_model // UNIT)
            entry, kv_head, which = fill_tile(g, tile)
            column = kv_head * (g.group + 2) + g.group + which
            at = r.wqkv.at[r.order[ran + entry], pl.ds(k * UNIT, UNIT)]
            return put_halves(counts, [at.at[:, pl.ds(column * 128 + i * 64, 64)] for i in (0, 1)], phase)

        counts = lax.fori_loop(*grid.share(fill_units(g, r, ran)), unit, counts)
    count, arrived, pages = counts
    for i in range(g.stages):
        plgpu.barrier_wait(r.ring_free.at[lax.rem(count + i, g.stages)])
    await_units(arrived, count, pages)


def feed(g, r, static, grid):
    """Read activations as soon as all blocks have written them."""
    plgpu.set_max_registers(REGISTERS, action="decrease")

    def units(source, parts, first, stop, count):
        """Read ``source(k)`` for each of the units, of ``parts`` parts ``[rows, UNIT]`` that tiles take in turn."""

        def unit(u, count):
            slot = lax.rem(count, g.feeds)
            plgpu.barrier_wait(r.feed_free.at[slot])
            plgpu.copy_gmem_to_smem(source(lax.rem(u, jnp.int32(parts))), r.feed.at[slot], r.feed_full.at[slot])
            return count + 1

        return lax.fori_loop(first, stop, unit, count)

    def final_states(ran, first, stop, count):
        """Make what a layer that did not run would have been given of the final states, as no layer has written it."""

        def read(u):
            tile, k = divide(u, g.d_model // UNIT)
            halves = []
            for i in (0, 1):
                features = pl.ds(k * UNIT + i * 64, 64)
                norm = load(r.norm_attn, (r.order[ran + fill_tile(g, tile)[0]], features), FEATURES)
                halves.append(load(r.stream, (features,)) * over_features(norm, g.rows))
            return halves

        def some(turn, count):
            begin = first + turn * g.made_together
            for i, halves in enumerate([read(jnp.minimum(begin + i, stop - 1)) for i in range(g.made_together)]):

                @pl.when(begin + i < stop)
                def _(i=i, halves=halves):
                    slot = lax.rem(count + i, g.feeds)
                    plgpu.barrier_wait(r.feed_free.at[slot])
                    for part, half in enumerate(halves):
                        r.feed.at[slot, :, pl.ds(part * 64, 64)].T[...] = half.astype(DTYPE)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(r.feed_full.at[slot])

            return count + jnp.minimum(g.made_together, stop - begin)

        return lax.fori_loop(0, lax.div(stop - first + g.made_together - 1, g.made_together), some, count)

    def columns(ref):
        return lambda k: ref.at[:, pl.ds(k * UNIT, UNIT)], ref.shape[1] // UNIT

    def qkv(first, stop, count):
        return units(*columns(r.norm_input), first, stop, count)

    def heads(at):
        plgpu.barrier_wait(r.head_free)
        for which, new in enumerate((r.new_k, r.new_v)):
            for i in (0, 1):
                half = r.heads.at[which, at.batch, at.kv_head, :, pl.ds(i * 64, 64)]
                plgpu.copy_gmem_to_smem(half, new.at[i], r.head_full)

    def before_decision(entry, count):
        grid.wait(g.phase(entry, QKV))
        first, stop = grid.product("qkv")
        early = jnp.minimum(stop, first + g.feeds)
        return qkv(first, early, count), early

    def layer(entry, count, qkv_from):
        if not static.rule:
            grid.wait(g.phase(entry, QKV))
        count = qkv(qkv_from, grid.product("qkv")[1], count)
        grid.wait(g.phase(entry, ATTENTION))
        number = r.order[entry]
        if g.select is not None:

            def score_turn(turn, _):
                at = grid.score_item(turn)
                pl.when(at.active)(lambda: heads(at))
                return 0

            lax.fori_loop(0, grid.num_score_items(number), score_turn, 0)
            grid.wait(g.scored(entry))

        def turn(turn, _):
            heads(grid.item(turn, number))
            return 0

        lax.fori_loop(0, grid.num_items(), turn, 0)
        for step, name, source in (
            (OUT, "out", (lambda head: r.attended.at[:, head], r.attended.shape[1])),
            (GATE_UP, "gate_up", columns(r.norm_input)),
            (DOWN, "down", columns(r.hidden)),
        ):
            grid.wait(g.phase(entry, step))
            count = units(*source, *grid.product(name), count)
        return count

    count, ran, going = _layers(r, static, jnp.int32(0), layer, before_decision, lambda: grid.product("qkv")[0])
    if static.fill:
        pl.when(going > 0)(lambda: grid.wait(g.phase(ran, QKV)))  # the states; a rule that ended the layers has waited
        count = final_states(ran, *grid.share(fill_units(g, r, ran)), count)
    for i in range(g.feeds):
        plgpu.barrier_wait(r.feed_free.at[lax.rem(count + i, g.feeds)])
    plgpu.barrier_wait(r.head_free)
    if g.blocks == 1 and not static.fill:
        pl.when(going > 0)(lambda: plgpu.barrier_wait(r.phase))


def _layers(r, static, count, layer, before_decision, first):
    """Run ``layer`` for every entry of the order until the rule ends it.

    Returns the count, the entries that ran, and 0 if the rule ended them.
    """
    total = r.count[0]
    if not static.rule:
        return lax.fori_loop(0, total, lambda entry, count: layer(entry, count, first()), count), total, jnp.int32(1)

    def body(state):
        entry, count, _ = state
        count, begun = before_decision(entry, count)
        plgpu.barrier_wait(r.decided)
        go = r.go[0]
        plgpu.barrier_arrive(r.taken)
        count = lax.cond(go > 0, lambda count: layer(entry, count, begun), lambda count: count, count)
        return entry + go, count, go

    going = lambda state: (state[0] < total) & (state[2] > 0)  # noqa: E731
    entry, count, go = lax.while_loop(going, body, (jnp.int32(0), count, jnp.int32(1)))
    return count, entry, go
