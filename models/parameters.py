"""The parameters of a transformer by name: ``embedding``, ``layers.0.wqkv``, ``norm_final`` and so on.

Loading, saving and everything else that handles parameters one at a time go through these names, so that only this
file knows how Flax NNX lays a module out as a pytree.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dyninf.models.config import ModelConfig
from dyninf.models.transformer import Transformer


def abstract_model(config: ModelConfig, dtype: Any = jnp.float32) -> Transformer:
    """Return the model with a ``jax.ShapeDtypeStruct`` in place of every array; allocates no weights.

    Raises:
        ValueError: if ``dtype`` is not a floating-point dtype.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"expected a floating-point dtype, got {np.dtype(dtype)}; use jnp.bfloat16 or jnp.float32")
    return jax.eval_shape(lambda: Transformer(config, jax.random.key(0), dtype))


def named_parameters(model: Transformer) -> dict[str, Any]:
    """Return every array of the model (or its abstract stand-in) by its dotted name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_parameter)
    return {_name(path): leaf.get_value() for path, leaf in leaves}


def with_parameters(model: Transformer, arrays: Mapping[str, Any]) -> Transformer:
    """Return ``model`` with its arrays replaced by ``arrays``, which holds exactly the names of the model.

    Raises:
        ValueError: if a name is missing or not a name of the model.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_parameter)
    names = [_name(path) for path, _ in leaves]
    if set(names) != set(arrays):
        raise ValueError(
            f"expected the parameters of the model, got {sorted(set(arrays) - set(names))} in excess "
            f"and {sorted(set(names) - set(arrays))} missing"
        )
    return jax.tree.unflatten(structure, [nnx.Param(arrays[name]) for name in names])


def _is_parameter(node: Any) -> bool:
    return isinstance(node, nnx.Param)


def _name(path: tuple) -> str:
    return ".".join(str(getattr(key, "name", getattr(key, "idx", key))) for key in path)
