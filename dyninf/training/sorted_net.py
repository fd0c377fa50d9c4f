"""SortedNet: sub-networks of several depths and widths trained as parts of one model, to be cut out later.

A sub-network is the first n layers, and of each the first key/value heads with their query groups and the first
columns of the MLP; the width of the residual stream stays. Since norms act on the residual stream alone, switching the
other heads and columns off (:func:`masked_state`, any sub-network in one program) and slicing them away
(:func:`extract`, a smaller model) compute the same numbers up to the order of additions. Sub-networks are nested: a
smaller one's weights are part of every larger one's.

Source: Valipour et al., "SortedNet: A Scalable and Generalized Framework for Training Modular Deep Neural Networks",
2023, which draws one sub-network a step. No code was released. Differences: the residual stream is never narrowed,
because RMS norm over fewer columns is another function and a masked run would no longer be the sliced one; accumulate
gradients over several draws with ``optax.MultiSteps``.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dyninf.models import ModelConfig, Transformer
from dyninf.models.parameters import abstract_model, named_parameters, with_parameters
from dyninf.training.layerskip import exit_loss
from dyninf.training.states import CHUNK, check_depths, exit_states


def sub_config(config: ModelConfig, depth: int, width: float) -> ModelConfig:
    """Return the config of a sub-network.

    Args:
        depth: number of layers (1 to L).
        width: share of the key/value heads and of ``d_ff`` that is kept, each rounded up (0, excluded, to 1).

    Raises:
        ValueError: if depth or width is out of range.
    """
    check_depths((depth,), config.num_layers)
    if not 0 < width <= 1:
        raise ValueError(f"expected a width above 0 and at most 1, got {width=}; it is a share of the full width")
    kv_heads, d_ff = (_share(size, width) for size in (config.num_kv_heads, config.d_ff))
    return dataclasses.replace(
        config,
        num_layers=depth,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * config.group_size,
        d_ff=d_ff,
        windows=None if config.windows is None else config.windows[:depth],
    )


def extract(model: Transformer, depth: int, width: float = 1.0) -> Transformer:
    """Return a sub-network as a model of its own, whose arrays are slices of the given one's.

    Works under jit and is differentiable: gradients of a loss of the sub-network are those of the full model's arrays,
    zero outside. Embedding, final norm and vocabulary matrix are shared. The full size returns equal arrays.

    Raises:
        ValueError: if depth or width is out of range, or the layers are stacked.
    """
    config = sub_config(model.config, depth, width)
    if not hasattr(model.layers, "__len__"):
        raise ValueError(f"expected a list of layers, got {type(model.layers).__name__}; unstack the layers")
    slices = {
        "wqkv": (slice(None), slice(config.num_kv_heads)),
        "bqkv": (slice(config.num_kv_heads),),
        "wo": (slice(config.num_heads),),
        "w_gate_up": (..., slice(config.d_ff)),
        "w_down": (slice(config.d_ff),),
    }
    kept = {}
    for name, array in named_parameters(model).items():
        part, *inner = name.split(".")
        if part != "layers" or int(inner[0]) < depth:
            kept[name] = array[slices.get(name.rpartition(".")[2], ...)]
    return with_parameters(abstract_model(config), kept)


def sub_networks(config: ModelConfig, depths: Sequence[int], widths: Sequence[float]) -> jax.Array:
    """Return the sizes of every depth with every width, int32 ``[S, 3]``: layers, key/value heads, columns of the MLP.

    Raises:
        ValueError: if a depth or width is out of range.
    """
    configs = [sub_config(config, depth, width) for depth in depths for width in widths]
    return jnp.array([(each.num_layers, each.num_kv_heads, each.d_ff) for each in configs], jnp.int32)


def draw(key: jax.Array, sizes_S3: jax.Array) -> jax.Array:
    """Draw one of the sub-networks, all equally likely; int32 ``[3]``."""
    return sizes_S3[jax.random.randint(key, (), 0, sizes_S3.shape[0])]


def masked_state(model: Transformer, tokens_BT: jax.Array, size_3: jax.Array) -> jax.Array:
    """Return the last state ``[B, T, D]`` of a sub-network, computed by the full model with the rest switched off.

    Zeroes the rows of ``wo`` and ``w_down`` that read heads and columns outside. Costs the full model, but the size may
    be traced: one compilation serves every sub-network. For list and stacked layers alike.

    Args:
        size_3: layers, key/value heads and columns of the MLP, as :func:`sub_networks` gives them; not checked.
    """
    config = model.config
    depth, kv_heads, d_ff = size_3
    in_heads_N11 = (jnp.arange(config.num_heads) < kv_heads * config.group_size)[:, None, None]
    in_columns_F1 = (jnp.arange(config.d_ff) < d_ff)[:, None]
    on = {"wo": in_heads_N11, "w_down": in_columns_F1}

    def narrow(path, leaf):
        name = next((name for name in on if name in jax.tree_util.keystr(path)), None)
        if name is None:
            return leaf
        mask = on[name].reshape((1,) * (leaf.ndim - on[name].ndim) + on[name].shape)
        return jnp.where(mask, leaf, 0)

    states_LBTD = exit_states(jax.tree.map_with_path(narrow, model), tokens_BT, range(1, config.num_layers + 1))
    return states_LBTD[depth - 1]


def sorted_loss(
    model: Transformer,
    tokens_BT1: jax.Array,
    size_3: jax.Array,
    *,
    with_full: bool = False,
    mask_BT: jax.Array | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Return the mean cross-entropy of a drawn sub-network, averaged with the full model's if asked, and each of them.

    Args:
        tokens_BT1: texts ``[B, T+1]``, right-padded.
        size_3: from :func:`draw`; may be traced.
        with_full: train the full model in every step, too; costs a second pass.
        mask_BT: bool, True where the prediction counts; ``None`` for everywhere.
        chunk: tokens whose logits are held at once.

    Returns:
        The loss, a float32 scalar, and the cross-entropies (nats per token): of the sub-network, float32 ``[1]``, or of
        both, ``[2]``.
    """
    config, targets_BT = model.config, tokens_BT1[:, 1:]
    sizes = [size_3, jnp.array([config.num_layers, config.num_kv_heads, config.d_ff])][: 1 + with_full]
    states_KBTD = jnp.stack([masked_state(model, tokens_BT1[:, :-1], size) for size in sizes])
    mask_BT = jnp.ones(targets_BT.shape, bool) if mask_BT is None else mask_BT
    weights_K = jnp.full(len(sizes), 1 / len(sizes))
    return exit_loss(model.unembed, states_KBTD, targets_BT, weights_K, mask_BT, chunk)


def _share(size: int, width: float) -> int:
    # Rounding must not make ceil(0.1 * 30) more than 3.
    return max(1, math.ceil(size * width - 1e-9))
