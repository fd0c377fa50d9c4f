"""Compaction as a Pallas TPU kernel, in place: a DMA for each slot to keep brings it to VMEM, whole units go back.

A step of the grid serves a head of a sequence, or the two that share words. Units of 64 rows pass through a ring of
buffers, and while one is put together, the rows of two others are on their way in and two others on their way out. A
unit is sent back when all of its rows have come. A slot never moves back, so that unit u goes to rows below
``64 (u + 1)``, and the rows of later units are not below that: they may be on their way already. (Slots before the
cache, which are read as the first one, can push others below their places; the kernel does not keep those.)

A DMA takes 32-bit words of HBM. Two numbers of bfloat16 share one: of two heads of a slot where heads fill tiles, else
of two slots of a head, as XLA then stores the slots of a head next to each other. Such a word is read for either of the
numbers that it shall hold, which is twice the bytes of the slots to keep; in float32 it is those bytes. Written are, in
both, the slots to keep and nothing else, but for the other half of the last word where their number is odd, which gets
what it holds.
"""

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import refuse_dtypes

UNIT = 64  # rows that are sent back at once
STAGES, AHEAD = 4, 2  # units in VMEM, and those of them that are on their way in
MOST_DIM = 1024
SMEM_BYTES = 2**18  # for the slots of a step, of which two buffers exist
I32, U32 = jnp.int32, jnp.uint32


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How one call is divided.

    Args:
        lanes: heads of a sequence, or pairs of them that share words.
        rows: of ``head_dim`` words each, that a lane keeps.
        pack: numbers of a word.
        by_head: whether the heads of a slot are next to each other in HBM, else the slots of a head.
        unit: rows that are sent back at once.
    """

    batch: int
    lanes: int
    rows: int
    head_dim: int
    pack: int
    by_head: bool
    unit: int
    dtype: Any

    @property
    def full(self) -> int:
        """Units of a lane that are full."""
        return self.rows // self.unit

    @property
    def tail(self) -> int:
        """Rows of one more unit."""
        return self.rows % self.unit

    @property
    def units(self) -> int:
        """Units of a lane."""
        return self.full + (self.tail > 0)


def fills_tiles(num_kv: int, dtype: Any) -> bool:
    """Return whether XLA stores the heads of a slot next to each other, rather than the slots of a head."""
    return num_kv in (2, 4) or num_kv % 8 == 0 or (num_kv == 1 and dtype == jnp.float32)


def refuse(
    *,
    platform: str,
    dtype: Any,
    value_dtype: Any,
    head_dim: int,
    num_kv: int,
    num_slots: int,
    kept: int,
    **_: Any,
) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if platform != "tpu":
        return f"needs a TPU, got platform {platform!r}"
    if reason := refuse_dtypes({"keys": dtype, "values": value_dtype}, ("bfloat16", "float32")):
        return reason
    if head_dim % 128 or head_dim > MOST_DIM:
        return f"needs head_dim to be a multiple of 128 up to {MOST_DIM}, got {head_dim}"
    if not fills_tiles(num_kv, dtype) and num_slots % 8:
        return f"needs a multiple of 8 slots where heads do not fill tiles, got {num_slots} slots of {num_kv} heads"
    heads = 2 if fills_tiles(num_kv, dtype) and dtype == jnp.bfloat16 else 1  # of a step
    if kept * heads * 4 > SMEM_BYTES:
        return f"keeps up to {SMEM_BYTES // 4 // heads} slots of {num_kv} heads, got {kept}"
    return None


def compact_cache(k, v, slots_BKM, layer, *, unit: int = UNIT, interpret: Any = False):
    """See :func:`pallas_kernels.compact_cache.compact_cache`; the arrays are stacked.

    Args:
        unit: rows that are sent back at once, on a TPU a multiple of 8.
        interpret: ``pltpu.InterpretParams(...)`` to run without a TPU.
    """
    layers, batch, slots, heads, dim = k.shape
    kept, pack = slots_BKM.shape[2], 4 // k.dtype.itemsize
    by_head = fills_tiles(heads, k.dtype)
    slots_BKM = jnp.clip(slots_BKM, 0, slots - 1)
    if by_head:
        parts_11P1 = jnp.arange(pack, dtype=I32).reshape(1, 1, pack, 1)
        from_BNPR = slots_BKM.reshape(batch, heads // pack, pack, kept) * pack + parts_11P1
    else:  # the rest of the last word stays as it is
        stays = jnp.broadcast_to(jnp.arange(kept, pl.cdiv(kept, pack) * pack, dtype=I32), (batch, heads, -kept % pack))
        slots_BKM = jnp.concatenate([slots_BKM, stays], axis=2)
        from_BNPR = jnp.stack([slots_BKM[:, :, part::pack] for part in range(pack)], axis=2)
        k, v = (array.swapaxes(2, 3) for array in (k, v))
    _, lanes, _, rows = from_BNPR.shape
    g = Geometry(
        batch=batch,
        lanes=lanes,
        rows=rows,
        head_dim=dim,
        pack=pack,
        by_head=by_head,
        unit=unit,
        dtype=k.dtype,
    )
    words = interpret and pack == 2
    if words:  # an interpreted DMA cannot take words from an array of bfloat16
        k, v = (pltpu.bitcast(array, U32) for array in (k, v))
    layer = jnp.clip(layer, 0, layers - 1).reshape(1).astype(I32)
    found = _call(g, k, interpret)(layer, from_BNPR.reshape(batch * lanes, 1, -1), k, v)
    found = [pltpu.bitcast(array, g.dtype) for array in found] if words else found
    return tuple(found) if by_head else tuple(array.swapaxes(2, 3) for array in found)


def _call(g: Geometry, cache: jax.Array, interpret: Any):
    whole = pl.BlockSpec(memory_space=pltpu.HBM)
    ring = pltpu.VMEM((STAGES, g.pack, g.unit, g.head_dim), U32 if g.pack == 2 else g.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, g),
        out_shape=[jax.ShapeDtypeStruct(cache.shape, cache.dtype)] * 2,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(g.batch, g.lanes),
            in_specs=[
                pl.BlockSpec(
                    (None, 1, g.pack * g.rows), lambda b, n, _: (b * g.lanes + n, 0, 0), memory_space=pltpu.SMEM
                ),
                whole,
                whole,
            ],
            out_specs=[whole, whole],
            scratch_shapes=[ring, ring, pltpu.SemaphoreType.DMA((STAGES,)), pltpu.SemaphoreType.DMA((STAGES,))],
        ),
        input_output_aliases={2: 0, 3: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="compact_cache",
        interpret=interpret,
    )


def _kernel(g: Geometry, layer, sources, _k, _v, k, v, keys, values, came, left):
    if k.dtype != keys.dtype:
        k, v = k.bitcast(U32), v.bitcast(U32)
    r = SimpleNamespace(sources=sources, arrays=((k, keys), (v, values)), came=came, left=left)
    r.layer, r.batch, r.lane = layer[0], pl.program_id(0), pl.program_id(1)

    for first in range(min(AHEAD, g.units)):
        _read(g, r, I32(first))

    def step(unit, _):
        # The buffers of the unit to begin are those of one that was sent back.
        pl.when(unit >= STAGES - AHEAD)(lambda: _return(g, r, unit - (STAGES - AHEAD), "wait"))
        pl.when(unit + AHEAD < g.units)(lambda: _read(g, r, unit + AHEAD))
        _pass_on(g, r, unit)
        return 0

    lax.fori_loop(0, g.units, step, 0)
    for last in range(max(g.units - (STAGES - AHEAD), 0), g.units):
        _return(g, r, I32(last), "wait")


def _rows(g, r, cache, words):
    """Return rows of the lane in HBM, by the number of their words."""
    return cache.at[(r.layer, r.batch, *((words, r.lane) if g.by_head else (r.lane, words)))]


def _placed(g, unit, act):
    """Call ``act`` with a function that places the rows of a unit behind a base: all of a full one, else one by one."""
    if g.full:
        pl.when(unit < g.full)(lambda: act(lambda base: pl.ds(base, g.unit)))
    if g.tail:
        each = functools.partial(lax.fori_loop, 0, g.tail, lambda i, _: act(lambda base: base + i), None)
        pl.when(unit == g.full)(each)


def _source(g, r, part, row):
    """Return what a part of a row shall hold: the row where it is, times the parts of one, plus the part there."""
    return r.sources[0, part * g.rows + row]


def _read(g, r, unit):
    """Begin to bring the rows that the parts of a unit are in."""
    stage = lax.rem(unit, I32(STAGES))

    def row(i, _):
        for part in range(g.pack):
            word = lax.div(_source(g, r, part, unit * g.unit + i), I32(g.pack))
            for cache, ring in r.arrays:
                pltpu.make_async_copy(_rows(g, r, cache, word), ring.at[stage, part, i], r.came.at[stage]).start()
        return 0

    lax.fori_loop(0, jnp.minimum(g.unit, g.rows - unit * g.unit), row, 0)


def _pass_on(g, r, unit):
    """Wait for a unit, put its words together and begin to send it back."""
    stage = lax.rem(unit, I32(STAGES))

    def row(i, _):
        halves = [lax.rem(_source(g, r, part, unit * g.unit + i), I32(g.pack)) for part in range(g.pack)]
        for _, ring in r.arrays:
            low, high = (_half(ring[stage, part, pl.ds(i, 1)], half) for part, half in enumerate(halves))
            ring[stage, 0, pl.ds(i, 1)] = low | lax.shift_left(high, jnp.full(high.shape, 16, U32))
        return 0

    def wait(place):
        for _, ring in r.arrays:
            for part in range(g.pack):
                there = ring.at[stage, part, place(0)]
                pltpu.make_async_copy(there, there, r.came.at[stage]).wait()

    _placed(g, unit, wait)
    if g.pack == 2:
        lax.fori_loop(0, jnp.minimum(g.unit, g.rows - unit * g.unit), row, 0)
    _return(g, r, unit, "start")


def _half(words, half):
    """Return one of the two numbers of words, as the lower one."""
    return lax.shift_right_logical(words, jnp.full(words.shape, 16 * half, U32)) & U32(0xFFFF)


def _return(g, r, unit, action):
    """Start, or await, the copies of a unit to where it belongs."""
    stage = lax.rem(unit, I32(STAGES))

    def act(place):
        for cache, ring in r.arrays:
            to = _rows(g, r, cache, place(unit * g.unit))
            getattr(pltpu.make_async_copy(ring.at[stage, 0, place(0)], to, r.left.at[stage]), action)()

    _placed(g, unit, act)
