"""Run operations on a mesh of devices: one program for each, with a part of the sequences and of the heads.

JAX partitions plain JAX by itself, and refuses to partition a Pallas kernel. Within :func:`partitioned` an operation
marked with :func:`per_device` runs inside ``jax.shard_map`` instead, whichever implementation serves it: the letters of
its arguments say where batch (B) and heads (N and K) are, which are split where they divide evenly; the rest is whole
on each device. Heads need nothing of each other, so that nothing is sent, except where they share a decision: such an
operation reduces with :func:`mean_of_devices`, once, and every device gets the same number and decides alike. A kernel
that runs whole layers asks who shares the heads (:func:`sharing`) and adds up with them itself. Tokens of whole prompts
can be split as well (:mod:`pallas_kernels.sequence`). What is not marked, and everything around, is left to JAX;
kernels that are not refuse (:mod:`pallas_kernels.dispatch`).
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.sequence import attend_part, is_whole_prompt


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A mesh, the axes that split sequences, heads, prompts, the width of weights and the vocabulary, whether one
    device is at hand, or all, and what devices that share heads write to (:mod:`pallas_kernels.add_devices`).
    """

    mesh: Mesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    length: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    one: bool = False
    inbox: jax.Array | None = None


_PARTITION: ContextVar[Partition | None] = ContextVar("partition", default=None)


@contextlib.contextmanager
def partitioned(
    mesh: Mesh,
    *,
    batch: Sequence[str] = (),
    heads: Sequence[str] = (),
    length: Sequence[str] = (),
    width: Sequence[str] = (),
    vocab: Sequence[str] = (),
    inbox: jax.Array | None = None,
) -> Iterator[None]:
    """Trace what follows for the devices of a mesh.

    Args:
        batch, heads, length, width, vocab: its axes that split sequences, heads, tokens of prompts, the width of
            weights, and the vocabulary.
        inbox: what :func:`pallas_kernels.add_devices.make_inbox` returned for the mesh and the axes that split heads,
            as an argument of the program.
    """
    axes = {"batch": batch, "heads": heads, "length": length, "width": width, "vocab": vocab}
    with _within(Partition(mesh=mesh, inbox=inbox, **{name: tuple(given) for name, given in axes.items()})):
        yield


def num_parts(mesh: Mesh, axes: Sequence[str]) -> int:
    """Return in how many parts axes of a mesh split what they split."""
    return math.prod(mesh.shape[axis] for axis in axes)


def num_devices() -> int:
    """Return for how many devices the operation at hand is traced that JAX is to partition; 1 within a marked one."""
    where = _PARTITION.get()
    return 1 if where is None or where.one else where.mesh.size


def platform() -> str | None:
    """Return the platform of the mesh that is traced for, which may be one that is only described; or ``None``."""
    where = _PARTITION.get()
    return where.mesh.devices.flat[0].platform if where is not None and isinstance(where.mesh, Mesh) else None


def mean_of_devices(x: jax.Array) -> jax.Array:
    """Return the mean over the devices that share the heads of the marked operation at hand: one all-reduce, or x."""
    where = _PARTITION.get()
    return jax.lax.pmean(x, where.heads) if where is not None and where.one and where.heads else x


def sharing() -> tuple[Mesh, tuple[str, ...]] | None:
    """Return the mesh and its axes whose devices share the heads of the marked operation at hand; ``None`` if alone."""
    where = _PARTITION.get()
    return (where.mesh, where.heads) if where is not None and where.one and where.heads else None


def inbox_at_hand() -> tuple[Mesh, tuple[str, ...], jax.Array] | None:
    """Return the mesh, its axes that split heads, and what devices along them may write to, where an operation is to be
    marked; ``None`` where there is nothing.
    """
    where = _PARTITION.get()
    found = where is not None and not where.one and where.inbox is not None
    return (where.mesh, where.heads, where.inbox) if found else None


def take_rows(table: jax.Array, tokens_BT: jax.Array, *, axis: int = 0) -> jax.Array:
    """Return the vectors ``[B, T, D]`` of tokens; each device takes what it has of them, and one sum joins them.

    Left to JAX, a single token makes XLA gather the whole table on a GPU, a millisecond for each quarter of a gigabyte.

    Args:
        table: one vector a token, ``[V, D]``, or ``[D, V]`` with ``axis=1``.
        tokens_BT: token ids within the vocabulary; with ``axis=1`` a few, as each is an operation of its own.
        axis: that of the vocabulary.
    """
    where = _PARTITION.get()
    axes = () if where is None or where.one or where.width else where.vocab
    shares = num_parts(where.mesh, axes) if axes else 1
    if shares == 1 or table.shape[axis] % shares:
        return _take(table, tokens_BT, axis)
    rows = table.shape[axis] // shares
    split = PartitionSpec(
        *(
            names if names and size % num_parts(where.mesh, names) == 0 else None
            for names, size in zip((where.batch, where.length), tokens_BT.shape, strict=True)
        )
    )

    def on_device(mine: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        at_BT = tokens_BT - jax.lax.axis_index(axes) * rows
        here_BT1 = ((at_BT >= 0) & (at_BT < rows))[..., None]
        return jax.lax.psum(jnp.where(here_BT1, _take(mine, jnp.clip(at_BT, 0, rows - 1), axis), 0), axes)

    specs = (PartitionSpec(*(None,) * axis, axes), split)
    return jax.shard_map(on_device, mesh=where.mesh, in_specs=specs, out_specs=split, check_vma=False)(table, tokens_BT)


def _take(table: jax.Array, tokens_BT: jax.Array, axis: int) -> jax.Array:
    if axis == 0:
        return table[tokens_BT]
    # One gather of columns makes XLA copy the whole table on a TPU.
    columns = [jax.lax.dynamic_slice_in_dim(table, token, 1, axis=1)[:, 0] for token in tokens_BT.ravel()]
    return jnp.stack(columns).reshape(*tokens_BT.shape, table.shape[0])


def parts() -> dict[str, int]:
    """Return in how many parts ``batch``, ``heads`` and ``width`` are split where an operation is to be marked; 1 each
    on one device.
    """
    where = _PARTITION.get()
    names = ("batch", "heads", "width")
    if where is None or where.one:
        return dict.fromkeys(names, 1)
    return {name: num_parts(where.mesh, getattr(where, name)) for name in names}


def device_numbers() -> list[int]:
    """Return the numbers of the devices of the mesh that is traced for, in its order; none for an abstract one."""
    where = _PARTITION.get()
    return [device.id for device in where.mesh.devices.flat] if where and isinstance(where.mesh, Mesh) else []


def per_device(
    outputs: str, *, prompts: bool = False, **letters: str | Mapping[str, str]
) -> Callable[[Callable], Callable]:
    """Mark an operation that runs on each device of a mesh for itself.

    Args:
        outputs: for every array that it returns its letters, such as ``BTNH``, or the argument that it is the like of;
            after ``flag:`` where it is returned only if that argument is true.
        prompts: whether it attends from queries (T, R rows of blocks) to keys (S), which may be those of whole prompts.
        letters: those of the arrays of arguments whose names do not end in them, for a dataclass by its fields. An
            array of one more axis is stacked, its first axis is L. Arrays without letters are whole on each device;
            an axis of letter Z has an entry for each.
    """

    def mark(operation: Callable) -> Callable:
        signature = inspect.signature(operation)

        @functools.wraps(operation)
        def run(*args: Any, **kwargs: Any) -> Any:
            where = _PARTITION.get()
            if where is None or where.one:
                return operation(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return _run(operation, where, bound.arguments, outputs, prompts, letters)

        return run

    return mark


def _run(operation, where, arguments: dict[str, Any], outputs: str, prompts: bool, letters: dict[str, Any]) -> Any:
    """Run a marked operation inside ``shard_map``."""
    length = where.length if prompts and where.length else ()
    if length and not is_whole_prompt(arguments, num_parts(where.mesh, length)):
        length = ()
    arrays = {name: value for name, value in arguments.items() if _holds_arrays(value)}
    rest = {name: value for name, value in arguments.items() if name not in arrays}
    axes = {name: _axes(value, letters.get(name, _suffix(name))) for name, value in arrays.items()}
    sizes: dict[str, set[int]] = {}
    for name, value in arrays.items():
        for array, named in zip(jax.tree.leaves(value), axes[name], strict=True):
            for letter, size in zip(named, array.shape, strict=True):
                sizes.setdefault(letter, set()).add(size)

    def splitting(names: tuple[str, ...], *letters: str) -> tuple[str, ...]:
        found = [size for letter in letters for size in sizes.get(letter, ())]
        return names if found and all(size % num_parts(where.mesh, names) == 0 for size in found) else ()

    batch, heads = splitting(where.batch, "B"), splitting(where.heads, "N", "K")
    split = dict.fromkeys("NK", heads or None) | dict.fromkeys("TRS", length or None) | {"B": batch or None}
    split["Z"] = where.mesh.axis_names

    def specs(named: list[str]) -> list[PartitionSpec]:
        return [PartitionSpec(*(split.get(letter) for letter in one)) for one in named]

    returned = []
    for one in outputs.split():
        flag, _, one = one.rpartition(":")
        if not flag or arguments[flag]:
            returned += axes[one] if one in axes else [one]
    structures = []

    def on_device(arrays: dict[str, list[jax.Array]]) -> tuple[jax.Array, ...]:
        given = {
            name: jax.tree.unflatten(jax.tree.structure(arguments[name]), leaves) for name, leaves in arrays.items()
        }
        with _within(Partition(mesh=where.mesh, batch=batch, heads=heads, one=True)):
            found = attend_part(operation, rest | given, length) if length else operation(**rest, **given)
            found, structure = jax.tree.flatten(found)
        structures.append(structure)
        return tuple(found)

    in_specs = {name: specs(named) for name, named in axes.items()}
    mapped = jax.shard_map(
        on_device, mesh=where.mesh, in_specs=(in_specs,), out_specs=tuple(specs(returned)), check_vma=False
    )
    found = mapped({name: jax.tree.leaves(value) for name, value in arrays.items()})
    return jax.tree.unflatten(structures[0], found)


@contextlib.contextmanager
def _within(where: Partition) -> Iterator[None]:
    token = _PARTITION.set(where)
    try:
        yield
    finally:
        _PARTITION.reset(token)


def _holds_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


def _axes(value: Any, letters: str | Mapping[str, str]) -> list[str]:
    """Return the letters of each array of an argument, as many as it has axes."""
    leaves = jax.tree.leaves(value)
    if isinstance(letters, Mapping):
        named = [letters[path[-1].name] for path, _ in jax.tree_util.tree_leaves_with_path(value)]
    else:
        named = letters.split() if letters else [""] * len(leaves)
    return [
        ("L" * array.ndim + one)[-array.ndim :] if array.ndim else "" for array, one in zip(leaves, named, strict=True)
    ]


def _suffix(name: str) -> str:
    last = name.rpartition("_")[2]
    return last if last.isupper() else ""
