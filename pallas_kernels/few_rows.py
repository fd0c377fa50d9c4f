"""Products of few rows of activations and weights, as XLA for GPUs does them fastest."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import platform
from pallas_kernels.norms import rms_norm
from pallas_kernels.partition import parts

ROWS = 4
WEIGHTS = range(2**21, 2**26)  # numbers of them, on a device, with which four rows are no slower than one


def einsum_rows(spec: str, rows: jax.Array, weights: jax.Array, **options: Any) -> jax.Array:
    """Return ``jnp.einsum(spec, rows, weights, **options)`` of rows ``[B, T, ...]``, a result ``[B, T, ...]``.

    See :func:`repeat_rows` for what it multiplies on a GPU.
    """
    return jnp.einsum(spec, repeat_rows(rows, weights), weights, **options)[: rows.shape[0]]


def repeat_rows(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the rows ``[B, T, ...]`` several times where XLA multiplies them faster so, else as they are.

    On a GPU, fewer than four rows in bfloat16 that devices do not split become four to six: XLA makes a product of one
    row and fewer than ten million weights a reduction, which takes twice as long, and some larger ones gain a sixth.
    Repeating them is part of the product, not a kernel before it.
    """
    batch, length = rows.shape[:2]
    split = parts()
    few = length == 1 and batch < ROWS and split["batch"] == 1 and weights.size // split["heads"] in WEIGHTS
    if not few or rows.dtype != jnp.bfloat16 or platform() != "gpu":
        return rows
    return jnp.tile(rows, (-(-ROWS // batch),) + (1,) * (rows.ndim - 1))


def norm_einsum_rows(spec: str, rows: jax.Array, scale_D: jax.Array, eps: float, weights: jax.Array) -> jax.Array:
    """Return the product of :func:`einsum_rows` of rows ``[B, T, D]`` after an RMS norm, in their dtype.

    Where rows are repeated, they are divided by their root mean square behind the product, with which that commutes, in
    float32: the division is part of the kernel that adds up the parts of such a product, and one before it less has to
    begin and to end.
    """
    if repeat_rows(rows, weights) is rows:
        return jnp.einsum(spec, rms_norm(rows, scale_D, eps), weights)
    wide, scale_11D = rows.astype(jnp.float32), scale_D.astype(jnp.float32)[None, None]
    shrink_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    product = einsum_rows(spec, (wide * scale_11D).astype(rows.dtype), weights, preferred_element_type=jnp.float32)
    return (product * jnp.expand_dims(shrink_BT1, tuple(range(3, product.ndim)))).astype(rows.dtype)
