"""Exits by a learned gate on the state, trained to tell whether the prediction is already the last layer's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.depth.base import EXIT, RUN, DepthPolicy, LayerObs, require_number
from dyninf.depth.routers import require_layers, route
from dyninf.pytree import pytree


@pytree()
class MetaExit(DepthPolicy):
    """Exit where ``sigmoid(w_l . x + b_l) > threshold``, a gate's probability that going on changes nothing.

    Costs one dot product of D and no readout. One gate serves every layer where the weights have one row. Never exits,
    and is exact, at a threshold of 1; a gate that is not a number never exits. It needs trained weights
    (:mod:`dyninf.training.meta_classifier`); one that was just created does not exit.

    Source: CALM (Schuster et al. 2022), the early-exit classifier, linear in the state. Differences: the paper's one
    classifier for all layers is the case of one row; its calibration of the threshold is left to the caller.

    Args:
        gate: weights ``[L, D]``, or ``[1, D]`` for one gate at every layer.
        bias: ``[L]``, or ``[1]``.
        threshold: exit above it (0 to 1).
    """

    gate: jax.Array
    bias: jax.Array
    threshold: float | jax.Array = 0.5

    @classmethod
    def create(cls, num_layers: int, d_model: int, *, shared: bool = False, threshold: float = 0.5) -> "MetaExit":
        """Return a policy to train; its gates say one half everywhere."""
        rows = 1 if shared else num_layers
        return cls(gate=jnp.zeros((rows, d_model)), bias=jnp.zeros(rows), threshold=threshold)

    def logits(self, layer: int | jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Return the gate's logits ``[B, T]`` (float32) for the states that would enter a layer."""
        return route(self.gate, self.bias, 0 if np.shape(self.gate)[0] == 1 else layer, x_BTD)

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Compare the gate's probability."""
        likely_BT = jax.nn.sigmoid(self.logits(obs.layer, obs.x_BTD)) > self.threshold
        return jnp.where(likely_BT, EXIT, RUN), state

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return every layer but the first: an exit needs a layer below it."""
        return tuple(range(1, num_layers))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless the weights belong to a model of this depth, or to every layer, and fit together."""
        rows = 1 if np.shape(self.gate)[:1] == (1,) else num_layers
        require_layers(rows, gate=(self.gate, 2), bias=(self.bias, 1))
        require_number("threshold", self.threshold, 0.0, 1.0)
