"""Depth shortcuts: where a router says so, a small adapter stands in for a layer."""

from typing import Any

import jax
import jax.numpy as jnp

from dyninf.depth.base import RUN, SKIP, DepthPolicy, LayerObs, require_number
from dyninf.depth.routers import require_layers, route
from dyninf.pytree import pytree


@pytree()
class DepthShortcut(DepthPolicy):
    """Replace a layer by its adapter ``g_l(x) = x + up_l gelu(down_l x)`` where ``sigmoid(w_l . x + b_l) > threshold``.

    Each layer has its own router and adapter of rank R and asks anew, so that a token may take the shortcut at any set
    of layers. Deciding costs one dot product of D per layer, the shortcut 2 D R multiplications per token instead of a
    layer; the hardware skips the layer when no token of the batch needs it. Keys of a layer whose shortcut was taken
    follow the plan's ``fill``. Exact at a threshold of 1; a router output that is not a number runs the layer.

    :meth:`mix` is what training runs instead: both branches, weighted by the router.

    Source: System-1.5 Reasoning (Wang et al. 2025), the depth shortcut; no code is public. The paper calls the router
    a feed-forward network and the adapter lightweight: here the router is linear and the adapter a residual bottleneck,
    so that zeros pass the state on. Its step shortcut, which reuses states across steps of latent reasoning, is left
    out: decoding here always feeds tokens. It needs trained weights.

    Args:
        router: weights ``[L, D]``.
        bias: ``[L]``.
        down: ``[L, D, R]``.
        up: ``[L, R, D]``.
        threshold: take the shortcut above it (0 to 1).
    """

    router: jax.Array
    bias: jax.Array
    down: jax.Array
    up: jax.Array
    threshold: float | jax.Array = 0.5

    skips = True

    @classmethod
    def create(
        cls, key: jax.Array, num_layers: int, d_model: int, rank: int, *, bias: float = -2.0, threshold: float = 0.5
    ) -> "DepthShortcut":
        """Return a policy to train: it never takes a shortcut yet, and its adapters pass the state on.

        Args:
            bias: of every router; -2 weighs the adapters with 0.12 while training.
        """
        return cls(
            router=jnp.zeros((num_layers, d_model)),
            bias=jnp.full(num_layers, bias),
            down=d_model**-0.5 * jax.random.normal(key, (num_layers, d_model, rank)),
            up=jnp.zeros((num_layers, rank, d_model)),
            threshold=threshold,
        )

    def weight(self, layer: int | jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Return the router's weight of the shortcut, in [0, 1] per token (float32)."""
        return jax.nn.sigmoid(route(self.router, self.bias, layer, x_BTD))

    def adapt(self, layer: int | jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Return what the adapter makes of the states that would enter a layer, in their dtype."""
        down_DR = jnp.asarray(self.down)[layer].astype(x_BTD.dtype)
        up_RD = jnp.asarray(self.up)[layer].astype(x_BTD.dtype)
        hidden_BTR = jax.nn.gelu(jnp.einsum("BTD,DR->BTR", x_BTD, down_DR))
        return x_BTD + jnp.einsum("BTR,RD->BTD", hidden_BTR, up_RD)

    def mix(self, layer: int | jax.Array, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        """Return ``w g(x) + (1 - w) y``, the layer's output ``y`` and the shortcut mixed, as training runs it."""
        weight_BT1 = self.weight(layer, x_BTD)[:, :, None].astype(x_BTD.dtype)
        return weight_BT1 * self.adapt(layer, x_BTD) + (1 - weight_BT1) * y_BTD

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Take the shortcut where the router is above the threshold."""
        return jnp.where(self.weight(obs.layer, obs.x_BTD) > self.threshold, SKIP, RUN), state

    def skip_state(self, state: Any, obs: LayerObs) -> jax.Array:
        """Return the adapter's output, which tokens that skip the layer take on."""
        return self.adapt(obs.layer, obs.x_BTD)

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless the weights belong to a model of this depth and fit together."""
        require_layers(num_layers, router=(self.router, 2), bias=(self.bias, 1), down=(self.down, 3), up=(self.up, 3))
        d_model, rank = self.down.shape[1:]
        if self.router.shape[1] != d_model or self.up.shape[1:] != (rank, d_model):
            raise ValueError(
                f"expected router [L, D], down [L, D, R] and up [L, R, D], got {self.router.shape}, {self.down.shape} "
                f"and {self.up.shape}; create the policy for this model"
            )
        require_number("threshold", self.threshold, 0.0, 1.0)
