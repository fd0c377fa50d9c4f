"""XAttention: a case by hand, and the blocks that the paper's own code chooses.

The maps below were printed by ``xattn_estimate`` of mit-han-lab/x-attention (e379887), run with torch on the same draws
in chunks of one block, so that no row but the first is in the first chunk: a word for each row of blocks, a digit for
each block up to the row's own.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.sparsity import XAttention

OFFICIAL = {
    "four heads": (
        {"seed": 0, "tokens": 1300, "heads": 4, "kv": 2, "dim": 16}, {"stride": 16, "mass": 0.9}, 0,
        ["1 11 111 1111 10111 101011 1010101 10101101 100011101 1011100111 10111001111",
         "1 11 101 1111 10111 101011 1010101 10101101 100011101 1011100111 10110001011",
         "1 11 101 1111 10111 101011 1010101 10101101 100011101 1011100011 10110001011",
         "1 11 101 1111 10111 101011 1010101 10101101 100011101 1011100111 10111011011"],
    ),
    "stride 8": (
        {"seed": 1, "tokens": 1500, "heads": 2, "kv": 1, "dim": 32}, {"stride": 8, "mass": 0.8}, 0,
        ["1 11 111 1101 11011 100111 1101101 10100001 100100111 1001000111 10101100001 110100100011",
         "1 11 111 1101 11011 100111 1101101 10100001 100100111 1001000111 10101100001 110100100011"],
    ),
    "block 64": (
        {"seed": 2, "tokens": 700, "heads": 2, "kv": 2, "dim": 16}, {"stride": 4, "mass": 0.9, "block_size": 64}, 0,
        ["1 11 111 1011 11001 100011 1100001 11000001 100101001 1000100011 11000101001",
         "1 11 111 1111 11101 100011 1100101 11000001 101111001 1000100011 11000101001"],
    ),
    "chunk": (
        {"seed": 3, "tokens": 1500, "heads": 2, "kv": 2, "dim": 16}, {"stride": 16, "mass": 0.9}, 1024,
        ["100110101 1101010001 11100101011 111001010111",
         "100100101 1101010001 11101100011 110011000111"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_blocks_are_those_of_the_papers_code(name, themes, select, maps):
    inputs, options, offset, expected = OFFICIAL[name]
    q, k = themes(**inputs)
    selected = select(XAttention(budget=12, **options), q[offset:], k, offset=offset)
    assert maps(selected) == expected
    np.testing.assert_array_equal(selected.wanted, selected.index.counts)


def test_blocks_by_hand(select, maps):
    # One feature, stride = block = 1, scale 1: a score is q * k. Row 3 asks with 1 for keys ln 1, ln 2, ln 6, ln 1: it
    # holds 1, 2, 6, 1 tenths. Forced are blocks 0 and 3, 0.2; block 2 makes it 0.8; block 1 makes it 1.
    q, k = jnp.ones((4, 1, 1)), jnp.log(jnp.array([1.0, 2.0, 6.0, 1.0])).reshape(4, 1, 1)
    for mass, row, wanted in ((0.15, "1001", 2), (0.7, "1011", 3), (0.85, "1011", 4), (None, "1011", 4)):
        # A budget of 3 cuts the least of the others off, and is filled without a mass.
        selected = select(XAttention(budget=3, stride=1, mass=mass, block_size=1), q, k)
        assert maps(selected)[0].split()[3] == row and int(selected.wanted[0, 0, 3]) == wanted
        assert selected.index.blocks.shape == (1, 1, 4, 3)


def test_a_planted_block_is_found(rng, select, maps):
    """The queries of row 9 look for the keys of block 4."""
    q, k = (rng.normal(size=(160, heads, 8)).astype(np.float32) * 0.1 for heads in (4, 2))
    q[144:, :, 3], k[64:80, :, 3] = 8, 8
    selected = select(XAttention(budget=10, stride=4, block_size=16), q, k)
    assert {head.split()[9] for head in maps(selected)} == {"1000100001"}


def test_padding_and_what_is_not_written_change_nothing(themes, select, maps):
    q, k = themes(4, 300, 2, 1, 16)
    policy = XAttention(budget=8, stride=8, block_size=32)
    q[237:], k[237:] = 0, 0
    alone = maps(select(policy, q[:237], k))
    q[237:], k[237:] = np.nan, np.nan
    assert maps(select(policy, q[:237], k)) == alone
    padded = select(policy, np.stack([q, q]), np.stack([k, k]), np.array([237, 0]))
    assert [head.split()[:8] for head in maps(padded)] == [head.split() for head in alone]
    # Rows of padding attend to what is forced.
    assert [head.split()[9] for head in maps(padded)] == ["1000000001"] * 2
    assert np.asarray(padded.index.counts[1, :, 2:] == 2).all()


def test_a_prompt_in_chunks_chooses_as_a_whole_one(themes, select, maps):
    q, k = themes(5, 288, 2, 1, 16)
    policy = XAttention(budget=6, stride=8, block_size=32)
    whole = maps(select(policy, q, k))
    pieces = [maps(select(policy, q[at : at + 96], k, offset=at)) for at in (0, 96, 192)]
    traces = select._cache_size()
    assert [" ".join(parts) for parts in zip(*pieces, strict=True)] == whole
    select(XAttention(budget=6, stride=8, block_size=32, mass=0.5), q[:96], k, offset=96)
    assert select._cache_size() == traces, "a new mass is no new trace"


@pytest.mark.parametrize("tokens", [1, 33])
def test_awkward_lengths(tokens, themes, select):
    q, k = themes(6, tokens, 2, 2, 8)
    selected = select(XAttention(budget=99, stride=16, block_size=32, mass=1.0), q, k)
    rows = math.ceil(tokens / 32)
    assert selected.index.counts.shape == (1, 2, rows) and selected.index.blocks.shape == (1, 2, rows, 2)
    assert selected.index.counts[0, 0].tolist() == list(range(1, rows + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1}, "budget of XAttention .* at least 2"),
        ({"budget": 8, "stride": 12}, "multiple of stride=12"),
        ({"budget": 8, "block_size": 0}, "block_size of XAttention"),
        ({"budget": 8, "mass": 1.5}, "mass to be a number between 0 and 1"),
        ({"budget": 8.0}, "budget of XAttention"),
    ],
)
def test_validated(options, message):
    with pytest.raises(ValueError, match=message):
        XAttention(**options).validate(2, 4)
    XAttention(budget=8, mass=None).validate(2, 4)
