"""What dyninf asks of a model: three methods and a list of layers.

Any pytree with these members runs under a plan, whatever library wrote it. A layer computes q, k and v and hands them
to the ``attend`` function it was given; cache, selection and kernels live behind that call. A model may also define
``readout(x_BTD)``, which returns a :class:`pallas_kernels.readout.Readout` of its logits ``[B, T]`` without the logits;
exits that ask for a probability or a token then use it. ``token_logits(x_BTD, tokens_BTM)`` returns its logits of some
tokens only, ``[B, T, M]``; exits that watch a few use it. And ``lay_out(cache)`` returns an empty cache as the model
wants it to lie on its devices.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.readout import Readout, read_logits


class Attend(Protocol):
    """Attend from new tokens to what the cache holds and to themselves."""

    def __call__(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, window: int | None = None
    ) -> tuple[jax.Array, Any]:
        """Return the attention output ``[B, T, N, H]`` and a carry that the layer must return unchanged."""


class DecoderLayer(Protocol):
    """One block of a decoder-only transformer."""

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
        """Return the block's output ``[B, T, D]`` and the carry of ``attend``."""

    def project_kv(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the keys and values ``[B, T, K, H]`` that the block would write for this state."""


class CausalLM(Protocol):
    """A decoder-only language model that is a pytree."""

    layers: Sequence[DecoderLayer]

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Return the states ``[B, T, D]`` that enter the first layer."""

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """Return logits ``[B, T, V]`` of the states of any layer, final norm included."""


def kv_shape(model: CausalLM) -> jax.ShapeDtypeStruct:
    """Return the shape ``[1, 1, K, H]`` and dtype of one token's keys, read off the first layer without running it."""
    x_BTD = jax.eval_shape(model.embed, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    positions = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(lambda layer, x, p: layer.project_kv(x, p)[0], model.layers[0], x_BTD, positions)


def query_shape(model: CausalLM) -> jax.ShapeDtypeStruct:
    """Return the shape ``[1, 1, N, H]`` and dtype of one token's queries, read off the first layer."""
    x_BTD = jax.eval_shape(model.embed, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    positions = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None):
        return q_BTNH, q_BTNH

    return jax.eval_shape(lambda layer, x, p: layer(x, p, attend)[1], model.layers[0], x_BTD, positions)


def vocab_size(model: CausalLM) -> int:
    """Return the number of token ids the model knows, read off its logits without running it."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(lambda model, tokens: model.unembed(model.embed(tokens)), model, tokens).shape[-1]


def readout_of(model: CausalLM) -> Callable[[jax.Array], Readout]:
    """Return the function that reads states ``[B, T, D]`` out: the model's own, or one made from its logits."""
    own = getattr(model, "readout", None)
    return (lambda x_BTD: read_logits(model.unembed(x_BTD))) if own is None else own


def token_logits_of(model: CausalLM) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the function of states and tokens that returns their logits: the model's own, or one that makes all."""
    own = getattr(model, "token_logits", None)
    return (lambda x_BTD, ids_BTM: jnp.take_along_axis(model.unembed(x_BTD), ids_BTM, -1)) if own is None else own


def lay_out(model: CausalLM, cache: Any) -> Any:
    """Return an empty cache as the model wants it to lie on its devices; the given one if it has no say in that."""
    own = getattr(model, "lay_out", None)
    return cache if own is None else own(cache)


def max_length(model: CausalLM) -> int | None:
    """Return the longest sequence (tokens) that ``config.max_length`` declares, ``None`` if the model declares none."""
    return getattr(getattr(model, "config", None), "max_length", None)
