"""Choosing pages and reading them, against loops and sorts in NumPy: by hand, at random, and with bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KVIndex, decode_attention, page_scores, summarize_pages, topk_pages

B, T, N, K, H, S, PAGE = 2, 3, 6, 2, 8, 22, 4
P = 6  # pages of S slots; the last one has two


def numpy_topk(scores, num_pages, k, sinks, recent):
    """The pages of one head, by a stable sort of Python tuples."""
    forced = [p for p in range(num_pages) if p < sinks] + [p for p in range(num_pages) if p >= num_pages - recent]
    scores = np.where(np.isnan(scores), -np.inf, scores)
    rest = sorted((p for p in range(num_pages) if p not in forced), key=lambda p: (-scores[p], p))
    return sorted((list(dict.fromkeys(forced)) + rest)[:k])


def numpy_attention(q, k, v, slots):
    """Attend with one query to a list of slots."""
    if not slots:
        return np.zeros(q.shape)
    scores = k[slots] @ q / np.sqrt(q.shape[0])
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ v[slots]


def test_pages_by_hand():
    # Six pages of which five are used: the first is a sink, the last two are recent, and of 1 and 2 the better is 2.
    scores = jnp.array([[[-9.0, 1.0, 2.0, 0.0, 0.5, 99.0]]])
    index = topk_pages(scores, jnp.array([5]), k=4, page_size=16, sinks=1, recent=2)
    assert index.pages.tolist() == [[[0, 2, 3, 4]]] and index.counts.tolist() == [[4]] and index.page_size == 16
    short = topk_pages(scores, jnp.array([2]), k=4, page_size=16, sinks=1, recent=2)
    assert short.pages.tolist() == [[[0, 1, 0, 0]]] and short.counts.tolist() == [[2]]


@pytest.mark.parametrize(("k", "sinks", "recent"), [(1, 0, 0), (7, 0, 0), (8, 3, 4), (40, 1, 1)])
def test_pages_are_those_of_a_sort(rng, k, sinks, recent):
    scores = rng.integers(-5, 5, (3, 2, 40)).astype(np.float32)  # many ties
    scores[0, 0, :9] = np.nan
    scores[1, 1, 5] = np.inf
    num_pages = np.array([40, 17, 0])
    index = jax.jit(topk_pages, static_argnames=("k", "page_size", "sinks", "recent"))(
        jnp.asarray(scores), jnp.asarray(num_pages), k=k, page_size=2, sinks=sinks, recent=recent
    )
    for b, head in np.ndindex(3, 2):
        want = numpy_topk(scores[b, head], int(num_pages[b]), k, sinks, recent)
        count = int(index.counts[b, head])
        assert index.pages[b, head, :count].tolist() == want and not np.asarray(index.pages)[b, head, count:].any()


@pytest.mark.parametrize("reduce", ["max", "sum", "vote"])
@pytest.mark.parametrize("kind", ["mean", "bounds"])
def test_scores_of_pages(rng, kind, reduce):
    q, k = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, N, H), (B, S, K, H)))
    lengths = np.array([S, 9])
    k[1, 9:] = np.nan
    summary = summarize_pages(jnp.asarray(k), jnp.asarray(lengths), page_size=PAGE, kind=kind)
    num_pages = -(-lengths // PAGE)
    got = page_scores(jnp.asarray(q), summary, jnp.asarray(num_pages), reduce=reduce, scale=0.5)
    stacked = jnp.stack([jnp.full_like(summary, jnp.nan), summary])
    again = page_scores(jnp.asarray(q), stacked, jnp.asarray(num_pages), reduce=reduce, scale=0.5, layer=jnp.int32(1))
    np.testing.assert_array_equal(got, again)
    for b, head in np.ndindex(B, K):
        rows = q[b, :, head * 3 : head * 3 + 3].reshape(-1, H)
        single = np.full((len(rows), P), -np.inf)
        for page in range(num_pages[b]):
            keys = k[b, page * PAGE : min(lengths[b], page * PAGE + PAGE), head]
            if kind == "mean":
                single[:, page] = rows @ keys.mean(0) * 0.5
            else:
                high, low = keys.max(0), keys.min(0)
                single[:, page] = np.maximum(rows * high, rows * low).sum(1) * 0.5
        if reduce == "vote":
            weights = np.exp(single - single.max(1, keepdims=True))
            want = np.where(np.isfinite(single[0]), (weights / weights.sum(1, keepdims=True)).sum(0), -np.inf)
        else:
            want = single.max(0) if reduce == "max" else np.where(np.isfinite(single[0]), single.sum(0), -np.inf)
        np.testing.assert_allclose(got[b, head], want, rtol=2e-5, atol=2e-5)


def read_case(rng, positions):
    """Queries, a cache whose unread slots are NaN, and an index with holes, padding and a page beyond the cache."""
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    counts = np.array([[3, 2], [4, 0]], np.int32)
    pages = np.array([[[0, 2, 5, 1], [1, 4, 0, 0]], [[0, 1, 3, 9], [2, 2, 2, 2]]], np.int32)
    read = np.zeros((B, S, K), bool)
    for b, head in np.ndindex(B, K):
        for page in pages[b, head, : counts[b, head]]:
            read[b, page * PAGE : page * PAGE + PAGE, head] = True
    read &= np.arange(S)[None, :, None] <= positions.max(1)[:, None, None]
    k[~read], v[~read] = np.nan, np.nan
    index = KVIndex(counts=jnp.asarray(counts), pages=jnp.asarray(pages), page_size=PAGE)
    return q, k, v, index, read


@pytest.mark.parametrize("window", [None, 7])
def test_pages_are_read_and_nothing_else(rng, window):
    positions = np.array([[19, 20, 21], [12, 13, 14]], np.int32)
    q, k, v, index, read = read_case(rng, positions)
    got = decode_attention(*map(jnp.asarray, (q, k, v, positions)), index=index, window=window)
    for b, t, n in np.ndindex(B, T, N):
        head = n // 3
        first = 0 if window is None else positions[b, t] - window + 1
        slots = [s for s in np.flatnonzero(read[b, :, head]) if first <= s <= positions[b, t]]
        want = numpy_attention(q[b, t, n], k[b, :, head], v[b, :, head], slots)
        np.testing.assert_allclose(got[b, t, n], want, rtol=1e-5, atol=1e-5)


def test_a_layer_of_a_stacked_cache(rng):
    positions = jnp.array([[19, 20, 21], [12, 13, 14]])
    q, k, v = (jnp.asarray(rng.normal(size=shape)) for shape in ((B, T, N, H), (3, B, S, K, H), (3, B, S, K, H)))
    for layer, read in ((1, 1), (7, 2)):
        got = decode_attention(q, k, v, positions, layer=jnp.int32(layer))
        np.testing.assert_array_equal(got, decode_attention(q, k[read], v[read], positions))


def test_an_index_of_all_pages_reads_everything(rng):
    positions = jnp.array([[19, 20, 21], [2, 3, 4]])
    q, k, v = (jnp.asarray(rng.normal(size=shape)) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    pages = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, K, P))
    index = KVIndex(counts=jnp.full((B, K), P, jnp.int32), pages=pages, page_size=PAGE)
    np.testing.assert_allclose(
        decode_attention(q, k, v, positions, index=index), decode_attention(q, k, v, positions), rtol=1e-5, atol=1e-6
    )


def test_bad_input_is_refused():
    scores, num_pages = jnp.zeros((B, K, P)), jnp.full(B, P)
    q, k, positions = jnp.zeros((B, T, N, H)), jnp.zeros((B, S, K, H)), jnp.zeros((B, T), jnp.int32)
    for k_pages in (0, P + 1):
        with pytest.raises(ValueError, match="expected k from 1"):
            topk_pages(scores, num_pages, k=k_pages, page_size=PAGE)
    with pytest.raises(ValueError, match="raise k"):
        topk_pages(scores, num_pages, k=3, page_size=PAGE, sinks=2, recent=2)
    with pytest.raises(ValueError, match="float32"):
        topk_pages(scores.astype(jnp.bfloat16), num_pages, k=3, page_size=PAGE)
    with pytest.raises(ValueError, match="num_pages"):
        topk_pages(scores, num_pages[:1], k=3, page_size=PAGE)
    with pytest.raises(ValueError, match="X = H or 2H"):
        page_scores(q, jnp.zeros((B, P, K, H + 1)), num_pages)
    with pytest.raises(ValueError, match="'max', 'sum' or 'vote'"):
        page_scores(q, jnp.zeros((B, P, K, H)), num_pages, reduce="mean")
    index = KVIndex(counts=jnp.zeros((B, K), jnp.int32), pages=jnp.zeros((B, K, 3), jnp.int32), page_size=PAGE)
    bad = {
        "page_size": dataclasses.replace(index, page_size=0),
        "counts": dataclasses.replace(index, counts=index.counts[:, :1]),
        "at least one": dataclasses.replace(index, pages=index.pages[..., :0]),
        "int32": dataclasses.replace(index, pages=index.pages.astype(jnp.float32)),
        "KVIndex": index.pages,
    }
    for match, one in bad.items():
        with pytest.raises(ValueError, match=match):
            decode_attention(q, k, k, positions, index=one)
    with pytest.raises(ValueError, match="scalar layer"):
        decode_attention(q, k, k, positions, layer=jnp.int32(0))
