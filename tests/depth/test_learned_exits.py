"""The laws of tests/depth/test_learned_policies.py for the exits with learned weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan
from dyninf.compaction import Compact
from dyninf.depth import AdaptedExit, JointExit, MetaExit, StopExit

L, D, V, B, T = 3, 24, 61, 3, 7
LENGTHS = np.array([7, 4, 5])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits reach 30; the same sums in another order


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


ADAPTED = AdaptedExit(
    gate=0.02 * random(L, D),
    bias=jnp.full(L, -0.1),
    scale=1 + random(L, D, seed=3),
    down=random(L, D, 3, seed=1) / 5,
    up=random(L, 3, D, seed=2),
)
POLICIES = {
    "adapted": ADAPTED,
    "meta": MetaExit(gate=0.02 * random(L, D), bias=jnp.zeros(L)),
    "joint": JointExit(gate=jnp.tile(jnp.array([[3.0, -1.0, 3.0, -1.0]]), (L, 1)), bias=jnp.full(L, -4.0)),
    "stop": StopExit(weight=0.05 * random(L, D, 3, seed=6), bias=jnp.zeros((L, 3)), stop_threshold=0.7),
}
NOTHING = {  # the setting that runs every layer
    "adapted": {"threshold": 1.0},
    "meta": {"threshold": 1.0},
    "joint": {"threshold": 1.0},
    "stop": {"exit_threshold": 1.0, "stop_threshold": 1.0},
}


# The gate of "meta" is the one of "adapted"; tests/depth/test_meta.py runs it alone.
@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n == "meta")) for n in POLICIES])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(0, V, (B, T))


@pytest.fixture(scope="module")
def base(shallow_roll, name, prompts):
    return shallow_roll(Plan(depth=POLICIES[name]), prompts, LENGTHS)


def test_tokens_decide_differently(base):
    assert len(set(base.stats.needed.ravel().tolist())) > 2


def test_full_budget_is_dense_and_not_traced_again(shallow_roll, name, prompts, base):
    before = shallow_roll.traces
    full = shallow_roll(Plan(depth=dataclasses.replace(POLICIES[name], **NOTHING[name])), prompts, LENGTHS)
    assert shallow_roll.traces == before and (full.stats.needed == L).all()
    want = shallow_roll(Plan(), prompts, LENGTHS)
    np.testing.assert_array_equal(full.tokens, want.tokens)
    np.testing.assert_allclose(full.logits, want.logits, **CLOSE)


def test_teacher_forcing_is_decoding(shallow_roll, name, prompts, base):
    text = np.zeros((B, T + shallow_roll.steps), np.int32)
    for row, length in enumerate(LENGTHS):
        text[row, :length] = prompts[row, :length]
        text[row, length : length + shallow_roll.steps] = np.maximum(base.tokens[row, : shallow_roll.steps], 0)
    sizes = {"lengths": jnp.asarray(LENGTHS + shallow_roll.steps), "prompt_lengths": jnp.asarray(LENGTHS)}
    out = shallow_roll.forward(
        shallow_roll.model, jnp.asarray(text), Plan(depth=POLICIES[name]), driver="masked", **sizes
    )
    for row, length in enumerate(LENGTHS):
        steps = base.stats.active[:, row].sum()  # fewer where the policy ended the text
        logits = np.asarray(out.logits)[row, length - 1 : length + steps]
        np.testing.assert_allclose(logits, base.logits[row, : steps + 1], **CLOSE)
        needed = np.asarray(out.needed)[row, length : length + steps]
        np.testing.assert_array_equal(needed, base.stats.needed[:steps, row])


def test_neighbours_and_padding_change_nothing(shallow_roll, name, prompts, base):
    others = np.random.default_rng(5).integers(0, V, (B, T))
    others[1, : LENGTHS[1]] = prompts[1, : LENGTHS[1]]
    got = shallow_roll(Plan(depth=POLICIES[name]), others, np.array([2, LENGTHS[1], 6]))
    np.testing.assert_array_equal(got.tokens[1], base.tokens[1])
    np.testing.assert_allclose(got.logits[1], base.logits[1], **CLOSE)
    np.testing.assert_array_equal(got.stats.needed[:, 1], base.stats.needed[:, 1])


# "stop" also ends texts, whose rows are left out.
@pytest.mark.parametrize("name", [pytest.param("adapted", marks=pytest.mark.slow), "stop"], indirect=True)
def test_gathered_rows_decide_the_same(shallow_roll, name, prompts, base):
    got = shallow_roll(Plan(depth=POLICIES[name]), prompts, LENGTHS, driver=Compact(capacity=1))
    np.testing.assert_array_equal(got.tokens, base.tokens)
    np.testing.assert_array_equal(got.stats.needed, base.stats.needed)


def test_nan_in_empty_slots_is_never_read(shallow_roll, name, prompts, base):
    got = shallow_roll(
        Plan(depth=POLICIES[name]),
        prompts,
        LENGTHS,
        edit=lambda state, _: shallow_roll.poison(state, shallow_roll.empty(state)),
    )
    np.testing.assert_array_equal(got.tokens, base.tokens)
    np.testing.assert_array_equal(got.stats.needed, base.stats.needed)
