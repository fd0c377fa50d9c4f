"""Build depth policies from others: fewer decisions, several rules at once, thresholds that change with position."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from dyninf.depth.base import EXIT, DepthPolicy, LayerObs, consult, require_integer, require_number
from dyninf.pytree import pytree


@pytree(static=("layers", "start", "step"))
class Restricted(DepthPolicy):
    """Ask ``policy`` only at some of its decision layers.

    Made by :func:`every`, :func:`after_layer` and :func:`at_layers`. Elsewhere tokens run on. Restricting to no layer
    at all is exact.
    """

    policy: DepthPolicy
    layers: tuple[int, ...] | None = None
    start: int = 0
    step: int = 1

    @property
    def skips(self) -> bool:
        """Whether the inner policy skips."""
        return self.policy.skips

    def init(self, shape_BT: tuple[int, int]) -> Any:
        """Return the inner state."""
        return self.policy.init(shape_BT)

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Ask the inner policy."""
        return self.policy.update(state, obs)

    def skip_state(self, state: Any, obs: LayerObs) -> jax.Array | None:
        """Return the inner answer."""
        return self.policy.skip_state(state, obs)

    def stops(self, state: Any) -> jax.Array | None:
        """Return the inner answer."""
        return self.policy.stops(state)

    def cosine_rule(self, num_layers: int) -> tuple[jax.Array | float, tuple[int, ...]] | None:
        """Return the inner rule at the decision layers that pass the restriction."""
        rule = self.policy.cosine_rule(num_layers)
        return None if rule is None else (rule[0], self.decision_layers(num_layers))

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the inner decision layers that pass the restriction."""
        inner = self.policy.decision_layers(num_layers)
        return tuple(
            layer
            for layer in inner
            if layer >= self.start and layer % self.step == 0 and (self.layers is None or layer in self.layers)
        )

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the inner answer."""
        return self.policy.prefill_layers(num_layers)

    def validate(self, num_layers: int) -> None:
        """Raise ValueError if the restriction or the inner policy does not fit the model."""
        if self.policy.static_layers(num_layers) is not None:
            raise ValueError(f"expected a policy that decides for each token, got {self.policy}; use it alone")
        require_integer("the layers between decisions", self.step, 1, num_layers)
        require_integer("the first layer to decide at", self.start, 0, num_layers)
        for layer in self.layers or ():
            require_integer("a decision layer of this model", layer, 0, num_layers - 1)
        self.policy.validate(num_layers)


def every(policy: DepthPolicy, *, step: int) -> Restricted:
    """Ask ``policy`` before layers ``step``, ``2 * step``, ... only."""
    return Restricted(policy=policy, step=step)


def after_layer(policy: DepthPolicy, *, layer: int) -> Restricted:
    """Let the first ``layer`` layers always run before ``policy`` is asked."""
    return Restricted(policy=policy, start=layer)


def at_layers(policy: DepthPolicy, *, layers: tuple[int, ...]) -> Restricted:
    """Ask ``policy`` before the named layers only."""
    return Restricted(policy=policy, layers=tuple(layers))


@pytree()
class FirstOf(DepthPolicy):
    """Exit as soon as one of several policies says so; made by :func:`first_of`. Exact with no policy at all."""

    policies: tuple[DepthPolicy, ...]

    def init(self, shape_BT: tuple[int, int]) -> tuple:
        """Return the states side by side."""
        return tuple(policy.init(shape_BT) for policy in self.policies)

    def update(self, state: tuple, obs: LayerObs) -> tuple[jax.Array, tuple]:
        """Ask each policy at its own decision layers."""
        answers = [consult(policy, inner, obs) for policy, inner in zip(self.policies, state, strict=True)]
        action_BT = jnp.zeros(obs.step_BT.shape, jnp.int32)
        for action, _ in answers:
            action_BT = jnp.maximum(action_BT, jnp.where(action == EXIT, EXIT, 0))
        return action_BT, tuple(inner for _, inner in answers)

    def stops(self, state: tuple) -> jax.Array | None:
        """Return the texts that any policy ends."""
        answers = [policy.stops(inner) for policy, inner in zip(self.policies, state, strict=True)]
        answers = [answer for answer in answers if answer is not None]
        return functools.reduce(operator.or_, answers) if answers else None

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the union of the decision layers."""
        return tuple(sorted({layer for policy in self.policies for layer in policy.decision_layers(num_layers)}))

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers that no policy rules out for good."""
        parts = [set(policy.prefill_layers(num_layers)) for policy in self.policies]
        return tuple(sorted(set(range(num_layers)).intersection(*parts)))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError if a policy does not fit the model or skips layers instead of exiting."""
        for policy in self.policies:
            if policy.skips:
                raise ValueError(f"expected policies that exit, got {type(policy).__name__}, which skips layers")
            policy.validate(num_layers)


def first_of(*policies: DepthPolicy) -> FirstOf:
    """Exit at the earliest layer at which any of ``policies`` exits."""
    return FirstOf(policies=policies)


@pytree()
class DecayingThreshold(DepthPolicy):
    """Lower the threshold of an exit policy as the text grows longer.

    The threshold of generated token t is ``0.9 * threshold + 0.1 * threshold * exp(-temperature * t / length)``:
    early tokens, whose errors reach everything after them, must be surer. Constant at ``temperature=0``.

    Source: CALM, section 3.4 and its released code (temperature 4).

    Args:
        policy: an exit policy with a ``threshold`` field.
        temperature: speed of the decay.
        length: expected number of generated tokens.
    """

    policy: DepthPolicy
    temperature: float | jax.Array = 4.0
    length: float | jax.Array = 128.0

    def init(self, shape_BT: tuple[int, int]) -> Any:
        """Return the inner state."""
        return self.policy.init(shape_BT)

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Ask the inner policy with the threshold of each token."""
        decay_BT = jnp.exp(-self.temperature * obs.step_BT.astype(jnp.float32) / self.length)
        threshold_BT = (0.9 + 0.1 * decay_BT) * self.policy.threshold
        return dataclasses.replace(self.policy, threshold=threshold_BT).update(state, obs)

    def stops(self, state: Any) -> jax.Array | None:
        """Return the inner answer."""
        return self.policy.stops(state)

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the inner decision layers."""
        return self.policy.decision_layers(num_layers)

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the inner answer."""
        return self.policy.prefill_layers(num_layers)

    def validate(self, num_layers: int) -> None:
        """Raise ValueError if the inner policy has no threshold or a parameter is out of range."""
        if not hasattr(self.policy, "threshold"):
            raise ValueError(f"expected a policy with a threshold, got {type(self.policy).__name__}")
        # An infinite temperature would multiply the first token's index 0 and give NaN.
        require_number("temperature", self.temperature, 0.0, 1e6)
        require_number("length", self.length, 1.0, float("inf"))
        self.policy.validate(num_layers)
