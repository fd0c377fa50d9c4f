"""A model whose decoder layers are stacked arrays that kernels index in place.

Per-layer arrays need a branch or a copy wherever the layer is decided while running. Stacked ones are read by
:func:`pallas_kernels.decoder_stack.decode_layers` at any layer, so that one program, without control flow between
layers, serves every depth.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dyninf.models.layers import DecoderLayer, rope_frequencies
from dyninf.models.transformer import Transformer, replace_layers
from pallas_kernels.decoder_stack import Decoded, DecoderWeights, decode_layers


class StackedLayers(nnx.Module):
    """Decoder layers with a leading axis L: a sequence of layers that can also decode by traced index.

    Taking one layer out is a static slice, which a compiled program copies where control flow needs it: use lists of
    layers for drivers that branch.

    Args:
        layers: layers of one structure, with one attention window.

    Raises:
        ValueError: if there is no layer, or they differ in structure.
    """

    def __init__(self, layers: Any):
        windows = {layer.window for layer in layers}
        if len(windows) != 1:
            raise ValueError(
                f"expected layers with one window for all, got {sorted(map(str, windows))}; keep a list of layers"
            )
        first, length = layers[0], len(layers)
        self.stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        self.qkv_shape, self.out_shape = first.wqkv.shape, first.wo.shape
        # One axis for all that a product makes: several would be padded, and copied, on a TPU.
        self.stack.wqkv = nnx.Param(self.stack.wqkv[...].reshape(length, self.qkv_shape[0], -1))
        self.stack.wo = nnx.Param(self.stack.wo[...].reshape(length, -1, self.out_shape[-1]))
        self.stack.w_gate_up = nnx.Param(jnp.moveaxis(self.stack.w_gate_up[...], 2, 1))
        if self.stack.bqkv is not None:
            self.stack.bqkv = nnx.Param(self.stack.bqkv[...].reshape(length, -1))

    @property
    def window(self) -> int | None:
        """The attention window of all layers."""
        return self.stack.window

    def __len__(self) -> int:
        """Return the number of layers."""
        return self.stack.norm_attn.shape[0]

    def __getitem__(self, index: int | slice) -> DecoderLayer | list[DecoderLayer]:
        """Return one layer as the module it was, or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected a layer below {len(self)}, got {index}")
        layer = jax.tree.map(lambda leaf: leaf[index], self.stack)
        layer.wqkv = nnx.Param(layer.wqkv[...].reshape(self.qkv_shape))
        layer.wo = nnx.Param(layer.wo[...].reshape(self.out_shape))
        layer.w_gate_up = nnx.Param(jnp.moveaxis(layer.w_gate_up[...], 0, 1))
        if layer.bqkv is not None:
            layer.bqkv = nnx.Param(layer.bqkv[...].reshape(self.qkv_shape[1:]))
        return layer

    def __iter__(self) -> Iterator[DecoderLayer]:
        """Yield the layers in order."""
        return (self[index] for index in range(len(self)))

    def decode(
        self, x_BD: jax.Array, k_LBSKH: jax.Array, v_LBSKH: jax.Array, positions_B: jax.Array, **schedule: Any
    ) -> Decoded:
        """Run layers on one token of each sequence; see :func:`pallas_kernels.decoder_stack.decode_layers`."""
        stack = self.stack
        weights = {
            name: None if leaf is None else leaf[...]
            for name in DecoderWeights.__dataclass_fields__
            for leaf in [getattr(stack, name)]
        }
        return decode_layers(
            x_BD,
            DecoderWeights(**weights),
            k_LBSKH,
            v_LBSKH,
            positions_B,
            frequencies=jnp.asarray(rope_frequencies(k_LBSKH.shape[-1], stack.rope_theta, stack.rope_scaling)),
            eps=stack.eps,
            window=stack.window,
            **schedule,
        )


def stack_for_decoding(model: Transformer) -> Transformer:
    """Return the model with stacked layers, which the driver ``indexed`` runs at any depth without control flow.

    Needs the memory of the layers once more while it runs; drop the given model to have it back.

    Raises:
        ValueError: if the layers differ in their attention windows.
    """
    return replace_layers(model, StackedLayers(list(model.layers)))


def list_layers(model: Transformer) -> Transformer:
    """Return the model with a list of layers: the inverse of :func:`stack_for_decoding`."""
    return replace_layers(model, nnx.List(list(model.layers)))
