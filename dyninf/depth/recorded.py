"""Depths from a table: replay what another policy decided, or test against a known schedule."""

from typing import Any

import jax
import jax.numpy as jnp

from dyninf.depth.base import EXIT, RUN, DepthPolicy, LayerObs
from dyninf.pytree import pytree


@pytree()
class Recorded(DepthPolicy):
    """Exit where a table says: generated token t of a sequence runs its first ``depths[t]`` layers.

    Costs nothing to ask, so that a run under it shows what a policy's decisions are worth apart from what they cost.
    Tokens beyond the table start it again. Exact where the table holds the number of layers; entries outside
    1 to that number are clamped.

    Args:
        depths: ``int [S]`` for all sequences alike, or ``[S, B]``, one column a sequence of the batch.
    """

    depths: jax.Array

    def planned_layers(self, step_BT: jax.Array, num_layers: int) -> jax.Array:
        """Return the entries of the table."""
        rows = jnp.remainder(step_BT, self.depths.shape[0])
        if self.depths.ndim == 1:
            planned_BT = self.depths[rows]
        else:
            planned_BT = self.depths[rows, jnp.arange(step_BT.shape[0])[:, None]]
        return jnp.clip(planned_BT, 1, num_layers)

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Exit where the entry is reached."""
        planned_BT = self.planned_layers(obs.step_BT, obs.num_layers)
        return jnp.where(obs.layer >= planned_BT, EXIT, RUN), state

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return every layer but the first."""
        return tuple(range(1, num_layers))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless the table is one of whole numbers."""
        shape, dtype = jnp.shape(self.depths), jnp.result_type(self.depths)
        if len(shape) not in (1, 2) or 0 in shape or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"expected depths to be integers [S] or [S, B], got {dtype} of shape {shape}")
