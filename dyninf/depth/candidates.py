"""Exits by a learned predictor that watches a few candidate tokens."""

from typing import Any

import jax
import jax.numpy as jnp

from dyninf.depth.base import EXIT, RUN, DepthPolicy, LayerObs, require_number
from dyninf.depth.routers import require_layers
from dyninf.pytree import pytree


@pytree()
class CandidateExit(DepthPolicy):
    """Exit where a small network, shown the M most likely tokens of the token's first decision, says so.

    Its 3 M features are the candidates' logits z, their probabilities among themselves ``p = softmax(z)``, and the
    change of p since the decision before (p itself at the first). It proposes to exit where
    ``sigmoid(w_out . relu(features W_in + b_in) + b_out)`` exceeds the threshold, and the exit is taken if the most
    probable token of the whole vocabulary is a candidate. Never exits, and is exact, at a threshold of 1; a prediction
    that is not a number never exits.

    The first decision of a token reads the vocabulary matrix; a later one the M vectors of the candidates, and the
    whole matrix only if the network proposes to exit for a sequence of the batch. A model without ``token_logits``
    (:mod:`dyninf.model`) pays for all logits each time.

    Source: SpecEE (Xu et al. 2025); features, network and check are those of its released code, which exits above one
    half. Differences: SpecEE takes its candidates from a separate draft model, so that no layer costs a pass over the
    vocabulary; its scheduling of which layers have a predictor is left to the combinators. It needs trained
    weights: :func:`features` is what to train them on, "this layer's prediction is the last layer's" the label.

    Args:
        w_in: ``[L, 3 M, H]``.
        b_in: ``[L, H]``.
        w_out: ``[L, H]``.
        b_out: ``[L]``.
        threshold: exit when the predictor exceeds it (0 to 1).
    """

    w_in: jax.Array
    b_in: jax.Array
    w_out: jax.Array
    b_out: jax.Array
    threshold: float | jax.Array = 0.5

    @classmethod
    def create(
        cls, key: jax.Array, num_layers: int, *, candidates: int = 4, hidden: int = 512, threshold: float = 0.5
    ) -> "CandidateExit":
        """Return a policy to train; its output weights are zero, so that it does not exit yet."""
        size = 3 * candidates
        return cls(
            w_in=size**-0.5 * jax.random.normal(key, (num_layers, size, hidden)),
            b_in=jnp.zeros((num_layers, hidden)),
            w_out=jnp.zeros((num_layers, hidden)),
            b_out=jnp.zeros(num_layers),
            threshold=threshold,
        )

    @property
    def num_candidates(self) -> int:
        """How many tokens are watched."""
        return self.w_in.shape[1] // 3

    def init(self, shape_BT: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """Return the candidates and their last probabilities."""
        shape_BTM = (*shape_BT, self.num_candidates)
        return jnp.zeros(shape_BTM, jnp.int32), jnp.zeros(shape_BTM, jnp.float32)

    def update(self, state: Any, obs: LayerObs) -> tuple[jax.Array, Any]:
        """Choose candidates at the first decision, look at them at every one."""
        ids_BTM, before_BTM = state
        ids_BTM, logits_BTM = jax.lax.cond(
            obs.first,
            lambda: _most_likely(obs.logits(), self.num_candidates),
            lambda: (ids_BTM, obs.token_logits(ids_BTM).astype(jnp.float32)),
        )
        probs_BTM = jax.nn.softmax(logits_BTM, axis=-1)
        before_BTM = jnp.where(obs.first, 0.0, before_BTM)
        likely_BT = self.predict(obs.layer, features(logits_BTM, before_BTM)) > self.threshold
        # The most probable token of the first decision is a candidate.
        best_BT = jax.lax.cond(
            jnp.any(likely_BT) & jnp.logical_not(obs.first), lambda: obs.readout().token, lambda: ids_BTM[:, :, 0]
        )
        known_BT = jnp.any(ids_BTM == best_BT[:, :, None], axis=-1)
        return jnp.where(likely_BT & known_BT, EXIT, RUN), (ids_BTM, probs_BTM)

    def predict(self, layer: int | jax.Array, features_BTF: jax.Array) -> jax.Array:
        """Return the predictor's probability that exiting before a layer is right (float32 ``[B, T]``)."""
        w_in, b_in, w_out, b_out = (jnp.asarray(w)[layer] for w in (self.w_in, self.b_in, self.w_out, self.b_out))
        hidden_BTH = jax.nn.relu(jnp.einsum("BTF,FH->BTH", features_BTF, w_in) + b_in[None, None])
        return jax.nn.sigmoid(jnp.einsum("BTH,H->BT", hidden_BTH, w_out) + b_out)

    def decision_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return every layer but the first: an exit needs a layer below it."""
        return tuple(range(1, num_layers))

    def validate(self, num_layers: int) -> None:
        """Raise ValueError unless the weights belong to a model of this depth and fit together."""
        require_layers(
            num_layers, w_in=(self.w_in, 3), b_in=(self.b_in, 2), w_out=(self.w_out, 2), b_out=(self.b_out, 1)
        )
        _, size, hidden = self.w_in.shape
        if size == 0 or size % 3 or self.b_in.shape[1] != hidden or self.w_out.shape[1] != hidden:
            raise ValueError(
                f"expected w_in [L, 3 M, H], b_in and w_out [L, H], got {self.w_in.shape}, {self.b_in.shape} and "
                f"{self.w_out.shape}; create the policy for this model"
            )
        require_number("threshold", self.threshold, 0.0, 1.0)


def features(logits_BTM: jax.Array, before_BTM: jax.Array) -> jax.Array:
    """Return what the predictor sees ``[B, T, 3 M]``: logits, probabilities, and their change since ``before``."""
    probs_BTM = jax.nn.softmax(logits_BTM, axis=-1)
    return jnp.concatenate([logits_BTM, probs_BTM, probs_BTM - before_BTM], axis=-1)


def _most_likely(logits_BTV: jax.Array, num_candidates: int) -> tuple[jax.Array, jax.Array]:
    logits_BTM, ids_BTM = jax.lax.top_k(logits_BTV.astype(jnp.float32), num_candidates)
    return ids_BTM.astype(jnp.int32), logits_BTM
