"""One decorator for every value object of dyninf: a frozen, keyword-only dataclass that is a JAX pytree.

Fields named in ``static`` become part of the tree structure: they decide shapes and control flow, and a new value
means a new compilation. Every other field is a leaf: it may be traced, swept and vmapped without a recompilation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, dataclass_transform

import jax
import numpy as np


@dataclass_transform(frozen_default=True, kw_only_default=True)
def pytree(*, static: tuple[str, ...] = (), lost: tuple[str, ...] = ()) -> Callable[[type], type]:
    """Make a class a frozen keyword-only dataclass registered as a pytree.

    Instances compare by value, also when they hold arrays, and print like dataclasses.

    Args:
        static: names of the fields that are part of the tree structure; their values must be hashable.
        lost: names of fields that what is made by operations on trees has by default, whatever they were.

    Raises:
        ValueError: if ``static`` or ``lost`` names a field that the class does not have.
    """

    def decorate(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted({*static, *lost} - set(names))
        if unknown:
            raise ValueError(f"expected static fields among {names}, got {unknown}; correct the decorator of {cls}")
        leaves = [name for name in names if name not in {*static, *lost}]
        _register(cls, leaves, static)
        cls.__eq__ = _equal
        cls.__hash__ = _hash
        return cls

    return decorate


def _register(cls: type, leaves: list[str], static: tuple[str, ...]) -> None:
    # Not jax.tree_util.register_dataclass: structures that it makes compare equal when only their classes differ (seen
    # with jax 0.10.2 and 0.11.2), and jit may then run the program of another policy.
    keys = [jax.tree_util.GetAttrKey(name) for name in leaves]

    def aux(value: Any) -> tuple:
        return (cls, *(getattr(value, name) for name in static))

    def flatten(value: Any) -> tuple[tuple, tuple]:
        return tuple(getattr(value, name) for name in leaves), aux(value)

    def flatten_with_keys(value: Any) -> tuple[tuple, tuple]:
        return tuple((key, getattr(value, name)) for key, name in zip(keys, leaves, strict=True)), aux(value)

    def unflatten(structure: tuple, children: tuple) -> Any:
        fields = dict(zip(leaves, children, strict=True))
        return cls(**fields, **dict(zip(static, structure[1:], strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


def _equal(self: Any, other: Any) -> bool:
    if type(self) is not type(other):
        return NotImplemented
    leaves, structure = jax.tree.flatten(self)
    other_leaves, other_structure = jax.tree.flatten(other)
    return structure == other_structure and all(np.array_equal(a, b) for a, b in zip(leaves, other_leaves, strict=True))


def _hash(self: Any) -> int:
    # Equal values hash alike whatever their types: 1, 1.0 and an array of 1.
    leaves, structure = jax.tree.flatten(self)
    return hash((structure, tuple((np.shape(leaf), *np.ravel(leaf).tolist()) for leaf in leaves)))
