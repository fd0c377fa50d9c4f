"""The product of few rows of activations and weights, as XLA for GPUs does it fastest."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import platform
from pallas_kernels.partition import parts

ROWS = 4
WEIGHTS = range(2**21, 2**26)  # numbers of them, on a device, with which four rows are no slower than one


def einsum_rows(spec: str, rows: jax.Array, weights: jax.Array, **options: Any) -> jax.Array:
    """Return ``jnp.einsum(spec, rows, weights, **options)`` of rows ``[B, T, ...]``, a result ``[B, T, ...]``.

    On a GPU, fewer than four rows in bfloat16 that devices do not split are multiplied several times, as four to six:
    XLA makes a product of one row and fewer than ten million weights a reduction, which takes twice as long, and some
    larger ones gain a sixth.
    """
    batch, length = rows.shape[:2]
    split = parts()
    few = length == 1 and batch < ROWS and split["batch"] == 1 and weights.size // split["heads"] in WEIGHTS
    if not few or rows.dtype != jnp.bfloat16 or platform() != "gpu":
        return jnp.einsum(spec, rows, weights, **options)
    repeated = jnp.tile(rows, (-(-ROWS // batch),) + (1,) * (rows.ndim - 1))  # part of the product, not a kernel before
    return jnp.einsum(spec, repeated, weights, **options)[:batch]
