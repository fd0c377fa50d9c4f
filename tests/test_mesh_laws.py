"""Every plan of configs/plans.py on many devices: what one device gives, token for token, with caches split as meant.

The eight devices are simulated on the CPU. Sums over heads and the MLP are split, so that logits agree within float32
rounding; tokens and the layers that they needed agree exactly.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.kv import KeyNorm, RetrievalAttention
from dyninf.models import cache_shardings, make_mesh, on_mesh, place
from tests.test_plan_laws import NAMES, at_work

B, T, STEPS, V = 8, 7, 6, 64
LENGTHS = np.array([7, 4, 5, 6, 1, 3, 2, 7])
MESHES = {f"{data}x{tensor}": {"data": data, "tensor": tensor} for data, tensor in ((8, 1), (4, 2), (2, 4), (1, 8))}
# One plan on a mesh that splits key/value heads, and one on one with more devices than there are; exits on a mesh are
# also in tests/models/test_mesh_model.py.
QUICK = {("evict_h2o", "2x4"), ("select_quest", "1x8")}
CASES = [
    pytest.param(name, mesh, id=f"{name}-{mesh}", marks=[pytest.mark.slow] * ((name, mesh) not in QUICK))
    for name in NAMES
    for mesh in MESHES
]


def decided(name):
    """The plan at work, with no more clusters than these prompts have: which of equal ones is nearest is rounding."""
    plan = at_work(name)
    if isinstance(getattr(plan.select, "scorer", None), RetrievalAttention):
        scorer = dataclasses.replace(plan.select.scorer, centroids=2, samples=4)
        return dataclasses.replace(plan, select=dataclasses.replace(plan.select, scorer=scorer))
    return plan


def rolled(roll, name, prompts):
    """What a plan does with prompts; with KeyNorm, to which equal tokens of the first layer are worth the same, with
    texts in which none occurs twice.
    """
    plan = decided(name)
    if not isinstance(getattr(plan.evict, "scorer", None), KeyNorm):
        return roll(plan, prompts, LENGTHS)
    texts = np.random.default_rng(0).permuted(np.tile(np.arange(V, dtype=np.int32), (B, 1)), axis=1)

    def follow(state, step):
        return dataclasses.replace(state, token=jnp.asarray(texts[:, T + step]))

    return roll(plan, texts[:, :T], LENGTHS, edit=follow)


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(0, V, (B, T))


@pytest.fixture(scope="module")
def one_device(even_model, roller, prompts):
    """The rollout of a plan on one device, computed once for all meshes."""
    roll, known = roller(even_model), {}

    def rollout(name):
        if name not in known:
            known[name] = rolled(roll, name, prompts)
        return known[name]

    return rollout


@pytest.fixture(scope="module")
def on(even_model, roller):
    """The rolls of the model on each mesh."""
    rolls = {}

    def roll(mesh):
        if mesh not in rolls:
            made = make_mesh(MESHES[mesh])
            rolls[mesh] = roller(on_mesh(place(even_model, made), made))
        return rolls[mesh]

    return roll


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_plan_on_a_mesh_is_the_plan(name, mesh, one_device, on, prompts):
    roll, want = on(mesh), one_device(name)
    got = rolled(roll, name, prompts)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.stats.needed, want.stats.needed)
    np.testing.assert_array_equal(got.stats.kv_read, want.stats.kv_read)
    # As far as the laws of plans: logits reach 30; the same sums in another order.
    np.testing.assert_allclose(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    meant = cache_shardings(got.state.cache, roll.model.where.mesh)
    for (path, array), sharding in zip(
        jax.tree_util.tree_leaves_with_path(got.state.cache), jax.tree.leaves(meant), strict=True
    ):
        assert array.sharding.is_equivalent_to(sharding, array.ndim), jax.tree_util.keystr(path)
