"""Exits with a small head of their own: a gate decides, an adapter prepares the state for the model's readout."""

from typing import Any

import jax
import jax.numpy as jnp

from dyninf.depth.base import RUN, SKIP, DepthPolicy, LayerObs, require_integer, require_number
from dyninf.depth.routers import require_layers, route
from dyninf.pytree import pytree


@pytree(static=("first",))
class AdaptedExit(DepthPolicy):
    """Leave the stack where ``sigmoid(w_l . x + b_l) > threshold``, with the state ``s_l x + up_l gelu(down_l x)``.

    The model's own final norm and vocabulary matrix then read the adapted state, so that an exit costs D + 2 D R
    weights instead of a vocabulary matrix. To hand over a state the policy skips every layer from the exit on; a
    decision costs one dot product of D. Keys of the layer at which a token leaves are projected from the state before
    the adapter, those above from the state after it. Never exits, and is exact, at a threshold of 1 or a bias of minus
    infinity; a gate that is not a number runs the layer. It must be asked at every layer from ``first`` on, where
    tokens that left are held: a combinator that leaves layers out is refused.

    Source: EE-LLM and EE-Tuning (Pan et al. 2024), exits with a norm or an MLP of their own, tuned with the backbone
    frozen (:mod:`dyninf.training.frozen`). Differences: their exit has a vocabulary matrix of its own, or the model's
    tied, and exits by the probability of the prediction; here the readout is shared and the gate is linear, as reading
    the adapted state out at every exit would cost a pass over the matrix each.

    Args:
        gate: weights ``[L, D]``.
        bias: ``[L]``.
        scale: ``[L, D]``; the per-exit scale of the norm, up to the norm's own factor.
        down: ``[L, D, R]``.
        up: ``[L, R, D]``.
        threshold: exit above it (0 to 1).
        first: lowest layer to be asked about (at least 1); rows below it are not read.
    """

    gate: jax.Array
    bias: jax.Array
    scale: jax.Array
    down: jax.Array
    up: jax.Array
    threshold: float | jax.Array = 0.5
    first: int = 1

    skips = True

    @classmethod
    def create(cls, key: jax.Array, num_layers: int, d_model: int, rank: int, **settings: Any) -> "AdaptedExit":
        """Return a policy to train: gates at one half, which do not exit, and heads that pass the state on."""
        return cls(
            gate=jnp.zeros((num_layers, d_model)),
            bias=jnp.zeros(num_layers),
            scale=jnp.ones((num_layers, d_model)),
            down=d_model**-0.5 * jax.random.normal(key, (num_layers, d_model, rank)),
            up=jnp.zeros((num_layers, rank, d_model)),
            **settings,
        )

    def init(self, shape_BT: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """Return which tokens have left, and which leave at this layer."""
        return jnp.zeros(shape_BT, bool), jnp.zeros(shape_BT, bool)

    def logits(self, layer: int | jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Return the gate's logits ``[B, T]`` (float32) for the states that would enter a layer."""
        return route(self.gate, self.bias, layer, x_BTD)

    def adapt(self, layer: int | jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Return the states that leave before a layer, ready for the model's readout, in their dtype."""
        scale_D, down_DR, up_RD = (jnp.asarray(w)[layer].astype(x_BTD.dtype) for w in (self.scale, self.down, self.up))
        hidden_BTR = jax.nn.gelu(jnp.einsum("BTD,DR->BTR", x_BTD, down_DR))
        return x_BTD * scale_D[None, None] + jnp.einsum("BTR,RD->BTD", hidden_BTR, up_RD)

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Ask the gate about tokens that have not left; skip for those that have.

        Raises:
            ValueError: if a combinator asks at some layers only.
        """
        if obs.asked is not None and obs.asked != tuple(range(obs.asked[0], obs.num_layers)):
            raise ValueError(
                f"expected AdaptedExit to be asked at every layer from its first on, got {obs.asked}; set biases of "
                "the other layers to minus infinity instead"
            )
        left_BT = state[0] & jnp.logical_not(obs.first)
        leaving_BT = ~left_BT & (jax.nn.sigmoid(self.logits(obs.layer, obs.x_BTD)) > self.threshold)
        left_BT = left_BT | leaving_BT
        return jnp.where(left_BT, SKIP, RUN), (left_BT, leaving_BT)

    def skip_state(self, state: Any, obs: LayerObs) -> jax.Array:
        """Return the adapted state where a token leaves at this layer, and what it left with above."""
        return jnp.where(state[1][:, :, None], self.adapt(obs.layer, obs.x_BTD), obs.x_BTD)

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return every layer from the first on."""
        return tuple(range(self.first, num_layers))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless the weights belong to a model of this depth and fit together."""
        require_layers(
            num_layers,
            gate=(self.gate, 2),
            bias=(self.bias, 1),
            scale=(self.scale, 2),
            down=(self.down, 3),
            up=(self.up, 3),
        )
        d_model, rank = self.down.shape[1:]
        sizes = (self.gate.shape[1], self.scale.shape[1], *self.up.shape[1:])
        if sizes != (d_model, d_model, rank, d_model):
            raise ValueError(
                f"expected gate and scale [L, D], down [L, D, R] and up [L, R, D], got {self.gate.shape}, "
                f"{self.scale.shape}, {self.down.shape} and {self.up.shape}; create the policy for this model"
            )
        require_number("threshold", self.threshold, 0.0, 1.0)
        require_integer("the first layer to be asked about", self.first, 1, num_layers)
