"""Train a model as a Mixture-of-Depths: in routed layers only the tokens that its router picks run.

Each routed layer gathers the C tokens of highest router logit of each sequence (C is static), runs them as a sequence
of their own that keeps its positions and order, and puts them back; the others pass by. Plain functions over the model
protocol, to be differentiated with respect to the model and to :class:`dyninf.depth.MixtureOfDepths` alike.
"""

import math

import jax
import jax.numpy as jnp

from dyninf.depth.mixture import MixtureOfDepths
from dyninf.model import Attend, CausalLM
from dyninf.pytree import pytree
from dyninf.training.layerskip import exit_loss
from pallas_kernels import prefill_attention


@pytree()
class MixtureForward:
    """Result of :func:`mixture_forward`.

    Attributes:
        x_BTD: final states, before the final norm; meaningless at padding.
        predictor_loss: mean cross-entropy (nats) between the sign of the router logits, as decoding reads it, and the
            tokens that were picked; a float32 scalar, 0 where no layer is routed.
        agreement: share of tokens and routed layers where that sign is right.
        ran_LBT: which tokens ran which layer; False at padding.
    """

    x_BTD: jax.Array
    predictor_loss: jax.Array
    agreement: jax.Array
    ran_LBT: jax.Array


def num_selected(num_tokens: int, capacity: float) -> int:
    """Return how many of ``num_tokens`` a routed layer runs: the capacity's share rounded up, at least 1."""
    # Rounding must not make ceil(0.1 * 30) more than 3.
    return min(num_tokens, max(1, math.ceil(num_tokens * capacity - 1e-9)))


def mixture_forward(
    model: CausalLM, policy: MixtureOfDepths, tokens_BT: jax.Array, lengths_B: jax.Array | None = None
) -> MixtureForward:
    """Run texts through the model, in routed layers only ``num_selected(T, capacity)`` tokens of each.

    The layer's update enters as it is, so that this is the dense model at a capacity of 1 and decoding under the
    policy, with ``fill="mask"``, wherever the router's sign predicts its picks. The router learns from the update's
    straight-through factor ``g - stop_gradient(g)``, ``g = sigmoid(logit)``: 0 in value, and in the gradient what a
    factor of g would give. Cost: a routed layer costs the capacity's share of a dense one, its attention the square.

    Source: Mixture-of-Depths (Raposo et al. 2024), sections 3.3 to 3.5; there the factor is the logit itself and
    present in the value.

    Args:
        tokens_BT: right-padded ids.
        lengths_B: tokens of each sequence; ``None`` for T. Padding is picked only where a sequence is shorter than C,
            and no token attends to it.

    Raises:
        ValueError: if the policy does not fit the model, or its layers are stacked.
        NotImplementedError: if a routed layer has an attention window and does not run all tokens.
    """
    if not hasattr(model.layers, "__len__"):
        raise ValueError(f"expected a sequence of layers, got {type(model.layers).__name__}; unstack the layers")
    num_layers, (batch, length) = len(model.layers), tokens_BT.shape
    policy.validate(num_layers)
    routed, count = policy.decision_layers(num_layers), num_selected(length, policy.capacity)
    lengths_B = jnp.full(batch, length, jnp.int32) if lengths_B is None else lengths_B
    positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    live_BT = positions_BT < lengths_B[:, None]
    x_BTD, ran, losses, right = model.embed(tokens_BT), [], [], []
    for index, layer in enumerate(model.layers):
        if index not in routed:
            x_BTD, _ = layer(x_BTD, positions_BT, _attend(lengths_B, gathered=False))
            ran.append(live_BT)
            continue
        logits_BT = policy.logits(index, x_BTD)
        x_BTD, picked_BT = _run_picked(layer, x_BTD, logits_BT, live_BT, lengths_B, count)
        losses.append(jax.nn.softplus(logits_BT) - jnp.where(picked_BT, logits_BT, 0.0))
        right.append((logits_BT > 0) == picked_BT)
        ran.append(picked_BT)
    return MixtureForward(
        x_BTD=x_BTD,
        predictor_loss=_mean(losses, live_BT),
        agreement=_mean(right, live_BT),
        ran_LBT=jnp.stack(ran),
    )


def mixture_loss(
    model: CausalLM,
    policy: MixtureOfDepths,
    tokens_BT1: jax.Array,
    *,
    predictor_weight: float | jax.Array = 0.01,
    chunk: int = 1024,
) -> tuple[jax.Array, MixtureForward]:
    """Return the loss of texts ``[B, T+1]`` without padding, and the forward pass behind it.

    ``mean next-token cross-entropy + predictor_weight * predictor_loss``; differentiate it with ``has_aux=True`` and
    ``argnums=(0, 1)``.

    Args:
        predictor_weight: the paper gives none; it only has to move the logits' zero to the edge of the picks.
        chunk: tokens whose logits are held at once.
    """
    out = mixture_forward(model, policy, tokens_BT1[:, :-1])
    targets_BT = tokens_BT1[:, 1:]
    mask_BT = jnp.ones(targets_BT.shape, bool)
    loss, _ = exit_loss(model.unembed, out.x_BTD[None], targets_BT, jnp.ones(1), mask_BT, chunk)
    return loss + predictor_weight * out.predictor_loss, out


def _run_picked(layer, x_BTD, logits_BT, live_BT, lengths_B, count):
    """Run the ``count`` tokens of highest logit through a layer; return all states and which tokens ran."""
    batch, length = live_BT.shape
    _, picked_BC = jax.lax.top_k(jnp.where(live_BT, logits_BT, -jnp.inf), count)
    # In order of position, so that causal attention among the picked is causal, and padding comes last.
    picked_BC = jnp.sort(picked_BC, axis=1)
    rows_B1 = jnp.arange(batch)[:, None]
    x_BCD = x_BTD[rows_B1, picked_BC]
    attend = _attend(jnp.minimum(lengths_B, count), gathered=count < length)
    y_BCD, _ = layer(x_BCD, picked_BC.astype(jnp.int32), attend)
    gate_BC1 = jax.nn.sigmoid(jnp.take_along_axis(logits_BT, picked_BC, axis=1))[:, :, None]
    factor_BC1 = (gate_BC1 - jax.lax.stop_gradient(gate_BC1)).astype(y_BCD.dtype)
    y_BCD = y_BCD + factor_BC1 * (y_BCD - x_BCD)
    ran_BT = jnp.zeros_like(live_BT).at[rows_B1, picked_BC].set(True, unique_indices=True)
    return x_BTD.at[rows_B1, picked_BC].set(y_BCD, unique_indices=True), ran_BT & live_BT


def _attend(lengths_B: jax.Array, *, gathered: bool) -> Attend:
    def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None):
        if gathered and window is not None:
            raise NotImplementedError(
                f"expected routed layers without an attention window, got {window=}: it would count picked tokens, "
                "not positions; route other layers or use a capacity of 1"
            )
        return prefill_attention(q_BTNH, k_BTKH, v_BTKH, lengths_B, window=window), None

    return attend


def _mean(values: list[jax.Array], live_BT: jax.Array) -> jax.Array:
    """Return the mean over routed layers and live tokens, 0 if there are none."""
    if not values:
        return jnp.float32(0)
    total = sum(jnp.sum(jnp.where(live_BT, value_BT, 0.0)) for value_BT in values)
    return total / (len(values) * jnp.maximum(jnp.sum(live_BT), 1))
