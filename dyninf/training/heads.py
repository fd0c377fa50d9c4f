"""Recipes that train exits beside a backbone: what they add to it, which arrays learn, and the loss.

All begin with a trained model and leave its layers and embedding as they were, bit for bit. ``frozen`` adds an adapter
and a gate for each exit (:class:`dyninf.depth.AdaptedExit`): the adapters learn the next token with equal weights, the
gates whether the adapted state says what the last layer will. ``jei`` trains the gates of
:class:`dyninf.depth.JointExit` and the readout that all exits share, in turn; a tied readout is copied first.
``stop`` trains the classifier of :class:`dyninf.depth.StopExit`.

Source: EE-Tuning, JEI-DNN and SEC; see :mod:`dyninf.training.frozen`, :mod:`dyninf.training.jei` and
:mod:`dyninf.training.stopping` for the differences.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dyninf.depth import AdaptedExit, JointExit, StopExit
from dyninf.depth.base import DepthPolicy
from dyninf.depth.combinators import at_layers
from dyninf.models import Transformer
from dyninf.models.parameters import abstract_model, named_parameters, with_parameters
from dyninf.training.frozen import head_loss, merge, select
from dyninf.training.jei import jei_loss, trains_gates
from dyninf.training.meta_classifier import meta_loss
from dyninf.training.recipe import HEADS, Recipe
from dyninf.training.soft import soft_depths
from dyninf.training.states import cast
from dyninf.training.stopping import stop_loss

TRAINED = {
    "frozen": ("exits.gate", "exits.bias", "exits.scale", "exits.down", "exits.up"),
    "jei": ("exits.gate", "exits.bias", "model.norm_final", "model.unembedding"),
    "stop": ("exits.weight", "exits.bias"),
}


def begin_heads(model: Transformer, recipe: Recipe) -> tuple[Transformer, DepthPolicy | None]:
    """Return the model with what the recipe adds to it, and the exits to train; ``None`` where it trains the model.

    Raises:
        ValueError: if the model is too shallow for the recipe's exits.
    """
    config = model.config
    if recipe.kind not in HEADS:
        return model, None
    exit_layers(config.num_layers, recipe)
    if recipe.kind == "frozen":
        key = jax.random.key(recipe.seed)
        exits = AdaptedExit.create(key, config.num_layers, config.d_model, recipe.rank)
    elif recipe.kind == "jei":
        model, exits = _untie(model), JointExit.create(config.num_layers)
    else:
        exits = StopExit.create(config.num_layers, config.d_model)
    return model, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), exits)  # thresholds, too


def exit_layers(num_layers: int, recipe: Recipe) -> tuple[int, ...]:
    """Return the layers before which tokens may exit under the trained policy, ascending.

    Raises:
        ValueError: if there is none.
    """
    period = recipe.exit_period if recipe.kind == "jei" else 1
    if period >= num_layers:
        raise ValueError(
            f"expected recipe.exit_period below the model's {num_layers} layers, got {period}; there is no early exit"
        )
    return soft_depths(num_layers, first=period, step=period)[:-1]


def policy_of(exits: DepthPolicy, num_layers: int, recipe: Recipe) -> DepthPolicy:
    """Return the trained exits as a policy to decode with: asked at the layers where they were trained."""
    return at_layers(exits, layers=exit_layers(num_layers, recipe)) if recipe.kind == "jei" else exits


def trained_arrays(model: Transformer, exits: DepthPolicy, recipe: Recipe) -> dict[str, jax.Array]:
    """Return the arrays that learn, by name."""
    return select({"model": model, "exits": exits}, TRAINED[recipe.kind])


def with_trained(
    model: Transformer, exits: DepthPolicy, arrays: dict[str, jax.Array]
) -> tuple[Transformer, DepthPolicy]:
    """Return the model and the exits with the trained arrays in place of their own."""
    whole = merge({"model": model, "exits": exits}, arrays)
    return whole["model"], whole["exits"]


def heads_loss(
    arrays: dict[str, jax.Array],
    model: Transformer,
    exits: DepthPolicy,
    tokens_BT1: jax.Array,
    recipe: Recipe,
    step: jax.Array,
    mask_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return the loss of the trained arrays and the cross-entropy of each exit (nats per token), deepest last.

    A classifier that stops predicts no token; in place of cross-entropies stands its loss.
    """
    model, exits = with_trained(cast(model, recipe.compute_dtype), exits, arrays)
    if recipe.kind == "stop":
        loss, _ = stop_loss(model, exits, tokens_BT1, mask_BT=mask_BT, chunk=recipe.chunk)
        return loss, loss[None]
    layers = exit_layers(model.config.num_layers, recipe)
    if recipe.kind == "frozen":
        equal_K = jnp.full(len(layers), 1 / len(layers))
        loss, entropy_K = head_loss(model, exits, tokens_BT1, layers, equal_K, mask_BT=mask_BT, chunk=recipe.chunk)
        # Of the gates alone, which the loss of the adapters does not reach.
        gates, _ = meta_loss(model, exits, tokens_BT1[:, :-1], mask_BT=mask_BT, chunk=recipe.chunk)
        return loss + gates, entropy_K

    def phase(name: str) -> Any:
        return lambda: jei_loss(model, exits, tokens_BT1, layers, phase=name, price=recipe.price, mask_BT=mask_BT)

    loss, (entropy_E, _) = jax.lax.cond(trains_gates(step, period=recipe.phase), phase("gates"), phase("readout"))
    return loss, entropy_E


def handed_over(exits: DepthPolicy | None, states_LBTD: jax.Array) -> jax.Array:
    """Return the outputs of all layers as the exits hand them to the readout; the last layer's is its own."""
    if not isinstance(exits, AdaptedExit):
        return states_LBTD
    adapted = [exits.adapt(depth, x_BTD) for depth, x_BTD in enumerate(states_LBTD[:-1], start=1)]
    return jnp.stack([*adapted, states_LBTD[-1]])


def _untie(model: Transformer) -> Transformer:
    """Return the model with a readout of its own in place of its embedding, which must stay as it is."""
    if not model.config.tie_embeddings:
        return model
    arrays = named_parameters(model)
    arrays["unembedding"] = arrays["embedding"].T
    return with_parameters(abstract_model(dataclasses.replace(model.config, tie_embeddings=False)), arrays)
