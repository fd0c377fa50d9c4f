"""The sum over devices by XLA's all-reduce."""

from typing import Any

import jax
import jax.numpy as jnp


def refuse(**facts: Any) -> None:
    """Return ``None``: serves every call."""


def add_devices(part_BD, residual_BD, mesh, axes, inbox=None):
    """See :func:`pallas_kernels.add_devices.add_devices`."""
    total_BD = jax.lax.psum(part_BD.astype(jnp.float32), axes)
    return residual_BD + total_BD.astype(residual_BD.dtype)
