"""Exits by gates that were trained together with the predictions they judge."""

from typing import Any

import jax
import jax.numpy as jnp

from dyninf.depth.base import EXIT, RUN, DepthPolicy, LayerObs, require_number
from dyninf.depth.routers import require_layers, route
from dyninf.pytree import pytree

NUM_FEATURES = 4


@pytree()
class JointExit(DepthPolicy):
    """Exit where the mass that the gates give to this exit is more than half of what earlier exits left.

    A gate is ``g_l = sigmoid(w_l . f + b_l)`` of four measures f of how sure the prediction is
    (:func:`uncertainty_features`). The mass of exit l is ``P_l = clip(g_l, 0, 1 - sum_{j<l} g_j)``; a token exits where
    ``c_l = P_l / prod_{j<l} (1 - c_j)`` exceeds the threshold. Gates are therefore read one after the other, and the
    state holds both running terms. Each decision costs a pass over the vocabulary matrix and the logits: ask at few
    layers, and train at the same ones (:func:`dyninf.depth.at_layers`). Never exits, and is exact, at a threshold of 1
    or biases of minus infinity; a prediction that is not a number never exits, nor does the token afterwards.

    Source: JEI-DNN (Regol et al., "Jointly-Learned Exit and Inference for a Dynamic Neural Network", 2024) and its
    released code. Differences: the intermediate inference modules are the model's one readout, since an exit ends in
    it; the code exits at ``c_l >= 1/2``, this above the threshold, which differs at equality only. It needs trained
    weights (:mod:`dyninf.training.jei`).

    Args:
        gate: weights ``[L, 4]``.
        bias: ``[L]``.
        threshold: exit above it (0 to 1).
    """

    gate: jax.Array
    bias: jax.Array
    threshold: float | jax.Array = 0.5

    @classmethod
    def create(cls, num_layers: int, *, bias: float = -2.0, threshold: float = 0.5) -> "JointExit":
        """Return a policy to train: no gate reads anything yet, each gives its exit the mass ``sigmoid(bias)``."""
        return cls(
            gate=jnp.zeros((num_layers, NUM_FEATURES)), bias=jnp.full(num_layers, float(bias)), threshold=threshold
        )

    def init(self, shape_BT: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """Return the sum of the gates so far, and the product of ``1 - c``."""
        return jnp.zeros(shape_BT), jnp.ones(shape_BT)

    def logits(self, layer: int | jax.Array, features_BTF: jax.Array) -> jax.Array:
        """Return a gate's logits ``[B, T]`` (float32) for the features of the states that would enter a layer."""
        return route(self.gate, self.bias, layer, features_BTF)

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Read the state out, give this exit its mass and compare."""
        given_BT, left_BT = jnp.where(obs.first, 0.0, state[0]), jnp.where(obs.first, 1.0, state[1])
        gate_BT = jax.nn.sigmoid(self.logits(obs.layer, uncertainty_features(obs.logits())))
        mass_BT = jnp.clip(gate_BT, 0.0, jnp.maximum(1.0 - given_BT, 0.0))
        # Where nothing is left, no mass is either: the quotient is 0.
        chance_BT = jnp.clip(mass_BT / jnp.maximum(left_BT, 1e-30), 0.0, 1.0)
        return jnp.where(chance_BT > self.threshold, EXIT, RUN), (given_BT + gate_BT, left_BT * (1.0 - chance_BT))

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return every layer but the first: an exit needs a layer below it."""
        return tuple(range(1, num_layers))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless the weights belong to a model of this depth."""
        require_layers(num_layers, gate=(self.gate, 2), bias=(self.bias, 1))
        if self.gate.shape[1] != NUM_FEATURES:
            raise ValueError(
                f"expected gate [L, {NUM_FEATURES}], a weight a feature, got {self.gate.shape}; create the policy anew"
            )
        require_number("threshold", self.threshold, 0.0, 1.0)


def uncertainty_features(logits: jax.Array) -> jax.Array:
    """Return what a gate sees of logits ``[..., V]``: four float32 numbers ``[..., 4]``.

    The largest probability, the entropy H(p) in nats, the distance of the two largest probabilities, and the entropy of
    ``p^2 / sum p^2``, which is the softmax of twice the logits. A vocabulary of one has a distance of 1.
    """
    z = logits.astype(jnp.float32)
    probs = jax.nn.softmax(z, axis=-1)
    # Not top_k: it sorts, which took nine tenths of the time on a CPU.
    places = jax.lax.broadcasted_iota(jnp.int32, probs.shape, probs.ndim - 1)
    is_top = places == jnp.argmax(probs, axis=-1)[..., None]
    top, second = jnp.max(probs, axis=-1), jnp.max(jnp.where(is_top, 0.0, probs), axis=-1)
    return jnp.stack([top, _entropy(z), top - second, _entropy(2 * z)], axis=-1)


def _entropy(logits: jax.Array) -> jax.Array:
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)
    return -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1)
