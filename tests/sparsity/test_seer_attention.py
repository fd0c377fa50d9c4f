"""SeerAttention: a case by hand, and the blocks that the paper's own gate scores highest.

The maps below are the best blocks by the scores of ``Qavg_Kmaxminavg`` of microsoft/SeerAttention (aba03e3), run with
torch without rotation on the same draws: a word for each row of blocks, a digit for each block up to the row's own.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.sparsity import SeerAttention

OFFICIAL = [
    "1 11 111 1111 11110 011101 0011110 00011110 011000011 1010000110 10100001100 000101001100",
    "1 11 111 1111 10111 111010 0101110 11100010 111000100 0010101001 00011010010 010101000100",
    "1 11 111 1111 11110 011101 0011110 01110100 010010011 0101010001 01010100010 000010011001",
    "1 11 111 1111 11011 101011 0101011 10001101 000111001 1001001100 10000011100 000111000100",
]


def gate(num_layers=1):
    """The weights that the paper's gate had, in the first layer; those of others are not numbers."""
    rng = np.random.default_rng(100)
    query, key = (rng.normal(size=shape).astype(np.float32) * 0.3 for shape in ((4, 16, 8), (2, 48, 8)))
    query, key = (np.stack([part] + [np.full_like(part, np.nan)] * (num_layers - 1)) for part in (query, key))
    return {"query_LNHD": jnp.asarray(query), "key_LKYD": jnp.asarray(key)}


def test_blocks_are_those_of_the_papers_gate(themes, select, maps):
    policy = SeerAttention(**gate(2), budget=4, sinks=0, recent=0, block_size=64)
    selected = select(policy, *themes(3, 750, 4, 2, 16))
    listed = np.asarray(selected.index.blocks[0])
    for head, expected in enumerate(OFFICIAL):
        for row, word in enumerate(expected.split()):
            count = int(selected.index.counts[0, head, row])
            assert listed[head, row, :count].tolist() == [c for c, digit in enumerate(word) if digit == "1"]
    assert selected.wanted is None


def test_blocks_by_hand(select, maps):
    # One feature, blocks of two tokens: keys 0 4 | 3 3 | 5 -9 | 0 0. Of largest, smallest and mean the gate takes
    # 1, 2 and 0: 4, 9, -13, 0. The mean query of a row is 1, in the last one -1. Forced: block 0 and a row's own.
    k = jnp.array([0.0, 4.0, 3.0, 3.0, 5.0, -9.0, 0.0, 0.0]).reshape(8, 1, 1)
    q = jnp.array([1.0, 1.0, 0.0, 2.0, 1.0, 1.0, -1.0, -1.0]).reshape(8, 1, 1)
    weights = {"query_LNHD": jnp.ones((1, 1, 1, 1)), "key_LKYD": jnp.array([1.0, 2.0, 0.0]).reshape(1, 1, 3, 1)}
    assert maps(select(SeerAttention(**weights, budget=3, block_size=2), q, k)) == ["1 11 111 1011"]
    # Without forced blocks: 9 before 4 before -13, and for the last row the other way round.
    free = SeerAttention(**weights, budget=2, sinks=0, recent=0, block_size=2)
    assert maps(select(free, q, k)) == ["1 11 11 0011"]


def test_padding_and_what_is_not_written_change_nothing(themes, select, maps):
    q, k = themes(3, 300, 4, 2, 16)
    policy = SeerAttention(**gate(), budget=4, block_size=32)
    whole = maps(select(policy, q[:237], k[:237]))
    q[237:], k[237:] = np.nan, np.nan
    padded = select(policy, np.stack([q, q]), np.stack([k, k]), np.array([237, 0]))
    assert [head.split()[:8] for head in maps(padded)] == [head.split() for head in whole]
    chunk = maps(select(policy, q[160:237], k, offset=160))
    assert [head.split() for head in chunk] == [head.split()[5:] for head in whole]


def test_one_token(themes, select):
    assert select(SeerAttention(**gate(), budget=4), *themes(3, 1, 4, 2, 16)).index.counts.tolist() == [[[1]] * 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1}, "sinks \\+ recent = 2, got 1"),
        ({"sinks": -1}, "sinks of SeerAttention"),
        ({"query_LNHD": jnp.zeros((2, 4, 16, 8))}, "maps of 1 layers and 4 heads"),
        ({"key_LKYD": jnp.zeros((1, 2, 16, 8))}, r"\[L, K, 3H, D\]"),
        ({"key_LKYD": jnp.zeros((1, 3, 48, 8))}, "N a multiple of K"),
    ],
)
def test_validated(options, message):
    with pytest.raises(ValueError, match=message):
        SeerAttention(**{**gate(), "budget": 4, **options}).validate(1, 4)
    SeerAttention(**gate(2), budget=4).validate(2, 4)
