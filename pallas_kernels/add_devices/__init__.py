"""Add up what each device of a mesh has of a sum, and add that to the residual.

:func:`add_devices` is the sum itself, for marked operations. :func:`add_product` is the product that a layer adds to
its residual, whose sum is a kernel where the layer decodes on Hopper GPUs that have an inbox (:func:`make_inbox`), and
which is plain JAX everywhere else.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.add_devices import mosaic_gpu, reference
from pallas_kernels.dispatch import Implementation, choose, kernel, platform
from pallas_kernels.exchange import EMPTY_BITS
from pallas_kernels.few_rows import einsum_rows, repeat_rows
from pallas_kernels.partition import device_numbers, inbox_at_hand, num_parts, partitioned, parts, per_device, sharing

FEW = 2**18  # numbers of a sum that two GPUs were seen to add faster by the kernel: 10.4 to 18.2 us at 2**18

ADD_DEVICES = (
    Implementation(name="mosaic_gpu", refuse=mosaic_gpu.refuse, run=mosaic_gpu.add_devices, splits=True),
    kernel("add_devices", "mosaic_tpu", "add_devices"),
    Implementation(name="psum", refuse=reference.refuse, run=reference.add_devices),
)


def add_devices(
    part_BD: jax.Array, residual_BD: jax.Array, *, inbox: jax.Array | None = None, implementation: str | None = None
) -> jax.Array:
    """Return the residual and the parts of all devices that share the heads of the marked operation at hand.

    For decoding, where a message is a few rows and its time is the way there. Every device gets the same bits: the
    parts are added in float32 in the order of the devices, rounded to the dtype, and the residual is added in it. Cost
    of the kernels: each device sends its part to each other at once, and holds all of them.

    Args:
        part_BD: this device's part, such as the product of its heads with its rows of the output projection.
        residual_BD: the same on all devices.
        inbox: this device's part of what :func:`make_inbox` returned, which the kernel for GPUs needs.
        implementation: ``"mosaic_gpu"``, ``"mosaic_tpu"`` or ``"psum"``, whose order of addition is XLA's; ``None``
            takes the fastest that can serve.

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
    facts = _facts(*found, part_BD.shape, part_BD.dtype, None if inbox is None else inbox.shape)
    chosen = choose("add_devices", ADD_DEVICES, implementation, **facts)
    return chosen.run(part_BD, residual_BD, *found, inbox)


def add_product(residual_BTD: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the residual and a product whose contraction devices of a mesh may share, such as an output projection.

    A few numbers, those of one token a sequence, on GPUs that share an inbox: each multiplies its part, in float32, and
    a kernel adds the parts and the residual (:func:`add_devices`). Everywhere else ``residual + einsum(y, weights)``,
    which JAX partitions, and which would add up more rows than there are if they were repeated.

    Args:
        y: ``[B, T, N, H]`` with weights ``[N, H, D]``, or ``[B, T, F]`` with ``[F, D]``; N or F is split as heads are.
    """
    letters = "BTNH"[: y.ndim]
    spec = f"{letters},{letters[2:]}D->BTD"
    found = _kernel_for(residual_BTD, y)
    if found is None:
        return residual_BTD + (jnp.einsum if parts()["heads"] > 1 else einsum_rows)(spec, y, weights)
    chosen, mesh, axes, array = found

    def on_device(residual: jax.Array, y: jax.Array, weights: jax.Array, inbox: jax.Array) -> jax.Array:
        part_BTD = jnp.einsum(spec, repeat_rows(y, weights), weights, preferred_element_type=jnp.float32)
        return chosen.run(part_BTD[:, 0], residual[:, 0], mesh, axes, inbox)[:, None]

    marked = per_device("BTD", residual="BTD", y=letters, weights=f"{letters[2:]}D", inbox="Z____")(on_device)
    return marked(residual_BTD, y, weights, array)


def _kernel_for(
    residual_BTD: jax.Array, y: jax.Array
) -> tuple[Implementation, Mesh, tuple[str, ...], jax.Array] | None:
    """Return the kernel that adds a product to a residual, the mesh, its axes and the inbox; ``None`` for XLA."""
    at_hand, split = inbox_at_hand(), parts()
    batch, length, width = residual_BTD.shape
    if at_hand is None or length != 1 or y.shape[2] % split["heads"] or residual_BTD.dtype != y.dtype:
        return None
    mesh, axes, inbox = at_hand
    rows = batch if batch % split["batch"] else batch // split["batch"]
    if rows * width > FEW:
        return None
    # A constant of this trace is no array of its own, and differs from what other programs write to.
    shape = inbox.shape if isinstance(inbox, jax.core.Tracer) else None
    chosen = choose("add_devices", ADD_DEVICES, None, **_facts(mesh, axes, (rows, width), residual_BTD.dtype, shape))
    return (chosen, mesh, axes, inbox) if chosen.name == "mosaic_gpu" else None


def make_inbox(mesh: Mesh, axes: tuple[str, ...], width: int) -> jax.Array | None:
    """Return room for what devices along axes of a mesh send each other; ``None`` where no kernel would use it.

    One inbox a device, empty, for sums of up to 64 rows: :func:`pallas_kernels.partition.partitioned` takes it. Hand it
    to programs as an argument that is neither donated nor returned, since other devices write to it while they run.

    Args:
        axes: those that split heads.
        width: of the sums, D.
    """
    if num_parts(mesh, axes) == 1 or not isinstance(mesh, Mesh) or mesh.devices.flat[0].platform != "gpu":
        return None
    shape = mosaic_gpu.inbox_shape(mesh.size, num_parts(mesh, axes), width)
    with partitioned(mesh, heads=axes):
        facts = _facts(mesh, axes, (mosaic_gpu.MAX_ROWS, width), jnp.float32, shape)
        chosen = choose("add_devices", ADD_DEVICES, None, **facts)
    if chosen.name != "mosaic_gpu":
        return None
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    fill = jax.jit(lambda: jnp.full(shape, EMPTY_BITS, jnp.int32), out_shardings=sharding)
    return jax.block_until_ready(fill())  # on every device, before any other writes to it


def _facts(mesh, axes, shape, dtype, inbox):
    """Return what implementations are chosen by."""
    facts = {"platform": platform(), "shape": shape, "dtype": dtype, "devices": num_parts(mesh, axes), "inbox": inbox}
    return facts | {"numbers": device_numbers()}
