"""ShadowKV by hand, against loops in NumPy, and against the authors' code on the same numbers.

Outliers, chunks and outputs were printed by ``ShadowKVCache`` (bytedance/ShadowKV, a21f5a9) on the CPU with 3 outlier
chunks and queries that undo its ``sqrt(128)``, on ``draw`` of the same seeds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec
from dyninf.attention import attend_cached, attend_prompt
from dyninf.kv import ShadowKV, TopK
from dyninf.kv.pages import own_caches
from dyninf.models.config import RopeScaling
from dyninf.models.layers import rope_frequencies, rotate
from pallas_kernels import decode_attention


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def selection(budget, recent=1, sinks=0, **scorer):
    return TopK(scorer=ShadowKV(**scorer), budget=budget, sinks=sinks, recent=recent)


def turned(x_BTNH, position=0, theta=10000.0):
    at_BT = position + jnp.broadcast_to(jnp.arange(x_BTNH.shape[1]), x_BTNH.shape[:2])
    return rotate(jnp.asarray(x_BTNH), at_BT, theta, None)


@functools.partial(jax.jit, static_argnames="capacity")
def read_prompt(select, k_BTKH, v_BTKH, lengths_B, capacity):
    batch, length, num_kv, dim = k_BTKH.shape
    entry = jax.ShapeDtypeStruct((1, 1, num_kv, dim), k_BTKH.dtype)
    (cache,) = own_caches(select, 1, entry, batch, length, CacheSpec(capacity=capacity))
    attend = attend_prompt(lengths_B, select=select)(cache, jnp.arange(length)[None] < lengths_B[:, None])
    return attend(jnp.zeros_like(k_BTKH), k_BTKH, v_BTKH)[1]


def read(select, k_BTKH, v_BTKH, lengths, capacity):
    """Return the cache of a layer that has read prompts with these keys."""
    return read_prompt(select, jnp.asarray(k_BTKH), jnp.asarray(v_BTKH), jnp.asarray(lengths), capacity)


@jax.jit
def read_token(select, cache, q_BTNH, k_BTKH, v_BTKH, positions_B):
    live_BT = jnp.ones((len(positions_B), 1), bool)
    attend = attend_cached(positions_B[:, None], live_BT, select=select, write_inactive=True)
    return attend(cache, live_BT)(q_BTNH, k_BTKH, v_BTKH)


def step(select, cache, q_BTNH, k_BTKH, v_BTKH, positions):
    """Return what a new token attends to, and the cache."""
    return read_token(select, cache, *map(jnp.asarray, (q_BTNH, k_BTKH, v_BTKH, positions)))


def test_it_reads_what_the_authors_code_reads():
    select = selection(32, recent=32, rank=12, outliers=3, page_size=8)
    cache = read(select, turned(draw(21, 133, 2, 16)[None]), draw(22, 133, 2, 16)[None], [133], 200)
    assert np.sort(cache.outliers[0], axis=1).tolist() == [[0, 7, 10], [3, 5, 8]]
    assert cache.start.tolist() == [96], "37 tokens at the end are exact"
    pages = ([[1, 3, 4, 6], [1, 2, 6, 7]], [[4, 5, 9, 11], [0, 4, 6, 9]], [[4, 6, 8, 11], [4, 6, 10, 11]])
    outputs = [
        [(-0.0179, -0.2021, 0.25442), (0.11083, -0.16122, 0.18073), (0.04389, 0.03723, -0.03659)],
        [(-0.05566, -0.09672, 0.36832), (0.02215, -0.15685, 0.27816), (0.00704, 0.04497, -0.1242)],
        [(-0.00714, 0.0735, 0.08956), (-0.16515, -0.22118, 0.04579), (0.12488, -0.14328, 0.14188)],
    ]  # the first entries of the first three heads
    for offset, (chosen, out) in enumerate(zip(pages, outputs, strict=True)):
        at = 133 + offset
        q = turned(draw(30 + offset, 1, 1, 4, 16), at)
        scores = select.scorer.score(q, cache.landmarks, jnp.array([12]), cache.choosable)
        best = np.argsort(np.where(cache.choosable[0], scores[0], -1.0), axis=1)[:, -4:]
        assert np.sort(best, axis=1).tolist() == chosen
        k, v = turned(draw(40 + offset, 1, 1, 2, 16), at), draw(50 + offset, 1, 1, 2, 16)
        got, cache = step(select, cache, q, k, v, [at])
        np.testing.assert_allclose(got[0, 0, :3, :3], out, atol=2e-5)


def test_three_pages_by_hand():
    """One head of two features that do not turn, pages of two tokens and one token more, one outlier."""
    k = np.array([[2, 0], [2, 0], [3, 1], [1, -3], [0, 1], [0, 3], [5, 5]], np.float32)[None, :, None]
    v = np.arange(14, dtype=np.float32).reshape(1, 7, 1, 2)
    select = selection(2, rank=2, outliers=1, page_size=2, frequencies=jnp.zeros(1))
    cache = read(select, k, v, [7], 9)
    # Means (2, 0), (2, -1), (0, 2). Cosines: 1 and 1; 5 / sqrt(5 * 10) = 0.71 and 0.71; 1 and 1.
    assert cache.outliers.tolist() == [[[1]]] and cache.start.tolist() == [6]
    np.testing.assert_allclose(cache.landmarks[0, :, 0], [[2, 0], [2, -1], [0, 2]])
    # Exact slots: 2 of the outlier, and 1 + 2 behind the prompt and what its last page may hold.
    np.testing.assert_allclose(cache.k[0, :, 0], [[3, 1], [1, -3], [5, 5], [0, 0], [0, 0]])
    scores = select.scorer.score(jnp.full((1, 1, 1, 2), np.sqrt(2.0)), cache.landmarks, jnp.array([3]), cache.choosable)
    # Dot products over sqrt(2): 2 and 2, equal shares, and none for the outlier; the first of equals is read.
    np.testing.assert_allclose(scores[0, 0], [0.5, 0, 0.5], rtol=1e-6)
    got, cache = step(
        select, cache, np.full((1, 1, 1, 2), np.sqrt(2.0)), np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 1, 2)), [7]
    )
    # Tokens 2, 3, 6, the new one, 0, 1: products 4, -2, 10, 0, 2, 2.
    weights = np.exp(np.array([4, -2, 10, 0, 2, 2.0]))
    want = weights @ np.array([[4, 5], [6, 7], [12, 13], [0, 0], [0, 1], [2, 3]]) / weights.sum()
    np.testing.assert_allclose(got[0, 0, 0], want, rtol=1e-5)
    assert cache.left_out(select).tolist() == [2]


def by_loops(select, q_NH, k_TKH, v_TKH, prompt, made_TKH):
    """Attention of the last token of a row whose first ``prompt`` tokens were read at once."""
    size, local = select.scorer.page_size, select.recent_pages - 1
    pages, out = max(prompt // size - local, 0), np.zeros_like(q_NH)
    num_kv, group = k_TKH.shape[1], len(q_NH) // k_TKH.shape[1]
    for head in range(num_kv):
        paged = k_TKH[: pages * size, head].reshape(pages, size, k_TKH.shape[2])
        means = paged.mean(axis=1)
        cosine = (paged * means[:, None]).sum(-1)
        cosine /= np.linalg.norm(paged, axis=-1) * np.linalg.norm(means, axis=-1)[:, None]
        order = np.argsort(cosine.min(axis=1), kind="stable") if pages else []
        outliers = [int(page) for page in order[: select.scorer.outliers]]
        rest = [page for page in range(pages) if page not in outliers]
        share = {page: 0.0 for page in rest}
        for n in range(head * group, (head + 1) * group):
            logits = np.array([means[page] @ q_NH[n] for page in rest]) / np.sqrt(q_NH.shape[1])
            for page, weight in zip(rest, np.exp(logits) / np.exp(logits).sum(), strict=True):
                share[page] = max(share[page], weight)
        best = sorted(rest, key=lambda page: (page >= select.sink_pages, -share[page]))[: select.budget // size]
        slots = [page * size + x for page in outliers for x in range(size)] + list(range(pages * size, len(k_TKH)))
        keys = [k_TKH[slot, head] for slot in slots]
        slots += [page * size + x for page in best for x in range(size)]
        keys += [made_TKH[page * size + x, head] for page in best for x in range(size)]
        for n in range(head * group, (head + 1) * group):
            weights = np.exp(np.array(keys) @ q_NH[n] / np.sqrt(q_NH.shape[1]))
            out[n] = weights @ v_TKH[slots, head] / weights.sum()
    return out


@pytest.mark.parametrize("rank", [5, 16])
def test_a_ragged_batch_attends_as_loops(rank):
    """Rows of many pages, of as many as are read, of outliers alone, of last pages alone and of one token."""
    select = selection(12, recent=5, sinks=3, rank=rank, outliers=2, page_size=4)
    lengths, length, steps = np.array([45, 27, 14, 11, 1]), 46, 3
    flat, v = draw(1, 5, length + steps, 2, 8), draw(2, 5, length + steps, 2, 8)
    q = draw(3, 5, steps, 6, 8)
    k = np.asarray(turned(flat, theta=500.0))
    select = dataclasses.replace(select, scorer=dataclasses.replace(select.scorer, theta=500.0))
    cache = read(select, k[:, :length], v[:, :length], lengths, 53)
    assert cache.k.shape[1] == 2 * 4 + (2 * 4 - 1) + (53 - length) and cache.u.shape == (5, 10, 4, rank)
    made = np.zeros_like(k)
    for row, prompt in enumerate(lengths):
        left, values, right = np.linalg.svd(flat[row, :prompt].reshape(prompt, 16), full_matrices=False)
        lossy = ((left[:, :rank] * values[:rank]) @ right[:rank]).reshape(1, prompt, 2, 8)
        made[row, :prompt] = turned(lossy, theta=500.0)[0]
    rows = np.arange(5)
    for offset in range(steps):
        at = lengths + offset
        got, cache = step(select, cache, q[:, [offset]], k[rows, at][:, None], v[rows, at][:, None], at)
        for row in rows:
            tokens = at[row] + 1
            want = by_loops(select, q[row, offset], k[row, :tokens], v[row, :tokens], lengths[row], made[row])
            np.testing.assert_allclose(got[row, 0], want, rtol=2e-4, atol=2e-5)
        np.testing.assert_array_equal(cache.left_out(select), np.maximum((lengths // 4 - 1) * 4 - 8 - 12, 0))


@pytest.mark.parametrize(("length", "outliers"), [(40, 9), (40, 0), (6, 2), (3, 2)])
def test_all_directions_and_pages_are_all_there_is(length, outliers):
    """Whatever is an outlier: prompts shorter than a page and the last pages among them."""
    select = selection(40, recent=5, rank=99, outliers=outliers, page_size=4)
    k, v, q = draw(4, 2, length, 2, 8), draw(5, 2, length, 2, 8), draw(6, 2, 1, 4, 8)
    lengths = np.array([length - 1, length // 2])
    cache = read(select, k, v, lengths, 48)
    got, _ = step(select, cache, q, k[[0, 1], lengths][:, None], v[[0, 1], lengths][:, None], lengths)
    want = decode_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(lengths)[:, None])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_sinks_are_read_whatever_their_score():
    select = selection(4, sinks=2, rank=16, outliers=1, page_size=4)
    k = np.concatenate([np.full((1, 4, 1, 8), -1.0), np.ones((1, 16, 1, 8))], axis=1).astype(np.float32)
    k[0, 17] = -1  # an outlier
    v = np.zeros((1, 20, 1, 8), np.float32)
    v[0, :4] = 1
    cache = read(select, k, v, [20], 32)
    assert cache.outliers.tolist() == [[[4]]]
    got, _ = step(select, cache, np.zeros((1, 1, 1, 8)), k[:, :1], v[:, 19:], [20])
    np.testing.assert_allclose(got, 4 / 9, rtol=1e-6)  # 4 of the sinks' page, 4 of the outlier, the new token


def test_frequencies_take_the_place_of_theta():
    """Keys that lie in one plane before a scaled rotation are rank 2 to those who know it, and not to others."""
    scaling = RopeScaling(kind="llama3", factor=8.0, original_length=16, low_freq_factor=1.0, high_freq_factor=4.0)
    flat = np.einsum("btr,rkh->btkh", draw(1, 1, 64, 2), draw(2, 2, 2, 8))
    k = rotate(jnp.asarray(flat), jnp.arange(64)[None], 100.0, scaling)
    known = selection(8, rank=2, outliers=0, frequencies=rope_frequencies(8, 100.0, scaling))
    for select, close in ((known, True), (selection(8, rank=2, outliers=0, theta=100.0), False)):
        cache = read(select, k, k, [64], 72)
        made = np.einsum("bpxr,bkrh->bpxkh", cache.u, cache.sv).reshape(1, 64, 2, 8)
        made = rotate(jnp.asarray(made), jnp.arange(64)[None], 100.0, scaling)
        assert np.allclose(made, k, atol=1e-4) == close
