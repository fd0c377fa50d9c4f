"""Add up what each device of a mesh has of a sum, and add that to the residual."""

import jax

from pallas_kernels.add_devices import reference
from pallas_kernels.dispatch import Implementation, choose, kernel, platform
from pallas_kernels.partition import num_parts, sharing

ADD_DEVICES = (
    kernel("add_devices", "mosaic_tpu", "add_devices"),
    Implementation(name="psum", refuse=reference.refuse, run=reference.add_devices),
)


def add_devices(part_BD: jax.Array, residual_BD: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Return the residual and the parts of all devices that share the heads of the marked operation at hand.

    For decoding, where a message is a few rows and its time is the way there. Every device gets the same bits: the
    parts are added in float32 in the order of the devices, rounded to the dtype, and the residual is added in it. Cost
    of the kernel: each device sends its part to each other at once, and holds all of them.

    Args:
        part_BD: this device's part, such as the product of its heads with its rows of the output projection.
        residual_BD: the same on all devices.
        implementation: ``"mosaic_tpu"`` or ``"psum"``, whose order of addition is XLA's; ``None`` takes the fastest
            that can serve.

    Raises:
        ValueError: if shapes or dtypes differ.
        NotImplementedError: if the requested implementation cannot serve.
    """
    if part_BD.shape != residual_BD.shape or part_BD.ndim != 2 or part_BD.dtype != residual_BD.dtype:
        raise ValueError(
            f"expected a part and a residual [B, D] of one shape and dtype, got {part_BD.shape} {part_BD.dtype} and "
            f"{residual_BD.shape} {residual_BD.dtype}"
        )
    found = sharing()
    if found is None:
        return residual_BD + part_BD
    mesh, axes = found
    facts = {"platform": platform(), "shape": part_BD.shape, "dtype": part_BD.dtype, "devices": num_parts(mesh, axes)}
    chosen = choose("add_devices", ADD_DEVICES, implementation, **facts)
    return chosen.run(part_BD, residual_BD, mesh, axes)
