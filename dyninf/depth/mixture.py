"""Mixture-of-Depths: a router in front of some layers decides which tokens run them."""

from typing import Any

import jax
import jax.numpy as jnp

from dyninf.depth.base import RUN, SKIP, DepthPolicy, LayerObs, require_integer, require_number
from dyninf.depth.routers import require_layers, route
from dyninf.pytree import pytree


@pytree(static=("capacity", "start", "step"))
class MixtureOfDepths(DepthPolicy):
    """Run a routed layer only for tokens that its router sends there: ``sigmoid(w_l . x + b_l) > 1/2``.

    Layers ``start``, ``start + step``, ... are routed, all others run for every token. While training
    (:func:`dyninf.training.mixture.mixture_forward`) the ``capacity`` share of tokens with the highest router logits of
    each sequence runs a routed layer, which needs the whole text; an auxiliary loss makes the sign of the logit
    predict that choice, and decoding goes by the sign alone. Use ``Plan(fill="mask")``: tokens that do not run a layer
    write no keys there, as in training. A decision costs one dot product of D. Exact where the logits are positive (a
    large bias); a logit that is not a number runs the layer.

    Source: Mixture-of-Depths (Raposo et al. 2024), routing every second block with a capacity of 12.5 %, and the first
    of its two ways to sample, where the router itself learns to predict its choice. Differences: the paper multiplies
    the layer's update by the router's output; a policy cannot scale a layer, so here the update enters unscaled while
    training, too, and the router learns from a straight-through gradient (see the training module). The prompt runs
    every layer for every token. It needs trained weights: without training it skips at random.

    Args:
        router: weights ``[L, D]``; rows of layers that are not routed are not read.
        bias: ``[L]``.
        capacity: share of tokens that run a routed layer while training (0 to 1); decoding does not read it.
        start: first routed layer.
        step: routed layers are this many layers apart.
    """

    router: jax.Array
    bias: jax.Array
    capacity: float = 0.125
    start: int = 1
    step: int = 2

    skips = True

    @classmethod
    def create(cls, key: jax.Array, num_layers: int, d_model: int, **settings: Any) -> "MixtureOfDepths":
        """Return a policy to train: small random weights, no bias; ``settings`` are the other fields."""
        router = 0.02 * jax.random.normal(key, (num_layers, d_model))
        return cls(router=router, bias=jnp.zeros(num_layers), **settings)

    def logits(self, layer: int | jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Return the router logits ``[B, T]`` (float32) of the states that would enter a layer."""
        return route(self.router, self.bias, layer, x_BTD)

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Skip where the logit is not positive."""
        return jnp.where(self.logits(obs.layer, obs.x_BTD) <= 0, SKIP, RUN), state

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the routed layers."""
        return tuple(range(self.start, num_layers, self.step))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless the weights belong to a model of this depth and the settings are in range."""
        require_layers(num_layers, router=(self.router, 2), bias=(self.bias, 1))
        require_number("capacity", self.capacity, 0.0, 1.0)
        require_integer("the first routed layer", self.start, 0, num_layers)
        require_integer("the layers between routed layers", self.step, 1, max(2, num_layers))
