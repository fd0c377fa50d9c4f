"""What the recipes for exits share: the states at chosen depths, the loss over them, and what they predict.

Convention: a *depth* counts the layers that have run, 1 to L. The state at depth n is the output of layer n - 1, which
is what a policy sees before layer n and what :class:`dyninf.depth.ExitAt` reads out.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.model import CausalLM, readout_of
from dyninf.training.batch_axes import split_batch, split_embedded
from dyninf.training.layerskip import exit_loss
from pallas_kernels import prefill_attention

CHUNK = 8192  # tokens whose logits exist at once; 1 GB in float32 at a vocabulary of 32 000


def exit_states(model: CausalLM, tokens_BT: jax.Array, depths: Sequence[int], *, dtype: Any = None) -> jax.Array:
    """Return the states of the dense model at some depths ``[K, B, T, D]``.

    A list of layers is run up to the largest depth only; stacked layers (:func:`dyninf.models.stack_layers`) all run in
    one scan. Differentiable. Texts may be right-padded: attention is causal, so that no token sees what follows it.

    Args:
        depths: how many layers have run (1 to L), ascending.
        dtype: of activations and of the layers' weights they meet; ``None`` for the model's own.

    Raises:
        ValueError: if the depths are not ascending numbers of layers of this model.
    """
    num_layers = count_layers(model)
    check_depths(depths, num_layers)
    # Not the embedding: the gradient of its rows is a sum, which bfloat16 would round at every term.
    model = model if dtype is None else cast(model, dtype, part="layers")
    if not hasattr(model.layers, "__len__"):
        keep_LB = jnp.ones((num_layers, tokens_BT.shape[0]), bool)
        return hidden_states(model, tokens_BT, keep_LB)[np.asarray(depths) - 1]
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    x_BTD, found = model.embed(tokens_BT), []
    x_BTD = x_BTD if dtype is None else x_BTD.astype(dtype)
    for index in range(depths[-1]):
        x_BTD, _ = model.layers[index](x_BTD, positions_BT, _attend)
        if index + 1 in depths:
            found.append(x_BTD)
    return jnp.stack(found)


def hidden_states(model: CausalLM, tokens_BT: jax.Array, keep_LB: jax.Array) -> jax.Array:
    """Return the output of every layer ``[L, B, T, D]``, passing a sequence by layers that it drops.

    Args:
        model: with stacked layers; their dtype is that of the activations, whatever the embedding's is.
        keep_LB: which layers run for which sequences.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

    def body(x_BTD, inputs):
        layer, keep_B = inputs
        y_BTD, _ = layer(x_BTD, positions_BT, _attend)
        x_BTD = split_batch(jnp.where(keep_B[:, None, None], y_BTD, x_BTD))
        return x_BTD, x_BTD

    x_BTD = split_embedded(model.embed(tokens_BT)).astype(model.layers.wqkv[...].dtype)
    return jax.lax.scan(body, x_BTD, (model.layers, keep_LB))[1]


def depth_loss(
    model: CausalLM,
    tokens_BT1: jax.Array,
    depths: Sequence[int],
    weights_K: jax.Array,
    *,
    mask_BT: jax.Array | None = None,
    chunk: int = CHUNK,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the weighted sum of the cross-entropies that the model's one readout has at some depths, and these.

    Args:
        tokens_BT1: texts ``[B, T+1]``; token t + 1 is the target of token t.
        weights_K: weight of each depth.
        mask_BT: bool, True where the prediction counts (the tokens of a response, say); ``None`` for everywhere.
        chunk: tokens whose logits are held at once.
        dtype: to compute in; gradients are added up in the dtype of the model's arrays, so keep those in float32.

    Returns:
        The loss, a float32 scalar, and the mean cross-entropy of each depth (nats per token, float32 ``[K]``).

    Raises:
        ValueError: if the depths are not ascending numbers of layers of this model, or shapes do not fit together.
    """
    states_KBTD = exit_states(model, tokens_BT1[:, :-1], depths, dtype=dtype)
    targets_BT = tokens_BT1[:, 1:]
    mask_BT = jnp.ones(targets_BT.shape, bool) if mask_BT is None else mask_BT

    def readout(x_BTD: jax.Array) -> jax.Array:
        return (model if dtype is None else cast(model, dtype)).unembed(x_BTD)

    return exit_loss(readout, states_KBTD, targets_BT, jnp.asarray(weights_K), mask_BT, chunk)


def exit_predictions(model: CausalLM, states_KBTD: jax.Array, *, chunk: int = CHUNK) -> jax.Array:
    """Return the most probable next token of every state, int32 ``[K, B, T]``; -1 where the logits hold a NaN.

    Args:
        chunk: states whose logits are held at once.
    """
    read = readout_of(model)
    return in_chunks(lambda x_BTD: read(x_BTD).token, states_KBTD, chunk)


def in_chunks(read: Callable[[jax.Array], jax.Array], states_KBTD: jax.Array, chunk: int) -> jax.Array:
    """Return ``read`` of all states, ``[K, B, T]``, handed ``[1, chunk, D]`` at a time; a chunk may span exits."""
    *shape, d_model = states_KBTD.shape
    count = int(np.prod(shape))
    chunk = min(chunk, count)
    num_chunks = -(-count // chunk)
    flat_ND = jnp.pad(states_KBTD.reshape(count, d_model), ((0, num_chunks * chunk - count), (0, 0)))
    values_IC = jax.lax.map(lambda x_CD: read(x_CD[None])[0], flat_ND.reshape(num_chunks, chunk, d_model))
    return values_IC.reshape(-1)[:count].reshape(shape)


def masked_mean(values: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Return the mean of the values where the mask, of the same shape, is True; 0 where it is nowhere."""
    total = jnp.sum(jnp.where(mask, values, 0.0), axis=axis)
    return total / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def count_layers(model: CausalLM) -> int:
    """Return the number of layers, whether they are a list or stacked."""
    return len(model.layers) if hasattr(model.layers, "__len__") else model.config.num_layers


def check_depths(depths: Sequence[int], num_layers: int) -> None:
    """Raise ValueError unless the depths are ascending numbers of layers, at least one, from 1 to ``num_layers``."""
    ascending = all(a < b for a, b in itertools.pairwise(depths))
    if not len(depths) or not ascending or not all(isinstance(d, int) and 1 <= d <= num_layers for d in depths):
        raise ValueError(f"expected ascending depths between 1 and {num_layers}, got {depths!r}; count layers from 1")


def cast(tree: Any, dtype: Any, *, part: str = "") -> Any:
    """Return a tree with its floating-point arrays, those whose path names the part, in another dtype."""

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        wanted = part in jax.tree_util.keystr(path) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if wanted else leaf

    return jax.tree_util.tree_map_with_path(one, tree)


def _attend(q_BTNH, k_BTKH, v_BTKH, *, window=None):
    return prefill_attention(q_BTNH, k_BTKH, v_BTKH, None, window=window), None
