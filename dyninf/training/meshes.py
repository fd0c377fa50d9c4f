"""Training on a mesh: ``data`` splits the batch, ``fsdp`` the batch and the weights with all that is kept of them.

Master weights, the optimizer's moments and the exits lie as :mod:`dyninf.models.sharding` says, step after step; XLA
gathers the weights of a layer where they meet its activations and adds up gradients over all devices. The sums are
those of one device in another order. The mesh is no part of a run: a checkpoint goes on on any other, or on one device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dyninf.models import ModelConfig, Transformer
from dyninf.models.sharding import PARAMETERS, Placement, placement
from dyninf.training.batch_axes import AXES
from dyninf.training.recipe import Recipe
from dyninf.training.step import TrainState, eval_step, init_state, train_step


def training_placement(mesh: Mesh, config: ModelConfig, recipe: Recipe) -> Placement:
    """Return the mesh with the rules of training.

    Raises:
        ValueError: if it has other axes, or the batch or the model's width does not divide.
        NotImplementedError: if there are several processes.
    """
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"expected one process for training, got {jax.process_count()}; use its devices alone"
        )
    if other := sorted(set(mesh.axis_names) - set(AXES)):
        raise ValueError(f"expected a mesh of {' and '.join(AXES)} for training, got {', '.join(other)}; use data=N")
    where = placement(mesh)
    for name, axis, size in (
        ("recipe.batch_size", "batch", recipe.batch_size),
        ("model.d_model", "embed", config.d_model),
    ):
        parts = where.parts(axis)
        if size % parts:
            axes = " x ".join(f"{used}={mesh.shape[used]}" for used in where.mesh_axes(axis))
            raise ValueError(f"expected {name} to divide by {axes}, got {size}; use {-(-size // parts) * parts}")
    return where


def state_shardings(state: TrainState, where: Placement) -> TrainState:
    """Return a state, or its abstract stand-in, with a ``NamedSharding`` in place of every array.

    What the optimizer keeps of a parameter lies as the parameter does; counts and exits are whole everywhere.
    """

    def one(path: tuple, leaf: Any) -> NamedSharding:
        names = ".".join(str(getattr(key, "name", getattr(key, "key", ""))) for key in path).split(".")
        axes = next((PARAMETERS[name] for name in reversed(names) if name in PARAMETERS), ())
        axes = ("layers", *axes) if "layers" in names else axes
        axes = axes if len(axes) == leaf.ndim else (None,) * leaf.ndim
        return where.sharding(".".join(names), axes, leaf.shape)

    return jax.tree_util.tree_map_with_path(one, state)


def init_state_on(
    where: Placement | None, config: ModelConfig, recipe: Recipe, model: Transformer | None = None
) -> TrainState:
    """Return what :func:`dyninf.training.step.init_state` does, on a mesh; random weights are drawn in place."""

    def init() -> TrainState:
        return init_state(config, recipe, model)

    if where is None:
        return init()
    if model is None and recipe.start == "normal":
        return jax.jit(init, out_shardings=state_shardings(jax.eval_shape(init), where))()
    state = init()
    return jax.device_put(state, state_shardings(state, where))


def steps_on(where: Placement | None, state: TrainState) -> tuple[Callable, Callable]:
    """Return ``train_step`` and ``eval_step`` for states that lie, and are to lie, as this one."""
    if where is None:
        return train_step, eval_step
    step = jax.jit(
        train_step,
        static_argnames=("recipe",),
        donate_argnames=("state",),
        out_shardings=(state_shardings(state, where), NamedSharding(where.mesh, PartitionSpec())),
    )

    def on_mesh(function: Callable) -> Callable:
        def run(*arguments: Any) -> Any:
            with jax.set_mesh(where.mesh):
                return function(*arguments)

        return run

    return on_mesh(step), on_mesh(eval_step)


def put_batch(
    batch: np.ndarray | tuple[np.ndarray, np.ndarray], where: Placement | None
) -> tuple[jax.Array, jax.Array | None]:
    """Return tokens ``[B, T+1]``, and which are to be predicted where the data says so, the batch split on a mesh."""

    def put(array: np.ndarray) -> jax.Array:
        if where is None:
            return jnp.asarray(array)
        return jax.device_put(array, where.sharding("the batch", ("batch", None), array.shape))

    tokens, mask = batch if isinstance(batch, tuple) else (batch, None)
    return put(tokens), None if mask is None else put(mask)
