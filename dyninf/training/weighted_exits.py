"""Weighted cross-entropies over exits: the weights of CALM, FREE and EE-LLM, and FREE's distillation between layers.

Each recipe is a vector of weights for :func:`dyninf.training.states.depth_loss`; FREE adds
:func:`layer_distillation`. Whatever changes during a run is a function of a traced step.

Source: Schuster et al., "Confident Adaptive Language Modeling", 2022; Bae et al., "Fast and Robust Early-Exiting
Framework for Autoregressive Language Models with Synchronized Parallel Decoding" (FREE), 2023; Chen et al., "EE-LLM",
2023. Each function states its differences.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.training.states import masked_mean

Growth = Literal["linear", "geometric", "uniform"]
WarmUp = Literal["linear", "cosine"]
Mapping = Literal["dynamic", "uniform", "last"]


def calm_weights(num_exits: int, growth: Growth = "linear") -> jax.Array:
    """Return the weight of each exit, summing to 1: proportional to 1, 2, 3, ... from the first exit to the last.

    "geometric" doubles from exit to exit, "uniform" is SoFT's.

    Raises:
        ValueError: if there is no exit or the growth is unknown.

    Source: CALM, with every layer an exit; the other two are options of its released code. With a subset
    of the layers, exits are counted, not layers.
    """
    if num_exits < 1:
        raise ValueError(f"expected at least 1 exit, got {num_exits=}; the last layer is one")
    rank_K = np.arange(1, num_exits + 1, dtype=np.float64)
    shapes = {"linear": rank_K, "geometric": np.exp2(rank_K - num_exits), "uniform": np.ones(num_exits)}
    if growth not in shapes:
        raise ValueError(f"expected growth to be one of {tuple(shapes)}, got {growth!r}; pick one of them")
    return jnp.asarray(shapes[growth] / shapes[growth].sum(), jnp.float32)


def free_weights(depths: Sequence[int]) -> jax.Array:
    """Return the weight of each depth, its share of their sum: ``S / (S + L)`` and ``L / (S + L)`` for two exits.

    Source: FREE, whose model has one early exit at depth S and the last layer; with all depths
    ``1, ..., L`` it is :func:`calm_weights`.
    """
    return jnp.asarray(np.asarray(depths) / np.sum(depths), jnp.float32)


def warm_up_weights(weights_K: jax.Array, step: int | jax.Array, steps: int, *, shape: WarmUp = "linear") -> jax.Array:
    """Return the weights at a step: those of early exits rise from 0, that of the last is 1 throughout.

    The factor is ``r = min(step / steps, 1)``, or ``(1 - cos(pi r)) / 2`` for "cosine". The sum is not normalised, as
    in EE-LLM, where 1 is the usual weight of an exit: the early exits come on top of the model's own loss.

    Args:
        weights_K: of each exit after the warm-up; the last is not read.
        step: optimizer steps already taken; may be traced.
        steps: length of the warm-up; 0 for none.

    Raises:
        ValueError: if the number of steps is negative or the shape unknown.

    Source: EE-LLM, whose exits may have weights that change while training. It also has a cool-down to
    smaller weights, which is left out.
    """
    if steps < 0 or shape not in ("linear", "cosine"):
        raise ValueError(f"expected steps >= 0 and shape 'linear' or 'cosine', got {steps=} and {shape=}")
    ratio = jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0) if steps else jnp.float32(1)
    factor = ratio if shape == "linear" else (1 - jnp.cos(jnp.pi * ratio)) / 2
    weights_K = jnp.asarray(weights_K, jnp.float32) * factor
    return weights_K.at[-1].set(1.0)


def layer_distillation(
    states_LBTD: jax.Array, shallow: int, mapping: Mapping = "dynamic", *, mask_BT: jax.Array | None = None
) -> jax.Array:
    """Return the mean squared distance between the layers of a shallow model and those of the whole one they imitate.

    The shallow model is the first S layers, the teachers S layers spread over all L: number i, from 1 to S, is layer
    ``ceil(i L / S)``. Teachers get no gradient. "uniform" pairs student i with teacher i. "dynamic" goes from the last
    teacher down and takes the closest student below the one before it (the first again once that is taken). "last"
    compares the last layers of the two alone.
    FREE adds it to its weighted cross-entropy with a factor of its own.

    Args:
        states_LBTD: output of every layer, as ``exit_states(model, tokens, range(1, L + 1))`` gives it.
        shallow: depth S of the early exit.
        mask_BT: bool, True where a token counts; ``None`` for everywhere.

    Returns:
        A float32 scalar, the mean over pairs, tokens and columns.

    Raises:
        ValueError: if the depth is not between 1 and L, or the mapping unknown.

    Source: FREE (KD-dyn, KD-unif, KD-last). Differences from the released code: it lists the teachers in a
    table, equal to the formula where S divides L; it may put a learned linear map on the students, which is left out;
    it averages over padding, too. Where it runs out of students (an index of 0) it repeats the first, as here.
    """
    num_layers = states_LBTD.shape[0]
    if not 1 <= shallow <= num_layers or mapping not in ("dynamic", "uniform", "last"):
        raise ValueError(
            f"expected a depth between 1 and {num_layers} and mapping 'dynamic', 'uniform' or 'last', got "
            f"{shallow=} and {mapping=}"
        )
    mask_BT = jnp.ones(states_LBTD.shape[1:3], bool) if mask_BT is None else mask_BT
    mask_BT1 = mask_BT[:, :, None]
    # Padding may hold anything, and a difference that is not a number would spoil the gradient of a masked mean.
    states_LBTD = jnp.where(mask_BT1[None], states_LBTD.astype(jnp.float32), 0.0)
    teachers_LBTD = jax.lax.stop_gradient(states_LBTD)
    mask_BTD = jnp.broadcast_to(mask_BT1, states_LBTD.shape[1:])

    def distance(student_BTD: jax.Array, teacher_BTD: jax.Array) -> jax.Array:
        return masked_mean(jnp.square(student_BTD - teacher_BTD), mask_BTD)

    if mapping == "last":
        return distance(states_LBTD[shallow - 1], teachers_LBTD[-1])
    taught = [-(-number * num_layers // shallow) - 1 for number in range(1, shallow + 1)]
    if mapping == "uniform":
        pairs = [distance(states_LBTD[i], teachers_LBTD[layer]) for i, layer in enumerate(taught)]
        return sum(pairs) / shallow
    total, below = jnp.float32(0), jnp.int32(shallow)
    for layer in reversed(taught):
        distances_S = jax.vmap(distance, in_axes=(0, None))(states_LBTD[:shallow], teachers_LBTD[layer])
        allowed_S = jnp.arange(shallow) < jnp.maximum(below, 1)
        below = jnp.argmin(jnp.where(allowed_S, jax.lax.stop_gradient(distances_S), jnp.inf)).astype(jnp.int32)
        total = total + distances_S[below]
    return total / shallow
