"""Attention of a prompt to the blocks of an index, and the choice of these blocks, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockIndex, block_sparse_attention, choose_blocks
from pallas_kernels.block_sparse_attention import mosaic_gpu, mosaic_tpu
from pallas_kernels.choose_blocks import topk
from pallas_kernels.dispatch import MOSAIC_GPU_JAX

# Compiled as one program: op by op, every shape would compile twenty.
attend = jax.jit(block_sparse_attention, static_argnames=("offset", "window", "sinks", "with_lse", "implementation"))
choice = jax.jit(choose_blocks, static_argnames=("block_size", "budget", "sinks", "recent", "offset"))


def choose(*arguments, **options):
    return jax.tree.map(np.asarray, choice(*arguments, **options))


def attend_numpy(q, k, v, counts, blocks, size, *, lengths, offset, window=None, sinks=0, order=None):
    """Attend in float64, key by key; also the logarithms of the sums of exponentials."""
    batch, tokens, heads, dim = q.shape
    group = heads // k.shape[2]
    place = np.broadcast_to(np.arange(k.shape[1]), (batch, heads, k.shape[1]))
    place = place if order is None else np.argsort(order, axis=2)
    out, lse = np.zeros(q.shape), np.full((batch, heads, tokens), -np.inf)
    for b, n, t in np.ndindex(batch, heads, tokens):
        row, position = (place[b, n, t] if order is not None else t) // size, offset + t
        named = blocks[b, n, row, : counts[b, n, row]]
        keys = np.arange(k.shape[1])
        seen = np.isin(place[b, n] // size, named) & (keys <= position) & (keys < lengths[b])
        if window is not None:
            seen &= (keys > position - window) | (keys < sinks)
        if not seen.any():
            continue
        scores = k[b, seen, n // group].astype(np.float64) @ q[b, t, n].astype(np.float64) * dim**-0.5
        lse[b, n, t] = np.log(np.sum(np.exp(scores)))
        out[b, t, n] = np.exp(scores - lse[b, n, t]) @ v[b, seen, n // group]
    return out, lse


def make_case(rng, *, tokens, keys, heads, kv, dim, size, entries, offset, lengths=None, dtype="float32"):
    """Random queries, keys and values, NaN beyond the lengths, and an index with an empty row and entries beyond."""
    batch = 2
    q, k, v = (rng.normal(size=shape) for shape in ((batch, tokens, heads, dim), *[(batch, keys, kv, dim)] * 2))
    lengths = np.full(batch, keys) if lengths is None else np.array(lengths)
    for b in range(batch):
        k[b, lengths[b] :], v[b, lengths[b] :] = np.nan, np.nan
    rows, num_blocks = -(-tokens // size), -(-keys // size)
    blocks = np.zeros((batch, heads, rows, entries), np.int32)
    counts = rng.integers(1, entries + 1, blocks.shape[:3]).astype(np.int32)
    for place in np.ndindex(*counts.shape):
        blocks[place] = np.sort(rng.permutation(num_blocks + 2)[:entries])  # two of them do not exist
    counts[0, 0, 0] = 0
    blocks[0, 0, 0] = -7
    arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
    index = BlockIndex(counts=jnp.asarray(counts), blocks=jnp.asarray(blocks), block_size=size)
    return arrays, index, {"lengths": lengths, "offset": offset}


CASES = {
    "whole": {"tokens": 37, "keys": 37, "heads": 4, "kv": 2, "dim": 16, "size": 8, "entries": 4, "offset": 0},
    "chunk": {"tokens": 16, "keys": 45, "heads": 3, "kv": 1, "dim": 8, "size": 8, "entries": 5, "offset": 24},
    "between": {"tokens": 13, "keys": 45, "heads": 2, "kv": 2, "dim": 8, "size": 8, "entries": 6, "offset": 21},
    "padded": {
        "tokens": 24, "keys": 24, "heads": 2, "kv": 1, "dim": 8, "size": 8, "entries": 3, "offset": 0,
        "lengths": (24, 9),
    },
    "one": {"tokens": 1, "keys": 1, "heads": 2, "kv": 2, "dim": 8, "size": 8, "entries": 1, "offset": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("window", [None, 11], ids=["all", "window"])
def test_reference_equals_numpy(rng, name, window):
    (q, k, v), index, about = make_case(rng, **CASES[name])
    options = {"window": window, "sinks": 0 if window is None else 2}
    lengths = jnp.asarray(about["lengths"], jnp.int32)
    out, lse = attend(q, k, v, index, lengths, offset=about["offset"], with_lse=True, implementation="xla", **options)
    numbers = [np.asarray(x) for x in (q, k, v, index.counts, index.blocks)]
    expected, sums = attend_numpy(*numbers, index.block_size, **about, **options)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(lse, sums, atol=2e-5)
    assert np.isneginf(sums[0, 0, 0])


@pytest.mark.parametrize("name", ["whole", "padded", "one"])
@pytest.mark.parametrize("window", [None, 11], ids=["all", "window"])
def test_an_order_moves_tokens_between_blocks_and_changes_no_position(rng, name, window):
    (q, k, v), index, about = make_case(rng, **CASES[name])
    options = {"window": window, "sinks": 0 if window is None else 2}
    order = rng.permuted(np.broadcast_to(np.arange(q.shape[1]), (2, q.shape[2], q.shape[1])), axis=2)
    lengths = jnp.asarray(about["lengths"], jnp.int32)
    given = {"order_BNT": jnp.asarray(order, jnp.int32), "with_lse": True, **options}
    out, lse = attend(q, k, v, index, lengths, **given)
    numbers = [np.asarray(x) for x in (q, k, v, index.counts, index.blocks)]
    expected, sums = attend_numpy(*numbers, index.block_size, **about, **options, order=order)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(lse, sums, atol=2e-5)


def test_an_order_of_a_part_of_a_prompt_is_refused(rng):
    (q, k, v), index, about = make_case(rng, **CASES["chunk"])
    order = jnp.zeros((2, 3, 16), jnp.int32)
    with pytest.raises(ValueError, match="a whole prompt for an order, got 16 queries of 45 keys"):
        block_sparse_attention(q, k, v, index, offset=24, order_BNT=order)
    with pytest.raises(ValueError, match=r"an order \[B, N, T\] = \(2, 3, 16\) of int32, got \(2, 3, 16\) of float32"):
        block_sparse_attention(q, k[:, :16], v[:, :16], index, order_BNT=order.astype(float))
    about = {"platform": "tpu", "dtype": jnp.float32, "kv_dtype": jnp.float32, "head_dim": 128, "num_keys": 64}
    assert "order of the text" in mosaic_tpu.refuse(**about, ordered=True)
    about = {"platform": "gpu", "dtype": jnp.bfloat16, "kv_dtype": jnp.bfloat16, "head_dim": 128, "capability": "9.0"}
    if jax.__version_info__ >= MOSAIC_GPU_JAX:
        assert "order of the text" in mosaic_gpu.refuse(**about, ordered=True)


def test_chosen_by_hand():
    # Row 2 of blocks of 4 ends with block 2. Forced: 0 and 2. Of the others, block 1 alone exists.
    scores = jnp.array([[[[9, 9, 9, 9], [1, 2, 9, 9], [1, 5, 2, 9], [4, 1, 3, 2]]]], jnp.float32)
    index, wanted = choose(scores, block_size=4, budget=3)
    assert index.counts[0, 0].tolist() == [1, 2, 3, 3]
    assert [row[:count].tolist() for row, count in zip(index.blocks[0, 0], index.counts[0, 0], strict=True)] == [
        [0], [0, 1], [0, 1, 2], [0, 2, 3],
    ]  # fmt: skip
    assert wanted[0, 0].tolist() == [1, 2, 3, 4]
    # Row 3: sum 10; forced 0 and 3 hold 6. With 0.65 block 2 is needed (6 < 6.5), then 9 are held: enough.
    index, wanted = choose(scores, block_size=4, budget=4, mass=0.65)
    assert index.counts[0, 0].tolist() == [1, 2, 3, 3] and wanted[0, 0].tolist() == [1, 2, 3, 3]
    # With 0.6 the forced ones are enough; the budget cuts off nothing.
    assert choose(scores, block_size=4, budget=4, mass=0.6)[0].counts[0, 0].tolist() == [1, 2, 3, 2]


@pytest.mark.parametrize("way", ["xla", "topk_pages"])
@pytest.mark.parametrize("mass", [None, 0.7], ids=["budget", "mass"])
@pytest.mark.parametrize(("rows", "blocks"), [(5, 9), (2, 2), (1, 1)])
def test_choice_equals_numpy(rng, mass, way, rows, blocks):
    scores = np.round(rng.exponential(size=(2, 3, rows, blocks)), 1).astype(np.float32)  # some of them are equal
    before = min(2, blocks - rows)
    options = {"block_size": 8, "budget": 4, "sinks": 1, "recent": 2}
    if way == "xla":
        index, wanted = choose(jnp.asarray(scores), mass=mass, offset=8 * before, **options)
    else:  # with the reference of the pages, where no kernel serves
        share = None if mass is None else jnp.float32(mass)
        run = functools.partial(topk.choose_blocks, implementation="xla", **options)
        index, wanted = jax.tree.map(np.asarray, jax.jit(run)(jnp.asarray(scores), share, jnp.int32(8 * before)))
    for place in np.ndindex(2, 3, rows):
        last = before + place[2]
        exist = list(range(last + 1))
        forced = [c for c in exist if c < 1 or c > last - 2]
        ranked = forced + sorted((c for c in exist if c not in forced), key=lambda c: -scores[place][c])
        held = np.cumsum([0, *scores[place][ranked]])
        enough = len(ranked) if mass is None else max(int(np.sum(held[:-1] < mass * held[-1])), len(forced))
        assert int(wanted[place]) == (min(enough, 5) if way == "topk_pages" and mass is not None else enough)
        kept = index.blocks[place][: index.counts[place]].tolist()
        assert kept == sorted(ranked[: min(enough, 4)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 30}, "offset=30"),
        ({"window": 0}, "window of at least 1"),
        ({"sinks": 3}, "a window beside"),
        ({"lengths_B": jnp.zeros(3, jnp.int32)}, r"lengths \[B\]"),
    ],
)
def test_refused(rng, change, message):
    (q, k, v), index, _ = make_case(rng, **CASES["whole"])
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, k, v, index, **change)
    with pytest.raises(ValueError, match="BlockIndex"):
        block_sparse_attention(q, k, v, index.blocks)
    with pytest.raises(ValueError, match=r"\[B, N, R\] = \(2, 4, 5\)"):
        block_sparse_attention(q, k, v, BlockIndex(counts=index.counts[:, :, 1:], blocks=index.blocks, block_size=8))
    with pytest.raises(ValueError, match="sinks"):
        choose_blocks(jnp.zeros((1, 1, 2, 2)), block_size=8, budget=1)
