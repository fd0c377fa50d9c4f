"""Random weights of a model that no single device holds."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dyninf.models.config import ModelConfig
from dyninf.models.layers import INIT_STD
from dyninf.models.parameters import abstract_model, named_parameters, with_parameters
from dyninf.models.sharding import Rules, model_shardings
from dyninf.models.stacked import stack_for_decoding
from dyninf.models.transformer import Transformer


def random_model(
    config: ModelConfig,
    mesh: Mesh,
    rules: Rules | None = None,
    *,
    key: jax.Array,
    dtype: Any = jnp.float32,
    stacked: bool = False,
) -> Transformer:
    """Return random weights that are made where they lie: norms are ones, biases zeros, the rest normal numbers.

    One parameter exists at a time beside those that are done. All have the deviation of an embedding; those of
    ``Transformer(config, key)`` are other numbers.

    Args:
        stacked: with the layers of :func:`dyninf.models.stack_for_decoding`, which would need them twice.

    Raises:
        ValueError: if the rules do not fit the mesh or a parameter.
    """
    like = abstract_model(config, dtype)
    like = jax.eval_shape(stack_for_decoding, like) if stacked else like
    shardings = named_parameters(model_shardings(like, mesh, rules))
    arrays = {}
    for number, (name, leaf) in enumerate(named_parameters(like).items()):
        last = name.rpartition(".")[2]
        constant = 1.0 if last.startswith("norm") else 0.0 if last.startswith("b") else None
        make = _maker(leaf.shape, leaf.dtype, constant, shardings[name], name.startswith("layers.stack."))
        arrays[name] = make(jax.random.fold_in(key, number))
    return with_parameters(like, arrays)


@functools.cache
def _maker(
    shape: tuple[int, ...], dtype: Any, constant: float | None, sharding: NamedSharding, stacked: bool
) -> Callable:
    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return (jax.random.normal(key, shape) * INIT_STD).astype(dtype)

    def make(key: jax.Array) -> jax.Array:
        if constant is not None:
            return jnp.full(shape, constant, dtype)
        if stacked:  # a layer at a time: the numbers are wider before they are rounded
            return jax.lax.map(lambda key: draw(key, shape[1:]), jax.random.split(key, shape[0]))
        return draw(key, shape)

    return jax.jit(make, out_shardings=sharding)
