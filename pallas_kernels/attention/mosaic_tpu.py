"""Decode attention as one Pallas TPU kernel that reads a cache, or the pages of an index, once and in place.

A step of the grid serves a sequence. It walks through the units of all its key/value heads, each a few hundred slots,
which DMAs bring from HBM to a ring of buffers in VMEM, page by page; what is beyond a query's position, a window or the
counts of an index is not read. Units are folded into an online softmax, a head after the other.

A cache in HBM has the heads of a slot next to each other. Two of bfloat16 share 32-bit words, the least that a DMA can
take apart, so both heads of a pair are read together. Without an index both are served at once; with one, a head reads
its pages of the pair, which is twice its own bytes. Where ``head_dim`` is 64, or the number of heads neither 1, 2, 4
nor a multiple of 8, XLA stores an array that a program takes or returns in another order. It makes a copy in this one
for the scatter that appends new tokens, and the kernel reads that copy; without an append, the copy is the kernel's.
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
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import refuse_dtypes

LANES = 128
PAGE_SIZES = (8, 16, 32, 64, 128)
HEAD_DIMS = (64, 128, 256)
MAX_ROWS = 128
UNIT = 512  # slots that are multiplied at once
STAGES = 4  # units in VMEM, all but one of them on their way
VMEM_BYTES = 12 * 2**20  # for buffers; the compiler of a v5e allows a kernel 16 MiB and needs some for itself
SMEM_BYTES = 2**18  # for the pages of a sequence, of which two buffers exist
EMPTY = -1e30  # score of a slot that must not be read
FAR = 2**29  # slot number beyond every cache
LOG2E = math.log2(math.e)
F32, I32, U32 = jnp.float32, jnp.int32, jnp.uint32


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How one call is divided.

    Args:
        rows: queries of a key/value head, rounded up to a tile.
        entries: pages of an index; ``None`` to read every slot.
        page_size: slots that a DMA takes.
        unit: slots that are multiplied at once, a multiple of 128.
    """

    layers: int
    batch: int
    rows: int
    kv_heads: int
    head_dim: int
    slots: int
    dtype: Any
    entries: int | None
    page_size: int
    window: int | None
    unit: int

    @property
    def pack(self) -> int:
        """Heads that a DMA brings."""
        return 2 if paired(self.kv_heads, self.dtype) else 1

    @property
    def together(self) -> int:
        """Heads that are served at once."""
        return self.pack if self.entries is None else 1

    @property
    def turns(self) -> int:
        """Heads, or pairs of heads, that are served one after the other."""
        return self.kv_heads // self.together

    @property
    def copies(self) -> int:
        """DMAs of a unit's keys."""
        return self.unit // self.page_size

    @property
    def tail(self) -> int:
        """Slots of the last page if it is cut off by the end of the cache, else 0."""
        return self.slots % self.page_size


def paired(num_kv: int, dtype: Any) -> bool:
    """Return whether two key/value heads share the words of a cache; a single head has whole words of two slots."""
    return jnp.dtype(dtype).itemsize == 2 and num_kv > 1


def split_pair(words: jax.Array, half: Any) -> jax.Array:
    """Return the first or the second of two bfloat16 that share 32-bit words."""
    # The first is the lower half of a word. A bfloat16 is the upper half of a float32.
    words = lax.shift_left(words, jnp.full(words.shape, 16 * (1 - half), U32)) & U32(0xFFFF0000)
    return lax.bitcast_convert_type(words, F32).astype(jnp.bfloat16)


def refuse(
    *,
    platform: str,
    dtype: Any,
    kv_dtype: Any,
    head_dim: int,
    masked: bool,
    num_queries: int,
    num_heads: int,
    num_kv: int,
    num_keys: int,
    page_size: int | None,
    num_entries: int | None = None,
    **_: Any,
) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if platform != "tpu":
        return f"needs a TPU, got platform {platform!r}"
    if reason := refuse_dtypes({"queries": dtype, "keys": kv_dtype}, ("bfloat16", "float32")):
        return reason
    if head_dim not in HEAD_DIMS:
        return f"needs head_dim {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if masked:
        return "takes positions and an index only, not a mask of slots"
    if page_size is not None and page_size not in PAGE_SIZES:
        return f"needs pages of {', '.join(map(str, PAGE_SIZES))} slots, got {page_size}"
    if dtype == jnp.bfloat16 and num_kv > 1 and num_kv % 2:
        return f"needs an even number of key/value heads in bfloat16, or one, as two share words; got {num_kv}"
    if dtype == jnp.bfloat16 and num_kv == 1 and page_size == 8:
        return "needs pages of at least 16 slots for a single key/value head in bfloat16, got 8"
    if num_keys % 8:
        return f"needs a cache of a multiple of 8 slots, got {num_keys}"
    rows = num_queries * (num_heads // num_kv)
    if rows > MAX_ROWS:
        return f"needs at most {MAX_ROWS} rows (tokens times the group's queries), got {rows}"
    if num_entries is not None and num_kv * num_entries * 4 > SMEM_BYTES:
        return f"holds {SMEM_BYTES // 4} pages of a sequence, got {num_entries} for each of {num_kv} heads"
    itemsize = jnp.dtype(dtype).itemsize
    asked = 4 * num_kv * _rows(rows, itemsize) * max(head_dim, LANES) * itemsize  # two buffers of queries and results
    if asked > VMEM_BYTES // 2:
        return f"holds {VMEM_BYTES // 2} bytes of queries and results of a sequence, got {asked}"
    return None


def decode_attention(
    q_BTNH,
    k,
    v,
    positions_BT,
    *,
    layer=None,
    index=None,
    window=None,
    valid_BS=None,
    unit: int = UNIT,
    interpret: Any = False,
):
    """See :func:`pallas_kernels.attention.decode_attention`.

    Args:
        unit: slots that are multiplied at once, a multiple of 128.
        interpret: ``pltpu.InterpretParams(...)`` to run without a TPU.
    """
    if layer is None:
        layer, k, v = jnp.int32(0), k[None], v[None]
    layers, batch, slots, kv_heads, head_dim = k.shape
    tokens, group = q_BTNH.shape[1], q_BTNH.shape[2] // kv_heads
    page_size, entries = (LANES, None) if index is None else (index.page_size, index.pages.shape[2])
    most = slots if index is None else entries * page_size
    g = Geometry(
        layers=layers,
        batch=batch,
        rows=_rows(tokens * group, q_BTNH.dtype.itemsize),
        kv_heads=kv_heads,
        head_dim=head_dim,
        slots=slots,
        dtype=q_BTNH.dtype,
        entries=entries,
        page_size=page_size,
        window=window,
        unit=min(unit // (2 if head_dim > LANES else 1) // LANES * LANES or LANES, pl.cdiv(most, LANES) * LANES),
    )
    positions_BT = jnp.clip(positions_BT, -1, slots - 1).astype(I32)
    latest_B = jnp.max(positions_BT, axis=1)
    oldest_B = jnp.maximum(jnp.min(positions_BT, axis=1) - (window or slots) + 1, 0)
    limits_BR = jnp.repeat(positions_BT, group, axis=1)
    padding = ((0, 0), (0, g.rows - tokens * group))
    limits_BR1 = jnp.pad(limits_BR, padding, constant_values=-1)[:, :, None]
    q_BKTGH = jnp.swapaxes(q_BTNH.reshape(batch, tokens, kv_heads, group, head_dim), 1, 2)
    q_BKRH = jnp.pad(q_BKTGH.reshape(batch, kv_heads, -1, head_dim), (padding[0], *padding, (0, 0)))
    scalars = [jnp.clip(layer, 0, layers - 1).reshape(1).astype(I32), latest_B, oldest_B]
    scalars += [] if index is None else [jnp.clip(index.counts, 0, entries).reshape(-1)]
    arrays = [] if index is None else [index.pages]
    if interpret and g.pack == 2:  # an interpreted DMA cannot take words from an array of bfloat16
        k, v = (pltpu.bitcast(array, U32) for array in (k, v))
    elif kv_heads == 1 and g.dtype == jnp.bfloat16:
        k, v = (array[:, :, :, 0] for array in (k, v))
    arrays += [limits_BR1, q_BKRH, k, v]
    out_BKRH = _call(g, interpret)(*scalars, *arrays)
    out_BKTGH = out_BKRH[:, :, : tokens * group].reshape(q_BKTGH.shape)
    return jnp.swapaxes(out_BKTGH, 1, 2).reshape(q_BTNH.shape)


def _rows(rows: int, itemsize: int) -> int:
    """Round up to a tile."""
    return pl.cdiv(rows, 32 // itemsize) * (32 // itemsize)


def _call(g: Geometry, interpret: Any):
    queries = pl.BlockSpec((None, g.kv_heads, g.rows, g.head_dim), lambda b, *_: (b, 0, 0, 0))
    pages = pl.BlockSpec((None, g.kv_heads, g.entries), lambda b, *_: (b, 0, 0), memory_space=pltpu.SMEM)
    cache = pl.BlockSpec(memory_space=pltpu.HBM)
    ring = pltpu.VMEM((STAGES, g.unit, g.head_dim), U32 if g.pack == 2 else g.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, g),
        out_shape=jax.ShapeDtypeStruct((g.batch, g.kv_heads, g.rows, g.head_dim), g.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3 if g.entries is None else 4,
            grid=(g.batch,),
            in_specs=[
                *([] if g.entries is None else [pages]),
                pl.BlockSpec((None, g.rows, 1), lambda b, *_: (b, 0, 0)),
                queries,
                cache,
                cache,
            ],
            out_specs=queries,
            scratch_shapes=[
                ring,
                ring,
                pltpu.SMEM((STAGES, g.copies), I32),  # slot at which each page in the ring begins
                pltpu.SMEM((STAGES,), I32),  # whether each unit is there and read throughout
                pltpu.VMEM((g.together, g.rows, g.head_dim), F32),  # mixed values
                pltpu.VMEM((g.together, g.rows, LANES), F32),  # largest score
                pltpu.VMEM((g.together, g.rows, LANES), F32),  # sum of exponentials
                pltpu.SemaphoreType.DMA((STAGES,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="decode_attention",
        interpret=interpret,
    )


def _kernel(g: Geometry, *refs):
    names = ["layer", "latest", "oldest", *([] if g.entries is None else ["counts", "pages"]), "limits"]
    names += ["q", "k", "v", "out", "keys", "values", "begins", "whole", "mixed", "top", "mass", "arrived"]
    r = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    if r.k.dtype != r.keys.dtype:
        r.k, r.v = r.k.bitcast(U32), r.v.bitcast(U32)
    batch = pl.program_id(0)
    at = SimpleNamespace(batch=batch, layer=r.layer[0], latest=r.latest[batch], oldest=r.oldest[batch])
    total = lax.fori_loop(0, g.turns, lambda turn, units: units + _units(g, r, at, turn), I32(0))

    def begin(item, turn, unit):
        pl.when(item < total)(lambda: _start(g, r, at, lax.rem(item, STAGES), jnp.minimum(turn, g.turns - 1), unit))

    def proceed(turn, unit):
        """Return the unit after one: of the same head, or the first of the next."""
        ends = unit + 1 >= _units(g, r, at, jnp.minimum(turn, g.turns - 1))
        return jnp.where(ends, turn + 1, turn), jnp.where(ends, 0, unit + 1)

    ahead = (I32(0), I32(0))
    for item in range(STAGES - 1):
        begin(I32(item), *ahead)
        ahead = proceed(*ahead)

    def step(item, carry):
        ahead, (turn, unit) = carry
        begin(item + STAGES - 1, *ahead)
        stage = lax.rem(item, STAGES)
        _wait(g, r, at, stage)
        slots_1U = _slots(g, r, stage)
        pl.when(r.whole[stage] == 0)(lambda: _clear(g, r, at, stage))
        for part in range(g.together):
            _fold(g, r, stage, turn, unit, part, slots_1U)
        following = proceed(turn, unit)
        pl.when(following[0] != turn)(lambda: _write(g, r, turn))
        return proceed(*ahead), following

    lax.fori_loop(0, total, step, (ahead, (I32(0), I32(0))))


def _pages(g, r, at, turn):
    """Return the first entry that a head reads and how many there are."""
    if g.entries is not None:
        return I32(0), r.counts[at.batch * g.kv_heads + turn]
    first = lax.div(at.oldest, I32(g.page_size))
    return first, jnp.maximum(lax.div(at.latest + g.page_size, I32(g.page_size)) - first, 0)


def _units(g, r, at, turn):
    """Return the units of a head; one that reads nothing has one, without pages."""
    return jnp.maximum(lax.div(_pages(g, r, at, turn)[1] + g.copies - 1, I32(g.copies)), 1)


def _copies(g, r, at, stage, lane, i, begin, count):
    """Return the copies of ``count`` slots of keys and of values to the place of page ``i`` in a unit."""
    found = []
    for cache, ring in ((r.k, r.keys), (r.v, r.values)):
        slots, place = pl.ds(begin, count), pl.ds(pl.multiple_of(i * g.page_size, g.page_size), count)
        source = cache.at[(at.layer, at.batch, slots, lane)[: cache.ndim - 1]]
        found.append(pltpu.make_async_copy(source, ring.at[stage, place], r.arrived.at[stage]))
    return found


def _copy(g, r, at, stage, lane, i, begin, action):
    """Start or await the copies of a page that exists; the last page may be cut off by the end of the cache."""

    def act(count):
        for copy in _copies(g, r, at, stage, lane, i, pl.multiple_of(begin, g.page_size), count):
            getattr(copy, action)()

    if g.tail:
        last = g.slots - g.tail
        pl.when(begin < last)(lambda: act(g.page_size))
        pl.when(begin == last)(lambda: act(g.tail))
    else:
        pl.when(begin < FAR)(lambda: act(g.page_size))


def _start(g, r, at, stage, turn, unit):
    """Begin to read a unit, and note which slots it will hold."""
    first, count = _pages(g, r, at, turn)
    lane = turn if g.together == g.pack else lax.div(turn, I32(g.pack))

    def page(i, whole):
        entry = unit * g.copies + i
        if g.entries is None:
            number = first + entry
        else:
            number = r.pages[turn, jnp.minimum(entry, g.entries - 1)]
        there = jnp.clip(number, 0, pl.cdiv(g.slots, g.page_size) - 1)
        begin = there * g.page_size
        exists = (entry < count) & (there == number)
        exists &= (begin <= at.latest) & (begin + g.page_size > at.oldest)
        begin = jnp.where(exists, begin, FAR)
        r.begins[stage, i] = begin
        _copy(g, r, at, stage, lane, i, begin, "start")
        read = (begin + g.page_size - 1 <= at.latest) & (begin >= at.oldest)
        return whole & read.astype(I32)

    r.whole[stage] = lax.fori_loop(0, g.copies, page, I32(1))


def _wait(g, r, at, stage):
    """Wait for a unit."""

    @pl.when(r.whole[stage] == 1)
    def _():
        for ring in (r.keys, r.values):
            pltpu.make_async_copy(ring.at[stage], ring.at[stage], r.arrived.at[stage]).wait()

    @pl.when(r.whole[stage] == 0)
    def _():
        def page(i, _):
            _copy(g, r, at, stage, 0, i, r.begins[stage, i], "wait")
            return 0

        lax.fori_loop(0, g.copies, page, 0)


def _slots(g, r, stage):
    """Return the slot of every place of a unit ``[1, unit]``."""
    lane = lax.broadcasted_iota(I32, (1, LANES), 1)
    each = LANES // g.page_size
    chunks = []
    for chunk in range(g.unit // LANES):
        begins = [r.begins[stage, chunk * each + i] for i in range(each)]
        base = jnp.full((1, LANES), begins[0])
        for i in range(1, each):
            base = jnp.where(lane >= i * g.page_size, begins[i] - i * g.page_size, base)
        chunks.append(base + lane)
    return chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=1)


def _clear(g, r, at, stage):
    """Zero the values of slots that no query reads: whatever they hold must not reach a product."""

    def page(i, _):
        place = pl.ds(pl.multiple_of(i * g.page_size, g.page_size), g.page_size)
        slot = r.begins[stage, i] + lax.broadcasted_iota(I32, (g.page_size, g.head_dim), 0)
        read = (slot <= at.latest) & (slot >= at.oldest)
        r.values[stage, place] = jnp.where(read, r.values[stage, place], jnp.zeros((), r.values.dtype))
        return 0

    lax.fori_loop(0, g.copies, page, 0)


def _fold(g, r, stage, turn, unit, part, slots_1U):
    """Fold a unit into the online softmax of one head."""
    head = turn * g.together + part

    @pl.when(unit == 0)
    def _():
        r.mixed[part] = jnp.zeros(r.mixed.shape[1:], F32)
        r.top[part] = jnp.full(r.top.shape[1:], EMPTY, F32)
        r.mass[part] = jnp.zeros(r.mass.shape[1:], F32)

    half = part if g.together == g.pack else lax.rem(head, I32(g.pack))
    keys, values = (ring[stage] if g.pack == 1 else split_pair(ring[stage], half) for ring in (r.keys, r.values))
    limits_R1 = r.limits[...]
    seen = slots_1U <= limits_R1
    if g.window is not None:
        seen &= slots_1U > limits_R1 - g.window
    scores = _product(r.q[head], keys, transposed=True) * (LOG2E / math.sqrt(g.head_dim))
    scores = jnp.where(seen, scores, EMPTY)
    old = r.top[part][:, :1]
    top = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.where(seen, jnp.exp2(scores - top), 0.0)
    decay = jnp.exp2(old - top)
    mass = r.mass[part][:, :1] * decay + jnp.sum(weights, axis=1, keepdims=True)
    mixed = _product(weights.astype(g.dtype), values, transposed=False)
    r.mixed[part] = r.mixed[part] * decay + mixed
    r.top[part] = jnp.broadcast_to(top, r.top.shape[1:])
    r.mass[part] = jnp.broadcast_to(mass, r.mass.shape[1:])


def _product(a, b, *, transposed):
    precision = lax.Precision.HIGHEST if a.dtype == F32 else lax.Precision.DEFAULT
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=F32)


def _write(g, r, turn):
    """Write the mixed values over the sum of their weights; zeros where nothing was read."""
    for part in range(g.together):
        mass = r.mass[part][:, :1]
        share = jnp.where(mass > 0, 1.0 / jnp.where(mass > 0, mass, 1.0), 0.0)
        r.out[turn * g.together + part] = (r.mixed[part] * share).astype(g.dtype)
