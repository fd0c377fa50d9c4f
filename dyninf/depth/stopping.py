"""Exit, continue or stop: a classifier that also ends a text whose next token no layer would get right.

A completion that goes on from a wrong token is rarely accepted, so that the cheapest thing to do there is to say
nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dyninf.depth.base import EXIT, RUN, DepthPolicy, LayerObs, require_number
from dyninf.depth.routers import require_layers
from dyninf.pytree import pytree

STOP, LEAVE, CONTINUE = 0, 1, 2


@pytree()
class StopState:
    """Which tokens have decided, and which of them to stop, bool ``[B, T]`` each."""

    decided: jax.Array
    stopped: jax.Array


@pytree()
class StopExit(DepthPolicy):
    """Choose among stop, exit and continue by ``p = softmax(W_l . x + b_l)``.

    A token exits where "exit" is the likeliest of the three and its probability is above ``exit_threshold``, and stops
    where "stop" is and has more than ``stop_threshold``. Either ends its way through the layers; the first decision of
    a token holds, and a new token starts afresh. Costs three dot products of D and no readout. Never exits at an
    ``exit_threshold`` of 1, never stops at a ``stop_threshold`` of 1, and is exact at both; a state that is not a
    number does neither. It needs trained weights (:mod:`dyninf.training.stopping`).

    Where a token stops, :meth:`stops` ends its text before it: the step gives that sequence no token.

    Source: SEC (Sun et al., "When Neural Code Completion Models Size up the Situation: Attaining Cheaper and Faster
    Completion through Dynamic Model Inference", 2024) and its released code, which decodes one sequence at a
    time. Classes, their order and the rule are its.

    Args:
        weight: ``[L, D, 3]``, in the order stop, exit, continue.
        bias: ``[L, 3]``.
        exit_threshold: exit above it (0 to 1).
        stop_threshold: stop above it (0 to 1).
    """

    weight: jax.Array
    bias: jax.Array
    exit_threshold: float | jax.Array = 0.5
    stop_threshold: float | jax.Array = 0.5

    @classmethod
    def create(cls, num_layers: int, d_model: int, **thresholds: float) -> "StopExit":
        """Return a policy to train; its classes are equally likely."""
        return cls(weight=jnp.zeros((num_layers, d_model, 3)), bias=jnp.zeros((num_layers, 3)), **thresholds)

    def init(self, shape_BT: tuple[int, int]) -> StopState:
        """Return the state of tokens that have not decided."""
        return StopState(decided=jnp.zeros(shape_BT, bool), stopped=jnp.zeros(shape_BT, bool))

    def logits(self, layer: int | jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Return the logits of stop, exit and continue, float32 ``[B, T, 3]``, for states that would enter a layer."""
        weight_D3, bias_3 = (jnp.asarray(w)[layer].astype(jnp.float32) for w in (self.weight, self.bias))
        return jnp.einsum("BTD,DC->BTC", x_BTD.astype(jnp.float32), weight_D3) + bias_3[None, None]

    def choose(self, logits_BT3: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return which tokens exit and which stop, bool ``[B, T]`` each, by the logits of one layer."""
        probs_BT3 = jax.nn.softmax(logits_BT3, axis=-1)
        likeliest_BT = jnp.argmax(probs_BT3, axis=-1)
        exits_BT = (likeliest_BT == LEAVE) & (probs_BT3[..., LEAVE] > self.exit_threshold)
        stops_BT = (likeliest_BT == STOP) & (probs_BT3[..., STOP] > self.stop_threshold)
        return exits_BT, stops_BT

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Let tokens that have not decided choose."""
        decided_BT, stopped_BT = (was & jnp.logical_not(obs.first) for was in (state.decided, state.stopped))
        exits_BT, stops_BT = self.choose(self.logits(obs.layer, obs.x_BTD))
        stopped_BT = stopped_BT | (stops_BT & ~decided_BT)
        decided_BT = decided_BT | exits_BT | stops_BT
        return jnp.where(decided_BT, EXIT, RUN), StopState(decided=decided_BT, stopped=stopped_BT)

    def stops(self, state: StopState) -> jax.Array:
        """Return which tokens chose to stop."""
        return state.stopped

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return every layer but the first: an exit needs a layer below it."""
        return tuple(range(1, num_layers))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless the weights belong to a model of this depth and fit together."""
        require_layers(num_layers, weight=(self.weight, 3), bias=(self.bias, 2))
        if self.weight.shape[2] != 3 or self.bias.shape[1] != 3:
            raise ValueError(
                f"expected weight [L, D, 3] and bias [L, 3], got {self.weight.shape} and {self.bias.shape}; "
                "create the policy for this model"
            )
        require_number("exit_threshold", self.exit_threshold, 0.0, 1.0)
        require_number("stop_threshold", self.stop_threshold, 0.0, 1.0)
