"""A model whose computation is laid out on a mesh: what ``generate`` and the rest are handed to run on many devices.

XLA partitions a program by the shardings of its inputs and guesses the rest. :class:`MeshModel` says what the rest is
to be, from where a model stands: tokens and states are split by batch, queries, keys, values and the caches that
``attend`` returns by batch and heads, logits by vocabulary. Everything that decides (depth policies, samplers, what is
read of a cache) follows from states that all devices of the tensor axis hold alike, so that all decide alike. What
JAX cannot partition, kernels, runs on each device for its sequences and heads (:mod:`pallas_kernels.partition`). The
mesh is part of the pytree's structure, so that a program is compiled anew for another one.

On GPUs the model holds one array beside its weights, the inbox in which devices hand each other their parts of a
layer's two sums (:mod:`pallas_kernels.add_devices`). Hand the model to programs as an argument, as ``generate`` and the
rest do, and neither donate nor return it; programs that run at once must not share it. What operations on trees make of
a layer has none, and adds by XLA.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from dyninf.models.sharding import CACHES, Placement, Rules, cache_axes, placement
from dyninf.models.transformer import Transformer
from dyninf.pytree import pytree
from pallas_kernels.add_devices import make_inbox
from pallas_kernels.partition import partitioned

_STATES = ("batch", "length", None)
_DECODED = {f"{name}_LBSKH": ("layers", *CACHES[name]) for name in ("k", "v")}
_DECODED |= {"x_BD": ("batch", None), "summary_LBPKX": ("layers", *CACHES["summary"])}
_KEYS = ("batch", "length", "kv_heads", None)
_QUERIES, _WHOLE = ("batch", "length", "heads", None), ("batch", "length", None, None)


@pytree(static=("where",), lost=("inbox",))
class MeshLayer:
    """One decoder layer on a mesh; see :mod:`dyninf.models.mesh_model`."""

    layer: Any
    where: Placement
    inbox: jax.Array | None = None

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, attend: Callable) -> tuple[jax.Array, Any]:
        """Return the layer's output ``[B, T, D]`` and what ``attend`` carries along."""
        constrain = self.where.constrain

        def attend_on_mesh(q_BTNH, k_BTKH, v_BTKH, **options):
            # Queries lie with the keys they read: those of replicated keys would pull parts of a cache to and fro.
            queries = _QUERIES if self.where.splits("kv_heads", k_BTKH.shape[2]) else _WHOLE
            k_BTKH, v_BTKH = constrain(k_BTKH, _KEYS), constrain(v_BTKH, _KEYS)
            o_BTNH, carry = attend(constrain(q_BTNH, queries), k_BTKH, v_BTKH, **options)
            return constrain(o_BTNH, queries), constrain_cache(carry, self.where)

        with _kernels(self.where, self.inbox):
            x_BTD, carry = self.layer(constrain(x_BTD, _STATES), positions_BT, attend_on_mesh)
        return constrain(x_BTD, _STATES), carry

    def project_kv(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the keys and values ``[B, T, K, H]`` the layer would write for a state."""
        with _kernels(self.where):
            k_BTKH, v_BTKH = self.layer.project_kv(self.where.constrain(x_BTD, _STATES), positions_BT)
        return self.where.constrain(k_BTKH, _KEYS), self.where.constrain(v_BTKH, _KEYS)


@pytree(static=("where",), lost=("inbox",))
class MeshStack:
    """Stacked layers on a mesh: a sequence of layers that also decode by index."""

    layers: Any
    where: Placement
    inbox: jax.Array | None = None

    @property
    def window(self) -> int | None:
        """The attention window of all layers, ``None`` if they do not say."""
        return getattr(self.layers, "window", None)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    def __getitem__(self, index: int | slice) -> MeshLayer | list[MeshLayer]:
        """Return one layer, or several."""
        found = self.layers[index]
        if isinstance(index, slice):
            return [MeshLayer(layer=layer, where=self.where, inbox=self.inbox) for layer in found]
        return MeshLayer(layer=found, where=self.where, inbox=self.inbox)

    def __iter__(self) -> Iterator[MeshLayer]:
        """Yield the layers in order."""
        return (self[index] for index in range(len(self)))

    def decode(
        self, x_BD: jax.Array, k_LBSKH: jax.Array, v_LBSKH: jax.Array, positions_B: jax.Array, **schedule: Any
    ) -> Any:
        """Run layers on one token of each sequence; see :meth:`dyninf.models.StackedLayers.decode`."""
        with _kernels(self.where):
            out = self.layers.decode(x_BD, k_LBSKH, v_LBSKH, positions_B, **schedule)
        parts = {name: (getattr(out, name, None), axes) for name, axes in _DECODED.items()}
        laid = {name: self.where.constrain(part, axes) for name, (part, axes) in parts.items() if part is not None}
        return dataclasses.replace(out, **laid)


@pytree(static=("where",))
class MeshModel:
    """A model on a mesh: all that dyninf asks of a model; :func:`on_mesh` makes it."""

    model: Any
    where: Placement
    inbox: jax.Array | None = None

    @property
    def config(self) -> Any:
        """The configuration of the model, ``None`` if it has none."""
        return getattr(self.model, "config", None)

    @property
    def layers(self) -> Sequence[MeshLayer]:
        """The layers, each laid out on the mesh."""
        if hasattr(self.model.layers, "decode"):
            return MeshStack(layers=self.model.layers, where=self.where, inbox=self.inbox)
        return tuple(MeshLayer(layer=layer, where=self.where, inbox=self.inbox) for layer in self.model.layers)

    @property
    def readout(self) -> Callable | None:
        """What the logits of states say, if the model knows."""
        readout = getattr(self.model, "readout", None)
        return None if readout is None else _kernels(self.where)(readout)

    @property
    def token_logits(self) -> Callable | None:
        """The logits of a few tokens, if the model knows them without all others."""
        token_logits = getattr(self.model, "token_logits", None)
        return None if token_logits is None else _kernels(self.where)(token_logits)

    def lay_out(self, cache: Any) -> Any:
        """Return an empty cache split by batch and heads, layers that no token will run included."""
        return constrain_cache(cache, self.where)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Return the states ``[B, T, D]`` that enter the first layer."""
        tokens_BT = self.where.constrain(tokens_BT, ("batch", "length"))
        with _kernels(self.where):
            x_BTD = self.model.embed(tokens_BT)
        return self.where.constrain(x_BTD, _STATES)

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """Return logits ``[B, T, V]`` of the states of any layer."""
        return self.where.constrain(self.model.unembed(x_BTD), ("batch", "length", "vocab"))


def on_mesh(model: Any, mesh: Mesh, rules: Rules | None = None) -> MeshModel:
    """Return the model as it is run on a mesh: hand it to ``generate``, ``prefill``, ``decode_step`` or ``forward``.

    The weights stay where they are: :func:`dyninf.models.load` and :func:`dyninf.models.place` put them on the mesh.
    Any model that dyninf runs can be had on a mesh. A batch that does not divide by the axes that split it is computed
    by all devices alike.

    Raises:
        ValueError: if the rules do not fit the mesh.
    """
    where = placement(mesh, rules)
    return MeshModel(model=model, where=where, inbox=_inbox(model, where))


def _inbox(model: Any, where: Placement) -> jax.Array | None:
    """Return room for the sums of layers that devices split by heads, the MLP alike, if they may add by a kernel."""
    heads = where.mesh_axes("kv_heads")
    alike = all(where.mesh_axes(axis) == heads for axis in ("heads", "mlp")) and not where.mesh_axes("embed")
    return make_inbox(where.mesh, heads, model.config.d_model) if isinstance(model, Transformer) and alike else None


def _kernels(where: Placement, inbox: jax.Array | None = None) -> contextlib.ContextDecorator:
    """Return the context in which kernels run on each device for its sequences and heads."""
    axes = {"batch": "batch", "heads": "kv_heads", "length": "length", "width": "embed", "vocab": "vocab"}
    return partitioned(where.mesh, inbox=inbox, **{name: where.mesh_axes(axis) for name, axis in axes.items()})


def constrain_cache(cache: Any, where: Placement) -> Any:
    """Ask for the shardings of the arrays of a cache that the table has."""

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        axes = cache_axes(path, leaf.ndim)
        return leaf if axes is None else where.constrain(leaf, axes)

    return jax.tree_util.tree_map_with_path(one, cache)
