"""The laws of dyninf over every plan of configs/plans.py: a plan listed there is held to all of them.

Each plan runs once on a ragged batch (``base``); every law changes one thing and compares. Logits are compared within
float32 rounding, tokens and counts exactly. Thresholds are set where this random model exits at different layers.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Compact, Plan
from dyninf import sparsity as sparse
from dyninf.configs.plans import plans
from dyninf.depth import (
    Confidence,
    DecayingThreshold,
    DepthDecay,
    ExitAt,
    FirstOf,
    Patience,
    Restricted,
    RunAll,
    Saturation,
    SkipLayers,
    Thresholds,
    TokenHalting,
    UnifiedSkip,
    every,
)
from dyninf.kv import PageScorer, ShadowKV, SnapKV, TopK

L, V, B, T, STEPS = 6, 61, 3, 7, 6
LENGTHS = np.array([7, 4, 5])
# A window that this model fills within a few tokens.
PLANS = {**plans(L), "exit_catch_up": Plan(depth=every(Confidence(threshold=0.9), step=1), fill="catch_up", window=2)}
NAMES = sorted(PLANS)
STATIC = {name for name in NAMES if PLANS[name].depth.static_layers(L) is not None}
# Differ from a plan beside them by how or when they score or by what they skip: held to the laws in slow runs.
ALIKE = {name for name in NAMES if name.startswith(("evict_", "select_", "sparse_"))}
ALIKE -= {"evict_h2o", "select_quest", "select_shadow_kv", "sparse_a_shape"}
ALIKE |= {f"exit_{rule}" for rule in ("budget", "calm", "capped", "entropy", "half", "margin", "mue", "saturation")}
ALIKE |= {"dense", "decay_linear", "skip_middle", "exit_confidence", "exit_patience"}  # exit_first_of asks both exits
ALONE = ["decay_power", "exit_catch_up", "exit_first_of"]  # one of each kind; the others run rows as these do
ALONE += [pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "exit_confidence_masked")]
COMPACT = ("decay_power", "exit_confidence", "exit_first_of")
# What a sparsity policy reads little of a short prompt with, and what it then reads everything with.
FEW = {shape: {"sinks": 1, "window": 2, "block_size": 1} for shape in (sparse.AShape, sparse.TriShape)}
FEW[sparse.TriShape]["last"] = 1
FEW |= {sparse.PowerAttention: {"window": 1, "unit": 1, "block_size": 1}, sparse.LazyLLM: {"budgets": (5, 3, 2)}}
FEW |= {policy: {"budget": 2, "block_size": 1} for policy in (sparse.PooledBlocks, sparse.FlexPrefill)}
FEW |= {sparse.VerticalSlash: {"slash": 1, "last_queries": 2, "block_size": 1}}
FEW |= {sparse.ZipVL: {"budget": 2, "probes": 2, "block_size": 1}}
FEW |= {sparse.XAttention: {"budget": 2, "stride": 1, "block_size": 1}}
ALL = {policy: {"window": T} for policy in (sparse.AShape, sparse.TriShape, sparse.PowerAttention)}
ALL |= {sparse.VerticalSlash: {"slash": T}, sparse.PooledBlocks: {"budget": T}}
ALL |= {policy: {"budget": T, "mass": 1.0} for policy in (sparse.ZipVL, sparse.XAttention)}
ALL |= {sparse.FlexPrefill: {"budget": T, "min_budget": T}}
ALL |= {sparse.LazyLLM: {"budgets": (T,) * 3}}
DRIVERS = ("segments", "masked", "scan")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits reach 30; the same sums in another order


def assert_same(got, want, rows=slice(None)):
    np.testing.assert_array_equal(got.tokens, want.tokens[rows])
    np.testing.assert_allclose(got.logits, want.logits[rows], **CLOSE)
    np.testing.assert_array_equal(got.stats.needed, want.stats.needed[:, rows])


def at_work(name):
    """The plan with thresholds at which this random model exits at several layers within a few tokens."""
    plan = PLANS[name]
    changed = {
        "decay_power": lambda depth: dataclasses.replace(depth, alpha=0.85),
        "decay_linear": lambda depth: dataclasses.replace(depth, length=6.0),
        "exit_saturation": lambda depth: dataclasses.replace(depth, policy=Saturation(threshold=0.9)),
        "exit_mue": lambda depth: Saturation(threshold=0.9),
        "exit_budget": lambda depth: FirstOf(
            policies=(dataclasses.replace(depth.policies[0], thresholds=(0.9, 0.8)), depth.policies[1])
        ),
        "halt_tokens": lambda depth: dataclasses.replace(depth, policy=TokenHalting(threshold=0.5)),
    }
    depth = changed.get(name, lambda depth: depth)(plan.depth)
    sparsity = dataclasses.replace(plan.sparsity, **FEW.get(type(plan.sparsity), {}))
    evict, select = scarce(plan.evict), scarce(plan.select)
    return dataclasses.replace(plan, depth=depth, evict=evict, select=select, sparsity=sparsity)


def scarce(policy):
    """The same eviction or selection of fewer tokens than this text has."""
    if not isinstance(policy, TopK):
        return policy
    scorer, selects = policy.scorer, isinstance(policy.scorer, PageScorer)
    scorer = SnapKV(window=2, kernel=3) if isinstance(scorer, SnapKV) else scorer
    scorer = dataclasses.replace(scorer, page_size=2) if selects else scorer
    budget = tuple(range(3 + L, 3, -1)) if isinstance(policy.budget, tuple) else 8 if selects else 6
    sizes = {"budget": budget, "sinks": min(policy.sinks, 1), "recent": min(policy.recent, 2)}
    if isinstance(scorer, ShadowKV):  # the longest prompt has three pages: an outlier, one chosen, one left
        scorer, sizes = dataclasses.replace(scorer, outliers=1, rank=3), {"budget": 2, "sinks": 0, "recent": 1}
    return dataclasses.replace(policy, scorer=scorer, reuse=policy.reuse and 0.2, **sizes)


def ample(policy):
    """The same eviction or selection with room for the whole text, though not for the cache's capacity."""
    if not isinstance(policy, TopK):
        return policy
    every_key = {"rank": 16} if isinstance(policy.scorer, ShadowKV) else {}
    return dataclasses.replace(policy, scorer=dataclasses.replace(policy.scorer, **every_key), budget=T + STEPS + 1)


def drivers(name):
    """The drivers that can run a plan; the one that compiles longest for some plans only."""
    if PLANS[name].fill == "catch_up":
        return ("segments",)
    if PLANS[name].sparsity.revive:
        return ("unrolled",)
    selected, kept = getattr(PLANS[name].select, "dense_layers", 0), getattr(PLANS[name].evict, "budget", 0)
    ran = DRIVERS[:2] if selected or isinstance(kept, tuple) else DRIVERS  # scan needs one kind of cache
    return (*ran, *(["unrolled"] if name in STATIC else []), *([Compact(capacity=2)] if name in COMPACT else []))


def everything(policy):
    """The same policy with a budget of every layer."""
    change = functools.partial(dataclasses.replace, policy)
    match policy:
        case RunAll():
            return policy
        case ExitAt():
            return change(layer=L)
        case SkipLayers():
            return change(layers=())
        case UnifiedSkip():
            return change(speedup=1.0)
        case DepthDecay(kind="power"):
            return change(alpha=1.0)
        case DepthDecay(kind="linear"):
            return change(min_layers=L)
        case Confidence() | Saturation():
            return change(threshold=1.0)
        case Thresholds():
            return change(thresholds=(math.inf,) * len(policy.layers))
        case TokenHalting():
            return change(threshold=0.0)
        case Patience():
            return change(patience=L)
        case DecayingThreshold():
            return change(policy=everything(policy.policy), temperature=0.0)
        case Restricted():
            return change(policy=everything(policy.policy))
        case FirstOf():
            return change(policies=tuple(everything(inner) for inner in policy.policies))
    raise ValueError(f"expected a known policy, got {policy}; say here which setting of it runs every layer")


def abstract(leaf):
    return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(0, V, (B, T))


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in NAMES])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def plan(name):
    return at_work(name)


@pytest.fixture(scope="module")
def base(roll, plan, prompts):
    return roll(plan, prompts, LENGTHS)


@pytest.fixture(scope="module")
def dense(roll, prompts):
    return roll(Plan(), prompts, LENGTHS)


def test_plan_saves_something(name, base, dense):
    """Without this the other laws could hold because a plan does nothing."""
    depths = set(base.stats.needed.ravel().tolist())
    evicts = base.stats.kv_live.max() < LENGTHS.max() + STEPS
    selects = (base.stats.kv_read < base.stats.kv_live).any()
    assert evicts == isinstance(PLANS[name].evict, TopK) and selects == isinstance(PLANS[name].select, TopK)
    assert isinstance(PLANS[name].sparsity, sparse.Dense) or not np.allclose(base.logits[:, 0], dense.logits[:, 0])
    assert depths == {L} if PLANS[name].depth == RunAll() else min(depths) < L
    assert len(depths) > 2 or name in STATIC


def test_full_budget_is_dense(roll, plan, prompts, dense):
    full = dataclasses.replace(plan, depth=everything(plan.depth), evict=ample(plan.evict), select=ample(plan.select))
    full = dataclasses.replace(full, sparsity=dataclasses.replace(plan.sparsity, **ALL.get(type(plan.sparsity), {})))
    assert_same(roll(full, prompts, LENGTHS), dense)


def test_new_threshold_and_rebuilt_plan_are_not_traced_again(roll, name, plan, prompts, base):
    before = roll.traces
    assert_same(roll(at_work(name), prompts, LENGTHS), base)
    lower = jax.tree.map(lambda leaf: 0.9 * leaf if isinstance(leaf, float) else leaf, plan)
    roll(lower, prompts, LENGTHS)
    assert roll.traces == before


def test_permuting_the_batch_permutes_the_output(roll, plan, prompts, base):
    order = np.array([2, 0, 1])
    assert_same(roll(plan, prompts[order], LENGTHS[order]), base, order)


def test_neighbours_change_nothing(roll, plan, prompts, base):
    others = np.random.default_rng(5).integers(0, V, (B, T))
    others[1] = prompts[1]
    got = roll(plan, others, np.array([2, LENGTHS[1], 6]))
    np.testing.assert_array_equal(got.tokens[1], base.tokens[1])
    np.testing.assert_allclose(got.logits[1], base.logits[1], **CLOSE)
    np.testing.assert_array_equal(got.stats.needed[:, 1], base.stats.needed[:, 1])


@pytest.mark.parametrize("alone", ALONE)
def test_a_sequence_alone_is_the_sequence_in_its_batch(roll, alone, prompts):
    plan = at_work(alone)
    base = roll(plan, prompts, LENGTHS)
    for row in range(B):
        assert_same(roll(plan, prompts[[row]], LENGTHS[[row]]), base, [row])


def test_padding_changes_nothing(roll, plan, prompts, base):
    random = np.random.default_rng(6).integers(0, V, (B, T + 4))
    real = np.arange(T)[None] < LENGTHS[:, None]
    random[:, :T] = np.where(real, prompts, random[:, :T])
    assert_same(roll(plan, random, LENGTHS), base)


def test_poisoned_empty_slots_change_nothing(roll, plan, prompts, base):
    got = roll(plan, prompts, LENGTHS, edit=lambda state, step: roll.poison(state, roll.empty(state)))
    np.testing.assert_array_equal(got.logits, base.logits)


def test_a_finished_neighbour_changes_nothing_and_costs_nothing(roll, plan, prompts, base):
    def finish(state, step):
        state = roll.poison(state, roll.empty(state))
        return dataclasses.replace(state, done=state.done.at[1].set(True))

    got = roll(plan, prompts, LENGTHS, edit=finish)
    for row in (0, 2):
        np.testing.assert_allclose(got.logits[row], base.logits[row], **CLOSE)
        np.testing.assert_array_equal(got.stats.needed[:, row], base.stats.needed[:, row])
    assert not got.stats.active[:, 1].any() and not got.stats.needed[:, 1].any()
    for cache in got.state.cache.layers:
        assert np.isnan(cache.v[1, LENGTHS[1] :]).all(), "a sequence that is done wrote to its cache"
    assert (got.stats.kv_live[:, 1] == LENGTHS[1]).all() and (got.tokens[1] == got.tokens[1, 0]).all()


def test_counts_are_ordered(base, name):
    length = LENGTHS[None] + np.arange(1, STEPS + 1)[:, None]
    assert (base.stats.kv_read <= base.stats.kv_live).all() and (base.stats.kv_live <= length).all()
    np.testing.assert_array_equal(base.state.cache.length, length[-1])
    # Decisions are one layer apart here, so the batch runs what its deepest sequence needs.
    np.testing.assert_array_equal(base.stats.run, base.stats.needed.max(axis=1))


def test_the_drivers_agree_and_keep_the_types_of_the_state(roll, name, plan, prompts, base):
    for driver in drivers(name):
        before = roll.step._cache_size()
        got = roll(plan, prompts, LENGTHS, driver=driver)
        assert roll.step._cache_size() <= before + 1, "a step was compiled for the state of another"
        assert jax.tree.structure(got.state) == jax.tree.structure(base.state)
        assert list(map(abstract, jax.tree.leaves(got.state))) == list(map(abstract, jax.tree.leaves(base.state)))
        assert_same(got, base)
        whole = max(plan.depth.prefill_layers(L)) + 1  # layers that the prompt does not run either are not compiled
        np.testing.assert_array_equal(got.stats.run, whole if driver in ("masked", "scan") else base.stats.run)


def test_teacher_forcing_is_decoding(roll, name, plan, prompts, base):
    text = np.zeros((B, T + STEPS), np.int32)
    for row, length in enumerate(LENGTHS):
        text[row, :length] = prompts[row, :length]
        text[row, length : length + STEPS] = base.tokens[row, :STEPS]
    for driver in ("masked", "segments", "scan") if name in ("exit_confidence_masked", "unified_skip") else ("masked",):
        sizes = {"lengths": jnp.asarray(LENGTHS + STEPS), "prompt_lengths": jnp.asarray(LENGTHS)}
        out = roll.forward(roll.model, jnp.asarray(text), plan, driver=driver, **sizes)
        for row, length in enumerate(LENGTHS):
            logits = np.asarray(out.logits)[row, length - 1 : length + STEPS]
            np.testing.assert_allclose(logits, base.logits[row], **CLOSE)
            needed = np.asarray(out.needed)[row, length : length + STEPS]
            np.testing.assert_array_equal(needed, base.stats.needed[:, row])
            assert (np.asarray(out.needed)[row, length + STEPS :] == 0).all()
