"""Where the arrays of a model and of its caches lie on a mesh of devices.

Two steps, each a table: names of arrays to logical axes (:data:`PARAMETERS`, :data:`CACHES`), and logical axes to axes
of the mesh (:data:`RULES`). ``tensor`` splits heads, the MLP and the vocabulary, ``fsdp`` the model's width in the
weights and the batch elsewhere, ``data`` the batch, ``sequence`` the tokens of prompts. An axis that the mesh lacks has
size 1. Modules hold no trace of any of this. Source of the two steps: the logical axis rules of t5x and maxtext.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dyninf.models.config import ModelConfig
from dyninf.models.meshes import MESH_AXES
from dyninf.models.parameters import named_parameters, with_parameters
from dyninf.models.transformer import Transformer

Axes = tuple[str | None, ...]
Rules = Mapping[str, str | Sequence[str] | None]
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": "sequence",
    "slots": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "layers": None,
    "norm": None,  # too small to be worth gathering
}
PARAMETERS: dict[str, Axes] = {
    "embedding": ("vocab", "embed"),
    "unembedding": ("embed", "vocab"),
    "norm_final": ("norm",),
    "norm_attn": ("norm",),
    "wqkv": ("embed", "kv_heads", None, "head_dim"),
    "bqkv": ("kv_heads", None, "head_dim"),
    "norm_q": ("norm",),
    "norm_k": ("norm",),
    "wo": ("heads", "head_dim", "embed"),
    "norm_mlp": ("norm",),
    "w_gate_up": ("embed", None, "mlp"),
    "w_down": ("mlp", "embed"),
}
# Of the layers of stack_for_decoding, which join the axes of heads and have gate and up apart.
JOINED: dict[str, Axes] = {
    "wqkv": ("embed", "kv_heads"),
    "bqkv": ("kv_heads",),
    "wo": ("heads", "embed"),
    "w_gate_up": (None, "embed", "mlp"),
}
CACHES: dict[str, Axes] = {
    "k": ("batch", "slots", "kv_heads", "head_dim"),
    "v": ("batch", "slots", "kv_heads", "head_dim"),
    "valid": ("batch", "slots"),
    "positions": ("batch", "slots", "kv_heads"),
    "scores": ("batch", "slots", "kv_heads"),
    "threshold": ("batch",),
    "summary": ("batch", None, "kv_heads", None),
    "choice.scores": ("batch", "kv_heads", None),
    "choice.q": ("batch", "heads", "head_dim"),
    # of caches whose keys are factors
    "u": ("batch", None, None, None),
    "sv": ("batch", "kv_heads", None, "head_dim"),
    "landmarks": ("batch", None, "kv_heads", "head_dim"),
    "choosable": ("batch", "kv_heads", None),
    "outliers": ("batch", "kv_heads", None),
    "start": ("batch",),
    "length": ("batch",),
}
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh with rules that were checked against it; :func:`placement` makes it."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """Return the axes of the mesh, of more than one device, that split a logical axis."""
        return tuple(name for name in dict(self.rules).get(axis, ()) if self.mesh.shape[name] > 1)

    def sharding(
        self, name: str, axes: Axes, shape: Sequence[int], whole: Mapping[str, int] | None = None
    ) -> NamedSharding:
        """Return the sharding of an array.

        Args:
            name: of the array, for messages.
            axes: a logical axis for each of its axes, ``None`` for those that are never split.
            whole: number of parts of a logical axis that must not be cut, such as heads, where arrays join it with
                others; ``None`` where every axis stands for itself.

        Raises:
            ValueError: if two of the axes are split by the same axis of the mesh, or a size does not divide.
        """
        entries, taken = [], {}
        for axis, size in zip(axes, shape, strict=True):
            names = self.mesh_axes(axis)
            for used in names:
                if used in taken:
                    raise ValueError(
                        f"expected every axis of the mesh once in {name}, got {used!r} for {taken[used]!r} and "
                        f"{axis!r}; change the rules"
                    )
                taken[used] = axis
            entries.append(self._entry(name, axis, size, (whole or {}).get(axis, size), names))
        return NamedSharding(self.mesh, PartitionSpec(*entries))

    def parts(self, axis: str) -> int:
        """Return in how many parts the rules split a logical axis."""
        return self._count(self.mesh_axes(axis))

    def splits(self, axis: str, size: int) -> bool:
        """Return whether an axis of this size is, or may be, split evenly as the rules say."""
        return size % self.parts(axis) == 0

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Ask for the sharding of an intermediate array; axes that do not divide are left to the compiler."""
        entries = []
        for axis, size in zip(axes, x.shape, strict=True):
            names = self.mesh_axes(axis)
            whole = not names or size == 1 or (axis == "kv_heads" and size < self._count(names))
            entries.append(None if whole else names if self.splits(axis, size) else PartitionSpec.UNCONSTRAINED)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*entries)))

    def _count(self, names: Sequence[str]) -> int:
        """Return the devices along axes of the mesh."""
        return math.prod(self.mesh.shape[name] for name in names)

    def _entry(self, name, axis, size, whole, names):
        """Return what splits one axis, of which ``whole`` parts must not be cut."""
        shards = self._count(names)
        if shards == 1:
            return None
        if axis == "kv_heads" and whole < shards:
            _say_once(
                f"{whole} key/value heads on {shards} devices ({_sizes(self.mesh, names)}): what belongs to them, the "
                "product for queries, keys and values included, is held by every one of these devices"
            )
            return None
        if whole % shards or size % shards:
            raise ValueError(
                f"expected the axis {axis!r} of {name} to divide by {_sizes(self.mesh, names)}, got {whole}; use "
                f"another mesh, or, from Python, rules={{{axis!r}: None}}"
            )
        return names


def placement(mesh: Mesh, rules: Rules | None = None) -> Placement:
    """Return a mesh with its rules.

    Args:
        rules: what differs from :data:`RULES`: an axis of the mesh, several or ``None`` for logical axes.

    Raises:
        ValueError: if a rule has an unknown logical axis or an axis that neither the mesh nor :data:`MESH_AXES` has,
            or no rule uses an axis of the mesh, or the axes of the mesh are not automatic.
    """
    rules = dict(rules or {})
    if unknown := sorted(set(rules) - set(RULES)):
        raise ValueError(f"expected rules for the logical axes {', '.join(RULES)}, got {', '.join(unknown)}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(f"expected a mesh of automatic axes, got {mesh.axis_types}; use dyninf.models.make_mesh")
    merged = {}
    for axis, names in (RULES | rules).items():
        names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
        if unknown := sorted(set(names) - set(mesh.axis_names) - set(MESH_AXES)):
            raise ValueError(
                f"expected the rule for {axis!r} to have axes of the mesh ({', '.join(map(str, mesh.axis_names))}), "
                f"got {', '.join(unknown)}"
            )
        merged[axis] = tuple(name for name in names if name in mesh.axis_names)
    used = {name for names in merged.values() for name in names}
    if idle := [name for name in mesh.axis_names if name not in used and mesh.shape[name] > 1]:
        raise ValueError(
            f"expected a rule for every axis of the mesh, got none for {', '.join(idle)}; add one to rules"
        )
    return Placement(mesh, tuple(merged.items()))


def model_shardings(model: Transformer, mesh: Mesh, rules: Rules | None = None) -> Transformer:
    """Return the model with a ``NamedSharding`` in place of every array, or of every abstract stand-in.

    Serves models with a list of layers and both kinds of stacked ones.

    Raises:
        ValueError: if the rules do not fit the mesh or an array, or a parameter is not in the table.
    """
    arrays = {name: tuple(array.shape) for name, array in named_parameters(model).items()}
    return with_parameters(model, parameter_shardings(arrays, model.config, placement(mesh, rules)))


def parameter_shardings(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, where: Placement
) -> dict[str, NamedSharding]:
    """Return the shardings of parameters by their names; see :func:`model_shardings`."""
    whole = {"heads": config.num_heads, "kv_heads": config.num_kv_heads}
    return {name: where.sharding(name, parameter_axes(name), shape, whole) for name, shape in shapes.items()}


def parameter_axes(name: str) -> Axes:
    """Return the logical axes of a parameter such as ``layers.0.wqkv``, ``layers.wqkv`` or ``layers.stack.wqkv``.

    Raises:
        ValueError: if it is not in the table.
    """
    *outer, last = name.split(".")
    if last not in PARAMETERS:
        raise ValueError(f"expected a parameter of the table in dyninf.models.sharding, got {name!r}; add it there")
    if outer == ["layers", "stack"]:
        return ("layers", *JOINED.get(last, PARAMETERS[last]))
    return ("layers", *PARAMETERS[last]) if outer == ["layers"] else PARAMETERS[last]


def place(model: Transformer, mesh: Mesh, rules: Rules | None = None) -> Transformer:
    """Return the model with its arrays on the devices of a mesh; see :func:`model_shardings`.

    A model that does not fit one device is loaded there instead: ``load(..., mesh=mesh)``.
    """
    return jax.device_put(model, model_shardings(model, mesh, rules))


def cache_shardings(cache: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """Return a KV cache, or the cache of a layer, with a ``NamedSharding`` in place of every array.

    Serves per-layer and stacked caches, whatever they hold beside keys and values. Arrays that are not in the table,
    which own caches may have, are split by batch on their first axis.

    Raises:
        ValueError: if the rules do not fit the mesh or an array.
    """
    where = placement(mesh, rules)

    def one(path: tuple, leaf: Any) -> NamedSharding:
        axes = cache_axes(path, leaf.ndim) or ("batch",) + (None,) * (leaf.ndim - 1)
        return where.sharding(f"the cache's {jax.tree_util.keystr(path)}", axes, leaf.shape)

    return jax.tree_util.tree_map_with_path(one, cache)


def cache_axes(path: tuple, ndim: int) -> Axes | None:
    """Return the logical axes of an array of a cache, ``None`` if the table does not have it."""
    names = [str(getattr(key, "name", "")) for key in path]
    axes = CACHES.get(".".join(names[-2:])) or CACHES.get(names[-1] if names else "")
    stacked = axes is not None and ndim == len(axes) + 1
    axes = ("layers", *axes) if stacked else axes
    return axes if axes is not None and len(axes) == ndim else None


def token_sharding(shape: Sequence[int], mesh: Mesh, rules: Rules | None = None) -> NamedSharding:
    """Return the sharding of tokens ``[B, T]``, or of what there is of each sequence ``[B]``.

    Raises:
        ValueError: if the rules do not fit the mesh, or a size does not divide.
    """
    return placement(mesh, rules).sharding("the tokens", ("batch", "length")[: len(shape)], shape)


def _sizes(mesh: Mesh, names: Sequence[str]) -> str:
    return " x ".join(f"{name}={mesh.shape[name]}" for name in names)


@functools.cache
def _say_once(message: str) -> None:
    _logger.warning(message)
