"""Verticals and slashes on blocks: by hand, against NumPy, and against numbers of the official code.

microsoft/MInference at fb56c91: ``vertical_and_slash_kernel`` of minference_forward.py for the sums, and
csrc/vertical_slash_index.cu, compiled for the CPU, for the blocks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.sparsity import PromptObs, VerticalSlash
from dyninf.sparsity.vertical_slash import pooled_sums
from pallas_kernels.index import check_blocks


def observe(q_BTNH, k_BSKH, lengths=None, offset=0):
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    return PromptObs(layer=0, q_BTNH=jnp.asarray(q_BTNH), k_BSKH=jnp.asarray(k_BSKH), lengths_B=lengths, offset=offset)


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _choose(policy, arrays):
    return policy.select(observe(*arrays))


def choose(policy, obs):
    """What a policy selects; cases of the same shapes share a program."""
    return _choose(policy, (obs.q_BTNH, obs.k_BSKH, obs.lengths_B, obs.offset))


@functools.partial(jax.jit, static_argnums=(1, 2), compiler_options={"xla_backend_optimization_level": 0})
def _sums(arrays, count, block_size):
    return pooled_sums(observe(*arrays), count, block_size)


def sums(obs, *about):
    return _sums((obs.q_BTNH, obs.k_BSKH, obs.lengths_B, obs.offset), *about)


def draw(rng, *, batch=2, tokens, keys, heads=4, kv=2, dim=8, lengths=None, offset=0, size=None):
    """Random queries and keys of a prompt or a chunk; what does not exist is NaN."""
    q, k = rng.normal(size=(batch, tokens, heads, dim)) * 2, rng.normal(size=(batch, keys, kv, dim))
    ends = np.minimum(keys if lengths is None else lengths, offset + tokens) * np.ones(batch, int)
    for b in range(batch):
        q[b, max(ends[b] - offset, 0) :], k[b, ends[b] :] = np.nan, np.nan
    return observe(q.astype(np.float32), k.astype(np.float32), lengths, offset), ends


def probabilities(obs, b, n, position):
    """What one query pays to each key, float64."""
    q = np.asarray(obs.q_BTNH, np.float64)[b, position - obs.offset, n]
    k = np.asarray(obs.k_BSKH, np.float64)[b, : position + 1, n * obs.k_BSKH.shape[2] // obs.q_BTNH.shape[2]]
    scores = k @ q * len(q) ** -0.5
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def lists(index):
    """The blocks of each row as sets ``[B][N][R]``, checked to be ascending, distinct and 0 or more."""
    found = np.empty(index.counts.shape, object)
    for place in np.ndindex(*found.shape):
        row = np.asarray(index.blocks[place])[: int(index.counts[place])].tolist()
        assert row == sorted(set(row)) and min(row, default=0) >= 0
        found[place] = set(row)
    return found


def mass_kept(obs, index, start=0):
    """The mean share of attention on listed blocks ``[B, N]`` of the queries from ``start`` on."""
    listed, size, (batch, tokens, heads, _) = lists(index), index.block_size, obs.q_BTNH.shape
    kept = np.zeros((batch, heads, tokens - start))
    for b, n, t in np.ndindex(*kept.shape):
        p = probabilities(obs, b, n, t + start)
        kept[b, n, t] = p[np.isin(np.arange(len(p)) // size, list(listed[b, n, (t + start) // size]))].sum()
    return kept.mean(axis=2)


def planted(*, distances=(), stripes=(), tokens=640):
    """Queries that find the keys at these distances before them, and those at these positions; one head.

    Scores are 12 for these and 0 for others.
    """
    *codes, marker = np.eye(tokens + 1)
    q, k = np.zeros((tokens, tokens + 1)), np.array(codes)
    for distance in distances:
        q[distance:] += codes[: tokens - distance]
    if stripes:
        q, k[list(stripes)] = q + marker, marker
    q *= 12 * (tokens + 1) ** 0.5
    return observe(*(x.astype(np.float32)[None, :, None] for x in (q, k)))


PROMPT, CHUNK = {"tokens": 37, "keys": 37}, {"tokens": 16, "keys": 53}
CASES = {
    "whole": PROMPT | {"lengths": (37, 36), "size": 4},
    "padded": PROMPT | {"lengths": (13, 0), "size": 4},
    "chunk": CHUNK | {"offset": 24, "lengths": (53, 29), "size": 4},
    "ended": CHUNK | {"offset": 24, "lengths": (30, 24), "size": 4},
    "between": CHUNK | {"offset": 21, "lengths": (40, 33), "size": 4},
    "wide": CHUNK | {"offset": 30, "lengths": (45, 31), "size": 10},
    "one": {"tokens": 1, "keys": 1, "lengths": (1, 0), "size": 4},
    "one_more": {"tokens": 1, "keys": 53, "lengths": (37, 36), "offset": 36, "size": 4},
}


def test_sums_by_hand():
    # Weights 1, 4, 1, 1, 1, 8 of the keys. Query 4 sees a sum of 8, query 5 of 16; in 16ths they pay
    # 2 8 2 2 2 and 1 4 1 1 1 8. By key 3 12 3 3 3 8, by distance (0 first) 10 3 3 9 6 1; then in pairs.
    keys = np.log([1, 4, 1, 1, 1, 8], dtype=np.float32)[None, :, None, None]
    columns, bands = sums(observe(np.ones_like(keys), keys), 2, 2)
    np.testing.assert_allclose(columns[0, 0] * 16, [15, 6, 11], rtol=1e-5)
    np.testing.assert_allclose(bands[0, 0] * 16, [13, 12, 7], rtol=1e-5)


def test_lists_by_hand():
    # Distances 9 and 19 are in bands 2 and 4 of blocks of 4, the stripe is in block 3. Offsets 0 and 1 are forced,
    # bands 2 and 4 bring 2 3 and 4 5; block 0 is forced, then 3. A row i has i, i-1, ..., i-5, 0 and 3.
    obs = planted(distances=(9, 19), stripes=(14,), tokens=48)
    policy = VerticalSlash(vertical=2, slash=5, last_queries=8, block_size=4)
    assert lists(choose(policy, obs).index)[0, 0].tolist() == [
        {r - o for o in range(6) if o <= r} | {0} | ({3} if r >= 3 else set()) for r in range(12)
    ]
    # With room for one band beside band 0, band 2 comes with both of its blocks or, if the budget ends there, with one.
    for slash, offsets in ((3, {0, 1, 2, 3}), (2, {0, 1, 2})):
        policy = VerticalSlash(vertical=1, slash=slash, last_queries=8, block_size=4)
        index = choose(policy, planted(distances=(9,), tokens=48)).index
        assert index.blocks.shape[3] == slash + 2
        assert lists(index)[0, 0].tolist() == [{r - o for o in offsets if o <= r} | {0} for r in range(12)]


@pytest.mark.parametrize("name", CASES)
def test_equals_numpy(rng, name):
    obs, ends = draw(rng, **CASES[name])
    window, size = 7, CASES[name]["size"]
    policy = VerticalSlash(vertical=2, slash=3, last_queries=window, block_size=size)
    columns, bands = (np.asarray(x) for x in sums(obs, window, size))
    want = np.zeros((2, *columns.shape))
    for b, n in np.ndindex(2, 4):
        for position in range(max(obs.offset, ends[b] - window), ends[b]):
            p = probabilities(obs, b, n, position)
            np.add.at(want[0, b, n], np.arange(len(p)) // size, p)
            np.add.at(want[1, b, n], (position - np.arange(len(p))) // size, p)
    np.testing.assert_allclose([columns, bands], want, atol=2e-6)

    chosen = choose(policy, obs)
    if name == "one":
        assert chosen is None
        return
    index = chosen.index
    check_blocks(index, batch=2, num_heads=4, num_queries=obs.q_BTNH.shape[1])
    found, num_blocks = lists(index), columns.shape[2]
    for b, n, r in np.ndindex(*found.shape):
        last = (obs.offset + (r + 1) * size - 1) // size
        worth = np.maximum(bands[b, n], np.append(np.inf, bands[b, n, :-1]))
        worth[:2] = np.inf
        offsets = np.argsort(-worth, kind="stable")[:4]
        verticals = [0, *(1 + np.argsort(-columns[b, n, 1:], kind="stable")[:1])]
        blocks = {last - o for o in offsets} | {v for v in verticals if v <= last}
        assert found[b, n, r] == {c for c in blocks if 0 <= c < num_blocks}


@pytest.mark.parametrize(("budget", "needed"), [("vertical", 10), ("slash", 9)])
def test_a_full_budget_decides_nothing(rng, budget, needed):
    obs, _ = draw(rng, **CASES["whole"])
    few = {"vertical": 1, "slash": 1, "last_queries": 7, "block_size": 4}
    assert VerticalSlash(**(few | {budget: needed})).select(obs) is None
    # One less leaves out at most one block of each row.
    found = lists(choose(VerticalSlash(**(few | {budget: needed - 1})), obs).index)
    for r in range(10):
        assert all(row <= set(range(r + 1)) and len(row) >= r for row in found[:, :, r].ravel())


def test_sums_of_the_official_code():
    """Attention of the last 64 of 320 queries by column and by diagonal, each pooled to blocks of 64."""
    numbers = np.random.default_rng(2490)
    q, k = numbers.normal(size=(1, 320, 2, 16)) * np.float32(2), numbers.normal(size=(1, 320, 2, 16))
    columns, bands = sums(observe(q.astype(np.float32), k.astype(np.float32)), 64, 64)
    verticals = [
        [15.7098446, 13.7906379, 13.1083584, 14.7192290, 6.6719337],
        [12.9500179, 14.1161432, 14.1491137, 15.2001171, 7.5846090],
    ]
    diagonals = [
        [14.3453960, 13.9964161, 13.3830023, 14.4132833, 7.8619027],
        [15.9357005, 13.7631416, 14.6512547, 12.9645996, 6.6853046],
    ]
    np.testing.assert_allclose(columns[0], verticals, rtol=1e-5)
    np.testing.assert_allclose(bands[0], diagonals, rtol=1e-5)


def test_covers_the_blocks_of_the_official_conversion():
    """Distances 0 to 128 and 320 to 384 with columns 0 to 63 and 192 to 255: bands 0, 1, 5 and blocks 0 and 3.

    The official lists for these, in blocks of 64 that its tiles and columns touch.
    """
    official = [
        {0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 2, 3, 4}, {0, 3, 4, 5}, {0, 1, 3, 4, 5, 6}, {0, 1, 2, 3, 5, 6, 7},
        {0, 2, 3, 6, 7, 8}, {0, 3, 4, 7, 8, 9},
    ]  # fmt: skip
    obs = planted(distances=(100, 350), stripes=(200,))
    found = lists(choose(VerticalSlash(vertical=2, slash=4, block_size=64), obs).index)[0, 0]
    assert all(theirs <= ours for theirs, ours in zip(official, found, strict=True))


@pytest.mark.parametrize(
    ("plan", "where"),
    [({"distances": (170,)}, "slash"), ({"stripes": (70, 71, 72)}, "vertical")],
    ids=["slash", "stripe"],
)
def test_finds_what_is_planted(plan, where):
    obs = planted(**plan, tokens=320)
    few = {"vertical": 1, "slash": 1, "last_queries": 16, "block_size": 16}
    before = mass_kept(obs, choose(VerticalSlash(**few), obs).index, start=192)
    after = mass_kept(obs, choose(VerticalSlash(**(few | {where: 3})), obs).index, start=192)
    assert before < 0.2 and after > 0.98


def test_scores_in_pieces_are_the_same(rng, monkeypatch):
    obs, _ = draw(rng, **CASES["padded"], heads=12, kv=6)
    whole = sums(obs, 7, 4)
    obs = dataclasses.replace(obs, offset=np.int32(obs.offset))  # another type: traced anew
    monkeypatch.setattr("dyninf.sparsity.probes.MOST_SCORES", 2 * 7 * 37 * 12 // 2)  # three of six heads at once
    for one, other in zip(whole, sums(obs, 7, 4), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", ["vertical", "slash", "last_queries", "block_size"])
def test_bad_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"expected {name} of VerticalSlash to be a whole number of at least 1, got 0"):
        VerticalSlash(**{name: 0}).validate(2, 4)
    VerticalSlash().validate(2, 4)
