"""Tiles of numbers handed from block to block, or device to device, through global memory, each number its own flag.

A fence and a semaphore would cost several trips through a memory system that is busy with weights, microseconds each.
Here a slot holds ``EMPTY_BITS`` until it is written, a NaN that no arithmetic gives, and the reader asks until nothing
of that is left; it then empties the slot for the next writer, which a barrier over all blocks must separate from it.
Every number is written, asked for and emptied by one thread each, so none can be torn or missed.

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
    first = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [linear], ir.F32Type.get())
    if isinstance(layout, mgpu.TiledLayout):
        between = layout.tiling.tile_strides(tuple(mgpu.utils.get_contiguous_strides(shape)))
        behind = [np.dot(at, between) for at in np.ndindex(*registers)]
    else:
        behind = [i * mgpu.utils.WARPGROUP_SIZE * layout.vec_size for i in range(math.prod(registers))]
    strides, _ = slot.get_strides_and_offset()
    tiles = [np.dot(at, strides[:-rank]) for at in np.ndindex(*slot.shape[:-rank])]
    return registers, [(first, int(4 * (tile + pair))) for tile in tiles for pair in behind]


def _empty(layout, rank, ctx, ref):
    bits = mgpu.c(EMPTY_BITS, ir.IntegerType.get_signless(32))
    for first, behind in _places(layout, rank, ref)[1]:
        store = f"st.relaxed.gpu.global.v2.b32 [$0+{behind}], {{$1, $1}};"
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
    i32 = ir.IntegerType.get_signless(32)
    unwritten = mgpu.c(EMPTY_BITS, i32)
    slots = [_places(layout, rank, ref) for ref in refs]
    shape = slots[0][0]
    places = [place for _, found in slots for place in found]
    loop = scf.WhileOp([i32] * (2 * len(places)), [mgpu.c(0, i32)] * (2 * len(places)))
    before = loop.before.blocks.append(*[i32] * (2 * len(places)))
    with ir.InsertionPoint.at_block_begin(before):
        loaded, missing = [], mgpu.c(0, ir.IntegerType.get_signless(1))
        for first, behind in places:
            loaded += mgpu.utils.inline_ptx(
                f"ld.relaxed.{scope}.global.v2.b32 {{$0, $1}}, [$2+{behind}];",
                first,
                result_types=[i32, i32],
                has_side_effects=True,
            )
        for bits in loaded:
            missing = arith.ori(missing, arith.cmpi(arith.CmpIPredicate.eq, bits, unwritten))
        scf.condition(missing, loaded)
    after = loop.after.blocks.append(*[i32] * (2 * len(places)))
    with ir.InsertionPoint.at_block_begin(after):
        scf.yield_(list(after.arguments))
    for ref in refs:
        _empty(layout, rank, ctx, ref)
    single = ir.VectorType.get((1,), ir.F32Type.get())
    numbers = iter([mgpu.utils.bitcast(bits, single) for bits in loop.results])
    arrays = []
    for _ in range(len(places) // math.prod(shape)):
        registers = np.empty(shape, dtype=object)
        for index in np.ndindex(*shape):
            registers[index] = mgpu.utils.vector_concat([next(numbers), next(numbers)])
        arrays.append(mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None))
    return arrays
