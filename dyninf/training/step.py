"""One optimizer step of a recipe, and held-out evaluation, as pure functions.

A recipe's kind chooses the loss and what it reaches: all of the model, or exits beside it
(:mod:`dyninf.training.heads`). Layers are stacked and scanned: one layer is compiled, whatever the depth. Master
weights and optimizer state are float32; activations, and the weights they meet, take the recipe's compute dtype.
Everything random is a function of the seed and the step, so a run that resumes makes the same numbers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dyninf.depth.base import DepthPolicy
from dyninf.models import ModelConfig, Transformer, stack_layers
from dyninf.pytree import pytree
from dyninf.training.heads import begin_heads, exit_layers, handed_over, heads_loss, trained_arrays, with_trained
from dyninf.training.layerskip import (
    active_exit_weights,
    active_exits,
    dropout_schedule,
    exit_loss,
    exit_weights,
    layer_dropout_mask,
    layer_dropout_rates,
)
from dyninf.training.recipe import HEADS, Recipe
from dyninf.training.retrieval_start import retrieval_start
from dyninf.training.soft import soft_depths, soft_loss
from dyninf.training.states import cast, hidden_states

# A gate of JointExit reads four numbers of about 1 and must learn weights of about 10; a readout's are about 0.1.
GATE_RATE = 50.0


@pytree()
class TrainState:
    """Master weights (layers stacked), exits trained beside them, optimizer state and the number of steps taken."""

    model: Transformer
    optimizer: Any
    step: jax.Array
    exits: DepthPolicy | None = None


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Return AdamW with clipping, linear warm-up and a cosine down to a tenth of the peak; gates of jei go faster."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, recipe.warmup, recipe.steps, recipe.learning_rate * 0.1
    )
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=recipe.beta2,
            weight_decay=recipe.weight_decay,
            mask=lambda model: jax.tree.map_with_path(lambda path, _: _decays(path), model),
        ),
        optax.stateless(_speed_up) if recipe.kind == "jei" else optax.identity(),
    )


def check_exits(num_layers: int, recipe: Recipe) -> None:
    """Raise ValueError if a model of this depth has no place for the exits that the recipe trains."""
    if recipe.kind in HEADS:
        exit_layers(num_layers, recipe)
    elif recipe.kind == "soft" and recipe.exit_period > num_layers:
        raise ValueError(
            f"expected recipe.exit_period up to the model's {num_layers} layers, got {recipe.exit_period}; "
            "there is no such depth"
        )


def init_state(config: ModelConfig, recipe: Recipe, model: Transformer | None = None) -> TrainState:
    """Return the state before the first step, with the recipe's first weights or those of ``model`` (listed layers).

    Raises:
        ValueError: if the recipe's exits or first weights do not fit the model.
    """
    if model is None:
        key = jax.random.key(recipe.seed)
        model = Transformer(config, key)
        if recipe.start == "retrieval":
            model = retrieval_start(model, jax.random.fold_in(key, 1))
    model, exits = begin_heads(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model), recipe)
    model = stack_layers(model)
    trained = model if exits is None else trained_arrays(model, exits, recipe)
    return TrainState(model=model, optimizer=optimizer(recipe).init(trained), step=jnp.int32(0), exits=exits)


@functools.partial(jax.jit, static_argnames=("recipe",), donate_argnames=("state",))
def train_step(
    state: TrainState, tokens_BT1: jax.Array, recipe: Recipe, mask_BT: jax.Array | None = None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one step on ``tokens [B, T+1]``.

    Args:
        mask_BT: which of the tokens 1 to T are to be predicted; ``None`` for all.

    Returns:
        The new state, and the metrics ``loss`` (of the recipe), ``final_loss`` (cross-entropy of the deepest exit that
        it trains, that of the full model but for ``frozen``; nats per token) and ``grad_norm``.
    """
    heads = state.exits is not None
    trained = trained_arrays(state.model, state.exits, recipe) if heads else state.model

    def loss_of(trained):
        if heads:
            return heads_loss(trained, state.model, state.exits, tokens_BT1, recipe, state.step, mask_BT)
        return _loss(trained, tokens_BT1, mask_BT, state.step, recipe)

    (loss, entropy_K), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
    updates, optimizer_state = optimizer(recipe).update(grads, state.optimizer, trained)
    trained = optax.apply_updates(trained, updates)
    model, exits = with_trained(state.model, state.exits, trained) if heads else (trained, None)
    metrics = {"loss": loss, "final_loss": entropy_K[-1], "grad_norm": optax.tree.norm(grads)}
    return TrainState(model=model, optimizer=optimizer_state, step=state.step + 1, exits=exits), metrics


@functools.partial(jax.jit, static_argnames=("recipe",))
def eval_step(
    model: Transformer,
    tokens_BT1: jax.Array,
    recipe: Recipe,
    mask_BT: jax.Array | None = None,
    exits: DepthPolicy | None = None,
) -> jax.Array:
    """Return the mean cross-entropy (nats per token) of every exit on ``tokens [B, T+1]``, float32 ``[L]``."""
    num_layers = model.config.num_layers
    keep_LB = jnp.ones((num_layers, tokens_BT1.shape[0]), bool)
    hiddens = hidden_states(_cast_layers(model, recipe), tokens_BT1[:, :-1], keep_LB)
    mask_BT = jnp.ones(tokens_BT1[:, 1:].shape, bool) if mask_BT is None else mask_BT
    readout = functools.partial(_readout, model, recipe)
    hiddens = handed_over(exits, hiddens)
    return exit_loss(readout, hiddens, tokens_BT1[:, 1:], jnp.ones(num_layers), mask_BT, recipe.chunk)[1]


def _loss(model, tokens_BT1, mask_BT, step, recipe):
    num_layers, batch = model.config.num_layers, tokens_BT1.shape[0]
    if recipe.kind != "layerskip":
        period = recipe.exit_period if recipe.kind == "soft" else num_layers
        depths = soft_depths(num_layers, first=period, step=period)
        return soft_loss(model, tokens_BT1, depths, mask_BT=mask_BT, chunk=recipe.chunk, dtype=recipe.compute_dtype)
    key = jax.random.fold_in(jax.random.key(recipe.seed), step)
    rates_L = layer_dropout_rates(num_layers, recipe.dropout)
    rates_L = rates_L * dropout_schedule(step, recipe.steps, curriculum=recipe.dropout_schedule)
    hiddens = hidden_states(_cast_layers(model, recipe), tokens_BT1[:, :-1], layer_dropout_mask(key, rates_L, batch))
    rotational = recipe.exit_curriculum == "rotational"
    weights = exit_weights(
        num_layers,
        step,
        recipe.steps,
        e_scale=recipe.e_scale,
        scale=recipe.exit_scale,
        curriculum=recipe.exit_curriculum,
        period=recipe.exit_period if rotational else None,
    )
    if rotational:
        exits_K = active_exits(num_layers, step, recipe.exit_period)
        hiddens, weights = hiddens[exits_K], active_exit_weights(weights, exits_K)
    mask_BT = jnp.ones(tokens_BT1[:, 1:].shape, bool) if mask_BT is None else mask_BT
    readout = functools.partial(_readout, model, recipe)
    return exit_loss(readout, hiddens, tokens_BT1[:, 1:], weights, mask_BT, recipe.chunk)


def _cast_layers(model: Transformer, recipe: Recipe) -> Transformer:
    """Leave the embedding alone: the gradient of a row is a sum over every place its token stands at.

    In bfloat16 such a sum stops growing at 256 equal terms.
    """
    return cast(model, recipe.compute_dtype, part="layers")


def _readout(model: Transformer, recipe: Recipe, hidden_BTD: jax.Array) -> jax.Array:
    """Cast inside, so that the gradient of the shared head is added up in float32."""
    return cast(model, recipe.compute_dtype).unembed(hidden_BTD)


def _speed_up(updates: dict[str, jax.Array], _: Any) -> dict[str, jax.Array]:
    """Let the gates of an exit learn faster than the readout."""
    return {name: leaf * (GATE_RATE if name.startswith("exits.") else 1.0) for name, leaf in updates.items()}


def _decays(path: tuple) -> bool:
    """Weight decay is for matrices: not for norms, biases and scales, whose names say what they are."""
    name = jax.tree_util.keystr(path)
    return not any(
        part in name for part in ("norm_", "bqkv", "exits.gate", "exits.bias", "exits.scale", "exits.weight")
    )
