"""JEI-DNN: train the gates of :class:`dyninf.depth.JointExit` and the readout that they judge together.

A gate that is trained alone judges predictions which were trained as if every token used every exit; confidence there
is another quantity than among the tokens that will exit. Here each exit's cross-entropy counts with the mass that the
gates give it, and the gates learn where exiting costs least, counting layers at a price. Two ways:

- ``phase="joint"``: one differentiable objective, ``E[CE + price * cost]`` under ``P_l = g_l prod_{j<l} (1 - g_j)``.
- ``phase="readout"`` and ``phase="gates"`` in turn (:func:`trains_gates`), as the paper alternates the two levels.

The paper freezes the backbone: hand :func:`jei_loss` the parameters of the readout alone to differentiate, with
:mod:`dyninf.training.frozen`. Its warm-up, the sum of the exits' cross-entropies, is
:func:`dyninf.training.states.depth_loss` with equal weights.

Source: Regol, Chataoui and Coates, "Jointly-Learned Exit and Inference for a Dynamic Neural Network: JEI-DNN", 2024,
and its released code. Every function states its differences. Shared by all: the inference modules are the model's one
readout, so that the last exit takes part in the objective, with the mass that is left, where the code sums over early
exits only; the code stops warming up each module by its own patience, which is left out.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from dyninf.depth.jei import JointExit, uncertainty_features
from dyninf.model import CausalLM
from dyninf.training.meta_classifier import bce
from dyninf.training.states import count_layers, exit_states, masked_mean

Phase = Literal["joint", "readout", "gates"]


def exit_masses(gates_KBT: jax.Array) -> jax.Array:
    """Return the mass of each exit under the released code's rule, ``[K+1, B, T]``; the last layer takes the rest.

    ``P_l = clip(g_l, 0, 1 - sum_{j<l} g_j)``; they sum to 1.
    """
    given_KBT = jnp.cumsum(gates_KBT, axis=0) - gates_KBT
    masses_KBT = jnp.minimum(gates_KBT, jnp.maximum(1 - given_KBT, 0.0))
    return jnp.concatenate([masses_KBT, jnp.maximum(1 - jnp.sum(masses_KBT, axis=0, keepdims=True), 0.0)])


def chain_masses(gates_KBT: jax.Array) -> jax.Array:
    """Return the chance of each exit if every gate is drawn on its own, ``g_l prod_{j<l} (1 - g_j)``, ``[K+1, B, T]``.

    The last layer is reached with ``prod_j (1 - g_j)``; they sum to 1.
    """
    reached_EBT = jnp.concatenate([jnp.ones_like(gates_KBT[:1]), jnp.cumprod(1 - gates_KBT, axis=0)])
    return reached_EBT * jnp.concatenate([gates_KBT, jnp.ones_like(gates_KBT[:1])])


def expected_loss(
    ce_EBT: jax.Array, logits_KBT: jax.Array, costs_E: jax.Array, mask_BT: jax.Array, *, price: float | jax.Array
) -> jax.Array:
    """Return ``mean sum_l P_l (CE_l + price * cost_l)`` under the chain of gates, differentiable in both.

    Source: JEI-DNN, the objective before it is split in two; the split's gate targets are where its minimum lies.
    """
    masses_EBT = chain_masses(jax.nn.sigmoid(logits_KBT))
    return masked_mean(jnp.sum(masses_EBT * (ce_EBT + price * costs_E[:, None, None]), axis=0), mask_BT)


def readout_loss(ce_EBT: jax.Array, logits_KBT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Return ``mean r sum_l P_l CE_l`` with the gates fixed and ``r = sum_l CE_l / sum_l P_l CE_l`` of each token.

    The factor keeps the size of the plain sum of cross-entropies, which the value equals, while the gradient of each is
    weighted by its mass.

    Source: JEI-DNN's classifier phase. In the released code, as far as it was read, the factor is differentiated, too;
    then it cancels the masses, and the gradient is that of the plain sum whatever the gates say. Here it is a constant,
    so that the masses matter as in the paper. The code also divides by the number of exits.
    """
    weighted_BT = jnp.sum(jax.lax.stop_gradient(exit_masses(jax.nn.sigmoid(logits_KBT))) * ce_EBT, axis=0)
    ratio_BT = jax.lax.stop_gradient(jnp.sum(ce_EBT, axis=0) / jnp.maximum(weighted_BT, 1e-30))
    return masked_mean(ratio_BT * weighted_BT, mask_BT)


def gate_targets(ce_EBT: jax.Array, costs_E: jax.Array, *, price: float | jax.Array) -> jax.Array:
    """Return which gates should be open, bool ``[K, B, T]``: from the exit of least ``CE_l + price * cost_l`` on."""
    best_BT = jnp.argmin(ce_EBT + price * costs_E[:, None, None], axis=0)
    return jnp.arange(ce_EBT.shape[0] - 1)[:, None, None] >= best_BT[None]


def gate_loss(logits_KBT: jax.Array, targets_KBT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Return the mean binary cross-entropy of the gates, where open targets weigh ``#closed / #open`` of their gate.

    A gate without open targets has nothing to weigh.

    Source: JEI-DNN's gate phase with one weight per gate; an earlier version of the code counts over all gates, and
    opens a gate at random if none should be.
    """
    mask_KBT = jnp.broadcast_to(mask_BT[None], targets_KBT.shape)
    open_K11 = jnp.sum(targets_KBT & mask_KBT, axis=(1, 2))[:, None, None]
    closed_K11 = jnp.sum(~targets_KBT & mask_KBT, axis=(1, 2))[:, None, None]
    weight_KBT = jnp.where(targets_KBT, closed_K11 / jnp.maximum(open_K11, 1), 1.0)
    return masked_mean(weight_KBT * bce(logits_KBT, targets_KBT), mask_KBT)


def trains_gates(step: int | jax.Array, *, period: int = 200) -> jax.Array:
    """Return whether a step, counted after the warm-up, is one of the gates; the readout's come first.

    Args:
        period: steps before the phases change; 200 in the released code.
    """
    return jnp.asarray(step) // period % 2 == 1


def jei_loss(
    model: CausalLM,
    policy: JointExit,
    tokens_BT1: jax.Array,
    layers: Sequence[int],
    *,
    phase: Phase = "joint",
    price: float | jax.Array = 0.7,
    mask_BT: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Return the loss of a phase, the mean cross-entropy of each exit, and how often the gates choose it.

    Differentiate with respect to both trees: "readout" gives no gradient to the policy, "gates" none to the model.
    What gates see of a prediction never carries a gradient. The cost of an exit is its share of the layers. Holds the
    logits of ``B * T`` tokens at one exit at a time.

    Args:
        tokens_BT1: texts ``[B, T+1]``, right-padded.
        layers: layers before which tokens may exit, ascending, among the policy's decisions; decode with
            ``at_layers(policy, layers=layers)``.
        price: nats that all layers are worth; the released code's default is 0.7.
        mask_BT: bool, True where the prediction counts; ``None`` for everywhere.

    Returns:
        The loss, a float32 scalar; cross-entropies (nats per token) and mean masses, float32 ``[K+1]`` each, the last
        layer's included.

    Raises:
        ValueError: if the policy or the layers do not fit the model, or the phase is unknown.
    """
    if phase not in ("joint", "readout", "gates"):
        raise ValueError(f"expected phase 'joint', 'readout' or 'gates', got {phase!r}; pick one of them")
    num_layers = count_layers(model)
    policy.validate(num_layers)
    if any(layer not in policy.decision_layers(num_layers) for layer in layers):
        raise ValueError(f"expected layers from 1 to {num_layers - 1}, got {layers}; an exit needs a layer below it")
    model = jax.lax.stop_gradient(model) if phase == "gates" else model
    policy = jax.lax.stop_gradient(policy) if phase == "readout" else policy
    depths = (*layers, num_layers)
    states_EBTD = exit_states(model, tokens_BT1[:, :-1], depths)
    mask_BT = jnp.ones(tokens_BT1[:, 1:].shape, bool) if mask_BT is None else mask_BT
    ce_EBT, features_EBTF = judge(model, states_EBTD, tokens_BT1[:, 1:])
    logits_KBT = jnp.stack(
        [policy.logits(layer, features_BTF) for layer, features_BTF in zip(layers, features_EBTF[:-1], strict=True)]
    )
    costs_E = jnp.asarray(depths, jnp.float32) / num_layers
    if phase == "joint":
        loss = expected_loss(ce_EBT, logits_KBT, costs_E, mask_BT, price=price)
    elif phase == "readout":
        loss = readout_loss(ce_EBT, logits_KBT, mask_BT)
    else:
        loss = gate_loss(logits_KBT, gate_targets(ce_EBT, costs_E, price=price), mask_BT)
    masses_EBT = (chain_masses if phase == "joint" else exit_masses)(jax.nn.sigmoid(logits_KBT))
    mask_EBT = jnp.broadcast_to(mask_BT[None], ce_EBT.shape)
    ce_E, masses_E = (masked_mean(values, mask_EBT, axis=(1, 2)) for values in (ce_EBT, masses_EBT))
    return loss, (ce_E, masses_E)


def judge(model: CausalLM, states_EBTD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return each state's cross-entropy ``[E, B, T]`` and, without a gradient, what gates see of it ``[E, B, T, 4]``.

    Args:
        targets_BT: ids of the next tokens; anything in the vocabulary where they do not count.
    """

    @jax.checkpoint
    def one(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BTV = model.unembed(x_BTD).astype(jnp.float32)
        picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[:, :, None], axis=-1)[:, :, 0]
        seen_BTF = uncertainty_features(jax.lax.stop_gradient(logits_BTV))
        return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT, seen_BTF

    return jax.lax.map(one, states_EBTD)
