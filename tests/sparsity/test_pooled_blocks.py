"""Blocks by products of means: by hand, against NumPy, and against blocks that the official code chooses.

microsoft/MInference at fb56c91: ``_build_block_index`` of ops/block_sparse_flash_attention.py.
"""

import dataclasses

import numpy as np
import pytest

from dyninf.sparsity import PooledBlocks
from pallas_kernels.index import check_blocks
from tests.sparsity.test_vertical_slash import CASES, choose, draw, lists, mass_kept, observe


def test_by_hand():
    # Pairs of queries have means 2, -1 and 1, pairs of keys 1, 2 and, of the one that exists, -4. Row 1 is worth -1 -2
    # to itself, row 2 is worth 1 2 -4.
    q, k = (np.array(x, np.float32)[None, :, None, None] for x in ((1, 3, -1, -1, 1, 9), (1, 1, 3, 1, -4, 9)))
    obs = observe(q, k, lengths=[5])
    free = {"block_size": 2, "sinks": 0, "recent": 0}
    assert lists(choose(PooledBlocks(budget=2, **free), obs).index)[0, 0].tolist() == [{0}, {0, 1}, {0, 1}]
    assert lists(choose(PooledBlocks(budget=1, **free), obs).index)[0, 0].tolist() == [{0}, {0}, {1}]
    forced = choose(PooledBlocks(budget=2, block_size=2), obs).index
    assert lists(forced)[0, 0].tolist() == [{0}, {0, 1}, {0, 2}]


@pytest.mark.parametrize("name", CASES)
def test_equals_numpy(rng, name):
    obs, ends = draw(rng, **CASES[name])
    size, budget = CASES[name]["size"], 4
    chosen = choose(PooledBlocks(budget=budget, block_size=size), obs)
    if name == "one":
        assert chosen is None
        return
    index = chosen.index
    check_blocks(index, batch=2, num_heads=4, num_queries=obs.q_BTNH.shape[1])
    found, q, k = lists(index), np.asarray(obs.q_BTNH, np.float64), np.asarray(obs.k_BSKH, np.float64)
    for b, n, r in np.ndindex(*found.shape):
        asking = q[b, r * size : min((r + 1) * size, max(ends[b] - obs.offset, 0)), n]
        if not len(asking):
            continue
        last = (obs.offset + (r + 1) * size - 1) // size
        held = [k[b, c * size : min((c + 1) * size, ends[b]), n // 2] for c in range(k.shape[1] // size + 1)]
        scores = {c: asking.mean(axis=0) @ keys.mean(axis=0) for c, keys in enumerate(held) if len(keys) and c <= last}
        scores |= {c: np.inf for c in (0, last) if c * size < k.shape[1]}
        assert found[b, n, r] - set(scores) == set() or len(scores) < budget
        assert set(sorted(scores, key=lambda c: -scores[c])[:budget]) <= found[b, n, r]


def test_a_full_budget_decides_nothing(rng):
    obs, _ = draw(rng, **CASES["whole"])
    assert PooledBlocks(budget=10, block_size=4).select(obs) is None
    found = lists(choose(PooledBlocks(budget=9, block_size=4), obs).index)
    assert all(row == set(range(r + 1)) for r in range(9) for row in found[:, :, r].ravel())


def test_blocks_of_the_official_code():
    """Three of eight blocks of 64 tokens. Its kernel reads the first min(r + 1, 3) of row r."""
    official = [
        [[0, 5, 6], [0, 1, 7], [0, 1, 2], [0, 2, 3], [0, 3, 4], [1, 4, 5], [0, 3, 4], [0, 3, 4]],
        [[0, 5, 6], [0, 1, 7], [0, 1, 2], [0, 1, 3], [2, 3, 4], [2, 4, 5], [1, 3, 5], [0, 4, 6]],
    ]
    numbers = np.random.default_rng(2407)
    obs = observe(*(numbers.normal(size=(1, 512, 2, 16)).astype(np.float32) for _ in "qk"))
    found = lists(choose(PooledBlocks(budget=3, sinks=0, recent=0, block_size=64), obs).index)
    for n, r in np.ndindex(2, 8):
        assert found[0, n, r] == set(official[n][r][: min(r + 1, 3)])


def test_finds_what_is_planted():
    # Of 16 blocks of 16 tokens, the queries of each of the last 8 point where the keys of one of the first 8 point.
    codes = np.repeat(np.eye(16), 16, axis=0)
    q, k = np.where(np.arange(256)[:, None] < 128, 0, np.roll(codes, 144, axis=0)) * 60.0, codes
    obs = observe(*(x.astype(np.float32)[None, :, None] for x in (q, k)))
    index = choose(PooledBlocks(budget=3, block_size=16), obs).index
    assert mass_kept(obs, index, start=144) > 0.99
    assert all(r - 9 in lists(index)[0, 0, r] for r in range(9, 16))


def test_rows_in_pieces_are_the_same(rng, monkeypatch):
    obs, _ = draw(rng, **CASES["between"])
    whole = choose(PooledBlocks(budget=5, block_size=4), obs).index
    monkeypatch.setattr("dyninf.sparsity.pooled_blocks.MOST_SCORES", 2 * 4 * 14 * 3)  # three of four rows at once
    obs = dataclasses.replace(obs, offset=np.int32(obs.offset))  # another type: traced anew
    pieces = choose(PooledBlocks(budget=5, block_size=4), obs).index
    np.testing.assert_array_equal(pieces.counts, whole.counts)
    np.testing.assert_array_equal(lists(pieces), lists(whole))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "expected budget of PooledBlocks"),
        ({"recent": -1}, "expected recent of PooledBlocks"),
        ({"budget": 3, "sinks": 2, "recent": 2}, r"at least sinks \+ recent = 4 blocks for PooledBlocks, got 3"),
    ],
    ids=str,
)
def test_bad_numbers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PooledBlocks(**change).validate(2, 4)
    PooledBlocks().validate(2, 4)
