"""One optimizer step of the LayerSkip recipe, and held-out evaluation, as pure functions.

Layers are stacked and scanned: one layer is compiled, whatever the depth. Master weights and optimizer state are
float32; activations, and the weights they meet, take the recipe's compute dtype. Everything random is a function of
the seed and the step, so a run that resumes makes the same numbers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dyninf.models import ModelConfig, Transformer, stack_layers
from dyninf.pytree import pytree
from dyninf.training.layerskip import (
    active_exit_weights,
    active_exits,
    dropout_schedule,
    exit_loss,
    exit_weights,
    layer_dropout_mask,
    layer_dropout_rates,
)
from dyninf.training.recipe import Recipe
from pallas_kernels import prefill_attention


@pytree()
class TrainState:
    """Master weights (layers stacked), optimizer state and the number of steps taken."""

    model: Transformer
    optimizer: Any
    step: jax.Array


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Return AdamW with clipping, linear warm-up and a cosine down to a tenth of the peak."""
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
    )


def init_state(config: ModelConfig, recipe: Recipe, model: Transformer | None = None) -> TrainState:
    """Return the state before the first step, with random weights or those of ``model`` (a list of layers)."""
    model = Transformer(config, jax.random.key(recipe.seed)) if model is None else model
    model = stack_layers(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model))
    return TrainState(model=model, optimizer=optimizer(recipe).init(model), step=jnp.int32(0))


@functools.partial(jax.jit, static_argnames=("recipe",), donate_argnames=("state",))
def train_step(
    state: TrainState, tokens_BT1: jax.Array, recipe: Recipe, mask_BT: jax.Array | None = None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one step on ``tokens [B, T+1]``.

    Args:
        mask_BT: which of the tokens 1 to T are to be predicted; ``None`` for all.

    Returns:
        The new state, and the metrics ``loss`` (weighted over exits), ``final_loss`` (cross-entropy of the full model,
        nats per token) and ``grad_norm``.
    """
    (loss, entropy_K), grads = jax.value_and_grad(_loss, has_aux=True)(
        state.model, tokens_BT1, mask_BT, state.step, recipe
    )
    updates, optimizer_state = optimizer(recipe).update(grads, state.optimizer, state.model)
    model = optax.apply_updates(state.model, updates)
    metrics = {"loss": loss, "final_loss": entropy_K[-1], "grad_norm": optax.tree.norm(grads)}
    return TrainState(model=model, optimizer=optimizer_state, step=state.step + 1), metrics


@functools.partial(jax.jit, static_argnames=("recipe",))
def eval_step(model: Transformer, tokens_BT1: jax.Array, recipe: Recipe, mask_BT: jax.Array | None = None) -> jax.Array:
    """Return the mean cross-entropy (nats per token) of every exit on ``tokens [B, T+1]``, float32 ``[L]``."""
    num_layers = model.config.num_layers
    keep_LB = jnp.ones((num_layers, tokens_BT1.shape[0]), bool)
    hiddens = hidden_states(_cast_layers(model, recipe), tokens_BT1[:, :-1], keep_LB)
    mask_BT = jnp.ones(tokens_BT1[:, 1:].shape, bool) if mask_BT is None else mask_BT
    readout = functools.partial(_readout, model, recipe)
    return exit_loss(readout, hiddens, tokens_BT1[:, 1:], jnp.ones(num_layers), mask_BT, recipe.chunk)[1]


def hidden_states(model: Transformer, tokens_BT: jax.Array, keep_LB: jax.Array) -> jax.Array:
    """Return the output of every layer ``[L, B, T, D]``, passing a sequence by layers that it drops.

    Args:
        model: with stacked layers; their dtype is that of the activations, whatever the embedding's is.
        keep_LB: which layers run for which sequences.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

    def attend(q, k, v, *, window=None):
        return prefill_attention(q, k, v, None, window=window), None

    def body(x_BTD, inputs):
        layer, keep_B = inputs
        y_BTD, _ = layer(x_BTD, positions_BT, attend)
        x_BTD = jnp.where(keep_B[:, None, None], y_BTD, x_BTD)
        return x_BTD, x_BTD

    x_BTD = model.embed(tokens_BT).astype(model.layers.wqkv[...].dtype)
    return jax.lax.scan(body, x_BTD, (model.layers, keep_LB))[1]


def _loss(model, tokens_BT1, mask_BT, step, recipe):
    num_layers, batch = model.config.num_layers, tokens_BT1.shape[0]
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


def _cast(model: Transformer, recipe: Recipe) -> Transformer:
    return jax.tree.map(lambda leaf: leaf.astype(recipe.compute_dtype), model)


def _cast_layers(model: Transformer, recipe: Recipe) -> Transformer:
    """Leave the embedding alone: the gradient of a row is a sum over every place its token stands at.

    In bfloat16 such a sum stops growing at 256 equal terms.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: leaf.astype(recipe.compute_dtype) if "layers" in jax.tree_util.keystr(path) else leaf, model
    )


def _readout(model: Transformer, recipe: Recipe, hidden_BTD: jax.Array) -> jax.Array:
    """Cast inside, so that the gradient of the shared head is added up in float32."""
    return _cast(model, recipe).unembed(hidden_BTD)


def _decays(path: tuple) -> bool:
    """Weight decay is for matrices: not for norms and biases, whose names say what they are."""
    name = jax.tree_util.keystr(path)
    return not any(part in name for part in ("norm_", "bqkv"))
