"""The sum over devices as one kernel for Hopper GPUs: every device writes its part into the others' memory, then adds.

For sums of a few kilobytes, dozens in a token, where a rendezvous costs more than the sum. Nobody waits for anything
but numbers: a block of the kernel sends its pieces of the part to the same block of every device, asks its own memory
until all pieces have come, adds them, and marks their slots as empty again (:mod:`pallas_kernels.exchange`).

Slots outlive a call, since they must be empty before another device writes. They are the *inbox*: one array a device,
an argument of the program that XLA takes for one that nobody writes, so that nothing hands it on from call to call. A
call leaves all slots as it found them. What differs is one number a block, whose lowest bit says which of two sets of
slots that block uses next, so that a block's calls always alternate, whichever calls a program makes or XLA keeps.

Why that is order enough: let a block of device A write the numbers of its call k into a set of device B. Its call
k-1, which used the other set, is over, so that it has taken what B's same block sent in its call k-1. That call began
on B after its call k-2 had ended (kernels of one device run one after the other), which had taken what A sent and
emptied the set. B's call k-1 may still be reading, the other set. Blocks that are idle in a call skip their turn on all
devices alike, and share no slots with others.

That holds for calls that XLA orders on each device alike, removes or repeats; what it does not hold without:

- All devices run the same programs in the same order, as for XLA's own collectives, and no two of them at once.
- A program's calls depend on each other, as those of layers do: independent ones might run at the same time.
- The inbox is an argument of the program, and neither donated, aliased nor returned: a copy that XLA made while others
  write would lose numbers, and a device would wait for ever. XLA copies neither what a loop only reads, nor operands of
  a conditional, nor those of nested programs; but a constant is another array in every program, and stacking copies.
- It is full of empty slots on every device before the first call, and again if a program was ended midway.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from pallas_kernels.dispatch import refuse_peers, refuse_unless_hopper
from pallas_kernels.exchange import ranks, send, take
from pallas_kernels.partition import num_parts

PIECE = 256  # numbers that a block hands over at once: two a thread, eight bytes
BLOCKS = 128  # small enough that all run at once: each waits for the same block of the others
MAX_ROWS = 64
ALIGNED = 8  # numbers: a piece begins at a multiple
PAIRS = 16  # that a thread asks for at once; more would not fit its registers with what they are added to
LAYOUT = plgpu.Layout.WG_STRIDED((PIECE,), vec_size=2)


def inbox_shape(devices: int, peers: int, width: int) -> tuple[int, ...]:
    """Return the shape of an inbox for sums of up to 64 rows: ``[devices, slots, block, piece, number]``.

    The slots are those of both sets for each sender, and one whose first number of each block says whose turn it is.
    """
    return devices, 2 * peers + 1, BLOCKS, _turns(MAX_ROWS * width), PIECE


def refuse(
    *,
    platform: str,
    shape: tuple[int, ...],
    dtype: Any,
    devices: int,
    numbers: list[int],
    inbox: tuple[int, ...] | None = None,
    **facts: Any,
) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if reason := refuse_unless_hopper(platform, getattr(jax.local_devices()[0], "compute_capability", None)):
        return reason
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"needs bfloat16 or float32, got {jnp.dtype(dtype).name}"
    rows, width = shape
    if rows > MAX_ROWS:
        return f"needs at most {MAX_ROWS} rows, got {rows}"
    if width % ALIGNED or rows * width < PIECE:
        return f"needs a width that is a multiple of {ALIGNED}, and {PIECE} numbers, got {rows} x {width}"
    if reason := refuse_peers(numbers):
        return reason
    if inbox is None:
        return "needs an inbox that is an argument of the program"
    if inbox[1:] != inbox_shape(1, devices, width)[1:]:
        return f"needs an inbox for {devices} devices and a width of {width}, got one of shape {inbox}"
    return None


@functools.partial(jax.jit, static_argnames=("mesh", "axes"))
def add_devices(part_BD, residual_BD, mesh, axes, inbox):
    """See :func:`pallas_kernels.add_devices.add_devices`; of the part, only as many rows count as the residual has.

    It may be in float32. Rows behind those that count are not cut off before: XLA would call the kernel through a
    program that does so, and would no longer join what reads the sum.

    A program of its own, so that the dozens of calls of a step are traced and lowered once.

    Args:
        inbox: int32 ``[1, ...]``, this device's of an array of :func:`inbox_shape`.
    """
    total = residual_BD.size
    turns = _turns(total)
    kernel = plgpu.kernel(
        functools.partial(_kernel, mesh=mesh, axes=axes, turns=turns),
        out_type=jax.ShapeDtypeStruct((total,), residual_BD.dtype),
        grid=(pl.cdiv(pl.cdiv(total, PIECE), turns),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(skip_device_barrier=True),
    )
    return kernel(part_BD.reshape(-1), residual_BD.reshape(-1), inbox).reshape(residual_BD.shape)


def _turns(total: int) -> int:
    """Return how many pieces each block handles."""
    return pl.cdiv(pl.cdiv(total, PIECE), BLOCKS)


def _kernel(part, residual, inbox, out, *, mesh, axes, turns):
    """Send this block's pieces of the part to every device, and add all in their order."""
    block, peers = lax.axis_index("block"), num_parts(mesh, axes)
    rank, devices = ranks(mesh, axes)
    first_slot = (inbox[0, 2 * peers, block, 0, 0] & 1) * peers

    def places(first, stop):
        """Return where pieces are; one behind the end is the last one once more, which does no harm."""
        starts = [jnp.minimum((block * turns + turn) * PIECE, out.shape[0] - PIECE) for turn in range(first, stop)]
        return [pl.ds(pl.multiple_of(start, ALIGNED), PIECE) for start in starts]

    def load(ref, place):
        return plgpu.load(ref.at[place], layout=LAYOUT, optimized=False).astype(jnp.float32)

    pieces = [load(part, place) for place in places(0, turns)]
    for device in devices:
        send(inbox.at[0, first_slot + rank, block], pieces, device, LAYOUT)
    together = max(1, min(turns, PAIRS // peers))
    for first in range(0, turns, together):
        stop = min(first + together, turns)
        olds = [load(residual, place) for place in places(first, stop)]
        slots = [inbox.at[0, first_slot + sender, block, pl.ds(first, stop - first)] for sender in range(peers)]
        totals = None
        for start in range(0, peers, PAIRS):
            for parts in take(slots[start : start + PAIRS], scope="sys", layout=LAYOUT):
                totals = parts if totals is None else [total + part for total, part in zip(totals, parts, strict=True)]
        for place, old, total in zip(places(first, stop), olds, totals, strict=True):
            # Rounded where XLA's sum is.
            out[place] = (old + total.astype(out.dtype).astype(jnp.float32)).astype(out.dtype)
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(_pass_turn)(inbox.at[0, 2 * peers, block, 0])


def _pass_turn(ctx, ref):
    """Let the block's next call use the other set, once all threads have read whose turn it is."""
    address, i32 = mgpu.utils.memref_ptr(ref), ir.IntegerType.get_signless(32)
    (bits,) = mgpu.utils.inline_ptx(
        "ld.relaxed.gpu.global.b32 $0, [$1];", address, result_types=[i32], has_side_effects=True
    )
    mgpu.utils.warpgroup_barrier()
    bits = arith.xori(bits, mgpu.c(1, i32))
    mgpu.utils.inline_ptx("st.relaxed.gpu.global.b32 [$0], $1;", address, bits, has_side_effects=True)
