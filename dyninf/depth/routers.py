"""What policies with learned weights share: a linear router per layer, and the check that weights fit the model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def route(router_LD: Any, bias_L: Any, layer: int | jax.Array, x_BTD: jax.Array) -> jax.Array:
    """Return ``w_l . x + b_l`` per token, float32 ``[B, T]``; ``layer`` may be traced."""
    weight_D = jnp.asarray(router_LD)[layer].astype(jnp.float32)
    bias = jnp.asarray(bias_L)[layer].astype(jnp.float32)
    return jnp.einsum("BTD,D->BT", x_BTD.astype(jnp.float32), weight_D) + bias


def require_layers(num_layers: int, **arrays: tuple[Any, int]) -> None:
    """Raise ValueError unless each ``name=(array, axes)`` has that many axes, the first of ``num_layers``."""
    for name, (array, axes) in arrays.items():
        shape = np.shape(array)
        if len(shape) != axes or shape[0] != num_layers:
            raise ValueError(
                f"expected {name} of {axes} axes, the first of {num_layers} layers, got shape {shape}; "
                "create the policy for this model"
            )
