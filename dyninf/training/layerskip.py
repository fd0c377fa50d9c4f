"""The LayerSkip training recipe: layer dropout rates, exit weights and the loss over early exits.

A model trained with plain next-token loss reads nonsense at its middle layers. LayerSkip makes them readable by
dropping layers at random (the deeper, the more often) and by adding to the loss the cross-entropy of the one shared
readout at several depths. Whatever changes during a run is a function of a traced `step`: one compilation serves it.

Convention: layers count from 0; the hidden state of exit `l` is the *output* of layer `l`, so exit L-1 is the model.

Source: Elhoushi et al., "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding", 2024, section 4.1.
Each function states how it differs from the paper and from torchtune 0.6.1, which also implements the recipe.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dyninf.training.batch_axes import in_chunks, split_batch

Readout = Callable[[Array], Array]
DropoutShape = Literal["exp", "linear", "uniform"]
DropoutSchedule = Literal["constant", "exp"]
ExitCurriculum = Literal["rotational", "gradual", "none"]
ExitScale = Literal["paper", "uniform", "linear", "sum", "sqrt", "inv", "inv_sqrt"]


def layer_dropout_rates(num_layers: int, p_max: float | Array, *, curriculum: DropoutShape = "exp") -> Array:
    """Return the probability with which each layer is dropped at full dropout.

    `D(l) * p_max` with `D(l) = 2^(l/(L-1)) - 1` for "exp", `l/(L-1)` for "linear" and 1 for "uniform", or for the only
    layer of a model. Multiply by `dropout_schedule`. Exact (no dropout) at `p_max=0`.

    Args:
        p_max: probability of dropping the last layer, in [0, 1]; the paper uses 0.1 to 0.2. May be traced (unchecked).

    Returns:
        float32 [L].

    Raises:
        ValueError: for fewer than one layer, an unknown curriculum, or a concrete `p_max` outside [0, 1].

    Source: LayerSkip, section 4.1.1. The numbers of torchtune's `prepare_layer_dropout` with scales of these names.
    """
    _check_positive("num_layers", num_layers)
    _check_choice("curriculum", curriculum, DropoutShape)
    if isinstance(p_max, int | float) and not 0 <= p_max <= 1:
        raise ValueError(f"expected p_max to be a probability in [0, 1], got {p_max=}; use a value such as 0.2")
    depth_L = np.arange(num_layers) / (num_layers - 1) if num_layers > 1 else np.ones(1)
    shape_L = {"exp": np.exp2(depth_L) - 1, "linear": depth_L, "uniform": np.ones(num_layers)}[curriculum]
    return jnp.asarray(shape_L, jnp.float32) * p_max


def dropout_schedule(step: int | Array, total_steps: int, *, curriculum: DropoutSchedule = "constant") -> Array:
    """Return the factor S(t) in [0, 1] that multiplies every dropout rate at a step.

    "constant" is 1, for continued training and fine-tuning; "exp" is `2^(t/T) - 1`, for training from scratch, which
    starts without dropout. Steps beyond `total_steps` count as `total_steps`, so that no rate exceeds `p_max`.

    Args:
        step: number of optimizer steps already taken; may be traced.

    Returns:
        float32 scalar.

    Raises:
        ValueError: for a wrong step, count or name.

    Source: LayerSkip, section 4.1.1, with t/T: 1 is reached right after the last step. torchtune has no such schedule.
    """
    step = _check_step(step)
    _check_positive("total_steps", total_steps)
    _check_choice("curriculum", curriculum, DropoutSchedule)
    fraction = jnp.clip(step.astype(jnp.float32) / total_steps, 0.0, 1.0)
    return jnp.expm1(jnp.log(2.0) * fraction) if curriculum == "exp" else jnp.ones((), jnp.float32)


def layer_dropout_mask(key: Array, rates_L: Array, batch: int) -> Array:
    """Draw which layers run for which sequences of the batch.

    One independent draw per layer and sequence. A layer that does not run leaves its input unchanged (only the residual
    passes), and nothing is rescaled, neither in training nor afterwards. A rate of 0 always runs, a rate of 1 never.

    Returns:
        bool [L, B], True where the layer runs.

    Raises:
        ValueError: if the rates are not one-dimensional or the batch is smaller than one.

    Source: LayerSkip, section 4.1.1. torchtune draws the same way but from one CPU generator per layer, seeded by the
    layer's number, and computes the kept rows only; a mask keeps shapes static.
    """
    if jnp.ndim(rates_L) != 1:
        raise ValueError(f"expected rates of shape [L], got {jnp.shape(rates_L)}; pass one rate per layer")
    _check_positive("batch", batch)
    keep_L1 = 1.0 - jnp.asarray(rates_L, jnp.float32)[:, None]
    return jax.random.bernoulli(key, keep_L1, (keep_L1.shape[0], batch))


def exit_weights(
    num_layers: int,
    step: int | Array,
    total_steps: int,
    *,
    e_scale: float | Array,
    curriculum: ExitCurriculum,
    period: int | None = None,
    scale: ExitScale = "paper",
    layers: tuple[int, ...] | None = None,
    normalise: bool = True,
) -> Array:
    """Return the weight of every exit in the loss at a step: `C(t,l) e(l) / sum_i C(t,i) e(i)`.

    Which exits are on, C(t,l): "none" all of them; "rotational" those with `(l - t) mod period == 0`, each once in
    `period` steps; "gradual" exit `l` from step `T (L-l) / (2L)` on (exact in integers), from the last to the first in
    the first half of the run. The last exit is always on.
    How much, e(l): "paper" is `e_scale * sum_{i<=l} i` for l < L-1 and `L-1 + e_scale * sum_{i<=L-2} i` for the last,
    so exit 0 weighs nothing; the others are 1, l+1, the running sum of l+1 over the exits that are on, sqrt(l+1),
    1/(l+1), 1/sqrt(l+1), times `e_scale` for every exit but the last. `e_scale=0` is the plain loss.

    Args:
        step: number of optimizer steps already taken; may be traced.
        e_scale: strength of the early exits, >= 0; the paper uses 0.1 to 1. May be traced (unchecked).
        period: distance in layers between two exits that are on, for "rotational" only; the paper calls it R.
        layers: exits that may be on at all, None for every one; the last is on in any case.
        normalise: divide by the sum of the weights; False returns C(t,l) e(l).

    Returns:
        float32 [L], zero where an exit is off, summing to 1 if normalised.

    Raises:
        ValueError: for a wrong step, count, name, period or layer, or a negative `e_scale`.

    Source: LayerSkip, section 4.1.2; the other scales are those of torchtune's `*_loss_scale`, including "sum" running
    over the active exits only. Differences from torchtune: its rotation rolls the pattern around the end of the stack,
    so unless the period divides L, exits closer than the period come on and some come on twice in a period; its gradual
    curriculum lags one step; neither resumes where a run stopped, which a function of the step always does.
    """
    step = _check_step(step)
    _check_positive("num_layers", num_layers)
    _check_positive("total_steps", total_steps)
    _check_choice("scale", scale, ExitScale)
    if isinstance(e_scale, int | float) and not e_scale >= 0:
        raise ValueError(f"expected e_scale >= 0, got {e_scale=}; use 0 to switch the early exits off")
    layers = range(num_layers) if layers is None else layers
    if any(not 0 <= layer < num_layers for layer in layers):
        raise ValueError(f"expected layers in [0, {num_layers}), got {layers=}; count layers from 0")
    on_L = _curriculum(num_layers, step, total_steps, curriculum, period)
    on_L = (on_L & np.isin(np.arange(num_layers), layers)).at[-1].set(True)
    weights_L = jnp.where(on_L, _scales(scale, on_L, e_scale), 0.0)
    return weights_L / jnp.sum(weights_L) if normalise else weights_L


def active_exits(num_layers: int, step: int | Array, period: int) -> Array:
    """Return the exits that the rotational curriculum has on at a step, as an array of static length.

    Reading only these `K = ceil(L / period) + 1` hidden states makes the loss cost K readouts instead of L. The last
    entry is the last layer; where fewer others are on, entries before it repeat it (always, if `period` divides L-1).

    Args:
        step: number of optimizer steps already taken; may be traced.

    Returns:
        int32 [K], ascending, every entry in [0, L).

    Raises:
        ValueError: for a wrong step or count.

    Source: LayerSkip, section 4.1.2 (rotational curriculum); the static form is this library's.
    """
    step = _check_step(step)
    _check_positive("num_layers", num_layers)
    _check_positive("period", period)
    grid = np.arange(-(-num_layers // period), dtype=np.int32) * period
    exits = jnp.minimum(step % period + grid, num_layers - 1)
    return jnp.append(exits, num_layers - 1).astype(jnp.int32)


def active_exit_weights(weights_L: Array, exits_K: Array) -> Array:
    """Return the weights of the active exits, zero for all but the last of equal entries.

    Args:
        weights_L: from `exit_weights`, with the curriculum and period that `exits_K` came from.
        exits_K: from `active_exits`; equal entries are neighbours.

    Returns:
        float32 [K] with the same sum as `weights_L`; the last entry belongs to the last layer.
    """
    counts_K = jnp.append(exits_K[1:] != exits_K[:-1], True)
    return jnp.where(counts_K, weights_L[exits_K], 0.0)


def exit_loss(
    readout: Readout, hiddens_KBTD: Array, targets_BT: Array, weights_K: Array, mask_BT: Array, chunk: int
) -> tuple[Array, Array]:
    """Return the weighted sum of the exits' mean cross-entropies, and these.

    `sum_k w_k * mean_mask(logsumexp(z_k) - z_k[target])` with `z_k = readout(hidden_k)`. One loop over exits and chunks
    holds the logits of `chunk` tokens of one exit, and its backward pass computes them again: 4 readouts' FLOPs an exit
    instead of 3, a few arrays of `chunk * V` floats instead of `K * B * T * V`. Value and gradient are those of the
    plain computation up to the order of additions. Where a mesh splits the batch, a chunk has its share of every part.

    Args:
        readout: norm and head, [1, chunk, D] -> [1, chunk, V], acting on each token alone and finite, with finite
            derivatives, at a hidden state of zeros. The gradient of an array that it closes over is added up over the
            chunks in that array's own dtype: close over float32 parameters and cast inside.
        hiddens_KBTD: output of each selected layer.
        targets_BT: ids of the next tokens, in [0, V) where the mask is True and anything elsewhere.
        weights_K: weight of each exit, summing to 1 for a weighted mean.
        mask_BT: bool, True where a token counts. Elsewhere hidden states may hold anything, NaN too.
        chunk: tokens per loop turn; if it does not divide B*T, padding copies the hidden states once.

    Returns:
        loss, a float32 scalar, and the mean cross-entropy of each exit, float32 [K]; zeros if no token counts.

    Raises:
        ValueError: if shapes or dtypes do not fit together or the chunk is smaller than one.

    Source: LayerSkip, section 4.1.2; torchtune's `early_exit_loss` with `mask = targets != ignore_index`, which holds
    all logits at once. Its recipe hands it the *input* of layer l as exit l, so the model's own output never enters.
    """
    num_exits = _check_loss_arrays(hiddens_KBTD, targets_BT, weights_K, mask_BT)
    _check_positive("chunk", chunk)
    mask_IC = in_chunks(mask_BT, chunk)
    num_chunks, chunk = mask_IC.shape
    targets_IC = in_chunks(jnp.where(mask_BT, targets_BT, 0).astype(jnp.int32), chunk)
    hiddens_KICD = jax.vmap(lambda hidden_BTD: in_chunks(hidden_BTD, chunk))(hiddens_KBTD)
    hiddens_MCD = hiddens_KICD.reshape(num_exits * num_chunks, chunk, -1)

    def summed_loss(hidden_CD: Array, target_C: Array, mask_C: Array) -> Array:
        logits_1CV = readout(split_batch(jnp.where(mask_C[:, None], hidden_CD, 0))[None])
        if logits_1CV.ndim != 3 or logits_1CV.shape[:2] != (1, chunk):
            raise ValueError(f"expected logits of shape [1, {chunk}, V], got {logits_1CV.shape}; keep the leading axes")
        logits_CV = logits_1CV[0].astype(jnp.float32)
        is_target_CV = lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) == target_C[:, None]
        picked_C = jnp.sum(jnp.where(is_target_CV, logits_CV, 0.0), axis=1)
        return jnp.sum(jnp.where(mask_C, jax.nn.logsumexp(logits_CV, axis=1) - picked_C, 0.0))

    def turn(inputs: tuple[Array, Array]) -> Array:
        hidden_CD, index = inputs
        return jax.checkpoint(summed_loss, prevent_cse=False)(hidden_CD, targets_IC[index], mask_IC[index])

    sums_M = lax.map(turn, (hiddens_MCD, jnp.tile(jnp.arange(num_chunks), num_exits)))
    entropy_K = sums_M.reshape(num_exits, num_chunks).sum(1) / jnp.maximum(jnp.sum(mask_BT), 1)
    return jnp.sum(weights_K * entropy_K), entropy_K


def _curriculum(num_layers: int, step: Array, total_steps: int, curriculum: str, period: int | None) -> Array:
    _check_choice("curriculum", curriculum, ExitCurriculum)
    if (curriculum == "rotational") != (period is not None):
        raise ValueError(f"expected a period with 'rotational' only, got {period=}, {curriculum=}; change one of them")
    if period is not None:
        _check_positive("period", period)
        return np.arange(num_layers, dtype=np.int32) % period == step % period
    starts_L = [-(-total_steps * (num_layers - layer) // (2 * num_layers)) for layer in range(num_layers)]
    return step >= np.array(starts_L, np.int32) if curriculum == "gradual" else jnp.ones(num_layers, bool)


def _scales(scale: str, on_L: Array, e_scale: float | Array) -> Array:
    num_layers = on_L.shape[0]
    rank_L = np.arange(1, num_layers + 1, dtype=np.float32)
    is_last_L = rank_L == num_layers
    if scale == "paper":
        sums_L = np.cumsum(rank_L - 1)
        last = num_layers - 1 + e_scale * sums_L[-2] if num_layers > 1 else 1.0  # the formula gives 0 for one layer
        return jnp.where(is_last_L, last, e_scale * sums_L)
    power = {"uniform": 0.0, "linear": 1.0, "sum": 1.0, "sqrt": 0.5, "inv": -1.0, "inv_sqrt": -0.5}[scale]
    scales_L = jnp.cumsum(jnp.where(on_L, rank_L, 0.0)) if scale == "sum" else rank_L**power
    return jnp.where(is_last_L, 1.0, e_scale) * scales_L


def _check_loss_arrays(hiddens_KBTD: Array, targets_BT: Array, weights_K: Array, mask_BT: Array) -> int:
    if hiddens_KBTD.ndim != 4 or 0 in hiddens_KBTD.shape:
        raise ValueError(f"expected hiddens [K, B, T, D], none of them 0, got {hiddens_KBTD.shape}; stack the exits")
    num_exits, *tokens, _ = hiddens_KBTD.shape
    expected, found = (tokens, tokens, [num_exits]), tuple(list(x.shape) for x in (targets_BT, mask_BT, weights_K))
    if found != expected:
        raise ValueError(f"expected targets, mask, weights of {expected}, got {found}; match them to the hiddens")
    if mask_BT.dtype != jnp.bool_ or not jnp.issubdtype(targets_BT.dtype, jnp.integer):
        raise ValueError(f"expected bool mask, int targets, got {mask_BT.dtype}, {targets_BT.dtype}; convert them")
    return num_exits


def _check_step(step: int | Array) -> Array:
    if jnp.ndim(step) or not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise ValueError(f"expected step to be an integer scalar, got {step!r}; count whole steps")
    return jnp.asarray(step, jnp.int32)


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"expected {name} to be an int >= 1, got {value!r}; pass a static positive count")


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"expected {name} to be one of {get_args(choices)}, got {value!r}; pick one of them")
