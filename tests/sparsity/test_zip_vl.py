"""ZipVL's important blocks: by hand, against NumPy, and on what is planted."""

import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.sparsity import ZipVL
from pallas_kernels.index import check_blocks
from tests.sparsity.test_vertical_slash import CASES, choose, draw, lists, mass_kept, observe, planted, probabilities


def test_by_hand():
    # Weights 1 4 1 1 1 8 of the keys. Probes: query 5 pays 1 4 1 1 1 8 sixteenths, query 0 pays all to key 0. Sums are
    # 17 4 1 1 1 8 sixteenths, in pairs 21 2 9 of 32; normalized, key 0 is seen by two: 8.5 + 4, 2, 9.
    keys = np.log([1, 4, 1, 1, 1, 8], dtype=np.float32)[None, :, None, None]
    obs = observe(np.ones_like(keys), keys)
    few = {"probes": 1, "block_size": 2}
    # 0.6 of 32 is 19.2: block 0 is enough. 0.95 is 30.4: 21 + 9 are not.
    chosen = choose(ZipVL(mass=0.6, budget=2, **few), obs)
    assert lists(chosen.index)[0, 0].tolist() == [{0}, {0, 1}, {0, 2}]
    assert chosen.wanted.tolist() == chosen.index.counts.tolist() == [[[1, 2, 2]]]
    chosen = choose(ZipVL(mass=0.95, budget=2, **few), obs)
    assert lists(chosen.index)[0, 0].tolist() == [{0}, {0, 1}, {0, 2}]
    assert chosen.wanted.tolist() == [[[1, 2, 3]]]
    assert lists(choose(ZipVL(mass=0.95, budget=3, **few), obs).index)[0, 0, 2] == {0, 1, 2}


@pytest.mark.parametrize("name", CASES)
def test_equals_numpy(rng, name):
    obs, ends = draw(rng, **CASES[name])
    size, budget, mass = CASES[name]["size"], 3, 0.8
    chosen = choose(ZipVL(mass=mass, budget=budget, probes=5, block_size=size), obs)
    check_blocks(chosen.index, batch=2, num_heads=4, num_queries=obs.q_BTNH.shape[1])
    found, num_keys = lists(chosen.index), obs.k_BSKH.shape[1]
    wide = min(5, obs.q_BTNH.shape[1])
    for b, n in np.ndindex(2, 4):
        middle = max(ends[b] - wide, obs.offset)
        spaced = {obs.offset + i * (middle - obs.offset) // wide for i in range(wide)} if middle > obs.offset else set()
        sums, seen = np.zeros((2, -(-num_keys // size) * size))
        for position in [*spaced, *range(middle, ends[b])]:
            p = probabilities(obs, b, n, position)
            sums[: len(p)] += p
            seen[: len(p)] += 1
        plain, ranks = (x.reshape(-1, size).sum(axis=1) for x in (sums, sums / np.maximum(seen, 1)))
        held = np.cumsum([0, *np.sort(plain)[::-1]])
        needed = int(np.sum(held[:-1] < mass * held[-1]))
        order = np.argsort(-ranks, kind="stable")[:needed].tolist()
        for r in range(found.shape[2]):
            first, last = (obs.offset + r * size) // size, (obs.offset + (r + 1) * size - 1) // size
            own = set(range(first, last + 1))
            assert found[b, n, r] == own | {c for c in order[:budget] if c < first}
            assert chosen.wanted[b, n, r] == len(own | {c for c in order if c < first})


@pytest.mark.parametrize("name", ["whole", "between"])
def test_a_full_budget_names_every_block(rng, name):
    obs, _ = draw(rng, **CASES[name])
    chosen = choose(ZipVL(mass=1.0, budget=14, probes=5, block_size=4), obs)
    found = lists(chosen.index)
    np.testing.assert_array_equal(chosen.wanted, chosen.index.counts)
    for r in range(found.shape[2]):
        every = set(range((obs.offset + 4 * r + 3) // 4 + 1))
        assert all(row == every for row in found[:, :, r].ravel())


def test_finds_what_is_planted_and_no_more():
    obs = planted(stripes=(70, 71, 150), tokens=320)
    chosen = choose(ZipVL(mass=0.9, budget=8, probes=16, block_size=16), obs)
    # Queries before the stripes pay all keys alike, so that some blocks of these are asked for as well.
    assert mass_kept(obs, chosen.index, start=192) > 0.98
    assert int(np.max(chosen.wanted)) <= 8


def test_a_threshold_is_a_leaf(rng):
    obs, _ = draw(rng, **CASES["whole"])
    few = choose(ZipVL(mass=jnp.float32(0.1), budget=9, probes=5, block_size=4), obs)
    more = choose(ZipVL(mass=jnp.float32(0.9), budget=9, probes=5, block_size=4), obs)
    assert np.all(few.wanted <= more.wanted) and np.any(few.wanted < more.wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"mass": 1.5}, "mass of ZipVL"), ({"budget": 0}, "budget of ZipVL"), ({"probes": 0}, "probes of ZipVL")],
    ids=str,
)
def test_bad_numbers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ZipVL(**change).validate(2, 4)
    ZipVL().validate(2, 4)
