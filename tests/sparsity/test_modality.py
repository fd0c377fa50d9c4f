"""Tokens taken group by group: blocks by hand, attention against masks, the grid that a head finds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Plan, forward, prefill
from dyninf.attention import attend_uncached
from dyninf.sparsity import AShape, ByModality, Grid, PerHead, density, kept_mass
from pallas_kernels.index import check_blocks
from tests.sparsity.test_vertical_slash import choose, draw, lists, observe

# Text and video by turns, and padding; two sequences of their own lengths.
GROUPS = np.array([[0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0], [1] * 5 + [0] * 3 + [1] * 3 + [7] * 8])
LENGTHS = np.array([19, 11])
NEAR = {
    "own kind alone": ((None, 0), (0, None)),
    "text sees all": ((None, None), (0, 2)),
    "near": ((1, 2), (1, 1)),
    "everything": ((None, None), (None, None)),
}


def seen_by(group_T, near, size, order):
    """Which key each query may see ``[T, T]``, from the definition: blocks of ``size`` of the tokens in their order."""
    length, blocks = len(group_T), [order[first : first + size] for first in range(0, len(order), size)]
    seen = np.zeros((length, length), bool)
    for row in blocks:
        named = set()
        for a, widths in enumerate(near):
            last = max((t for t in row if group_T[t] == a), default=-1)
            for b, width in enumerate(widths):
                begun = [c for c, block in enumerate(blocks) if any(group_T[t] == b and t <= last for t in block)]
                named |= set(begun if width is None else begun[len(begun) - min(width, len(begun)) :])
        for t in row:
            for c in named:
                seen[t, [s for s in blocks[c] if s <= t]] = True
    return seen


def in_order(group_T, length):
    """Positions sorted by group, padding last."""
    return sorted(range(len(group_T)), key=lambda t: (group_T[t] if t < length else 99, t))


def masked(q, k, v, seen_TS):
    """Attention of one head over the keys that are seen, float64."""
    scores = np.where(seen_TS, q.astype(float) @ k.astype(float).T * q.shape[1] ** -0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def attend(policy, q, k, v, lengths):
    build = attend_uncached(lengths, keep_inactive=True, prompt_lengths_B=lengths, sparsity=policy)
    return build(None, jnp.ones(q.shape[:2], bool), 0)(q, k, v)[0]


def test_by_hand():
    # Text 0 3 4 7 and video 1 2 5 6, in blocks of two: text in 0 (0 3), 1 (4 7), video in 2 (1 2), 3 (5 6).
    groups = jnp.array([[0, 1, 1, 0, 0, 1, 1, 0]])
    obs = observe(np.ones((1, 8, 1, 2), np.float32), np.ones((1, 8, 1, 2), np.float32))
    # Text reads the text before it and the last block of video: up to 3 that is 1 2, up to 7 it is 5 6. Video reads
    # all video and no text.
    chosen = choose(ByModality(groups=groups, near=((None, 1), (0, None)), block_size=2), obs)
    assert chosen.order.tolist() == [[[0, 3, 4, 7, 1, 2, 5, 6]]]
    assert lists(chosen.index)[0, 0].tolist() == [{0, 2}, {0, 1, 3}, {2}, {2, 3}]
    # One block each: text that ends with 7 reads 4 7; video that ends with 2 reads 0 3, which begins before it.
    chosen = choose(ByModality(groups=groups, near=((1, 0), (1, 1)), block_size=2), obs)
    assert lists(chosen.index)[0, 0].tolist() == [{0}, {1}, {0, 2}, {1, 3}]


@pytest.mark.parametrize("near", NEAR.values(), ids=NEAR)
def test_regrouped_attention_is_masked_attention(rng, near):
    q, k, v = (rng.normal(size=(2, 19, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    for b, length in enumerate(LENGTHS):
        k[b, length:], v[b, length:] = np.nan, np.nan
    policy = ByModality(groups=jnp.asarray(GROUPS), near=near, block_size=4)
    got = attend(policy, q, k, v, jnp.asarray(LENGTHS))
    chosen = choose(policy, observe(q, k, LENGTHS))
    check_blocks(chosen.index, batch=2, num_heads=4, num_queries=19)
    for b, length in enumerate(LENGTHS):
        order = in_order(GROUPS[b], length)
        np.testing.assert_array_equal(chosen.order[b, 0], order)
        group = np.where(np.arange(19) < length, GROUPS[b], 9)
        seen = seen_by(group, near, 4, order)[:length, :length]
        if near == NEAR["everything"]:
            assert (seen == np.tri(length, dtype=bool)).all()
        else:
            assert seen.sum() < length * (length + 1) // 2
        for n in range(4):
            want = masked(q[b, :length, n], k[b, :length, n // 2], v[b, :length, n // 2], seen)
            np.testing.assert_allclose(got[b, :length, n], want, atol=2e-5)


def planted(stride, first, tokens=60, strong=3.0):
    """Queries that pay most to every stride-th key."""
    k = np.zeros((1, tokens, 1, 2), np.float32)
    k[0, first::stride, 0, 0] = strong
    return np.full((1, tokens, 1, 2), 1.5, np.float32), k


@pytest.mark.parametrize(("stride", "first"), [(3, 0), (5, 2), (7, 6)])
def test_the_planted_grid_is_found(stride, first):
    q, k = planted(stride, first)
    policy = Grid(strides=(3, 5, 7), near=1, probes=9, block_size=4)
    found = policy.find(observe(q, k, [49]))
    assert [int(part[0, 0]) for part in found] == [stride, first]
    # Every row reads all tokens of the grid before it; rows of the grid read everything.
    chosen = choose(policy, observe(q, k, [49]))
    grid = np.arange(60) % stride == first
    order = in_order(np.where(grid, 0, 1), 49)
    np.testing.assert_array_equal(chosen.order[0, 0], order)
    seen = seen_by(np.where(np.arange(60) < 49, 1 - grid, 9), ((None, None), (None, 1)), 4, order)[:49, :49]
    causal = np.tri(49, dtype=bool)
    assert seen[:, grid[:49]][causal[:, grid[:49]]].all() and (seen == causal)[grid[:49]].all()
    rows = [sum(seen[t].any() for t in order[r : r + 4] if t < 49) for r in range(0, 60, 4)]
    assert [count > 0 for count in np.asarray(chosen.index.counts)[0, 0]] == [row > 0 for row in rows]
    got = attend(policy, q, k, k, jnp.array([49]))
    np.testing.assert_allclose(got[0, :49, 0], masked(q[0, :49, 0], k[0, :49, 0], k[0, :49, 0], seen), atol=2e-5)


def test_heads_have_grids_and_orders_of_their_own(rng):
    (q3, k3), (q5, k5) = planted(3, 1), planted(5, 4)
    q, k = np.concatenate([q3, q3, q5, q5], axis=2), np.concatenate([k3, k5], axis=2)
    grid, local = Grid(strides=(3, 5), near=2, probes=8, block_size=4), AShape(sinks=4, window=9, block_size=4)
    mixed = PerHead(patterns=(grid, local), heads=((0, 1, 1, 0),))
    lengths = jnp.array([60])
    got, found = attend(mixed, q, k, k, lengths), choose(mixed, observe(q, k))
    np.testing.assert_allclose(got[:, :, [0, 3]], attend(grid, q, k, k, lengths)[:, :, [0, 3]], atol=1e-6)
    # Beside another pattern the A-shape reads its blocks whole.
    alone = choose(local, observe(q, k))
    np.testing.assert_array_equal(lists(found.index)[0, 1], lists(alone.index)[0, 1])
    assert found.order[0, 1].tolist() == list(range(60)) != found.order[0, 0].tolist() != found.order[0, 3].tolist()


@pytest.mark.slow
def test_a_model_runs_group_by_group(tiny_model):
    tokens, lengths = jnp.asarray(np.random.default_rng(1).integers(0, 61, (2, 19))), jnp.asarray(LENGTHS)
    quick = {"xla_backend_optimization_level": 0}
    fill = jax.jit(prefill, static_argnames=("spec", "chunk"), compiler_options=quick)
    run = jax.jit(forward, compiler_options=quick)
    about = (CacheSpec(capacity=24), jax.random.key(0))
    plans = {name: Plan(sparsity=ByModality(groups=GROUPS, near=near, block_size=4)) for name, near in NEAR.items()}
    last = np.arange(2), LENGTHS - 1
    dense, whole = (run(tiny_model, tokens, plan, lengths=lengths).logits[last] for plan in (None, plans["everything"]))
    np.testing.assert_allclose(whole, dense, rtol=1e-4, atol=1e-4)
    few, _ = fill(tiny_model, tokens, lengths, plans["near"], *about)
    assert not np.allclose(few, dense, rtol=1e-4, atol=1e-4)
    forced = run(tiny_model, tokens, plans["near"], lengths=lengths).logits[last]
    np.testing.assert_allclose(forced, few, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"a group for each token of prompts .* got \(2, 19\)"):
        fill(tiny_model, tokens, lengths, plans["near"], *about, chunk=8)
    grid = Plan(sparsity=Grid(strides=(3,), near=1, probes=4, block_size=4))
    with pytest.raises(NotImplementedError, match="read at once for Grid"):
        fill(tiny_model, tokens, lengths, grid, *about, chunk=8)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ByModality(groups=GROUPS, near=((1, 2),)), "a row and a column for each group"),
        (ByModality(groups=GROUPS, near=((1, -1), (1, 1))), "whole numbers of at least 0"),
        (ByModality(groups=GROUPS, near=((1, 1), (1, 0))), "read their own group"),
        (Grid(strides=()), "strides of Grid"),
        (Grid(strides=(3, 0)), "strides of Grid"),
        (Grid(strides=(3,), near=0), "near of Grid"),
    ],
    ids=lambda value: None,
)
def test_bad_numbers_are_refused(policy, message):
    with pytest.raises(ValueError, match=message):
        policy.validate(2, 4)
    Grid(strides=(3,)).validate(2, 4)
    ByModality(groups=GROUPS, near=NEAR["near"]).validate(2, 4)


def test_what_counts_blocks_of_the_text_refuses_another_order(rng):
    obs, _ = draw(rng, tokens=12, keys=12, size=4)
    policy = Grid(strides=(3,), near=1, probes=4, block_size=4)
    with pytest.raises(NotImplementedError, match="the text in its order"):
        density(policy.select(obs), obs)
    with pytest.raises(NotImplementedError, match="got Grid"):
        kept_mass(obs, (policy,), 0)
