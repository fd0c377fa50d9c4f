"""Token halting: a token whose state has converged is frozen for all layers above."""

from typing import Any

import jax
import jax.numpy as jnp

from dyninf.depth.base import EXIT, RUN, DepthPolicy, LayerObs, require_number
from dyninf.pytree import pytree


@pytree()
class TokenHalting(DepthPolicy):
    """Halt a token where the last layer hardly moved its state: ``|h_l - h_(l-1)| / |h_(l-1)|`` below a threshold.

    A halted token exits: its state is frozen and becomes its prediction. Under ``Plan(fill="mask")`` it also writes no
    keys above, which no later token attends to there. Costs two norms of D, no readout. Where
    :class:`dyninf.depth.Saturation` asks whether the state still turns, this asks whether it still moves: a state that
    only grows is saturated but not halted. Never halts, and is exact, at a threshold of 0; a state that is not a number
    never halts.

    Source: QuickSilver (Khanna et al. 2025), dynamic token halting with KV cache skipping; it published neither code
    nor thresholds. Differences: the update is divided by the state's norm, since states grow with depth and differ in
    scale between models; its second signal, the entropy of the prediction, is left out, as it costs a readout; so are
    its token fusion and quantisation. A budget of tokens that may go on is left out on purpose: tokens would compete
    with their neighbours in the batch or with later ones, so that results depend on the batch and teacher forcing is no
    longer decoding; ``dyninf.training.mixture`` is where tokens compete for capacity.

    Args:
        threshold: halt when the relative update is below it (at least 0).
    """

    threshold: float | jax.Array

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Compare the states before and after the last layer."""
        x, prev = obs.x_BTD.astype(jnp.float32), obs.prev_BTD.astype(jnp.float32)
        moved_BT, norm_BT = jnp.linalg.norm(x - prev, axis=-1), jnp.linalg.norm(prev, axis=-1)
        # Multiplied out, a state of zeros needs no care. The comparison is false for a NaN on either side.
        return jnp.where(moved_BT < self.threshold * norm_BT, EXIT, RUN), state

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return every layer but the first: an update needs a layer below it."""
        return tuple(range(1, num_layers))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless the threshold is a number of at least 0."""
        require_number("threshold", self.threshold, 0.0, float("inf"))
