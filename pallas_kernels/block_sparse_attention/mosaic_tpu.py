"""Attention of a prompt to blocks of keys as a Pallas TPU kernel: those that an index names, or all up to the diagonal.

A step of the grid serves a row of queries of one head; its list of blocks, and how many there are, comes to SMEM with
it. The loop over them ends with the count, so that padding costs nothing. A few blocks are multiplied at once and
folded into an online softmax; only where a query may not see one of their keys are there masks.

The keys and values of a head stay in VMEM while its queries are served, and are read from HBM once. Rows that choose
their own blocks of 128 keys otherwise read a byte for every 128 FLOPs, which no TPU has the bandwidth for. Where a head
is too long for VMEM, DMAs bring the blocks of a row to a ring of buffers.
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
HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (128, 256, 512)
UNIT_BYTES = 2**18  # of keys that are multiplied at once: 1024 of 128 features in bfloat16
MOST_ROWS = 512  # queries of a row without an index
MOST_BLOCKS = 8192  # that the lists of several rows name; two buffers of them take half of SMEM
ROWS = 8  # of queries whose lists, and sums of exponentials, are moved at once: a tile
STAGES = 3  # units in the ring, all but one of them on their way
VMEM_BYTES = 64 * 2**20  # of a v5p or tpu7x; a v5e or v6e has twice as much
WORK_BYTES = 16 * 2**20  # of it, for everything but the keys and values that stay
EMPTY = -1e30  # score of a key that must not be read
FAR = 2**29  # position beyond all keys
LOG2E = math.log2(math.e)
F32, I32 = jnp.float32, jnp.int32


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How one call is divided.

    Args:
        group: query heads of a key/value head.
        rows: rows of ``size`` queries.
        blocks: blocks of ``size`` keys.
        entries: blocks that an index can name for a row; ``None`` to read all up to the diagonal.
        unit: blocks that are multiplied at once, 1 or an even number.
        held: buffers in VMEM for all keys of a head; 0 to bring blocks one by one.
        limit: bytes of VMEM that the kernel may take.
    """

    batch: int
    heads: int
    group: int
    head_dim: int
    dtype: Any
    rows: int
    size: int
    blocks: int
    entries: int | None
    window: int | None
    sinks: int
    with_lse: bool
    unit: int
    held: int
    limit: int

    @property
    def keys(self) -> int:
        """Keys of a head, filled up to whole blocks."""
        return self.blocks * self.size


def refuse(
    *,
    platform: str,
    dtype: Any,
    kv_dtype: Any,
    head_dim: int,
    num_keys: int,
    block_size: int | None = None,
    masked: bool = False,
    ordered: bool = False,
    **_: Any,
) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    size = LANES if block_size is None else block_size
    if platform != "tpu":
        return f"needs a TPU, got platform {platform!r}"
    if reason := refuse_dtypes({"queries": dtype, "keys": kv_dtype}, ("bfloat16", "float32")):
        return reason
    if head_dim not in HEAD_DIMS:
        return f"needs head_dim {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if size not in BLOCK_SIZES:
        return f"needs blocks of {', '.join(map(str, BLOCK_SIZES))} keys, got {size}"
    if num_keys > MOST_BLOCKS * size:
        return f"needs at most {MOST_BLOCKS} blocks of keys, got {num_keys} keys in blocks of {size}"
    if masked:
        return "takes lengths and a window only, not a mask of keys"
    if ordered:
        return "takes tokens in the order of the text only"
    return None


def block_sparse_attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    index,
    lengths_B,
    *,
    offset,
    window=None,
    sinks=0,
    with_lse=False,
    vmem: int | None = None,
    interpret: Any = False,
):
    """See :func:`pallas_kernels.block_sparse_attention.block_sparse_attention`.

    Args:
        vmem: bytes of VMEM; ``None`` for what the TPU has.
        interpret: ``pltpu.InterpretParams(...)`` to run without a TPU.
    """
    entries = index.blocks.shape[3]
    counts = jnp.clip(index.counts, 0, entries)[..., None]
    named = jnp.concatenate([index.blocks, counts], axis=3)
    about = {"size": index.block_size, "offset": offset, "window": window, "sinks": sinks, "with_lse": with_lse}
    return _attend(q_BTNH, k_BSKH, v_BSKH, lengths_B, named, **about, vmem=vmem, interpret=interpret)


def prefill_attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    lengths_B,
    *,
    window=None,
    keep_BT=None,
    offset=None,
    with_lse=False,
    vmem: int | None = None,
    interpret: Any = False,
):
    """Attend causally to all keys; see :func:`pallas_kernels.attention.prefill_attention`.

    Args:
        keep_BT: must be ``None``.
        vmem: bytes of VMEM; ``None`` for what the TPU has.
        interpret: ``pltpu.InterpretParams(...)`` to run without a TPU.

    Returns:
        ``[B, T, N, H]`` in q's dtype; zeros in blocks of queries that are all padding.
    """
    if keep_BT is not None:
        raise NotImplementedError("takes lengths and a window only, not a mask of keys")
    length, offset = q_BTNH.shape[1], 0 if offset is None else offset
    size = pl.cdiv(pl.cdiv(length, pl.cdiv(length, MOST_ROWS)), LANES) * LANES
    about = {"size": size, "offset": offset, "window": window, "sinks": 0, "with_lse": with_lse}
    return _attend(q_BTNH, k_BTKH, v_BTKH, lengths_B, None, **about, vmem=vmem, interpret=interpret)


def _attend(q_BTNH, k_BSKH, v_BSKH, lengths_B, named, *, size, offset, window, sinks, with_lse, vmem, interpret):
    batch, length, heads, head_dim = q_BTNH.shape
    slots, kv_heads = k_BSKH.shape[1:3]
    rows, blocks = pl.cdiv(length, size), max(pl.cdiv(slots, size), 1)
    entries = None if named is None else named.shape[3] - 1
    most = blocks if entries is None else entries
    vmem = _vmem() if vmem is None else vmem
    key_bytes = max(head_dim, LANES) * q_BTNH.dtype.itemsize
    held = 2 * blocks * size * key_bytes
    buffers = min(max(vmem - 2 * WORK_BYTES, 0) // held, 2)  # the compiler needs some for itself
    g = Geometry(
        batch=batch,
        heads=heads,
        group=heads // kv_heads,
        head_dim=head_dim,
        dtype=q_BTNH.dtype,
        rows=rows,
        size=size,
        blocks=blocks,
        entries=entries,
        window=window,
        sinks=sinks,
        with_lse=with_lse,
        unit=min(max(UNIT_BYTES // (key_bytes * size), 1), most + most % 2 if most > 1 else 1),
        held=buffers,
        limit=WORK_BYTES + buffers * held,
    )
    lengths_B = jnp.full(batch, slots, I32) if lengths_B is None else jnp.clip(lengths_B, 0, slots).astype(I32)
    q_BNTH, k_BKSH, v_BKSH = (
        jnp.pad(jnp.swapaxes(array, 1, 2), ((0, 0), (0, 0), (0, padded - array.shape[1]), (0, 0)))
        for array, padded in ((q_BTNH, rows * size), (k_BSKH, g.keys), (v_BSKH, g.keys))
    )
    lists = [] if named is None else [named]
    out_BNTH, *lse = _call(g, interpret)(jnp.reshape(offset, 1).astype(I32), lengths_B, *lists, q_BNTH, k_BKSH, v_BKSH)
    o_BTNH = jnp.swapaxes(out_BNTH[:, :, :length], 1, 2)
    return (o_BTNH, lse[0].reshape(batch, heads, rows * size)[:, :, :length]) if with_lse else o_BTNH


def _vmem() -> int:
    """Return the bytes of VMEM of the TPU, or the least of current ones when compiling without one."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if jax.default_backend() == "tpu" else VMEM_BYTES


def _call(g: Geometry, interpret: Any):
    def some_rows(width, **options):
        shape = (None, None, min(g.rows, ROWS), width)
        return pl.BlockSpec(shape, lambda b, n, row, *_: (b, n, lax.div(row, I32(ROWS)), 0), **options)

    queries = pl.BlockSpec((None, None, g.size, g.head_dim), lambda b, n, row, *_: (b, n, row, 0))
    keys = pl.BlockSpec(memory_space=pltpu.HBM)
    if g.held:
        shape, buffers = (None, None, g.keys, g.head_dim), pl.Buffered(g.held)
        keys = pl.BlockSpec(shape, lambda b, n, *_: (b, lax.div(n, I32(g.group)), 0, 0), pipeline_mode=buffers)
    ring = pltpu.VMEM((STAGES, g.unit * g.size, g.head_dim), g.dtype)
    o = jax.ShapeDtypeStruct((g.batch, g.heads, g.rows * g.size, g.head_dim), g.dtype)
    lse = jax.ShapeDtypeStruct((g.batch, g.heads, g.rows, g.size), F32)
    named = [] if g.entries is None else [some_rows(g.entries + 1, memory_space=pltpu.SMEM)]
    return pl.pallas_call(
        functools.partial(_kernel, g),
        out_shape=[o, lse] if g.with_lse else [o],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(g.batch, g.heads, g.rows),
            in_specs=[*named, queries, keys, keys],
            out_specs=[queries, some_rows(g.size)] if g.with_lse else [queries],
            scratch_shapes=[
                pltpu.VMEM((g.size, g.head_dim), F32),  # mixed values
                pltpu.VMEM((g.size, LANES), F32),  # largest score
                pltpu.VMEM((g.size, LANES), F32),  # sum of exponentials
                *([] if g.held else [ring, ring, pltpu.SemaphoreType.DMA((STAGES,))]),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=g.limit
        ),
        name="prefill_attention" if g.entries is None else "block_sparse_attention",
        interpret=interpret,
    )


def _kernel(g: Geometry, *refs):
    names = ["offset", "lengths", *([] if g.entries is None else ["named"]), "q", "k", "v", "out"]
    names += [*(["lse"] if g.with_lse else []), "mixed", "top", "mass"]
    names += [] if g.held else ["keys", "values", "arrived"]
    r = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    batch, head, row = (pl.program_id(axis) for axis in range(3))
    at = SimpleNamespace(batch=batch, head=lax.div(head, I32(g.group)), length=r.lengths[batch])
    at.first, at.row = r.offset[0] + row * g.size, lax.rem(row, I32(ROWS))
    at.begin, at.count = _named(g, r, at)
    r.mixed[...] = jnp.zeros(r.mixed.shape, F32)
    r.top[...] = jnp.full(r.top.shape, EMPTY, F32)
    r.mass[...] = jnp.zeros(r.mass.shape, F32)
    if not g.held:
        for unit in range(STAGES - 1):
            _copy(g, r, at, I32(unit), "start")

    def step(unit, _):
        _serve(g, r, at, unit, g.unit)
        return 0

    pair = min(g.unit, 2)  # of blocks, which what is left over is rounded up to
    units = lax.div(at.count + pair - 1, I32(g.unit))
    lax.fori_loop(0, units, step, 0)
    rest = at.count - units * g.unit
    for width in range(pair, g.unit, pair):
        pl.when((rest > width - pair) & (rest <= width))(functools.partial(_serve, g, r, at, units, width))
    _write(g, r, at)


def _named(g, r, at):
    """Return the first block of a row without an index, and how many blocks a row reads."""
    if g.entries is not None:
        return I32(0), r.named[at.row, g.entries]
    begin = I32(0) if g.window is None else lax.div(jnp.maximum(at.first - g.window + 1, 0), I32(g.size))
    end = lax.div(jnp.minimum(at.first + g.size, at.length) + g.size - 1, I32(g.size))
    return begin, jnp.where(at.first < at.length, end - begin, 0)


def _block(g, r, at, entry):
    """Return where to read the block of an entry, and its first position: far away if there is no such block."""
    number = at.begin + entry if g.entries is None else r.named[at.row, jnp.minimum(entry, g.entries - 1)]
    there = jnp.clip(number, 0, g.blocks - 1)
    place = pl.multiple_of(there * g.size, g.size)
    return place, jnp.where((there == number) & (entry < at.count), place, FAR)


def _copy(g, r, at, unit, action):
    """Start or await the copies of the blocks of a unit."""
    stage = lax.rem(unit, I32(STAGES))
    for part in range(g.unit):

        def act(part=part):
            begin, _ = _block(g, r, at, unit * g.unit + part)
            for source, ring in ((r.k, r.keys), (r.v, r.values)):
                block = source.at[at.batch, at.head, pl.ds(begin, g.size)]
                place = ring.at[stage, pl.ds(part * g.size, g.size)]
                getattr(pltpu.make_async_copy(block, place, r.arrived.at[stage]), action)()

        pl.when(unit * g.unit + part < at.count)(act)


def _serve(g, r, at, unit, width):
    """Fold the first blocks of a unit, with masks where a query may not see one of their keys."""
    blocks = [_block(g, r, at, unit * g.unit + part) for part in range(width)]
    positions = [position for _, position in blocks]
    if g.held:
        places = [pl.ds(place, g.size) for place, _ in blocks]
        keys, values = (lambda ref=ref: _join([ref[place] for place in places], 0) for ref in (r.k, r.v))
    else:
        _copy(g, r, at, unit + STAGES - 1, "start")
        _copy(g, r, at, unit, "wait")
        here = lax.rem(unit, I32(STAGES)), pl.ds(0, width * g.size)
        keys, values = (lambda ring=ring: ring[here] for ring in (r.keys, r.values))
    if width < g.unit:
        return _fold(g, r, at, keys, values, positions)
    seen = True
    for position in positions:
        last = position + g.size - 1
        seen &= (last <= at.first) & (last < at.length)
        if g.window is not None:
            seen &= (position > at.first + g.size - 1 - g.window) | (last < g.sinks)
    pl.when(seen)(lambda: _fold(g, r, at, keys, values, None))
    pl.when(~seen)(lambda: _fold(g, r, at, keys, values, positions))


def _join(parts, axis):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)


def _fold(g, r, at, keys, values, positions):
    """Fold blocks into the online softmax of a row; they begin at these positions, or are seen throughout."""
    scores = _product(r.q[...], keys(), transposed=True) * (LOG2E / math.sqrt(g.head_dim))
    values = values()
    if positions is not None:
        queries_XU = at.first + lax.broadcasted_iota(I32, scores.shape, 0)
        keys_XU, keys_UH = (
            _join([begin + lax.broadcasted_iota(I32, (g.size, width), axis) for begin in positions], axis)
            for axis, width in ((1, g.size), (0, g.head_dim))
        )
        seen = keys_XU <= jnp.minimum(queries_XU, at.length - 1)
        read = keys_UH <= jnp.minimum(at.first + g.size, at.length) - 1
        if g.window is not None:
            seen &= (keys_XU > queries_XU - g.window) | (keys_XU < g.sinks)
            read &= (keys_UH > at.first - g.window) | (keys_UH < g.sinks)
        scores = jnp.where(seen, scores, EMPTY)
        values = jnp.where(read, values, jnp.zeros((), values.dtype))  # whatever they hold must not reach a product
    old = r.top[...]
    top = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - _wide(top, scores.shape[1]))
    if positions is not None:
        weights = jnp.where(seen, weights, 0.0)
    decay = jnp.exp2(old - top)
    r.mass[...] = r.mass[...] * decay + sum(weights[:, i : i + LANES] for i in range(0, weights.shape[1], LANES))
    r.mixed[...] = r.mixed[...] * _wide(decay, g.head_dim) + _product(weights.astype(g.dtype), values, transposed=False)
    r.top[...] = top


def _wide(array, width):
    """Repeat lanes that are all alike."""
    return array[:, :width] if width <= LANES else jnp.concatenate([array] * (width // LANES), axis=1)


def _product(a, b, *, transposed):
    precision = lax.Precision.HIGHEST if a.dtype == F32 else lax.Precision.DEFAULT
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=F32)


def _write(g, r, at):
    """Write the mixed values over the sum of their weights; zeros and -inf where nothing was seen."""
    mass = jnp.broadcast_to(jnp.sum(r.mass[...], axis=1, keepdims=True), r.mass.shape)
    share = jnp.where(mass > 0, 1.0 / jnp.where(mass > 0, mass, 1.0), 0.0)
    r.out[...] = (r.mixed[...] * _wide(share, g.head_dim)).astype(g.dtype)
    if g.with_lse:
        sums = jnp.where(mass > 0, (r.top[...] + jnp.log2(jnp.where(mass > 0, mass, 1.0))) / LOG2E, -jnp.inf)
        r.lse[pl.ds(at.row, 1)] = jnp.swapaxes(sums, 0, 1)[:1]
