"""Policies that choose by position: their masks by hand and against NumPy, and what of a prompt is attended to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, check
from dyninf.sparsity import AShape, Dense, PowerAttention, PromptObs, Selected, TriShape, density
from pallas_kernels import BlockIndex

# Queries, keys, and the position of the first query: whole prompts, chunks at a block and within one.
SPANS = {"whole": (37, 37, 0), "short": (3, 3, 0), "chunk": (16, 45, 24), "within": (13, 45, 21), "end": (13, 45, 32)}


def observe(tokens, keys, offset, *, lengths=None, layer=0, batch=2, heads=3):
    """What a policy looks at that does not look at numbers."""
    return PromptObs(
        layer=layer,
        q_BTNH=jnp.zeros((batch, tokens, heads, 8)),
        k_BSKH=jnp.zeros((batch, keys, 1, 8)),
        lengths_B=None if lengths is None else jnp.asarray(lengths),
        offset=offset,
    )


def seen_by(selected, obs):
    """The keys that each query sees ``[B, N, T, S]``, for an index that keeps its promises."""
    (batch, tokens, heads, _), num_keys = obs.q_BTNH.shape, obs.k_BSKH.shape[1]
    size, offset = selected.index.block_size, int(obs.offset)
    counts, blocks = np.asarray(selected.index.counts), np.asarray(selected.index.blocks)
    assert counts.shape == (batch, heads, -(-tokens // size)) and counts.min() >= 0 and counts.max() <= blocks.shape[3]
    seen = np.zeros((batch, heads, tokens, num_keys), bool)
    for b, n, t in np.ndindex(batch, heads, tokens):
        row, position, keys = t // size, offset + t, np.arange(num_keys)
        named = blocks[b, n, row, : counts[b, n, row]]
        assert (np.diff(named) > 0).all() and (named >= 0).all() and (named <= -(-num_keys // size) - 1).all()
        seen[b, n, t] = np.isin(keys // size, named) & (keys <= position)
        if selected.window is not None:
            seen[b, n, t] &= (keys > position - selected.window) | (keys < selected.sinks)
    return seen


def positions(tokens, keys, offset):
    return (offset + np.arange(tokens))[:, None], np.arange(keys)[None]


def a_shape(query, key, policy):
    return (key <= query) & ((key < policy.sinks) | (key > query - policy.window))


def in_whole_blocks(seen_TS, size):
    """Everything of the blocks of which some query of the row sees some key."""
    tokens, keys = seen_TS.shape
    rows, blocks = -(-tokens // size), -(-keys // size)
    padded = np.pad(seen_TS, ((0, rows * size - tokens), (0, blocks * size - keys)))
    named_RC = padded.reshape(rows, size, blocks, size).any(axis=(1, 3))
    return np.repeat(np.repeat(named_RC, size, axis=0), size, axis=1)[:tokens, :keys]


def power(query, key, policy):
    distance = query // policy.unit - key // policy.unit
    powers = (distance > 0) & (distance & (distance - 1) == 0)
    return (key <= query) & ((distance < policy.window) | powers | (key < policy.unit))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (3, 6), (9, 4), (2, 16), (50, 1)])
def test_a_shape_sees_sinks_and_window_to_the_token(span, sinks, window):
    policy, (tokens, keys, offset) = AShape(sinks=sinks, window=window, block_size=4), SPANS[span]
    obs = observe(tokens, keys, offset)
    want = a_shape(*positions(tokens, keys, offset), policy)
    np.testing.assert_array_equal(seen_by(policy.select(obs), obs), np.broadcast_to(want, (2, 3, tokens, keys)))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("last", [0, 1, 6])
def test_tri_shape_sees_whole_blocks_and_the_end_sees_everything(span, last):
    policy, (tokens, keys, offset) = TriShape(sinks=3, window=6, block_size=4, last=last), SPANS[span]
    lengths = np.array([keys, max(keys - 7, 1)])
    obs = observe(tokens, keys, offset, lengths=lengths)
    query, key = positions(tokens, keys, offset)
    # The rows of the last queries are filled up, as the index names blocks whether or not queries are padding.
    filled = positions(-(-tokens // 4) * 4, keys, offset)
    shape = in_whole_blocks(a_shape(*filled, policy), 4)[:tokens]
    row = (query - offset) // 4
    for b, length in enumerate(lengths):
        rows = {(t - offset) // 4 for t in range(max(length - last, offset), min(length, offset + tokens))}
        want = (shape | np.isin(row, list(rows))) & (key <= query)
        got = seen_by(policy.select(obs), obs)
        np.testing.assert_array_equal(got[b], np.broadcast_to(want, (3, tokens, keys)))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("window", "unit"), [(1, 4), (2, 4), (2, 8), (9, 4)])
def test_power_attention_sees_powers_of_two(span, window, unit):
    policy, (tokens, keys, offset) = PowerAttention(window=window, unit=unit, block_size=4), SPANS[span]
    obs = observe(tokens, keys, offset, layer=2)
    query, key = positions(-(-tokens // 4) * 4, keys, offset)
    want = power(query, key, policy)
    if offset % 4:  # rows that reach over two units see what either sees
        want = np.repeat(want.reshape(-1, 4, keys).any(axis=1), 4, axis=0)
        want = in_whole_blocks(want, 4) & (key <= query)
    got = seen_by(policy.select(obs), obs)
    np.testing.assert_array_equal(got, np.broadcast_to(want[:tokens], got.shape))


def test_by_hand():
    # Blocks of 4; row 3 holds the queries 12 to 15. A window of 6 begins at 12 - 5 = 7, in block 1; sinks: block 0.
    selected = AShape(sinks=3, window=6, block_size=4).select(observe(16, 16, 0))
    np.testing.assert_array_equal(selected.index.counts[0, 0], [1, 2, 3, 4])
    assert (selected.window, selected.sinks) == (6, 3)
    # With a window of 5 it begins at 8, in block 2: block 1 is left out.
    selected = AShape(sinks=3, window=5, block_size=4).select(observe(16, 16, 0))
    np.testing.assert_array_equal(selected.index.blocks[1, 2, 3, :3], [0, 2, 3])
    assert selected.index.counts[1, 2, 3] == 3
    # Unit 11 sees itself, 10, 9 and 7, 3 (distances 1, 2, 4, 8), and unit 0.
    selected = PowerAttention(window=1, unit=4, block_size=4).select(observe(48, 48, 0, layer=9))
    np.testing.assert_array_equal(selected.index.blocks[0, 0, 11, :6], [0, 3, 7, 9, 10, 11])
    assert selected.index.counts[0, 0, 11] == 6
    # Two layers of seven are dense.
    dense = [layer for layer in range(16) if PowerAttention().select(observe(4, 4, 0, layer=layer)) is None]
    assert dense == [0, 1, 7, 8, 14, 15]


@pytest.mark.parametrize(
    "policy", [AShape(sinks=3, window=6, block_size=4), PowerAttention(window=2, unit=8, block_size=4, dense_layers=0)]
)
def test_the_budget_does_not_depend_on_the_offset_and_hardly_on_the_keys(policy):
    select = jax.jit(lambda offset: policy.select(observe(16, 256, offset)))
    shapes = set()
    for offset in (0, 24, 240):
        traced, static = select(offset), policy.select(observe(16, 256, offset))
        np.testing.assert_array_equal(traced.index.counts, static.index.counts)
        shapes |= {traced.index.blocks.shape, static.index.blocks.shape}
    assert len(shapes) == 1
    more = policy.select(observe(16, 4096, 0)).index.blocks.shape[3] - shapes.pop()[3]
    assert more <= (0 if isinstance(policy, AShape) else 2 * 2 * 4)  # four more powers of two, from two units of two


def test_density_counts_blocks_up_to_the_last_token():
    # Rows of 4 may attend to 1, 2, 3 blocks, the second sequence to 1, 2 (its third row is padding): 6 and 3 in all.
    obs = observe(12, 12, 0, lengths=[12, 7], heads=1)
    index = BlockIndex(
        counts=jnp.array([[[1, 1, 2]], [[1, 2, 2]]], jnp.int32),
        blocks=jnp.array([[[[0, 9], [1, 0], [0, 2]]], [[[0, 1], [0, 1], [0, 1]]]], jnp.int32),
        block_size=4,
    )
    wanted = jnp.array([[[1, 2, 3]], [[1, 2, 3]]])
    got = density(Selected(index=index, wanted=wanted), obs)
    np.testing.assert_allclose(got.attended, [[4 / 6], [1.0]])
    np.testing.assert_allclose(got.overflow, [[2 / 3], [0.0]])
    np.testing.assert_array_equal(density(Selected(index=index), obs).overflow, [[0], [0]])
    # A chunk of one row at position 8 has three blocks before it; sequences that end before it have none.
    obs = observe(4, 12, 8, lengths=[12, 7], heads=1)
    index = BlockIndex(
        counts=jnp.full((2, 1, 1), 2, jnp.int32), blocks=jnp.array([[[[0, 2]]]] * 2, jnp.int32), block_size=4
    )
    np.testing.assert_allclose(density(Selected(index=index), obs).attended, [[2 / 3], [0]])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (AShape(sinks=-1), "expected sinks to be an integer between 0 and inf, got -1"),
        (AShape(window=0), "expected window to be an integer between 1 and inf, got 0"),
        (AShape(block_size=2.0), "expected block_size to be an integer .* got 2.0"),
        (TriShape(window=0), "expected window"),
        (TriShape(last=-1), "expected last to be an integer between 0 and inf, got -1"),
        (PowerAttention(window=0), "expected window"),
        (PowerAttention(unit=192), "expected a unit that is a multiple of block_size=128, got 192"),
        (PowerAttention(dense_layers=7), "expected dense_layers to be an integer between 0 and 6, got 7"),
        (PowerAttention(period=0), "expected period"),
    ],
    ids=lambda value: repr(value) if not isinstance(value, str) else "",
)
def test_sizes_out_of_range_are_refused(tiny_model, policy, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(sparsity=policy), tiny_model)


def test_dense_selects_nothing():
    assert Dense().select(observe(4, 4, 0)) is None
