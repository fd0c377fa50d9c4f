"""The laws of tests/test_plan_laws.py for policies with learned weights, which no named plan can hold.

The weights are chosen so that tokens decide differently.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, decode_step
from dyninf.depth import CandidateExit, DepthShortcut, MixtureOfDepths

L, D, V, B, T = 6, 24, 61, 3, 7
LENGTHS = np.array([7, 4, 5])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits reach 30; the same sums in another order


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


MIXTURE = MixtureOfDepths(router=0.1 * random(L, D), bias=jnp.zeros(L))
SHORTCUT = DepthShortcut(
    router=0.1 * random(L, D), bias=jnp.full(L, -1.0), down=random(L, D, 3, seed=1) / 5, up=random(L, 3, D, seed=2)
)
# Exits where the probability of a candidate, less half of what it rose by, is above 0.51.
CANDIDATES = CandidateExit(
    w_in=jnp.tile(jnp.concatenate([jnp.zeros((4, 4)), jnp.eye(4), -0.5 * jnp.eye(4)])[None], (L, 1, 1)),
    b_in=jnp.full((L, 4), -0.5),
    w_out=jnp.full((L, 4), 10.0),
    b_out=jnp.full(L, -0.1),
)
PLANS = {
    "mixture": Plan(depth=MIXTURE, fill="mask"),
    "shortcut": Plan(depth=SHORTCUT),
    "candidates": Plan(depth=CANDIDATES),
}
NOTHING = {  # the setting that runs every layer
    "mixture": {"bias": jnp.full(L, jnp.inf)},
    "shortcut": {"threshold": 1.0},
    "candidates": {"threshold": 1.0},
}


@pytest.fixture(scope="module", params=PLANS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(0, V, (B, T))


@pytest.fixture(scope="module")
def base(roll, name, prompts):
    return roll(PLANS[name], prompts, LENGTHS)


def assert_same(got, want, rows=slice(None)):
    np.testing.assert_array_equal(got.tokens, want.tokens[rows])
    np.testing.assert_allclose(got.logits, want.logits[rows], **CLOSE)
    np.testing.assert_array_equal(got.stats.needed, want.stats.needed[:, rows])


def test_tokens_decide_differently(base):
    assert len(set(base.stats.needed.ravel().tolist())) > 2


def test_full_budget_is_dense(roll, name, prompts):
    plan = PLANS[name]
    full = dataclasses.replace(plan, depth=dataclasses.replace(plan.depth, **NOTHING[name]))
    assert_same(roll(full, prompts, LENGTHS), roll(Plan(), prompts, LENGTHS))


def test_new_weights_are_not_traced_again(roll, name, prompts, base):
    before = roll.traces
    roll(jax.tree.map(lambda leaf: 0.9 * leaf, PLANS[name]), prompts, LENGTHS)
    assert roll.traces == before


# What stands in for a layer under "masked": tests/test_skip_state.py.
QUICK = (("mixture", "masked"), ("candidates", "masked"), ("candidates", "scan"))


@pytest.mark.parametrize(
    ("name", "driver"),
    [
        pytest.param(name, driver, marks=[pytest.mark.slow] * ((name, driver) not in QUICK))
        for name in PLANS
        for driver in ("masked", "scan")
    ],
    indirect=["name"],
)
def test_the_drivers_agree_and_keep_the_types_of_the_state(roll, tiny_model, name, prompts, base, driver):
    assert_same(roll(PLANS[name], prompts, LENGTHS, driver=driver), base)
    step = functools.partial(decode_step, driver=driver)
    after, _ = jax.eval_shape(step, tiny_model, base.state, PLANS[name])
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(base.state)
    ]


def test_neighbours_and_padding_change_nothing(roll, name, prompts, base):
    others = np.random.default_rng(5).integers(0, V, (B, T))
    others[1, : LENGTHS[1]] = prompts[1, : LENGTHS[1]]
    got = roll(PLANS[name], others, np.array([2, LENGTHS[1], 6]))
    np.testing.assert_array_equal(got.tokens[1], base.tokens[1])
    np.testing.assert_allclose(got.logits[1], base.logits[1], **CLOSE)
    np.testing.assert_array_equal(got.stats.needed[:, 1], base.stats.needed[:, 1])


def test_teacher_forcing_is_decoding(roll, name, prompts, base):
    text = np.zeros((B, T + roll.steps), np.int32)
    for row, length in enumerate(LENGTHS):
        text[row, :length] = prompts[row, :length]
        text[row, length : length + roll.steps] = base.tokens[row, : roll.steps]
    sizes = {"lengths": jnp.asarray(LENGTHS + roll.steps), "prompt_lengths": jnp.asarray(LENGTHS)}
    out = roll.forward(roll.model, jnp.asarray(text), PLANS[name], driver="masked", **sizes)
    for row, length in enumerate(LENGTHS):
        logits = np.asarray(out.logits)[row, length - 1 : length + roll.steps]
        np.testing.assert_allclose(logits, base.logits[row], **CLOSE)
        needed = np.asarray(out.needed)[row, length : length + roll.steps]
        np.testing.assert_array_equal(needed, base.stats.needed[:, row])
