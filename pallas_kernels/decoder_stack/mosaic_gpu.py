"""The decoder stack as one persistent Mosaic GPU kernel for Hopper: no launch, branch or copy between layers.

Every multiprocessor holds one block of three warpgroups. The *streamer* reads weights and cached keys and values by TMA
into a ring of buffers; nothing it reads depends on the token, so it runs ahead through the phases of a layer. It has no
more in flight than keeps memory busy, as every other trip through memory waits behind it: one unit at a time as long as
the phase of those units may not have begun, since the end of the last one is such trips. The *feeder* does the same
with activations, phase by phase. The *worker* multiplies, with the weights as the 64-row left side of the tensor cores'
products and the few rows of activations as the right side, so that one row costs what eight cost. A phase ends at a
barrier over all blocks, whose wait the ring hides in part.

Activations live in global memory, features along the last axis for the tensor cores and, for the residual stream, along
the first: an accumulator holds 64 features by all rows. RMS norms are applied after the product, which commutes with
scaling rows. Partial sums are added in the order of their blocks, so that results do not depend on timing.

Devices that share a layer, each with its heads and its part of the MLP, run the same kernel on the same states. What a
device's output and down projection give is sent to the others tile by tile and added in the order of the devices
(:meth:`Worker.add_devices`), so that all go on with the same numbers: nothing else is ever sent.
"""

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decoder_stack.geometry import PHASES, UNIT, Geometry, refuse_geometry, refuse_parts
from pallas_kernels.decoder_stack.tiles import divide, fill_tile, fill_units
from pallas_kernels.decoder_stack.worker import Worker
from pallas_kernels.dispatch import refuse_peers, refuse_unless_hopper
from pallas_kernels.exchange import EMPTY_BITS, ranks
from pallas_kernels.partition import num_parts, sharing

OUTPUTS = (
    "stream",
    "layer_input",
    "norm_input",
    "heads",
    "attended",
    "hidden",
    "fill_input",
    "partial",
    "split",
    "sums",
    "ended",
)


def refuse(*, platform: str, dtypes: set, sizes: dict, parts: dict, devices: list[int], **facts: Any) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    device, peers = jax.local_devices()[0], parts["heads"]
    if reason := refuse_unless_hopper(platform, getattr(device, "compute_capability", None)):
        return reason
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        return f"needs weights, states and cache in bfloat16, got {', '.join(sorted(map(str, dtypes)))}"
    if reason := refuse_parts(parts, sizes):
        return reason
    if peers > 1 and (reason := refuse_peers(devices)):
        return reason
    sizes = sizes | {"kv_heads": sizes["kv_heads"] // peers, "d_ff": sizes["d_ff"] // peers, "peers": peers}
    if sizes["batch"] % parts["batch"] == 0:
        sizes["batch"] //= parts["batch"]
    return refuse_geometry(Geometry(**sizes, blocks=device.core_count))


def decode_layers(
    x_BD,
    weights,
    k_LBSKH,
    v_LBSKH,
    positions_B,
    *,
    order_M,
    length,
    planned_B,
    live_B,
    frequencies,
    eps,
    threshold,
    asked_M,
    fill,
    window,
    blocks: int | None = None,
):
    """See :func:`pallas_kernels.decoder_stack.decode_layers`; ``blocks`` is one for each multiprocessor by default."""
    layers, batch, capacity, kv_heads, head_dim = k_LBSKH.shape
    mesh, axes = sharing() or (None, ())
    g = Geometry(
        layers=layers,
        d_model=x_BD.shape[1],
        d_ff=weights.w_down.shape[1],
        kv_heads=kv_heads,
        group=weights.wo.shape[1] // (kv_heads * head_dim),
        head_dim=head_dim,
        batch=batch,
        capacity=capacity,
        blocks=jax.local_devices()[0].core_count if blocks is None else blocks,
        peers=num_parts(mesh, axes) if axes else 1,
    )
    pad_rows = lambda x: jnp.pad(x.astype(jnp.int32), (0, g.rows - batch))  # noqa: E731
    numbers = {
        "position": pad_rows(jnp.clip(positions_B, 0, capacity)),
        "writes": pad_rows(live_B & (positions_B >= 0) & (positions_B < capacity)),
        "planned": pad_rows(planned_B),
        "count": jnp.stack([jnp.max(planned_B), length]).astype(jnp.int32),
        "order": order_M,
        "asked": asked_M.astype(jnp.int32),
    }
    angles = frequencies[:, None] * numbers["position"][None].astype(jnp.float32)
    x_DR = jnp.pad(x_BD.astype(jnp.float32).T, ((0, 0), (0, g.rows - batch)))
    columns = {"x": x_DR, "cos": jnp.cos(angles), "sin": jnp.sin(angles)}
    values = {
        "numbers": _together(_numbers(g, order_M.shape[0]), numbers),
        "columns": _together(_columns(g), columns),
        "threshold": jnp.reshape(jnp.float32(0) if threshold is None else threshold, (1,)).astype(jnp.float32),
        "k_cache": jax.new_ref(k_LBSKH),
        "v_cache": jax.new_ref(v_LBSKH),
        "inbox": jax.new_ref(jnp.full(g.inbox, EMPTY_BITS, jnp.int32)) if g.peers > 1 else None,
        **vars(weights),
    }
    inputs = tuple(name for name in INPUTS if values[name] is not None)
    kernel = build(
        g,
        entries=order_M.shape[0],
        eps=eps,
        rule=threshold is not None,
        fill=fill,
        window=window,
        inputs=inputs,
        mesh=mesh,
        axes=axes,
    )
    results = dict(zip(OUTPUTS, kernel(*[values[name] for name in inputs]), strict=True))
    ran_B = planned_B if threshold is None else jnp.minimum(results["ended"][:batch], planned_B)
    states = (results[name].T[:batch].astype(x_BD.dtype) for name in ("stream", "layer_input"))
    return *states, jax.freeze(values["k_cache"]), jax.freeze(values["v_cache"]), ran_B


def build(g: Geometry, *, entries: int, **static: Any):
    """Return the kernel for one geometry.

    Args:
        entries: length of the order.
        static: ``eps``; ``rule``, whether rows leave when the cosine of the states before and after a layer exceeds a
            threshold; ``fill``, whether entries after the last one that ran store keys and values of the final states;
            ``window``; ``inputs``, which of ``INPUTS`` the kernel is given, in their order; ``mesh`` and
            ``axes``, whose devices share a layer.
    """
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    dtype, f32 = jnp.bfloat16, jnp.float32
    shape = jax.ShapeDtypeStruct
    queries = g.kv_heads * g.group * g.head_dim
    outputs = {
        "stream": shape((g.d_model, g.rows), f32),
        "layer_input": shape((g.d_model, g.rows), f32),
        "norm_input": shape((g.rows, g.d_model), dtype),
        "heads": shape((2, g.batch * g.kv_heads, g.head_rows, g.head_dim), dtype),  # queries and new key; new value
        "attended": shape((g.rows, queries), dtype),
        "hidden": shape((g.rows, g.d_ff), dtype),
        "fill_input": shape((entries if static["fill"] else 1, g.rows, g.d_model), dtype),
        "partial": shape((g.blocks, 2, 64, g.rows), f32),
        "split": shape((g.items, 4, 64, g.head_rows), f32),
        "sums": shape((3, g.padded_tiles, g.rows), f32),
        "ended": shape((g.rows,), jnp.int32),
    }
    scratch = {
        "ring": plgpu.SMEM((g.stages, 2, UNIT, 64), dtype, transforms=tiled),
        "feed": plgpu.SMEM((g.feeds, g.rows, UNIT), dtype, transforms=tiled),
        "new_k": plgpu.SMEM((2, g.head_rows, 64), dtype, transforms=tiled),
        "new_v": plgpu.SMEM((2, g.head_rows, 64), dtype, transforms=tiled),
        "probs": plgpu.SMEM((UNIT // 64, g.head_rows, 64), dtype, transforms=tiled),
        "staged": plgpu.SMEM((2, g.rows, 64), dtype),
        "staged_o": plgpu.SMEM((2, g.head_rows, 64), dtype),
        "flags": plgpu.SMEM((g.rows,), jnp.int32),
        "go": plgpu.SMEM((1,), jnp.int32),
        "ring_full": plgpu.Barrier(num_arrivals=2, num_barriers=g.stages),
        "ring_free": plgpu.Barrier(num_barriers=g.stages),
        "feed_full": plgpu.Barrier(num_barriers=g.feeds),
        "feed_free": plgpu.Barrier(num_barriers=g.feeds),
        "head_full": plgpu.Barrier(num_arrivals=4),
        "head_free": plgpu.Barrier(),
        "decided": plgpu.Barrier(),
    }
    if g.blocks == 1:
        scratch["phase"] = plgpu.Barrier()
    return plgpu.kernel(
        functools.partial(_body, g, SimpleNamespace(**static), entries),
        out_type=list(outputs.values()),
        grid=(g.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=4096),
    )


INPUTS = (
    "numbers",  # int32, the parts of _numbers one after the other
    "columns",  # float32 [D + H, rows], the parts of _columns one below the other
    "threshold",  # float32 [1]
    "k_cache",
    "v_cache",  # [L, B, S, K, H], changed in place
    "inbox",  # int32 [out or down, sender, tile, half, 64, rows], bits of float32, from the devices that share a layer
    "norm_attn",
    "wqkv",  # [L, D, K(G+2)H]
    "bqkv",  # [L, K(G+2)H]
    "norm_q",
    "norm_k",  # [L, H]
    "wo",  # [L, KGH, D]
    "norm_mlp",
    "w_gate_up",  # [L, 2, D, F]
    "w_down",  # [L, F, D]
)


def _numbers(g: Geometry, entries: int) -> dict[str, int]:
    """Return the sizes of the small arrays of integers that the kernel is given as one."""
    return {
        "position": g.rows,  # slot of the new token, and how many slots hold older ones
        "writes": g.rows,  # 1 where the new token's keys and values are stored
        "planned": g.rows,  # entry of order before which the row stops; 0 for rows that do not exist
        "count": 2,  # entries of order that run at most, and entries that exist
        "order": entries,  # layers, in the order they run
        "asked": entries,  # 1 where the rule is asked before that entry
    }


def _columns(g: Geometry) -> dict[str, int]:
    """Return the heights of the arrays with a column for each row that the kernel is given as one."""
    return {"x": g.d_model, "cos": g.head_dim // 2, "sin": g.head_dim // 2}


def _together(sizes: dict[str, int], parts: dict[str, jax.Array]) -> jax.Array:
    """Return parts of these sizes as one array: XLA makes a kernel of each array it computes, however small."""
    return jnp.concatenate([parts[name] for name in sizes])


def _apart(sizes: dict[str, int], ref) -> dict[str, Any]:
    """Return the parts of what :func:`_together` has made."""
    starts = itertools.accumulate(sizes.values(), initial=0)
    return {name: ref.at[pl.ds(start, size)] for (name, size), start in zip(sizes.items(), starts, strict=False)}


def _body(g: Geometry, static: SimpleNamespace, entries: int, *refs, **scratch):
    r = SimpleNamespace(**dict(zip((*static.inputs, *OUTPUTS), refs, strict=True)), **scratch)
    vars(r).update(_apart(_numbers(g, entries), r.numbers) | _apart(_columns(g), r.columns))
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    if g.peers > 1:
        static = SimpleNamespace(**vars(static), devices=ranks(static.mesh, static.axes))
    grid = _Grid(g, r, static, block)
    pl.when(warpgroup == 1)(lambda: _stream(g, r, static, grid, block))
    pl.when(warpgroup == 2)(lambda: _feed(g, r, static, grid, block))
    pl.when(warpgroup == 0)(lambda: Worker(g, r, static, grid, block).run())


class _Grid:
    """Barriers over all blocks, and the division of products among them."""

    def __init__(self, g, r, static, block):
        self.g, self.r, self.block = g, r, block
        if g.blocks > 1:
            self.arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)

    def wait(self, phase, *, worker=False):
        """Wait until every block has finished ``phase`` phases."""
        if self.g.blocks > 1:
            target = (phase + 1) * self.g.blocks
            plgpu.semaphore_wait(self.arrived, target, decrement=False, memory_scope="gpu")
        elif not worker:
            plgpu.barrier_wait(self.r.phase)

    def finish_phase(self):
        if self.g.blocks > 1:
            plgpu.semaphore_signal(self.arrived, 1, memory_scope="gpu")
        else:
            plgpu.barrier_arrive(self.r.phase)

    def share(self, units):
        """Return the first unit of this block and the one behind its last."""
        workers = jnp.clip(units, 1, self.g.blocks)
        index = jnp.minimum(self.block, workers)
        return lax.div(index * units, workers), lax.div(jnp.minimum(index + 1, workers) * units, workers)

    def product(self, name):
        tiles, contraction = self.g.products[name]
        return (*self.share(jnp.int32(tiles * contraction)), contraction)

    def owners(self, tile, contraction, units):
        """Return the first and the last block that work on a tile."""
        workers = jnp.minimum(units, self.g.blocks)
        first = lax.div((tile * contraction + 1) * workers - 1, units)
        return first, lax.div((tile + 1) * contraction * workers - 1, units)

    def num_items(self):
        return jnp.maximum(0, lax.div(self.g.items - self.block + self.g.blocks - 1, self.g.blocks))

    def item(self, turn, window):
        """Return sequence, head, split, first chunk and end of the chunks of this block's item of a turn."""
        g = self.g
        item = self.block + turn * g.blocks
        head, split = divide(item, g.splits)
        batch, kv_head = divide(head, g.kv_heads)
        older = self.r.position[batch]
        first = 0 if window is None else lax.div(jnp.maximum(older - window + 1, 0), UNIT)
        chunks = lax.div(older + UNIT - 1, UNIT) - first
        splits = jnp.clip(chunks, 1, g.splits)  # those with anything to read
        bound = lambda split: first + lax.div(jnp.minimum(split, splits) * chunks, splits)  # noqa: E731
        return SimpleNamespace(
            item=item, head=head, batch=batch, kv_head=kv_head, split=split, splits=splits, older=older,
            start=bound(split), stop=bound(split + 1),
        )  # fmt: skip


def _stream(g, r, static, grid, block):
    """Read weights and cache into the ring, in the order in which the worker takes them."""
    plgpu.set_max_registers(104, action="decrease")

    def await_units(arrived, wanted):
        """Wait until ``wanted`` units have arrived, of which ``arrived`` are known to have."""

        def one(number, _):
            plgpu.barrier_wait(r.ring_full.at[lax.rem(number, g.stages)])
            return 0

        lax.fori_loop(arrived, wanted, one, 0)
        return jnp.maximum(arrived, wanted)

    def put(counts, halves, first):
        """Ask for a unit of a phase, whose first was the ``first`` of all, once few enough are on their way."""
        count, arrived = counts
        slot = lax.rem(count, g.stages)
        plgpu.barrier_wait(r.ring_free.at[slot])
        arrived = await_units(arrived, count + 1 - jnp.where(count < first + g.stages, 1, g.in_flight))
        for i, half in enumerate(halves):
            plgpu.copy_gmem_to_smem(half, r.ring.at[slot, i], r.ring_full.at[slot])
        return count + 1, arrived

    def source(name, layer, unit):
        tile, k = divide(unit, g.products[name][1])
        rows = pl.ds(k * UNIT, UNIT)
        if name == "gate_up":
            return [r.w_gate_up.at[layer, i, rows, pl.ds(tile * 64, 64)] for i in (0, 1)]
        weights = {"qkv": r.wqkv, "out": r.wo, "down": r.w_down}[name]
        return [weights.at[layer, rows, pl.ds(tile * 128 + i * 64, 64)] for i in (0, 1)]

    def units(name, entry, first, stop, counts):
        phase = counts[0] - (first - grid.product(name)[0])

        def unit(u, counts):
            return put(counts, source(name, r.order[entry], u), phase)

        return lax.fori_loop(first, stop, unit, counts)

    def attention(entry, counts):
        phase = counts[0]

        def turn(turn, counts):
            at = grid.item(turn, static.window)

            def chunk(c, counts):
                for cache in (r.k_cache, r.v_cache):
                    slots = cache.at[r.order[entry], at.batch, pl.ds(c * UNIT, UNIT), at.kv_head]
                    counts = put(counts, [slots.at[:, pl.ds(i * 64, 64)] for i in (0, 1)], phase)
                return counts

            return lax.fori_loop(at.start, at.stop, chunk, counts)

        return lax.fori_loop(0, grid.num_items(), turn, counts)

    def rest(entry, counts, qkv_from):
        counts = units("qkv", entry, qkv_from, grid.product("qkv")[1], counts)
        counts = attention(entry, counts)
        for name in ("out", "gate_up", "down"):
            first, stop, _ = grid.product(name)
            counts = units(name, entry, first, stop, counts)
        return counts

    def before_decision(entry, counts):
        first, stop, _ = grid.product("qkv")
        early = jnp.minimum(stop, first + g.stages)
        return units("qkv", entry, first, early, counts), early

    counts = (jnp.int32(0), jnp.int32(0))  # units asked for, and units known to have arrived
    counts, ran, _ = _layers(r, static, counts, rest, before_decision, lambda: grid.product("qkv")[0])
    if static.fill:
        phase = counts[0]

        def unit(u, counts):
            tile, k = divide(u, g.d_model // UNIT)
            entry, kv_head, which = fill_tile(g, tile)
            column = kv_head * (g.group + 2) + g.group + which
            at = r.wqkv.at[r.order[ran + entry], pl.ds(k * UNIT, UNIT)]
            return put(counts, [at.at[:, pl.ds(column * 128 + i * 64, 64)] for i in (0, 1)], phase)

        counts = lax.fori_loop(*grid.share(fill_units(g, r, ran)), unit, counts)
    count, arrived = counts
    for i in range(g.stages):
        plgpu.barrier_wait(r.ring_free.at[lax.rem(count + i, g.stages)])
    await_units(arrived, count)


def _feed(g, r, static, grid, block):
    """Read activations as soon as all blocks have written them."""
    plgpu.set_max_registers(104, action="decrease")

    def units(source, first, stop, contraction, count, entry_of=None):
        def unit(u, count):
            tile, k = divide(u, contraction)
            slot = lax.rem(count, g.feeds)
            plgpu.barrier_wait(r.feed_free.at[slot])
            ref = source if entry_of is None else source.at[entry_of(tile)]
            plgpu.copy_gmem_to_smem(ref.at[:, pl.ds(k * UNIT, UNIT)], r.feed.at[slot], r.feed_full.at[slot])
            return count + 1

        return lax.fori_loop(first, stop, unit, count)

    def qkv(first, stop, count):
        return units(r.norm_input, first, stop, g.products["qkv"][1], count)

    def before_decision(entry, count):
        grid.wait(PHASES * entry)
        first, stop, _ = grid.product("qkv")
        early = jnp.minimum(stop, first + g.feeds)
        return qkv(first, early, count), early

    def layer(entry, count, qkv_from):
        if not static.rule:
            grid.wait(PHASES * entry)
        count = qkv(qkv_from, grid.product("qkv")[1], count)
        grid.wait(PHASES * entry + 1)

        def turn(turn, _):
            at = grid.item(turn, static.window)
            plgpu.barrier_wait(r.head_free)
            for which, new in enumerate((r.new_k, r.new_v)):
                for i in (0, 1):
                    source = r.heads.at[which, at.head, :, pl.ds(i * 64, 64)]
                    plgpu.copy_gmem_to_smem(source, new.at[i], r.head_full)
            return 0

        lax.fori_loop(0, grid.num_items(), turn, 0)
        for phase, (name, source) in enumerate(
            (("out", r.attended), ("gate_up", r.norm_input), ("down", r.hidden)), start=2
        ):
            grid.wait(PHASES * entry + phase)
            count = units(source, *grid.product(name), count)
        return count

    count, ran, going = _layers(r, static, jnp.int32(0), layer, before_decision, lambda: grid.product("qkv")[0])
    if static.fill:
        pl.when(going > 0)(lambda: grid.wait(PHASES * ran))  # the states; a rule that ended the layers has waited
        grid.wait(PHASES * ran + 1)  # their normalised forms
        first, stop = grid.share(fill_units(g, r, ran))
        entry_of = lambda tile: ran + fill_tile(g, tile)[0]  # noqa: E731
        count = units(r.fill_input, first, stop, g.d_model // UNIT, count, entry_of)
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
        count = lax.cond(go > 0, lambda count: layer(entry, count, begun), lambda count: count, count)
        return entry + go, count, go

    going = lambda state: (state[0] < total) & (state[2] > 0)  # noqa: E731
    entry, count, go = lax.while_loop(going, body, (jnp.int32(0), count, jnp.int32(1)))
    return count, entry, go
