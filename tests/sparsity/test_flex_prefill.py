"""FlexPrefill: cases by hand, NumPy loops, and the blocks that the paper's own code chooses.

The maps below were printed by ``get_active_blocks`` of ByteDance-Seed/FlexPrefill (a24b27b), run with torch on the same
draws, its pooling kernel replaced by means: a word for each row of blocks, a digit for each block up to the row's own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.sparsity import FlexPrefill
from dyninf.sparsity.cover import count_cover, cover

OFFICIAL = {
    "vertical-slash": (
        {"seed": 0, "tokens": 1300, "heads": 4, "kv": 2, "dim": 16}, {"gamma": 0.9, "tau": 0.1, "min_budget": 1},
        ["1 11 111 1111 10111 101111 1111111 11111111 111110111 1111100111 10111101111",
         "1 11 111 1111 10111 101111 1010111 10100111 111000111 1110000111 10110000111",
         "1 11 111 1111 10111 101111 1010111 10100111 111000111 1110000111 10110000111",
         "1 11 111 1111 10111 101111 1111111 11111111 111110111 1111100111 10111100111"],
    ),
    "both": (  # its first head is vertical-slash
        {"seed": 6, "tokens": 1800, "heads": 3, "kv": 1, "dim": 16}, {"gamma": 0.8, "tau": 0.6, "min_budget": 1},
        ["1 11 111 1011 10011 110011 1010011 10010011 100010011 1000010011 10000010011 100000010011 1000000010011 "
         "11000000010011 101000000010011",
         "1 11 111 1111 11111 100111 1001011 11101001 100001101 1001101011 11100000001 100001101001 1111000000001 "
         "11100000000001 100001001000111",
         "1 11 111 1111 11111 111111 1011011 11101001 100101101 1001101011 11100011001 100001101011 1111000001001 "
         "11100001000001 100001001000111"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_blocks_are_those_of_the_papers_code(name, themes, select, maps):
    inputs, options, expected = OFFICIAL[name]
    selected = select(FlexPrefill(budget=15, **options), *themes(**inputs))
    assert maps(selected) == expected
    np.testing.assert_array_equal(selected.wanted, selected.index.counts)


def test_patterns_by_hand(select, maps):
    # One feature, blocks of one token, scale 1, queries of 1: a row gives keys parts of 1, 2, 5, 2. The last row holds
    # .1 .2 .5 .2 in columns, and .2 .5 .2 .1 in diagonals from the main one on.
    q, k = jnp.ones((4, 1, 1)), jnp.log(jnp.array([1.0, 2.0, 5.0, 2.0])).reshape(4, 1, 1)

    def chosen(**options):
        selected = select(FlexPrefill(budget=4, min_budget=1, block_size=1, **options), q, k)
        return maps(selected)[0], selected.wanted[0, 0].tolist()

    # Vertical-slash: one token reaches 0.4, so that there are two of each: columns 0 and 2, diagonals 0 and 1.
    assert chosen(gamma=0.4, tau=0.0) == ("1 11 111 1011", [1, 2, 3, 3])
    # The estimate is exact here and the head query-aware: entries 1, .667, .625, .5, .333 ... up to 0.6 * 4 = 2.4 are
    # the diagonal of rows 0 to 2, up to 0.75 * 4 = 3 block 2 of row 3 as well; the rest is forced.
    assert chosen(gamma=0.6) == ("1 11 101 1001", [1, 2, 2, 2])
    assert chosen(gamma=0.75) == ("1 11 101 1011", [1, 2, 2, 3])


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def best(mass, number, forced):
    order = sorted(range(len(mass)), key=lambda c: (c != forced, -mass[c]))
    return set(order[:number])


def reach(weights, share):
    """Tokens that reach a share."""
    return int(np.sum(np.cumsum(np.sort(weights)[::-1]) <= share)) + 1


def select_numpy(q, k, size, *, gamma, tau, min_budget, budget, offset=0):
    """Maps, numbers wanted and whether query-aware, of each head of a prompt or a chunk, with loops in float64."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    (length, heads, dim), end = q.shape, offset + len(q)
    blocks, first = -(-end // size), offset // size
    results = []
    for head in range(heads):
        keys = k[:end, head // (heads // k.shape[1])]
        last = min(size, length)
        column, diagonal = np.zeros(end), np.zeros(end)
        for t in range(end - last, end):
            weights = softmax(keys[: t + 1] @ q[t - offset, head] / dim**0.5) / last
            column[: t + 1] += weights
            diagonal[: t + 1] += weights[::-1]  # by the distance back
        pools = np.array([column[c * size : (c + 1) * size].sum() for c in range(blocks)])
        aligned = np.zeros(blocks)  # blocks of diagonals start at the front of the prompt
        for distance, mass in enumerate(diagonal):
            aligned[blocks - 1 - (end - 1 - distance) // size] += mass
        means = np.array([keys[c * size : (c + 1) * size].mean(0) for c in range(blocks)])
        estimate = softmax(means @ q[-last:, head].mean(0) / dim**0.5)
        middle = (estimate + pools) / 2
        distance = np.sqrt((estimate * np.log(estimate / middle) + pools * np.log(pools / middle)).sum() / 2)
        numbers = [max(min_budget, 0 if distance < tau else reach(x, gamma) // size + 1) for x in (column, diagonal)]
        columns, diagonals = best(pools, numbers[0], 0), best(aligned, numbers[1], 0)
        mass = {}
        for row, c in ((first + r, c) for r, c in np.ndindex(blocks - first, blocks) if c <= first + r):
            held = [pools[c]] * (c in columns) + [aligned[row - c]] * (row - c in diagonals)
            if held:
                mass[row, c] = max(held)
        if distance < tau:
            entries = {}
            for row in range(first, blocks):
                mean = q[row * size - offset : (row + 1) * size - offset, head].mean(0)
                entries |= {(row, c): x for c, x in enumerate(softmax(means[: row + 1] @ mean / dim**0.5))}
            ranked = sorted(entries, key=lambda entry: -entries[entry])
            number = reach([entries[entry] for entry in ranked], gamma * (blocks - first)) - 1
            mass = {entry: entries[entry] for entry in set(ranked[:number]) | set(mass)}
        rows, wanted = [], []
        for row in range(first, blocks):
            listed = sorted((c for r, c in mass if r == row), key=lambda c: (c not in (0, row), -mass[row, c]))
            wanted.append(len(listed))
            rows.append("".join(str(int(c in listed[:budget])) for c in range(row + 1)))
        results.append((" ".join(rows), wanted, bool(distance < tau)))
    return results


@pytest.mark.parametrize(
    ("tokens", "offset", "options"),
    [
        (150, 0, {"gamma": 0.6, "tau": 0.25, "min_budget": 2, "budget": 3}),
        (45, 96, {"gamma": 0.8, "tau": 0.2, "min_budget": 1, "budget": 3}),
        (7, 128, {"gamma": 0.9, "tau": 0.2, "min_budget": 1, "budget": 3}),
    ],
    ids=["whole", "chunk", "short chunk"],
)
def test_choice_equals_numpy(tokens, offset, options, themes, select, maps, monkeypatch):
    monkeypatch.setattr("dyninf.sparsity.flex_prefill.ENTRIES", 200)  # heads are looked at in groups of one and two
    kinds, cut = set(), False
    for seed in (7, 8):
        q, k = themes(seed, 150, 4, 2, 8)
        q, k = q[offset : offset + tokens], k.copy()
        expected = select_numpy(q, k, 16, offset=offset, **options)
        k[offset + tokens :] = np.nan
        selected = select(FlexPrefill(block_size=16, **options), q, k, offset=offset)
        assert maps(selected) == [rows for rows, _, _ in expected]
        assert selected.wanted[0].tolist() == [wanted for _, wanted, _ in expected]
        kinds |= {aware for _, _, aware in expected}
        cut |= any(max(wanted) > options["budget"] for _, wanted, _ in expected)
    assert cut, "the budget cuts something off"
    assert kinds == {True, False}, "heads of both patterns are tried"


def test_planted_patterns_are_found(rng, select, maps):
    """Head 0 looks at column 4, head 1 three blocks back."""
    q, k = (rng.normal(size=(160, 2, 16)).astype(np.float32) * 0.1 for _ in range(2))
    q[:, 0, 0], k[64:80, 0, 0] = 8, 8
    places = np.arange(10).repeat(16)
    k[:, 1] += 12 * np.eye(16, dtype=np.float32)[places]
    q[:, 1] += 12 * np.eye(16, dtype=np.float32)[np.maximum(places - 3, 0)]
    # A column fills one block, so that two are taken: the first, and the planted one. A diagonal is spread over two.
    column, diagonal = maps(select(FlexPrefill(budget=10, gamma=0.99, tau=0.0, min_budget=1, block_size=16), q, k))
    assert all(row[4] == "1" for row in column.split()[4:])
    assert all(row[r - 3] == "1" for r, row in enumerate(diagonal.split()) if r >= 3)
    assert max(row.count("1") for row in (column + " " + diagonal).split()) <= 5


def test_padding_and_what_is_not_written_change_nothing(themes, select, maps):
    q, k = themes(7, 150, 4, 2, 8)
    options = {"budget": 8, "tau": 0.25, "gamma": 0.8, "min_budget": 2}
    expected = select_numpy(q[:117], k[:117], 16, **options)
    assert {aware for _, _, aware in expected} == {True, False}
    q[117:], k[117:] = np.nan, np.nan
    selected = select(FlexPrefill(block_size=16, **options), np.stack([q, q]), np.stack([k, k]), np.array([117, 0]))
    assert maps(selected) == [rows for rows, _, _ in expected]
    assert not np.asarray(selected.index.counts[0, :, 8:]).any() and not np.asarray(selected.index.counts[1]).any()


@pytest.mark.parametrize("tokens", [1, 33])
def test_everything_is_taken_with_a_full_budget(tokens, themes, select):
    q, k = themes(9, tokens, 2, 2, 8)
    selected = select(FlexPrefill(budget=99, min_budget=99, block_size=16), q, k)
    rows = -(-tokens // 16)
    assert selected.index.counts.tolist() == [[list(range(1, rows + 1))] * 2] == selected.wanted.tolist()


def test_cover_is_what_sorting_gives(rng):
    values = rng.dirichlet(np.full(50, 0.3), size=4).astype(np.float32)
    both = jax.jit(lambda values, share: (cover(values, share), count_cover(values, share)))
    for share in (0.0, 0.3, 0.9, 1.1):
        taken, number = both(values, share)
        for row, mask, count in zip(values, np.asarray(taken), np.asarray(number), strict=True):
            assert count == mask.sum() == np.sum(np.cumsum(np.sort(row)[::-1].astype(np.float64)) <= share)
            assert not mask.any() or row[mask].min() >= row[~mask].max(initial=0)
    # Of four equal entries two fit into what is left.
    equal = jnp.array([[0.125, 0.5, 0.125, 0.125, 0.125]])
    taken, number = both(equal, 0.8)
    assert taken.tolist() == [[False, True, False, False, False]] and number.tolist() == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1}, "budget of FlexPrefill .* at least 2"),
        ({"budget": 8, "min_budget": 0}, "min_budget of FlexPrefill .* at least 1"),
        ({"budget": 8, "block_size": 16.0}, "block_size of FlexPrefill"),
        ({"budget": 8, "gamma": 1.5}, "gamma to be a number between 0 and 1"),
        ({"budget": 8, "tau": -0.1}, "tau to be a number between 0 and 1"),
    ],
)
def test_validated(options, message):
    with pytest.raises(ValueError, match=message):
        FlexPrefill(**options).validate(2, 4)
    FlexPrefill(budget=8).validate(2, 4)
