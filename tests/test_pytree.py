"""The value objects: what is a leaf, what is structure, equality, hashing, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, describe, pytree
from dyninf.depth import Confidence, ExitAt, UnifiedSkip, every, first_of


@pytree(static=("size",))
class Box:
    weight: float | jax.Array
    size: int = 3


def test_leaves_and_structure():
    box = Box(weight=0.5, size=4)
    assert jax.tree.leaves(box) == [0.5]
    assert jax.tree.structure(box) == jax.tree.structure(Box(weight=9.0, size=4)) != jax.tree.structure(Box(weight=0.5))
    assert jax.tree.map(lambda leaf: 2 * leaf, box) == Box(weight=1.0, size=4)


@pytree(lost=("room",))
class Tenant:
    name: float
    room: int = 0


def test_operations_on_trees_lose_some_fields():
    tenant = Tenant(name=1.0, room=7)
    assert jax.tree.leaves(tenant) == [1.0] and tenant == Tenant(name=1.0)
    assert tenant.room == 7 and jax.tree.map(lambda leaf: leaf, tenant).room == 0


def test_instances_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Box(weight=1.0).weight = 2.0
    with pytest.raises(TypeError):
        Box(1.0)
    assert repr(Box(weight=1.0)) == "Box(weight=1.0, size=3)"


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (Box(weight=1.0), Box(weight=1.0), True),
        (Box(weight=1), Box(weight=1.0), True),
        (Box(weight=0.0), Box(weight=-0.0), True),
        (Box(weight=1.0), Box(weight=jnp.float32(1)), True),
        (Box(weight=1.0), Box(weight=2.0), False),
        (Box(weight=1.0), Box(weight=1.0, size=4), False),
        (Box(weight=jnp.arange(3.0)), Box(weight=np.arange(3.0)), True),
        (Box(weight=jnp.arange(3.0)), Box(weight=jnp.arange(4.0)), False),
        (Box(weight=jnp.ones(())), Box(weight=jnp.ones(1)), False),
        (Box(weight=(1.0, 2.0)), Box(weight=(1.0, 2.0)), True),
        (Box(weight=(1.0, 2.0)), Box(weight=[1.0, 2.0]), False),
        (Plan(), Plan(depth=Confidence(threshold=0.5)), False),
        (first_of(every(Confidence(threshold=0.5), step=2)), first_of(every(Confidence(threshold=0.5), step=2)), True),
        (Confidence(threshold=0.5), Confidence(threshold=0.5, measure="margin"), False),
    ],
)
def test_equality_is_by_value_and_equal_values_hash_alike(one, other, equal):
    assert (one == other) is equal
    if equal:
        assert hash(one) == hash(other) and len({one, other}) == 1


def test_another_type_is_another_value():
    assert Box(weight=1.0) != 1.0 and Confidence(threshold=0.5) != ExitAt(layer=2)


def test_a_new_static_value_is_a_new_program_and_a_new_leaf_is_not():
    traced = []

    @jax.jit
    def run(box):
        traced.append(box.size)
        return box.weight * box.size

    assert float(run(Box(weight=2.0))) == 6.0 and float(run(Box(weight=4.0))) == 12.0
    assert float(run(Box(weight=2.0, size=5))) == 10.0
    assert traced == [3, 5]


def test_a_static_field_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"static fields among \['weight'\], got \['weigth'\]"):

        @pytree(static=("weigth",))
        class Wrong:
            weight: float


def test_describe_names_what_differs_from_dense():
    assert describe(Plan()) == "dense"
    plan = Plan(depth=ExitAt(layer=2), fill="mask")
    assert describe(plan) == "depth=ExitAt(layer=2), fill='mask'"


def test_structures_of_different_classes_differ():
    """Two policies with equal static fields must not share a compiled program."""
    one, other = jax.tree.structure(ExitAt(layer=2)), jax.tree.structure(UnifiedSkip(speedup=2.0))
    assert one != other
    assert jax.tree.structure(Plan(depth=ExitAt(layer=2))) != jax.tree.structure(Plan(depth=UnifiedSkip(speedup=2.0)))
