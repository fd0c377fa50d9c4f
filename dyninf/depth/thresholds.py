"""One threshold an exit, as calibration finds them, where a rule by itself has one for all."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.depth.base import DepthPolicy, LayerObs, require_integer
from dyninf.pytree import pytree


@pytree(static=("layers",))
class Thresholds(DepthPolicy):
    """Ask an exit rule at some layers only, at each with a threshold of its own.

    The rule's own threshold is not used and has to be 1. Costs what the rule costs at these layers; new thresholds are
    no new compilation. Exact where no threshold lets the rule exit: infinity, for rules that exit above theirs.

    Source: the confidence thresholds of MSDNet (Huang et al. 2018) and DeeR-VLA (Yue et al. 2024), solved by
    :mod:`dyninf.training.calibrate`; there a value equal to its threshold exits, here the rule decides.

    Args:
        policy: an exit rule with a ``threshold`` field, such as :class:`Confidence` or :class:`Saturation`.
        thresholds: float ``[E]`` or a tuple, one for each of ``layers``, in the rule's measure; any number.
        layers: layers before which the rule is asked, ascending; an exit there has run as many layers.
    """

    policy: DepthPolicy
    thresholds: jax.Array | tuple[float, ...]
    layers: tuple[int, ...]

    def init(self, shape_BT: tuple[int, int]) -> Any:
        """Return the rule's state."""
        return self.policy.init(shape_BT)

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Ask the rule with the threshold of this layer."""
        place = jnp.searchsorted(jnp.asarray(self.layers), obs.layer)
        threshold = jnp.asarray(self.thresholds, jnp.float32)[place]
        return dataclasses.replace(self.policy, threshold=threshold).update(state, obs)

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers that have a threshold."""
        return self.layers

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the rule's answer."""
        return self.policy.prefill_layers(num_layers)

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless the rule has a threshold and each of its layers is given one."""
        exits = isinstance(self.policy, DepthPolicy) and not self.policy.skips
        if not exits or not hasattr(self.policy, "threshold"):
            raise ValueError(f"expected an exit policy with a threshold, got {self.policy}; use Confidence, say")
        self.policy.validate(num_layers)
        own = self.policy.threshold
        if not isinstance(own, jax.core.Tracer) and float(own) != 1.0:
            raise ValueError(
                f"expected the rule's own threshold, which is not used, to be 1, got {own}; set thresholds"
            )
        for layer in self.layers:
            require_integer("a layer with a threshold", layer, 0, num_layers - 1)
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"expected layers in ascending order, got {self.layers}; sort them and their thresholds")
        unasked = [layer for layer in self.layers if layer not in self.policy.decision_layers(num_layers)]
        if unasked:
            raise ValueError(
                f"expected layers before which {type(self.policy).__name__} decides, got {unasked}; leave them out"
            )
        shape = (len(self.thresholds),) if isinstance(self.thresholds, tuple) else jnp.shape(self.thresholds)
        if shape != (len(self.layers),):
            raise ValueError(f"expected one threshold for each of {len(self.layers)} layers, got shape {shape}")
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self.thresholds))
        if not traced and np.isnan(np.asarray(self.thresholds)).any():
            raise ValueError(f"expected thresholds that are numbers, got {self.thresholds}; infinity is one")
