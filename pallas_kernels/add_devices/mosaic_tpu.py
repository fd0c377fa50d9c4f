"""The sum over devices as one kernel for TPUs: every device writes its part into the others' memory, then all add.

All devices meet at a barrier first. Who passes it knows that the others have begun this call, so that what they got in
the call before is used up, and their room for parts is free.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.partition import num_parts

LANES = 128
VMEM_BYTES = 8 * 2**20  # for parts, a share of what the smallest TPU has
COLLECTIVE_ID = 11  # of the barrier; calls of one program take turns


def refuse(*, shape: tuple[int, ...], dtype: Any, devices: int, **facts: Any) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"needs bfloat16 or float32, got {jnp.dtype(dtype).name}"
    if shape[1] % LANES:
        return f"needs a width that is a multiple of {LANES}, got {shape[1]}"
    sublanes = 32 // jnp.dtype(dtype).itemsize
    held = (devices + 3) * pl.cdiv(shape[0], sublanes) * sublanes * shape[1] * jnp.dtype(dtype).itemsize
    if held > VMEM_BYTES:
        return f"needs at most {VMEM_BYTES} bytes of VMEM for the parts of {devices} devices, got {held}"
    return None


def add_devices(part_BD, residual_BD, mesh, axes, inbox=None):
    """See :func:`pallas_kernels.add_devices.add_devices`."""
    devices = num_parts(mesh, axes)
    return pl.pallas_call(
        functools.partial(_kernel, mesh=mesh, axes=axes, devices=devices),
        out_shape=jax.ShapeDtypeStruct(part_BD.shape, part_BD.dtype),
        in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)] * 2,
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        scratch_shapes=[
            pltpu.VMEM((devices, *part_BD.shape), part_BD.dtype),
            pltpu.SemaphoreType.DMA((devices,)),
            pltpu.SemaphoreType.DMA((devices,)),
        ],
        compiler_params=pltpu.CompilerParams(collective_id=COLLECTIVE_ID),
        name="add_devices",
    )(part_BD, residual_BD)


def _kernel(part_ref, residual_ref, out_ref, inbox_ref, sent, received, *, mesh, axes, devices):
    """Send the part to every other device, and add all in their order; ``inbox_ref [devices, B, D]``."""
    strides = {axis: num_parts(mesh, axes[i + 1 :]) for i, axis in enumerate(axes)}
    me = lax.axis_index(axes)

    def place(rank):
        """Return where a device that shares is on the axes that it shares along."""
        return {
            axis: lax.rem(lax.div(rank, np.int32(stride)), np.int32(mesh.shape[axis]))
            for axis, stride in strides.items()
        }

    others = [lax.rem(me + offset, np.int32(devices)) for offset in range(1, devices)]

    def copy(sender, receiver):
        return pltpu.make_async_remote_copy(
            src_ref=part_ref,
            dst_ref=inbox_ref.at[sender],
            send_sem=sent.at[receiver],
            recv_sem=received.at[sender],
            device_id=place(receiver),
            device_id_type=pl.DeviceIdType.MESH,
        )

    barrier = pltpu.get_barrier_semaphore()
    for other in others:
        pl.semaphore_signal(barrier, 1, device_id=place(other), device_id_type=pl.DeviceIdType.MESH)
    pl.semaphore_wait(barrier, devices - 1)
    for other in others:
        copy(me, other).start()
    inbox_ref[me] = part_ref[...]
    for other in others:
        copy(other, me).wait_recv()
    total = inbox_ref[0].astype(jnp.float32)
    for rank in range(1, devices):
        total += inbox_ref[rank].astype(jnp.float32)
    # Rounded where XLA's sum is, wide in between: not every TPU computes in bfloat16.
    total = total.astype(out_ref.dtype).astype(jnp.float32)
    out_ref[...] = (residual_ref[...].astype(jnp.float32) + total).astype(out_ref.dtype)
    for other in others:
        copy(me, other).wait_send()
