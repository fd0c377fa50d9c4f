"""How a mesh in force (``jax.set_mesh``) splits the batch of a loss: by its axes ``data`` and ``fsdp``.

XLA would rather split activations as the weights are that they meet, by width, which sends activations instead of
weights and leaves the batch whole. Without a mesh all of this does nothing.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

AXES = ("data", "fsdp")


def split_batch(x_BX: jax.Array) -> jax.Array:
    """Return an array of which the first axis is split over the mesh, and no other one."""
    names = _names(x_BX.shape[0])
    return jax.lax.with_sharding_constraint(x_BX, PartitionSpec(names)) if names else x_BX


def split_embedded(x_BTD: jax.Array) -> jax.Array:
    """Return embedded tokens with their batch split over the mesh, by way of how ``fsdp`` splits the table: by width.

    Both ways devices exchange parts of the states; XLA alone would hand all states to all of them.
    """
    names = _names(x_BTD.shape[0])
    if "fsdp" in names and x_BTD.shape[2] % jax.sharding.get_abstract_mesh().shape["fsdp"] == 0:
        rows = tuple(name for name in names if name != "fsdp")
        x_BTD = jax.lax.with_sharding_constraint(x_BTD, PartitionSpec(rows or None, None, "fsdp"))
    return split_batch(x_BTD)


def in_chunks(array_BTX: jax.Array, chunk: int) -> jax.Array:
    """Return tokens ``[B, T, ...]`` in chunks ``[I, C, ...]`` of about ``chunk`` of them, zeros behind the last ones.

    Every chunk has its share of each part of a batch that is split, so that all devices work on it; else the order is
    that of the tokens.
    """
    batch, length, *rest = array_BTX.shape
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in _names(batch))
    tokens = batch * length // parts  # of a part
    share = -(-min(chunk, batch * length) // parts)
    count = -(-tokens // share)
    array_PNX = array_BTX.reshape(parts, tokens, *rest)
    array_PNX = jnp.pad(array_PNX, ((0, 0), (0, count * share - tokens), *((0, 0) for _ in rest)))
    return array_PNX.reshape(parts, count, share, *rest).swapaxes(0, 1).reshape(count, parts * share, *rest)


def _names(size: int) -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = tuple(name for name in AXES if kinds.get(name) == AxisType.Auto)
    return () if size % math.prod(mesh.shape[name] for name in names) else names
