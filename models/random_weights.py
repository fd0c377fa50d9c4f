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
from dyninf.models.transformer import Transformer


def random_model(
    config: ModelConfig, mesh: Mesh, rules: Rules | None = None, *, key: jax.Array, dtype: Any = jnp.float32
) -> Transformer:
    """Return random weights that are made where they lie: norms are ones, biases zeros, the rest normal numbers.

    One parameter exists at a time beside those that are done. All have the deviation of an embedding; those of
    ``Transformer(config, key)`` are other numbers.

    Raises:
        ValueError: if the rules do not fit the mesh or a parameter.
    """
    like = abstract_model(config, dtype)
    shardings = named_parameters(model_shardings(like, mesh, rules))
    arrays = {}
    for number, (name, leaf) in enumerate(named_parameters(like).items()):
        last = name.rpartition(".")[2]
        constant = 1.0 if last.startswith("norm") else 0.0 if last.startswith("b") else None
        make = _maker(leaf.shape, leaf.dtype, constant, shardings[name])
        arrays[name] = make(jax.random.fold_in(key, number))
    return with_parameters(like, arrays)


@functools.cache
def _maker(shape: tuple[int, ...], dtype: Any, constant: float | None, sharding: NamedSharding) -> Callable:
    def make(key: jax.Array) -> jax.Array:
        if constant is not None:
            return jnp.full(shape, constant, dtype)
        return (jax.random.normal(key, shape) * INIT_STD).astype(dtype)

    return jax.jit(make, out_shardings=sharding)
