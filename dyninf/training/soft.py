"""Sorted fine-tuning (SoFT): one model of which every trained prefix of layers can be read out.

The loss is the plain average of the cross-entropies of nested sub-models, each the first n layers under the same final
norm and vocabulary matrix. A trained prefix is a model without new parameters: :class:`dyninf.depth.ExitAt` decodes
with it, :func:`dyninf.training.sorted_net.extract` cuts it out.

Source: Kavehzadeh et al., "Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for
Dynamic Inference", 2024. Equal weights are the paper's; no code was released to compare with.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dyninf.model import CausalLM
from dyninf.training.states import CHUNK, check_depths, count_layers, depth_loss


def soft_depths(num_layers: int, *, first: int, step: int) -> tuple[int, ...]:
    """Return the depths ``first, first + step, ...`` and always ``num_layers``.

    The paper takes 12, 16, ..., 40 of the 40 layers of LLaMA 2 13B: ``first=12, step=4``.

    Raises:
        ValueError: if there is no such depth.
    """
    if step < 1:
        raise ValueError(f"expected a step of at least 1 layer, got {step=}; use 1 to train every depth")
    check_depths((first,), num_layers)
    return (*range(first, num_layers, step), num_layers)


def soft_loss(
    model: CausalLM,
    tokens_BT1: jax.Array,
    depths: Sequence[int],
    *,
    mask_BT: jax.Array | None = None,
    chunk: int = CHUNK,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Return ``mean_n CE(unembed(h_n))`` over the depths, and the cross-entropy of each.

    One forward pass of the deepest sub-model and K readouts. Fine-tuning on the full depth alone, ``depths=(L,)``, is
    the plain loss exactly.

    Args:
        tokens_BT1: texts ``[B, T+1]``, right-padded.
        depths: numbers of layers of the sub-models, ascending; static.
        mask_BT: bool, True where the prediction counts; for instructions, the tokens of the response. ``None`` for all.
        chunk: tokens whose logits are held at once.
        dtype: to compute in; gradients are added up in the dtype of the model's arrays, so keep those in float32.

    Returns:
        The loss, a float32 scalar, and the cross-entropy of each depth (nats per token, float32 ``[K]``).

    Raises:
        ValueError: if the depths do not fit the model, or shapes do not fit together.
    """
    check_depths(depths, count_layers(model))
    weights_K = jnp.full(len(depths), 1 / len(depths))
    return depth_loss(model, tokens_BT1, depths, weights_K, mask_BT=mask_BT, chunk=chunk, dtype=dtype)
