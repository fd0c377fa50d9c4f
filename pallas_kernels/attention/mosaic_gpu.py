"""Decode attention as one Mosaic GPU kernel for Hopper that reads a cache, or the pages of an index, once and in place.

The slots of every key/value head are split among blocks. A *loader* warpgroup streams units of 128 slots by TMA into a
ring of buffers, from whole runs of the cache or page by page. A *reader* warpgroup folds them into an online softmax,
with 64 slots or features as the left side of the tensor cores' products and the few queries of the head as the right
side, so that one query costs what eight cost. The last split of a head combines what the others found: it waits for
blocks with lower numbers only, which have started before it.
"""

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import refuse_dtypes, refuse_unless_hopper

PAGE_SIZES = (8, 16, 32, 64, 128)
HEAD_DIMS = (64, 128, 256)
UNIT = 128  # slots of a stage of the ring, in two tiles of 64
MAX_ROWS = 64
SHARED_BYTES = 216 * 1024  # of the 227 KiB that a multiprocessor can give, less barriers and the scratch of reductions
REDUCTION_BYTES = 2048
EMPTY = -1e30  # score of a slot that must not be read: exp2 of its distance to any score is 0
FAR = 2**29  # slot number beyond every cache
LOG2E = math.log2(math.e)
F32, I32 = jnp.float32, jnp.int32
TILE = plgpu.Layout.WGMMA  # [64 slots or features, rows]
ROWS = TILE.reduce(0)  # [rows]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How one call is divided.

    Args:
        tokens: new tokens of a sequence.
        entries: pages of an index; ``None`` to read every slot.
        cores: multiprocessors of the device.
    """

    layers: int
    batch: int
    tokens: int
    kv_heads: int
    group: int
    head_dim: int
    slots: int
    dtype: Any
    entries: int | None
    page_size: int
    window: int | None
    cores: int

    @property
    def token_rows(self) -> int:
        """Rows of a token: its queries to one head, and those of the next heads up to a multiple of 8."""
        return -(-self.group // 8) * 8

    @property
    def rows(self) -> int:
        """Rows that meet a head's keys."""
        return self.tokens * self.token_rows

    @property
    def chunks(self) -> int:
        """Groups of 64 features."""
        return self.head_dim // 64

    @property
    def blocks_per_core(self) -> int:
        """Blocks that share a multiprocessor: two, to hide each other's waiting, where their memory allows it."""
        return 2 if self._stages(2) >= 3 else 1

    @property
    def stages(self) -> int:
        """Stages of the ring, each with the keys or the values of a unit."""
        return self._stages(self.blocks_per_core)

    @property
    def units(self) -> int:
        """Units that a head can have at most."""
        return -(-(self.slots if self.entries is None else self.entries * self.page_size) // UNIT)

    @property
    def splits(self) -> int:
        """Blocks of a key/value head, no more than it takes to give each as many units.

        As many as run at once to read everything; for the few units of an index one on each multiprocessor, where
        starting and combining take longer than reading.
        """
        blocks = self.cores * (self.blocks_per_core if self.entries is None else 1)
        most = max(1, min(self.units, blocks // (self.batch * self.kv_heads)))
        return -(-self.units // -(-self.units // most))

    @property
    def copies(self) -> int:
        """TMA copies of a stage."""
        return 1 if self.entries is None else UNIT // self.page_size

    @property
    def run(self) -> int:
        """Slots of a tile of 64 that follow each other in the cache."""
        return 64 if self.entries is None else min(self.page_size, 64)

    @property
    def together(self) -> int:
        """Splits that are combined at once, as registers allow."""
        return max(1, min(8, 128 // (self.chunks * self.rows)))

    def _stages(self, blocks: int) -> int:
        rows = 2 * self.rows * (2 * self.head_dim + UNIT)
        return (SHARED_BYTES // blocks - rows) // (2 * UNIT * self.head_dim)


def refuse(
    *,
    platform: str,
    capability: str | None,
    dtype: Any,
    kv_dtype: Any,
    head_dim: int,
    masked: bool,
    num_queries: int,
    num_heads: int,
    num_kv: int,
    num_keys: int,
    page_size: int | None,
    **_: Any,
) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if reason := refuse_unless_hopper(platform, capability):
        return reason
    if reason := refuse_dtypes({"queries": dtype, "keys": kv_dtype}, ("bfloat16", "float16")):
        return reason
    if head_dim not in HEAD_DIMS:
        return f"needs head_dim {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if num_keys % 8:
        return f"needs a cache of a multiple of 8 slots, got {num_keys}"
    if masked:
        return "takes positions and an index only, not a mask of slots"
    rows = num_queries * -(-num_heads // num_kv // 8) * 8
    if rows > MAX_ROWS:
        return f"needs at most {MAX_ROWS} rows (tokens times the group's queries, rounded up to 8), got {rows}"
    if page_size is not None and page_size not in PAGE_SIZES:
        return f"needs pages of {', '.join(map(str, PAGE_SIZES))} slots, got {page_size}"
    return None


def decode_attention(
    q_BTNH, k, v, positions_BT, *, layer=None, index=None, window=None, valid_BS=None, cores: int | None = None
):
    """See :func:`pallas_kernels.attention.decode_attention`.

    Args:
        cores: multiprocessors to divide the work for; ``None`` for those of the device.
    """
    if layer is None:
        layer, k, v = jnp.int32(0), k[None], v[None]
    layers, batch, slots, kv_heads, head_dim = k.shape
    g = Geometry(
        layers=layers,
        batch=batch,
        tokens=q_BTNH.shape[1],
        kv_heads=kv_heads,
        group=q_BTNH.shape[2] // kv_heads,
        head_dim=head_dim,
        slots=slots,
        dtype=q_BTNH.dtype,
        entries=None if index is None else index.pages.shape[2],
        page_size=UNIT if index is None else index.page_size,
        window=window,
        cores=jax.local_devices()[0].core_count if cores is None else cores,
    )
    inputs = [layer.reshape(1).astype(I32), positions_BT.astype(I32)]
    inputs += [] if index is None else [index.counts, index.pages]
    return _kernel(g)(*inputs, q_BTNH, k, v)[0]


@functools.cache
def _kernel(g: Geometry):
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    heads = g.batch * g.kv_heads
    return plgpu.kernel(
        functools.partial(_body, g),
        out_type=[
            jax.ShapeDtypeStruct((g.batch, g.tokens, g.kv_heads * g.group, g.head_dim), g.dtype),
            jax.ShapeDtypeStruct((heads, g.splits, g.chunks, 64, g.rows), F32),  # mixed values
            jax.ShapeDtypeStruct((heads, g.splits, 2, g.rows), F32),  # largest score, sum of exponentials
        ],
        grid=(heads * g.splits,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types={
            "ring": plgpu.SMEM((g.stages, UNIT, g.head_dim), g.dtype, transforms=tiled),
            "queries": plgpu.SMEM((g.rows, g.head_dim), g.dtype, transforms=tiled),
            "probs": plgpu.SMEM((UNIT // 64, g.rows, 64), g.dtype, transforms=tiled),
            "staged": plgpu.SMEM((g.rows, g.head_dim), g.dtype),
            "full": plgpu.Barrier(num_arrivals=g.copies, num_barriers=g.stages),
            "free": plgpu.Barrier(num_barriers=g.stages),
            "asked": plgpu.Barrier(num_arrivals=g.tokens),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=REDUCTION_BYTES),
    )


def _body(g: Geometry, *refs, **scratch):
    names = ["layer", "position", *(["counts", "pages"] if g.entries is not None else []), "q", "k", "v"]
    names += ["out", "mixed", "sums"]
    r = SimpleNamespace(**dict(zip(names, refs, strict=True)), **scratch)
    warpgroup = lax.axis_index("warpgroup")
    at = _share(g, r, lax.axis_index("block"))
    pl.when(warpgroup == 1)(lambda: _load(g, r, at))
    pl.when(warpgroup == 0)(lambda: _read(g, r, at))


def _share(g, r, block):
    """Return this block's head and split, the positions of the queries, and the units to read."""
    head, split = lax.div(block, I32(g.splits)), lax.rem(block, I32(g.splits))
    batch, kv_head = lax.div(head, I32(g.kv_heads)), lax.rem(head, I32(g.kv_heads))
    positions = [jnp.clip(r.position[batch, token], -1, g.slots - 1) for token in range(g.tokens)]
    latest = functools.reduce(jnp.maximum, positions)
    oldest = jnp.maximum(functools.reduce(jnp.minimum, positions) - (g.window or g.slots) + 1, 0)
    if g.entries is None:
        first, end, count = lax.div(oldest, I32(UNIT)), lax.div(latest + UNIT, I32(UNIT)), None
        units = jnp.maximum(end - first, 0)
        splits = jnp.clip(units, 1, g.splits)  # those with anything to read
        start, stop = (first + lax.div(jnp.minimum(split + i, splits) * units, splits) for i in (0, 1))
    else:  # where a split begins does not depend on the count, so that both are loaded at once
        count = jnp.clip(r.counts[batch, kv_head], 0, g.entries)
        units, each = lax.div(count * g.page_size + UNIT - 1, I32(UNIT)), -(-g.units // g.splits)
        splits = jnp.clip(lax.div(units + each - 1, I32(each)), 1, g.splits)
        start, stop = split * each, jnp.minimum((split + 1) * each, units)
    return SimpleNamespace(
        batch=batch, head=head, kv_head=kv_head, split=split, splits=splits, start=start, stop=stop,
        positions=positions, oldest=oldest, latest=latest, count=count, layer=jnp.clip(r.layer[0], 0, g.layers - 1),
    )  # fmt: skip


def _load(g, r, at):
    """Read keys and values into the ring, a unit of keys and the same unit of values in turn."""
    plgpu.set_max_registers(40, action="decrease")
    num_pages = -(-g.slots // g.page_size)

    def pages_of(unit):
        if g.entries is None:
            return []
        entries = [jnp.minimum(unit * g.copies + i, g.entries - 1) for i in range(g.copies)]
        return [jnp.clip(r.pages[at.batch, at.kv_head, entry], 0, num_pages - 1) for entry in entries]

    def unit(unit, carry):
        count, pages = carry
        following = pages_of(unit + 1)  # asked for before they are needed
        slots = [page * g.page_size for page in pages] or [unit * UNIT]
        for cache in (r.k, r.v):
            stage = lax.rem(count, I32(g.stages))
            plgpu.barrier_wait(r.free.at[stage])
            for i, slot in enumerate(slots):
                source = cache.at[at.layer, at.batch, pl.ds(slot, UNIT // g.copies), at.kv_head]
                into = r.ring.at[stage, pl.ds(i * (UNIT // g.copies), UNIT // g.copies)]
                plgpu.copy_gmem_to_smem(source, into, r.full.at[stage])
            count += 1
        return count, following

    count, _ = lax.fori_loop(at.start, at.stop, unit, (I32(0), pages_of(at.start)))
    for i in range(g.stages):  # a block may not end before its reader is done with the ring
        plgpu.barrier_wait(r.free.at[lax.rem(count + i, I32(g.stages))])


def _read(g, r, at):
    """Fold the units of this split into an online softmax, and hand it on or combine it with those of the others."""
    for i in range(g.stages):
        plgpu.barrier_arrive(r.free.at[i])
    for token in range(g.tokens):
        source = r.q.at[at.batch, token, pl.ds(at.kv_head * g.group, g.token_rows)]
        plgpu.copy_gmem_to_smem(source, r.staged.at[pl.ds(token * g.token_rows, g.token_rows)], r.asked)
    plgpu.barrier_wait(r.asked)
    for i in range(g.chunks):
        features = pl.ds(i * 64, 64)
        r.queries.at[:, features].T[...] = plgpu.load(r.staged.at[:, features].T, layout=TILE, optimized=False)
    plgpu.commit_smem()
    limit = at.positions[0]
    if g.tokens > 1:
        row = plgpu.broadcasted_iota(I32, (64, g.rows), 1, layout=TILE)
        limit = row * 0 + limit
        for token in range(1, g.tokens):
            step = at.positions[token] - at.positions[token - 1]
            limit = limit + (row >= token * g.token_rows).astype(I32) * step

    def unit(unit, carry):
        count, state = carry
        begins = [_begins(g, r, at, unit, part) for part in range(UNIT // 64)]
        slots = [_slots(g, runs, g.rows) for runs in begins]
        seen = [slot <= limit for slot in slots]
        if g.window is not None:
            seen = [part & (slot > limit - g.window) for part, slot in zip(seen, slots, strict=True)]
        keys, values = lax.rem(count, I32(g.stages)), lax.rem(count + 1, I32(g.stages))
        plgpu.barrier_wait(r.full.at[keys])
        scores = _score(g, r, keys, seen)
        plgpu.barrier_arrive(r.free.at[keys])
        *mixed, top, mass = state
        decay, top, mass = _weigh(g, r, scores, seen, top, mass)
        plgpu.barrier_wait(r.full.at[values])
        _clear(g, r, at, values, begins)
        added = _mix(g, r, values)
        plgpu.barrier_arrive(r.free.at[values])
        mixed = [old * _over(g, decay) + new for old, new in zip(mixed, added, strict=True)]
        return count + 2, (*mixed, top, mass)

    rows = lambda value: plgpu.layout_cast(jnp.full((g.rows,), value, F32), ROWS)  # noqa: E731
    tile = lambda: plgpu.layout_cast(jnp.zeros((64, g.rows), F32), TILE)  # noqa: E731
    nothing = (*(tile() for _ in range(g.chunks)), rows(EMPTY), rows(0.0))
    _, state = lax.fori_loop(at.start, at.stop, unit, (I32(0), nothing))
    _finish(g, r, at, state)


def _begins(g, r, at, unit, part):
    """Return where the runs of slots in a tile begin, less their place in it: ``FAR`` for one that does not exist."""
    if g.entries is None:
        return [unit * UNIT + part * 64]
    num_pages = -(-g.slots // g.page_size)
    begins = []
    for i in range(64 // g.run):
        place = unit * UNIT + part * 64 + i * g.run  # among the slots of the index
        entry = lax.div(place, I32(g.page_size))
        page = r.pages[at.batch, at.kv_head, jnp.minimum(entry, g.entries - 1)]
        exists = (entry < at.count) & (page >= 0) & (page < num_pages)
        begin = jnp.clip(page, 0, num_pages - 1) * g.page_size + lax.rem(place, I32(g.page_size))
        begins.append(jnp.where(exists, begin - i * g.run, FAR))
    return begins


def _slots(g, begins, width):
    """Return the slot of every row of a tile ``[64, width]``."""
    row = plgpu.broadcasted_iota(I32, (64, width), 0, layout=TILE)
    slot = row + begins[0]
    for i in range(1, len(begins)):
        slot = slot + (row >= i * g.run).astype(I32) * (begins[i] - begins[i - 1])
    return slot


def _score(g, r, keys, seen):
    """Return the scores of a unit's tiles in base 2, ``EMPTY`` where a query may not read."""

    def multiply(*sums):
        for part, acc in enumerate(sums):
            plgpu.wgmma(acc, r.ring.at[keys, pl.ds(part * 64, 64)], r.queries.T)
        plgpu.wgmma_wait(0)
        return [acc[...] for acc in sums]

    scores = pl.run_scoped(multiply, *[plgpu.ACC((64, g.rows), F32)] * len(seen))
    scale = LOG2E / math.sqrt(g.head_dim)
    return [jnp.where(part, score * scale, EMPTY) for part, score in zip(seen, scores, strict=True)]


def _weigh(g, r, scores, seen, top, mass):
    """Write the weights of a unit to shared memory; return the decay of what came before, new maximum and new sum."""
    new_top = jnp.maximum(top, jnp.max(functools.reduce(jnp.maximum, scores), axis=0))
    peak = _over(g, new_top)
    probs = [jnp.where(part, jnp.exp2(score - peak), 0.0) for part, score in zip(seen, scores, strict=True)]
    decay = jnp.exp2(top - new_top)
    mass = mass * decay + jnp.sum(functools.reduce(jnp.add, probs), axis=0)
    for part, prob in enumerate(probs):
        r.probs.at[part].T[...] = prob.astype(g.dtype)
    plgpu.commit_smem()
    return decay, new_top, mass


def _clear(g, r, at, values, begins):
    """Zero the values of slots that no query reads: whatever they hold must not reach a product."""
    for part, runs in enumerate(begins):
        last = functools.reduce(jnp.maximum, [begin + i * g.run for i, begin in enumerate(runs)]) + (g.run - 1)
        unread = last > at.latest
        if g.window is not None:
            unread |= functools.reduce(jnp.minimum, [begin + i * g.run for i, begin in enumerate(runs)]) < at.oldest

        @pl.when(unread)
        def _(part=part, runs=runs):
            slot = _slots(g, runs, 64)
            read = slot <= at.latest
            if g.window is not None:
                read &= slot >= at.oldest
            for i in range(g.chunks):
                tile = (values, pl.ds(part * 64, 64), pl.ds(i * 64, 64))
                held = plgpu.load(r.ring.at[tile], layout=TILE)
                r.ring[tile] = jnp.where(read, held, jnp.zeros((), g.dtype))

    plgpu.commit_smem()


def _mix(g, r, values):
    """Return the values of a unit, mixed by its weights, for every 64 features."""

    def multiply(*sums):
        for part in range(UNIT // 64):
            for i, acc in enumerate(sums):
                plgpu.wgmma(acc, r.ring.at[values, pl.ds(part * 64, 64), pl.ds(i * 64, 64)].T, r.probs.at[part].T)
        plgpu.wgmma_wait(0)
        return [acc[...] for acc in sums]

    return pl.run_scoped(multiply, *[plgpu.ACC((64, g.rows), F32)] * g.chunks)


def _over(g, vector):
    """Return a vector ``[rows]`` as a tile with 64 equal rows."""
    return lax.broadcast_in_dim(vector, (64, g.rows), [1])


def _finish(g, r, at, state):
    """Hand the state of a split to the last one of its head, which combines them all and writes the output."""
    if g.splits == 1:
        _write(g, r, at, state)
        return
    found = pl.get_global(plgpu.SemaphoreType.REGULAR((g.batch * g.kv_heads,))).at[at.head]

    @pl.when(at.split < at.splits - 1)
    def _():
        *mixed, top, mass = state
        for i, tile in enumerate(mixed):
            r.mixed[at.head, at.split, i] = tile
        r.sums[at.head, at.split, 0] = top
        r.sums[at.head, at.split, 1] = mass
        plgpu.semaphore_signal(found, 1, memory_scope="gpu")

    @pl.when(at.split == at.splits - 1)
    def _():
        plgpu.semaphore_wait(found, at.splits - 1, decrement=False, memory_scope="gpu")

        def merge(turn, state):
            """Combine some further splits at once: their loads wait for memory together."""
            others = [turn * g.together + i for i in range(g.together)]
            there = [jnp.minimum(other, at.splits - 2) for other in others]
            load = functools.partial(plgpu.load, optimized=False)
            sums = [[load(r.sums.at[at.head, other, i], layout=ROWS) for i in (0, 1)] for other in there]
            tiles = [[load(r.mixed.at[at.head, other, i], layout=TILE) for i in range(g.chunks)] for other in there]
            *mixed, top, mass = state
            # A split that was loaded twice counts for nothing the second time.
            tops = [top, *(_keep_if(other < at.splits - 1, s[0], EMPTY) for other, s in zip(others, sums, strict=True))]
            new_top = functools.reduce(jnp.maximum, tops)
            share, *shares = [jnp.exp2(one - new_top) for one in tops]
            mass, mixed = mass * share, [tile * _over(g, share) for tile in mixed]
            for one, (_, other_mass), found in zip(shares, sums, tiles, strict=True):
                mass = mass + other_mass * one
                mixed = [tile + other * _over(g, one) for tile, other in zip(mixed, found, strict=True)]
            return *mixed, new_top, mass

        turns = lax.div(at.splits - 2 + g.together, I32(g.together))
        _write(g, r, at, lax.fori_loop(0, turns, merge, state))


def _keep_if(flag, rows, otherwise):
    """Return a vector if a scalar is true, else ``otherwise`` throughout."""
    return jnp.where(plgpu.layout_cast(jnp.full(rows.shape, flag.astype(F32)), ROWS) > 0, rows, otherwise)


def _write(g, r, at, state):
    """Write the mixed values over the sum of their weights; zeros where nothing was read."""
    *mixed, _, mass = state
    share = jnp.where(mass > 0, 1.0 / jnp.where(mass > 0, mass, 1.0), 0.0)
    for i, tile in enumerate(mixed):
        r.staged.at[:, pl.ds(i * 64, 64)].T[...] = (tile * _over(g, share)).astype(g.dtype)
    plgpu.commit_smem()
    for token in range(g.tokens):
        rows = r.staged.at[pl.ds(token * g.token_rows, g.group)]
        plgpu.copy_smem_to_gmem(rows, r.out.at[at.batch, token, pl.ds(at.kv_head * g.group, g.group)])
    plgpu.wait_smem_to_gmem(0)
