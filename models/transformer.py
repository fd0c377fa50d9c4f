"""A decoder-only transformer as an immutable Flax NNX pytree.

Use it with plain ``jax.jit``, ``jax.vmap`` and ``jax.lax``; nothing is assigned after ``__init__``. ``layers`` is a
list of :class:`~dyninf.models.layers.DecoderLayer` (per-layer arrays: fastest for decoding) or one layer whose weights
carry a leading layer axis (:func:`stack_layers`: compiles once for all layers, used for training).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dyninf.models.config import ModelConfig
from dyninf.models.layers import INIT_STD, DecoderLayer
from pallas_kernels.norms import rms_norm
from pallas_kernels.partition import take_rows
from pallas_kernels.readout import Readout, exit_readout

# A column of an untied vocabulary matrix is a slice of its own; for more of them all logits are computed.
MOST_COLUMNS = 64


class Transformer(nnx.Module):
    """Embedding, decoder layers, final norm and vocabulary projection.

    Args:
        config: sizes and switches.
        key: random key of the initial weights.
        dtype: dtype of the weights and activations.
    """

    def __init__(self, config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32):
        embed_key, head_key, *layer_keys = jax.random.split(key, 2 + config.num_layers)
        shape = (config.vocab_size, config.d_model)
        self.config = config
        self.embedding = nnx.Param((jax.random.normal(embed_key, shape) * INIT_STD).astype(dtype))
        self.layers = nnx.List([DecoderLayer(config, i, layer_key, dtype) for i, layer_key in enumerate(layer_keys)])
        self.norm_final = nnx.Param(jnp.ones(config.d_model, dtype))
        head = None if config.tie_embeddings else jax.random.normal(head_key, shape[::-1]) * INIT_STD
        self.unembedding = None if head is None else nnx.Param(head.astype(dtype))

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Return the embeddings ``[B, T, D]`` of token ids; ids outside the vocabulary are not checked here."""
        return take_rows(self.embedding[...], tokens_BT)

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """Return float32 logits ``[B, T, V]`` of the states of any layer: final norm, then the vocabulary product."""
        x_BTD = rms_norm(x_BTD, self.norm_final[...], self.config.norm_eps)
        weights, axis = self._vocabulary()
        spec = ("BTD,VD->BTV", "BTD,DV->BTV")[axis]
        return jnp.einsum(spec, x_BTD, weights, preferred_element_type=jnp.float32)

    def token_logits(self, x_BTD: jax.Array, tokens_BTM: jax.Array) -> jax.Array:
        """Return what :meth:`unembed` does of a few tokens only, float32 ``[B, T, M]``.

        Reads their vectors of the vocabulary matrix; all of it where more than 64 are columns of an untied one.
        """
        batch, length, num_tokens = tokens_BTM.shape
        weights, axis = self._vocabulary()
        if axis == 1 and tokens_BTM.size > MOST_COLUMNS:
            return jnp.take_along_axis(self.unembed(x_BTD), tokens_BTM, axis=-1)
        rows_BND = take_rows(weights, tokens_BTM.reshape(batch, length * num_tokens), axis=axis)
        x_BTD = rms_norm(x_BTD, self.norm_final[...], self.config.norm_eps)
        rows_BTMD = rows_BND.reshape(batch, length, num_tokens, -1)
        return jnp.einsum("BTD,BTMD->BTM", x_BTD, rows_BTMD, preferred_element_type=jnp.float32)

    def readout(self, x_BTD: jax.Array) -> Readout:
        """Return what the logits of the states of any layer say ``[B, T]``, which a kernel does without the logits."""
        batch, length, d_model = x_BTD.shape
        weights, axis = self._vocabulary()
        rows_ND, scale_D = x_BTD.reshape(batch * length, d_model), self.norm_final[...]
        out = exit_readout(rows_ND, scale_D, weights, eps=self.config.norm_eps, transposed=axis == 1)
        return jax.tree.map(lambda leaf: leaf.reshape(batch, length), out)

    def _vocabulary(self) -> tuple[jax.Array, int]:
        """Return the vocabulary matrix, ``[V, D]`` if it is the embedding and else ``[D, V]``, and the axis of V."""
        return (self.embedding[...], 0) if self.unembedding is None else (self.unembedding[...], 1)


def stack_layers(model: Transformer) -> Transformer:
    """Return the model with its layers stacked into one layer of arrays with a leading axis L.

    Raises:
        ValueError: if the layers differ in a static property (attention windows), so that one program cannot serve all.
    """
    windows = {layer.window for layer in model.layers}
    if len(windows) > 1:
        raise ValueError(f"expected every layer to have the same window, got {sorted(map(str, windows))}; keep a list")
    return replace_layers(model, jax.tree.map(lambda *leaves: jnp.stack(leaves), *model.layers))


def unstack_layers(model: Transformer) -> Transformer:
    """Return the model with per-layer arrays; the inverse of :func:`stack_layers`."""
    num_layers = model.config.num_layers
    return replace_layers(
        model, nnx.List([jax.tree.map(lambda leaf, i=i: leaf[i], model.layers) for i in range(num_layers)])
    )


def replace_layers(model: Transformer, layers: Any) -> Transformer:
    """Return the model with other layers; the given one is left alone."""
    # A rebuilt tree instead of copy.copy: inside jit a copy of a captured model would still belong to the outer trace.
    changed = jax.tree.map(lambda leaf: leaf, model)
    changed.layers = layers
    return changed
