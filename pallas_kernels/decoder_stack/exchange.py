"""Tiles of numbers handed from block to block through global memory, each number its own flag.

A fence and a semaphore would cost several trips through a memory system that is busy with weights, microseconds each.
Here a slot holds ``EMPTY_BITS`` until it is written, a NaN that no arithmetic gives, and the reader asks until nothing
of that is left; it then empties the slot for the next writer, which a barrier over all blocks must separate from it.
Every number is written, asked for and emptied by one thread each, so none can be torn or missed.

Devices hand each other tiles in the same way, in two sets of slots by turns. A device writes to a slot again after it
has taken what the other sent in between, which that one sent behind a barrier over its blocks after it had emptied the
slot: that is order enough.
"""

import functools

import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf

from pallas_kernels.decoder_stack.tiles import F32, TILE

EMPTY_BITS = 0xFFFF0BAD  # a NaN; arithmetic on a GPU gives 0x7FFFFFFF


def empty(ref):
    """Mark the tiles of a slot ``[..., 64, rows]`` of global memory as not written."""
    for at in np.ndindex(*ref.shape[:-2]):
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(_empty)(ref.at[at])


def put(ref, tiles):
    """Write one tile ``[64, rows]`` to each tile of a slot ``[tiles, 64, rows]``."""
    for i, tile in enumerate(tiles):
        ref[i] = tile


def send(ref, tiles, device):
    """Write one tile ``[64, rows]`` to each tile of the slot ``[tiles, 64, rows]`` of a device of the mesh."""
    for i, tile in enumerate(tiles):
        there = plgpu.remote_ref(ref.at[i], device, pl.DeviceIdType.LOGICAL)
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))(_send)(there, tile)


def take(refs, *, scope="gpu"):
    """Return the tiles of slots ``[tiles, 64, rows]``, a list for each slot, once all are written, and empty the slots.

    A slot may be given several times. ``scope`` is ``"sys"`` where other devices write.
    """
    count, _, rows = refs[0].shape
    tiles = [ref.at[i] for ref in refs for i in range(count)]
    returned = [plgpu.ShapeDtypeStruct((64, rows), F32, layout=TILE)] * len(tiles)
    read = functools.partial(_take, scope)
    found = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(tiles), return_type=returned)(read)(*tiles)
    return [found[i : i + count] for i in range(0, len(found), count)]


def warm(refs):
    """Ask tiles ``[64, rows]`` into the L2 cache, from which streaming weights have driven them.

    A store to a line that is not there takes as long as a load of it.
    """
    for ref in refs:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(_warm)(ref)


def _addresses(ref):
    """Return the shape of this thread's registers of a tile, and the address of each pair of numbers."""
    layout, shape = TILE.to_mgpu(), tuple(ir.MemRefType(ref.type).shape)
    base, i32 = mgpu.utils.memref_ptr(ref), ir.IntegerType.get_signless(32)
    addresses = []
    for row, column in layout.thread_idxs(shape):
        linear = arith.addi(arith.muli(row, mgpu.c(shape[1], row.type)), column)
        addresses.append(mgpu.utils.getelementptr(base, [arith.index_cast(i32, linear)], ir.F32Type.get()))
    return layout.registers_shape(shape), addresses


def _empty(ctx, ref):
    bits = mgpu.c(EMPTY_BITS - 2**32, ir.IntegerType.get_signless(32))
    for address in _addresses(ref)[1]:
        mgpu.utils.inline_ptx("st.relaxed.gpu.global.v2.b32 [$0], {$1, $1};", address, bits, has_side_effects=True)


def _warm(ctx, ref):
    for address in _addresses(ref)[1]:
        mgpu.utils.inline_ptx("prefetch.global.L2 [$0];", address, has_side_effects=True)


def _send(ctx, ref, tile):
    i64 = ir.IntegerType.get_signless(64)
    for address, pair in zip(_addresses(ref)[1], tile.registers.flat, strict=True):
        bits = mgpu.utils.bitcast(pair, i64)
        mgpu.utils.inline_ptx("st.relaxed.sys.global.b64 [$0], $1;", address, bits, has_side_effects=True)


def _take(scope, ctx, *refs):
    i32 = ir.IntegerType.get_signless(32)
    unwritten = mgpu.c(EMPTY_BITS - 2**32, i32)
    places = [_addresses(ref) for ref in refs]
    addresses = [address for _, found in places for address in found]
    loop = scf.WhileOp([i32] * (2 * len(addresses)), [mgpu.c(0, i32)] * (2 * len(addresses)))
    before = loop.before.blocks.append(*[i32] * (2 * len(addresses)))
    with ir.InsertionPoint.at_block_begin(before):
        loaded, missing = [], mgpu.c(0, ir.IntegerType.get_signless(1))
        for address in addresses:
            loaded += mgpu.utils.inline_ptx(
                f"ld.relaxed.{scope}.global.v2.b32 {{$0, $1}}, [$2];",
                address,
                result_types=[i32, i32],
                has_side_effects=True,
            )
        for bits in loaded:
            missing = arith.ori(missing, arith.cmpi(arith.CmpIPredicate.eq, bits, unwritten))
        scf.condition(missing, loaded)
    after = loop.after.blocks.append(*[i32] * (2 * len(addresses)))
    with ir.InsertionPoint.at_block_begin(after):
        scf.yield_(list(after.arguments))
    for ref in refs:
        _empty(ctx, ref)
    single = ir.VectorType.get((1,), ir.F32Type.get())
    numbers = iter([mgpu.utils.bitcast(bits, single) for bits in loop.results])
    arrays = []
    for shape, _ in places:
        registers = np.empty(shape, dtype=object)
        for index in np.ndindex(*shape):
            registers[index] = mgpu.utils.vector_concat([next(numbers), next(numbers)])
        arrays.append(mgpu.FragmentedArray(_registers=registers, _layout=TILE.to_mgpu(), _is_signed=None))
    return arrays
