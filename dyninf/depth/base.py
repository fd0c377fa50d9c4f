"""The protocol of depth policies: one decision before each layer, RUN, SKIP or EXIT.

A policy is a frozen pytree dataclass. Static schedules answer :meth:`DepthPolicy.static_layers` and compile to no
control flow; the others are asked at their ``decision_layers``, per token, and answer with an action. Tokens are laid
out ``[B, T]``: T is 1 while decoding and the whole text under teacher forcing, where every token decides for itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.pytree import pytree
from pallas_kernels.readout import Readout, read_logits

RUN, SKIP, EXIT = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class LayerObs:
    """What a policy may look at before a layer.

    Attributes:
        layer: index of the layer about to run, an int or a traced int32.
        num_layers: layers of the model.
        first: whether this is the policy's first decision for the token; per-token state starts here.
        asked: layers before which the policies around this one are asked, ``None`` for all.
        x_BTD: state that would enter the layer.
        prev_BTD: state that entered the layer before.
        step_BT: index of the token among the generated ones, 0 for the first.
        logits: call it for the logits ``[B, T, V]`` of ``x_BTD``; costs a pass over the vocabulary matrix.
        readout: call it for what the logits say ``[B, T]`` without the logits, which a model may do faster than by
            computing them; made from ``logits`` unless given.
        token_logits: call it with token ids ``[B, T, M]`` for their logits alone, which a model may do without the
            others; taken from ``logits`` unless given.
    """

    layer: int | jax.Array
    num_layers: int
    first: bool | jax.Array
    x_BTD: jax.Array
    prev_BTD: jax.Array
    step_BT: jax.Array
    logits: Callable[[], jax.Array]
    asked: tuple[int, ...] | None = None
    readout: Callable[[], Readout] | None = None
    token_logits: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self):
        logits = self.logits
        if self.readout is None:
            object.__setattr__(self, "readout", lambda: read_logits(logits()))
        if self.token_logits is None:
            object.__setattr__(self, "token_logits", lambda ids_BTM: jnp.take_along_axis(logits(), ids_BTM, axis=-1))


class DepthPolicy:
    """Base of depth policies; its answers are those of a policy that runs every layer.

    Attributes:
        skips: whether the policy may answer SKIP; its decisions must then be cheap, they are made outside conditionals.
        nested: whether the layers that a token runs are always among those every earlier token ran, so that no later
            token reads keys that were never written and nothing has to be filled in.
    """

    skips: bool = False
    nested: bool = False

    def init(self, shape_BT: tuple[int, int]) -> Any:
        """Return the state for tokens laid out ``[B, T]``."""
        return ()

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Return the action of each token ``[B, T]`` and the new state."""
        kept = self.static_layers(obs.num_layers)
        if kept is None:
            raise NotImplementedError(f"expected {type(self).__name__} to define update or static_layers")
        runs_L = jnp.asarray(np.isin(np.arange(obs.num_layers), kept))
        return jnp.full(obs.step_BT.shape, jnp.where(runs_L[obs.layer], RUN, SKIP), jnp.int32), state

    def skip_state(self, state: Any, obs: LayerObs) -> jax.Array | None:
        """Return the states ``[B, T, D]`` with which tokens that SKIP this layer go on, ``None`` if they keep theirs.

        ``state`` is what :meth:`update` returned for this layer; asked outside conditionals, so it must be cheap.
        """
        return None

    def stops(self, state: Any) -> jax.Array | None:
        """Return which tokens ``[B, T]`` end their text, ``None`` if the policy never ends one.

        ``state`` is that of the whole step. A sequence that is ended gets no token from this step.
        """
        return None

    def planned_layers(self, step_BT: jax.Array, num_layers: int) -> jax.Array | None:
        """Return how many leading layers each token runs ``[B, T]`` where that is known before the step, else ``None``.

        Must agree with :meth:`update`; layers that are run by index then need not be asked on the way.
        """
        return None

    def cosine_rule(self, num_layers: int) -> tuple[jax.Array | float, tuple[int, ...]] | None:
        """Return a threshold and decision layers if the policy exits where the cosine of two states exceeds it.

        The states are those that entered the layer before and the layer asked about; ``None`` for any other rule.
        """
        return None

    def static_layers(self, num_layers: int) -> tuple[int, ...] | None:
        """Return the layers every decoded token runs, ``None`` if that depends on the token."""
        return None

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers the prompt runs; all of them unless the policy says otherwise."""
        return tuple(range(num_layers))

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers before which :meth:`update` is asked, ascending."""
        return tuple(range(num_layers))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError if the policy does not fit a model of ``num_layers`` layers."""


@pytree()
class RunAll(DepthPolicy):
    """Run every layer for every token: the identity element of depth policies."""

    def static_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return every layer."""
        return tuple(range(num_layers))


def consult(policy: DepthPolicy, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
    """Ask a policy if this is one of its decision layers; elsewhere answer RUN and keep its state.

    Works for a layer index known while tracing (nothing is compiled elsewhere) and for a traced one.
    """
    decisions = policy.decision_layers(obs.num_layers)
    if obs.asked is not None:
        decisions = tuple(layer for layer in decisions if layer in obs.asked)
    run = jnp.full(obs.step_BT.shape, RUN, jnp.int32)
    if not decisions:
        return run, state
    if isinstance(obs.layer, int):
        if obs.layer not in decisions:
            return run, state
        return policy.update(state, _replace(obs, first=obs.layer == decisions[0], asked=decisions))
    asked_L = jnp.asarray(np.isin(np.arange(obs.num_layers), decisions))
    obs = _replace(obs, first=obs.layer == decisions[0], asked=decisions)
    return jax.lax.cond(asked_L[obs.layer], lambda s: policy.update(s, obs), lambda s: (run, s), state)


def require_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise ValueError unless a concrete ``value`` is a number in [low, high]; traced values are not checked."""
    if isinstance(value, jax.core.Tracer):
        return
    number = np.ndim(value) == 0 and jnp.issubdtype(np.asarray(value).dtype, jnp.number)
    if not number or not low <= float(value) <= high:
        raise ValueError(f"expected {name} to be a number between {low:g} and {high:g}, got {value!r}")


def require_integer(name: str, value: Any, low: int, high: int) -> None:
    """Raise ValueError unless ``value``, which decides a shape, is an integer in [low, high]."""
    if not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"expected {name} to be an integer between {low} and {high}, got {value!r}")


def _replace(obs: LayerObs, **changes: Any) -> LayerObs:
    return LayerObs(**{**obs.__dict__, **changes})
