"""Data-dependent exits: a token stops at the first layer whose state says that the rest would not change it."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from dyninf.depth.base import EXIT, RUN, DepthPolicy, LayerObs, require_number
from dyninf.pytree import pytree
from pallas_kernels.readout import Readout


@pytree(static=("measure",))
class Confidence(DepthPolicy):
    """Exit where the layer's own prediction is confident enough.

    Measures, all in [0, 1] and higher for surer: ``max_prob`` is the largest probability, ``margin`` the distance to
    the second largest, ``entropy`` is ``1 - H(p) / log V``. Each decision costs a pass over the vocabulary matrix:
    ask at few layers (:func:`dyninf.depth.every`). Never exits, and is exact, at a threshold of 1.

    Source: CALM (Schuster et al. 2022), softmax response and its variants; EE-LLM for ``max_prob``. CALM's entropy is
    not normalised; its batch shares one decision, here every token has its own.

    Args:
        threshold: exit when the measure exceeds it (0 to 1).
    """

    threshold: float | jax.Array
    measure: Literal["max_prob", "margin", "entropy"] = "max_prob"

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Read the state out and compare."""
        confident_BT = confidence(obs.readout(), self.measure) > self.threshold
        return jnp.where(confident_BT, EXIT, RUN), state

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return every layer but the first: an exit needs a layer below it."""
        return tuple(range(1, num_layers))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless measure and threshold are in range."""
        if self.measure not in ("max_prob", "margin", "entropy"):
            raise ValueError(f"expected measure 'max_prob', 'margin' or 'entropy', got {self.measure!r}")
        require_number("threshold", self.threshold, 0.0, 1.0)


@pytree()
class Saturation(DepthPolicy):
    """Exit where the last layer hardly turned the state: cosine(h_l, h_{l-1}) above a threshold.

    Costs two dot products of D. Never exits, and is exact, at a threshold of 1.

    Source: CALM, "state" confidence. The released code divides by norms over the whole batch; here each token has its
    own, as in the paper.

    Args:
        threshold: exit when the cosine similarity exceeds it (0 to 1).
    """

    threshold: float | jax.Array

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Compare the states before and after the last layer."""
        return jnp.where(cosine(obs.x_BTD, obs.prev_BTD) > self.threshold, EXIT, RUN), state

    def cosine_rule(self, num_layers: int) -> tuple[float | jax.Array, tuple[int, ...]]:
        """Return the threshold: the cosine is the whole rule."""
        return self.threshold, self.decision_layers(num_layers)

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return every layer but the first."""
        return tuple(range(1, num_layers))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless the threshold is in range."""
        require_number("threshold", self.threshold, 0.0, 1.0)


@pytree()
class Patience(DepthPolicy):
    """Exit when ``patience`` decisions in a row agree with the one before them on the next token.

    Each decision costs a pass over the vocabulary matrix. Never exits, and is exact, when ``patience`` is at least the
    number of decision layers.

    Source: PABEE (Zhou et al. 2020): the counter restarts at 0 whenever the prediction changes.

    Args:
        patience: unchanged predictions needed (at least 1).
    """

    patience: int | jax.Array = 2

    def init(self, shape_BT: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """Return the last prediction and the run of unchanged ones."""
        return jnp.full(shape_BT, -1, jnp.int32), jnp.zeros(shape_BT, jnp.int32)

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Count unchanged predictions."""
        last_BT, unchanged_BT = state
        token_BT = obs.readout().token
        # A readout that is not a number predicts no token, -1, twice in a row.
        same_BT = (token_BT == last_BT) & (token_BT >= 0) & jnp.logical_not(obs.first)
        unchanged_BT = jnp.where(same_BT, unchanged_BT + 1, 0)
        return jnp.where(unchanged_BT >= self.patience, EXIT, RUN), (token_BT, unchanged_BT)

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return every layer but the first."""
        return tuple(range(1, num_layers))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless patience is a number of at least 1."""
        require_number("patience", self.patience, 1, float("inf"))


def cosine(x_BTD: jax.Array, prev_BTD: jax.Array) -> jax.Array:
    """Return the cosine of two states of each token, float32 ``[B, T]``."""
    x, prev = x_BTD.astype(jnp.float32), prev_BTD.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(prev, axis=-1)
    # Rounding can lift the cosine of equal vectors above 1, which no threshold may allow.
    return jnp.minimum(jnp.sum(x * prev, axis=-1) / jnp.maximum(norms, 1e-30), 1.0)


def confidence(readout: Readout, measure: str) -> jax.Array:
    """Return how sure a prediction is, in [0, 1] per token; see :class:`Confidence` for the measures."""
    if measure == "max_prob":
        return readout.max_prob
    if measure == "margin":
        return readout.margin
    return 1.0 - readout.entropy / jnp.log(readout.num_tokens)
