"""Keys and values that a schedule never wrote are never read: they are overwritten with NaN and nothing changes.

Poisoned are exactly the (layer, slot) entries that a token skipped, as the rule says on paper. A control poisons one
layer more and must find NaN in the logits.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan
from dyninf.configs.plans import plans
from dyninf.depth import Confidence, DepthDecay, ExitAt, SkipLayers, UnifiedSkip

L, V, B, T = 6, 61, 3, 7
LENGTHS = np.array([7, 4, 5])
POWER = DepthDecay(kind="power", alpha=0.85, min_layers=3, flex_start=1)
LINEAR = DepthDecay(kind="linear", length=6.0, min_layers=3, flex_start=1)
# name -> (nested policy, layers that the prompt skips, layers that generated token i skips)
SCHEDULES = {
    "exit_at": (ExitAt(layer=3), {3, 4, 5}, lambda i: {3, 4, 5}),
    "skip_always": (SkipLayers(layers=(1, 4)), {1, 4}, lambda i: {1, 4}),
    "skip_after_prompt": (SkipLayers(layers=(1, 4), prompt=False), set(), lambda i: {1, 4}),
    "unified_skip": (UnifiedSkip(speedup=2.0), set(), lambda i: {1, 2, 4}),  # keeps 0, 6 // 2 and 5
    # 6 * 0.85 ** i = 6, 5.1, 4.3, 3.7, 3.1, ... layers: the lowest after layer 0 go first.
    "decay_power": (POWER, set(), lambda i: set(range(1, 1 + [0, 1, 2, 3, 3, 3][i]))),
    # 6 - 3 * i / 6 = 6, 5.5, 5, 4.5, 4, 3.5 layers.
    "decay_linear": (LINEAR, set(), lambda i: set(range(1, 1 + [0, 1, 1, 2, 2, 3][i]))),
}


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(0, V, (B, T))


def test_every_nested_policy_is_listed():
    listed = {type(policy) for policy, _, _ in SCHEDULES.values()}
    named = {type(plan.depth) for plan in plans(L).values() if plan.depth.nested}
    assert listed == named and all(policy.nested for policy, _, _ in SCHEDULES.values())


# Of two that skip alike, one.
QUICK = {(name, None) for name in SCHEDULES if name != "decay_linear"} | {("skip_always", "masked")}
QUICK |= {("decay_power", "masked")}
CASES = [
    pytest.param(name, driver, marks=[pytest.mark.slow] * ((name, driver) not in QUICK))
    for name in SCHEDULES
    for driver in (None, "masked")
]


@pytest.mark.parametrize(("name", "driver"), CASES)
def test_nested_schedules_never_read_what_is_missing(roll, name, driver, prompts):
    policy, prompt_skips, token_skips = SCHEDULES[name]
    plan = Plan(depth=policy)
    want = roll(plan, prompts, LENGTHS, driver=driver)

    def poison(state, step, reach=0):
        """Poison what the prompt and the token before ``step`` skipped, and ``reach`` of the layers that it ran."""
        bad = roll.empty(state)
        bad[sorted(prompt_skips)] = True
        if step:
            skipped = token_skips(step - 1)
            assert (want.stats.needed[step - 1] == L - len(skipped)).all()
            ran = [layer for layer in range(L) if layer not in skipped]
            for layer in (*skipped, *ran[:reach]):
                bad[layer, np.arange(B), np.asarray(state.cache.length) - 1] = True
        return roll.poison(state, bad)

    np.testing.assert_array_equal(roll(plan, prompts, LENGTHS, driver=driver, edit=poison).logits, want.logits)
    control = roll(plan, prompts, LENGTHS, driver=driver, edit=functools.partial(poison, reach=1))
    assert np.isnan(control.logits[:, 2:]).all(), "poison in a layer that ran was not read"


@pytest.mark.parametrize("name", ["skip_after_prompt", "unified_skip"])
def test_prompt_entries_of_layers_that_never_run_again_are_not_read(roll, name, prompts):
    policy, _, token_skips = SCHEDULES[name]
    want = roll(Plan(depth=policy), prompts, LENGTHS)

    def poison(state, step):
        bad = roll.empty(state)
        bad[sorted(token_skips(0))] = True
        return roll.poison(state, bad)

    np.testing.assert_array_equal(roll(Plan(depth=policy), prompts, LENGTHS, edit=poison).logits, want.logits)


@pytest.mark.parametrize("driver", [None, "masked", "scan"])
def test_masked_fill_never_reads_what_is_missing(roll, driver, prompts):
    plan = Plan(depth=Confidence(threshold=0.9), fill="mask")
    want = roll(plan, prompts, LENGTHS, driver=driver)
    holes = []

    def poison(state, step):
        missing = np.stack([~np.asarray(cache.valid) for cache in state.cache.layers])
        holes.append((missing & ~roll.empty(state)).sum())
        return roll.poison(state, missing)

    np.testing.assert_array_equal(roll(plan, prompts, LENGTHS, driver=driver, edit=poison).logits, want.logits)
    # Every layer that a token did not need is one hole, and nothing else is.
    np.testing.assert_array_equal(np.diff(holes), (L - want.stats.needed[:-1]).sum(axis=1))
    assert holes[0] == 0 and holes[-1] > 0


def test_propagated_entries_are_read(roll, prompts):
    """The control of the test above: with ``propagate`` the entries of layers that did not run do matter."""
    plan = Plan(depth=Confidence(threshold=0.9))
    want = roll(plan, prompts, LENGTHS)

    def poison(state, step):
        bad = roll.empty(state)
        if step:
            for row in range(B):
                bad[want.stats.needed[step - 1, row] :, row, int(state.cache.length[row]) - 1] = True
        return roll.poison(state, bad)

    assert np.isnan(roll(plan, prompts, LENGTHS, edit=poison).logits).any()
    assert jnp.isfinite(want.logits).all()
