"""Position-aware decay: later tokens run fewer layers, whatever they are."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from dyninf.depth.base import RUN, SKIP, DepthPolicy, LayerObs, require_integer, require_number
from dyninf.pytree import pytree


@pytree(static=("kind", "flex_start", "tail"))
class DepthDecay(DepthPolicy):
    """Let the number of layers fall with the index i of the generated token; the prompt runs every layer.

    ``power`` keeps ``floor(L * alpha ** i)`` layers (D3), ``linear`` keeps ``L - (L - min_layers) * i / length``
    (SkipDecode class), never fewer than ``min_layers``. Skipped are the lowest layers of the flexible range
    ``flex_start <= layer < L - tail``, so the layers of a later token are always among those of an earlier one:
    its missing keys are never read. Exact at ``alpha = 1`` or ``min_layers = L``.

    Source: D3 (Fan et al. 2025) for the power rule and its core head and tail; SkipDecode (Del Corro et al. 2023) for
    the linear rule. Neither released code; the sizes of the core and the order inside the flexible range are arguments
    here, not the papers' settings.

    Args:
        alpha: decay per token (0 to 1); ``power`` only.
        length: tokens until ``min_layers`` is reached; ``linear`` only.
        min_layers: fewest layers a token runs.
        flex_start: number of first layers that always run.
        tail: number of last layers that always run.
    """

    kind: Literal["power", "linear"] = "power"
    alpha: float | jax.Array = 0.99
    length: float | jax.Array = 256.0
    min_layers: int | jax.Array = 1
    flex_start: int = 1
    tail: int = 1

    skips = True
    nested = True

    def num_run(self, step: jax.Array, num_layers: int) -> jax.Array:
        """Return how many layers the generated token ``step`` runs (int32, same shape as ``step``)."""
        if self.kind == "power":
            count = num_layers * jnp.power(jnp.asarray(self.alpha, jnp.float32), step.astype(jnp.float32))
        else:
            count = num_layers - (num_layers - self.min_layers) * step / self.length
        # Float rounding must not take a layer away from an exact product such as L * 1 ** i.
        count = jnp.floor(count + 1e-4).astype(jnp.int32)
        fewest = jnp.maximum(self.min_layers, self.flex_start + self.tail)
        return jnp.clip(count, jnp.minimum(fewest, num_layers), num_layers)

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Skip the layer if it is among the lowest flexible ones that this token goes without."""
        skipped_BT = obs.num_layers - self.num_run(obs.step_BT, obs.num_layers)
        return jnp.where(obs.layer - self.flex_start < skipped_BT, SKIP, RUN), state

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the flexible range."""
        return tuple(range(self.flex_start, num_layers - self.tail))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError if the core is larger than the model or a rate is out of range."""
        if self.kind not in ("power", "linear"):
            raise ValueError(f"expected kind 'power' or 'linear', got {self.kind!r}")
        require_integer("flex_start", self.flex_start, 0, num_layers)
        require_integer("tail", self.tail, 0, num_layers)
        if not 1 <= self.flex_start + self.tail <= num_layers:
            raise ValueError(
                f"expected flex_start + tail between 1 and {num_layers} layers, got {self.flex_start} + {self.tail}"
            )
        require_number("alpha", self.alpha, 0.0, 1.0)
        require_number("length", self.length, 1.0, float("inf"))
        require_number("min_layers", self.min_layers, 1, num_layers)
