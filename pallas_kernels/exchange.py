"""Tiles of numbers handed from block to block, or device to device, through global memory, each number its own flag.

A fence and a semaphore would cost several trips through a memory system that is busy with weights, microseconds each.
Here a slot holds ``EMPTY_BITS`` until it is written, a NaN that no arithmetic gives, and the reader asks until nothing
of that is left; it then empties the slot for the next writer, which a barrier over all blocks must separate from it.
Every number is written by one thread, and asked for and emptied by one, so none can be torn or missed. What all blocks
read (:func:`published`) has two sets of slots by turns: who writes to one empties the other, which all have read by
then and whose next reader waits for a barrier behind that.

Devices hand each other tiles in the same way, in two sets of slots by turns. A device writes to a slot again after it
has taken what the other sent in between, which that one sent behind a barrier over its blocks, or in a later kernel,
after it had emptied the slot: that is order enough. A tile is ``[64, rows]`` in the layout of an accumulator unless
another ``layout`` is given; any will do whose threads hold pairs of neighbours.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf

EMPTY_BITS = 0xFFFF0BAD - 2**32  # a NaN, as an int32; arithmetic on a GPU gives 0x7FFFFFFF
EMPTY_HALVES = -1  # two of bfloat16, where conversions give 0x7FFF
TILE = plgpu.Layout.WGMMA  # [64 features or slots, rows]


def ranks(mesh, axes):
    """Return this device's place among those along axes of a mesh, and the numbers of all of them in the mesh.

    Within a kernel; the places are those of ``jax.lax.axis_index(axes)``.
    """
    strides = {axis: math.prod(mesh.axis_sizes[i + 1 :]) for i, axis in enumerate(mesh.axis_names)}
    others = sum(lax.axis_index(axis) * stride for axis, stride in strides.items() if axis not in axes)
    places = [
        sum(place * strides[axis] for place, axis in zip(at, axes, strict=True))
        for at in np.ndindex(*(mesh.shape[axis] for axis in axes))
    ]
    return lax.axis_index(axes), [jnp.int32(others + place) for place in places]


def empty(ref):
    """Mark the tiles of a slot ``[..., 64, rows]`` of global memory as not written."""
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(functools.partial(_empty, TILE, 2))(ref)


def put(ref, tiles):
    """Write one tile ``[64, rows]`` to each tile of a slot ``[tiles, 64, rows]``."""
    for i, tile in enumerate(tiles):
        ref[i] = tile


def send(ref, tiles, device, layout=TILE):
    """Write one tile to each tile of the slot ``[tiles, ...]`` of a device of the mesh."""
    store = functools.partial(_send, layout)
    for i, tile in enumerate(tiles):
        there = plgpu.remote_ref(ref.at[i], device, pl.DeviceIdType.LOGICAL)
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))(store)(there, tile)


def take(refs, *, scope="gpu", layout=TILE):
    """Return the tiles of slots ``[tiles, ...]``, a list for each slot, once all are written, and empty the slots.

    A slot may be given several times. ``scope`` is ``"sys"`` where other devices write.
    """
    count, *shape = refs[0].shape
    returned = [plgpu.ShapeDtypeStruct(tuple(shape), jnp.float32, layout=layout)] * (count * len(refs))
    read = functools.partial(_take, layout, len(shape), scope)
    found = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs), return_type=returned)(read)(*refs)
    return [found[i : i + count] for i in range(0, len(found), count)]


def published(refs):
    """Return tiles of bfloat16 ``[64, rows]`` once all are written, and leave them there for others to read.

    Each number is its own flag: one that is empty is a NaN that no conversion gives.
    """
    returned = [plgpu.ShapeDtypeStruct(ref.shape, jnp.bfloat16, layout=TILE) for ref in refs]
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs), return_type=returned)(_published)(*refs)


def warm(refs):
    """Ask tiles ``[..., 64, rows]`` into the L2 cache, from which streaming weights have driven them.

    A store to a line that is not there takes as long as a load of it.
    """
    for ref in refs:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(_warm)(ref)


def _places(layout, rank, ref):
    """Return the shape of this thread's registers of a tile, and each pair's place in memory, tile by tile of a slot.

    A place is an address, the same for all, and a number of bytes behind it, which costs a thread no register. The last
    ``rank`` dimensions are those of a tile, which lies in one piece.
    """
    slot = ir.MemRefType(ref.type)
    layout, shape = layout.to_mgpu(), tuple(slot.shape[-rank:])
    registers = layout.registers_shape(shape)
    linear, *rest = next(iter(layout.thread_idxs(shape)))
    for size, index in zip(shape[1:], rest, strict=True):
        linear = arith.addi(arith.muli(linear, mgpu.c(size, linear.type)), index)
    linear = arith.index_cast(ir.IntegerType.get_signless(32), linear)
    first = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [linear], slot.element_type)
    if isinstance(layout, mgpu.TiledLayout):
        strides = layout.tiling.tile_strides(tuple(mgpu.utils.get_contiguous_strides(shape)))
        behind = [np.dot(at, strides) for at in np.ndindex(*registers)]
    else:
        behind = [i * mgpu.utils.WARPGROUP_SIZE * layout.vec_size for i in range(math.prod(registers))]
    strides, _ = slot.get_strides_and_offset()
    tiles = [np.dot(at, strides[:-rank]) for at in np.ndindex(*slot.shape[:-rank])]
    size = mgpu.utils.bytewidth(slot.element_type)
    return registers, [(first, int(size * (tile + pair))) for tile in tiles for pair in behind]


def _empty(layout, rank, ctx, ref):
    half = mgpu.utils.bytewidth(ir.MemRefType(ref.type).element_type) == 2
    bits = mgpu.c(EMPTY_HALVES if half else EMPTY_BITS, ir.IntegerType.get_signless(32))
    kind, value = ("", "$1") if half else (".v2", "{$1, $1}")
    for first, behind in _places(layout, rank, ref)[1]:
        store = f"st.relaxed.gpu.global{kind}.b32 [$0+{behind}], {value};"
        mgpu.utils.inline_ptx(store, first, bits, has_side_effects=True)


def _warm(ctx, ref):
    for first, behind in _places(TILE, 2, ref)[1]:
        mgpu.utils.inline_ptx(f"prefetch.global.L2 [$0+{behind}];", first, has_side_effects=True)


def _send(layout, ctx, ref, tile):
    i64 = ir.IntegerType.get_signless(64)
    places = _places(layout, len(tile.shape), ref)[1]
    for (first, behind), pair in zip(places, tile.registers.flat, strict=True):
        bits = mgpu.utils.bitcast(pair, i64)
        mgpu.utils.inline_ptx(f"st.relaxed.sys.global.b64 [$0+{behind}], $1;", first, bits, has_side_effects=True)


def _take(layout, rank, scope, ctx, *refs):
    slots = [_places(layout, rank, ref) for ref in refs]
    shape = slots[0][0]
    found = iter(_await([place for _, places in slots for place in places], 2, scope))
    for ref in refs:
        _empty(layout, rank, ctx, ref)
    single = ir.VectorType.get((1,), ir.F32Type.get())
    arrays = []
    for _ in range(sum(len(places) for _, places in slots) // math.prod(shape)):
        registers = np.empty(shape, dtype=object)
        for index in np.ndindex(*shape):
            registers[index] = mgpu.utils.vector_concat([mgpu.utils.bitcast(next(found), single) for _ in range(2)])
        arrays.append(mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None))
    return arrays


def _published(ctx, *refs):
    tiles = [_places(TILE, 2, ref) for ref in refs]
    found = iter(_await([place for _, places in tiles for place in places], 1, "gpu"))
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    arrays = []
    for shape, _ in tiles:
        registers = np.empty(shape, dtype=object)
        for index in np.ndindex(*shape):
            registers[index] = mgpu.utils.bitcast(next(found), pair)
        arrays.append(mgpu.FragmentedArray(_registers=registers, _layout=TILE.to_mgpu(), _is_signed=None))
    return arrays


def _await(places, words, scope):
    """Ask for all places, so many words each, until no number in them is empty; return the words."""
    i32 = ir.IntegerType.get_signless(32)
    count = words * len(places)
    loop = scf.WhileOp([i32] * count, [mgpu.c(0, i32)] * count)
    before = loop.before.blocks.append(*[i32] * count)
    kind, value = (".v2", "{$0, $1}") if words == 2 else ("", "$0")
    with ir.InsertionPoint.at_block_begin(before):
        loaded, missing = [], mgpu.c(0, ir.IntegerType.get_signless(1))
        for first, behind in places:
            load = f"ld.relaxed.{scope}.global{kind}.b32 {value}, [${words}+{behind}];"
            loaded += mgpu.utils.inline_ptx(load, first, result_types=[i32] * words, has_side_effects=True)
        equal = functools.partial(arith.cmpi, arith.CmpIPredicate.eq)
        for bits in loaded:
            for mask in [0xFFFF, -0x10000] if words == 1 else [-1]:
                expected = mgpu.c(EMPTY_HALVES & mask if words == 1 else EMPTY_BITS, i32)
                missing = arith.ori(missing, equal(arith.andi(bits, mgpu.c(mask, i32)), expected))
        scf.condition(missing, loaded)
    after = loop.after.blocks.append(*[i32] * count)
    with ir.InsertionPoint.at_block_begin(after):
        scf.yield_(list(after.arguments))
    return loop.results
