"""Static schedules: the layers that run are known before the program is compiled.

They compile to the kept layers and nothing else. Every decoded token runs the same layers, so a skipped layer's cache
is never read after the prompt and nothing has to be filled in.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dyninf.depth.base import EXIT, DepthPolicy, LayerObs, require_integer, require_number
from dyninf.pytree import pytree


@pytree(static=("layer",))
class ExitAt(DepthPolicy):
    """Run only the first ``layer`` layers, for prompt and generated tokens alike.

    Exact when ``layer`` is the number of layers. Saves ``(L - layer) / L`` of all layer work and cache. Inside
    :func:`dyninf.depth.first_of` it caps the depth: layers above are not compiled.

    Source: the early-exit inference of LayerSkip (Elhoushi et al. 2024, section 4.2); useful on models trained for it.

    Args:
        layer: how many layers run (1 to L).
    """

    layer: int

    nested = True

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Exit; asked only before the first layer that does not run."""
        return jnp.full(obs.step_BT.shape, EXIT, jnp.int32), state

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the first layer that does not run, if there is one."""
        return (self.layer,) if self.layer < num_layers else ()

    def static_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return layers 0 to ``layer - 1``."""
        return tuple(range(self.layer))

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the same layers: what lies above is never read."""
        return self.static_layers(num_layers)

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless the exit exists."""
        require_integer("the number of layers that run", self.layer, 1, num_layers)


@pytree(static=("layers", "prompt"))
class SkipLayers(DepthPolicy):
    """Never run the named layers.

    Exact when ``layers`` is empty. :func:`dyninf.depth.block_influence` ranks layers by how little they change.

    Source: layer removal as in ShortGPT (Men et al. 2024).

    Args:
        layers: indices of the layers to skip (0 to L-1).
        prompt: also skip them in the prompt (a pruned model); ``False`` lets the prompt run every layer.
    """

    layers: tuple[int, ...]
    prompt: bool = True

    skips = True
    nested = True

    def static_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers that are not named."""
        return tuple(layer for layer in range(num_layers) if layer not in self.layers)

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return what the prompt runs."""
        return self.static_layers(num_layers) if self.prompt else tuple(range(num_layers))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError if a layer does not exist or none is left."""
        for layer in self.layers:
            require_integer("a layer of this model", layer, 0, num_layers - 1)
        if not self.static_layers(num_layers):
            raise ValueError(f"expected at least one layer left to run, got all {num_layers} skipped; skip fewer")


@pytree(static=("speedup",))
class UnifiedSkip(DepthPolicy):
    """Skip evenly spaced middle layers so that about ``1 / speedup`` of them run; the prompt runs every layer.

    The first and last layer always run; between them every ``interval``-th, until ``int(L / speedup)`` are kept.
    Exact at ``speedup=1``. The choice ignores the input, so batches and caches work unchanged.

    Source: Liu et al. 2024, "Accelerating Inference in LLMs with a Unified Layer Skipping Strategy". The released
    rule divides by zero when one layer is to be kept and keeps two when ``L / speedup`` is 2; here at least two
    layers are always kept.

    Args:
        speedup: target ratio of all layers to kept layers (1 to L/2).
    """

    speedup: float

    skips = True
    nested = True

    def static_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the kept layers, ascending."""
        budget = max(2, int(num_layers / self.speedup))
        if budget >= num_layers:
            return tuple(range(num_layers))
        interval = int(num_layers / (budget - 1))
        middle = range(interval, num_layers - 1, interval)
        return (0, *list(middle)[: budget - 2], num_layers - 1)

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless the target can be met."""
        # Two layers are always kept.
        require_number("the target speedup", self.speedup, 1.0, max(1.0, num_layers / 2))
