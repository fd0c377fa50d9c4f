"""Train the gates of :class:`dyninf.depth.MetaExit` to tell where a state predicts what the last layer will.

The label of a state is whether its most probable token is the last layer's: no text is needed beside the model's input.
The model is frozen.

Source: Schuster et al., "Confident Adaptive Language Modeling" (CALM), 2022, which has both losses.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from dyninf.depth.adapted import AdaptedExit
from dyninf.depth.meta import MetaExit
from dyninf.model import CausalLM
from dyninf.training.states import CHUNK, count_layers, exit_predictions, exit_states, masked_mean

Objective = Literal["independent", "geometric"]


def consistency_labels(predictions_EBT: jax.Array) -> jax.Array:
    """Return where the predictions of all depths but the last equal those of the last, bool ``[E-1, B, T]``.

    A prediction of -1 (a readout that was not a number) is consistent with nothing.
    """
    last_BT = predictions_EBT[-1]
    return (predictions_EBT[:-1] == last_BT[None]) & (last_BT >= 0)[None]


def balanced_bce(logits_KBT: jax.Array, labels_KBT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Return the binary cross-entropy with each class weighted by one less its frequency, a float32 scalar.

    Mean over exits and tokens of ``(1 - f) bce`` for labels that are True at a frequency f of the exit's tokens, and
    ``f bce`` for the others. Both classes then pull equally, and an exit whose labels are all alike gives 0.

    Source: CALM (independent losses with class weights); frequencies are counted per exit here. The released code of
    FREE, for the same gate, shifts logits by the classes' log frequencies over all exits instead.
    """
    mask_KBT = jnp.broadcast_to(mask_BT[None], labels_KBT.shape)
    frequency_K11 = masked_mean(labels_KBT.astype(jnp.float32), mask_KBT, axis=(1, 2))[:, None, None]
    weight_KBT = jnp.where(labels_KBT, 1 - frequency_K11, frequency_K11)
    return masked_mean(weight_KBT * bce(logits_KBT, labels_KBT), mask_KBT)


def geometric_loss(logits_KBT: jax.Array, labels_KBT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Return ``-log P(exit = first consistent depth)`` with ``P(exit = l) = c_l prod_{j<l} (1 - c_j)``, its mean.

    Where no early exit is consistent, the exit is the last layer, of probability ``prod_j (1 - c_j)``. Written in
    logits it is a sum of binary cross-entropies up to the first consistent depth.

    Source: CALM, the geometric-like loss.
    """
    before_KBT = jnp.cumsum(labels_KBT, axis=0) - labels_KBT
    terms_KBT = jnp.where(before_KBT == 0, bce(logits_KBT, labels_KBT), 0.0)
    return masked_mean(jnp.sum(terms_KBT, axis=0), mask_BT)


def meta_loss(
    model: CausalLM,
    policy: MetaExit | AdaptedExit,
    tokens_BT: jax.Array,
    *,
    objective: Objective = "independent",
    mask_BT: jax.Array | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Return the loss of the policy's gates at all of its decision layers, and how often each is right.

    One pass of the dense model, a readout at each decision layer and the last, and gradients of the gates alone. For an
    :class:`~dyninf.depth.AdaptedExit` the labels are those of the adapted states.

    Args:
        tokens_BT: texts, right-padded.
        mask_BT: bool, True where a token counts; ``None`` for everywhere.
        chunk: states whose logits are held at once.

    Returns:
        The loss, a float32 scalar, and the share of tokens for which the sign of the logit is the label, ``[K]``.

    Raises:
        ValueError: if the policy does not fit the model or the objective is unknown.
    """
    if objective not in ("independent", "geometric"):
        raise ValueError(f"expected objective 'independent' or 'geometric', got {objective!r}; pick one of them")
    num_layers = count_layers(model)
    policy.validate(num_layers)
    layers = policy.decision_layers(num_layers)
    states_EBTD = jax.lax.stop_gradient(exit_states(model, tokens_BT, (*layers, num_layers)))
    read_EBTD = states_EBTD
    if isinstance(policy, AdaptedExit):
        adapted = [policy.adapt(layer, x_BTD) for layer, x_BTD in zip(layers, states_EBTD[:-1], strict=True)]
        read_EBTD = jax.lax.stop_gradient(jnp.stack([*adapted, states_EBTD[-1]]))
    labels_KBT = consistency_labels(exit_predictions(model, read_EBTD, chunk=chunk))
    logits_KBT = jnp.stack([policy.logits(layer, x_BTD) for layer, x_BTD in zip(layers, states_EBTD[:-1], strict=True)])
    mask_BT = jnp.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
    loss = (balanced_bce if objective == "independent" else geometric_loss)(logits_KBT, labels_KBT, mask_BT)
    right_KBT = (logits_KBT > 0) == labels_KBT
    mask_KBT = jnp.broadcast_to(mask_BT[None], right_KBT.shape)
    return loss, masked_mean(right_KBT.astype(jnp.float32), mask_KBT, axis=(1, 2))


def bce(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the binary cross-entropy (nats) of logits with bool labels, elementwise, float32."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(jnp.where(labels, -logits, logits))
