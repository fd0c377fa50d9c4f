"""The arranged prompt and what its pages catch: by hand, and against loops in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, check, generate
from dyninf.attention import attend_cached, attend_prompt
from dyninf.cache import LayerCache
from dyninf.kv import PageMean, PromptKV, Quest, RetrievalAttention, TokenSelect, TopK, page_recall
from dyninf.models import ModelConfig, Transformer

# Compiled as one program each: op by op, every shape would compile a dozen.
_arrange = jax.jit(lambda scorer, seen, *ends: scorer.arrange(PromptKV(**seen), *ends), static_argnums=(2, 3))
_recall = jax.jit(lambda select, seen, q, top: page_recall(select, PromptKV(**seen), q, top=top), static_argnums=3)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def prompt(seed, lengths, length, *, heads=6, kv_heads=2, dim=8):
    batch = len(lengths)
    q, k, v = (draw(seed + i, batch, length, n, dim) for i, n in enumerate((heads, kv_heads, kv_heads)))
    return PromptKV(q_BTNH=q, k_BTKH=k, v_BTKH=v, lengths_B=jnp.asarray(lengths))


def unit(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-20)


def arranged_by_loops(scorer, q_TNH, k_TH, head, length, sinks, recent):
    """Return the order of one head of one sequence."""
    group = len(q_TNH[0]) // 2
    asked = [
        q_TNH[sample * length // scorer.samples, n]
        for sample in range(scorer.samples)
        for n in range(head * group, (head + 1) * group)
    ]
    asked = unit(np.array(asked))
    centers = np.array([asked[c * len(asked) // scorer.centroids] for c in range(scorer.centroids)])
    for _ in range(scorer.iterations):
        nearest = np.argmax(asked @ centers.T, axis=1)
        for c in range(scorer.centroids):
            if (nearest == c).any():
                centers[c] = unit(asked[nearest == c].sum(axis=0))
    middle = range(min(sinks, length), max(length - recent, min(sinks, length)))
    cluster = {t: int(np.argmax(centers @ k_TH[t])) for t in middle}
    return [
        *range(middle.start),
        *sorted(middle, key=lambda t: (cluster[t], t)),
        *range(middle.stop, len(k_TH)),
    ]


@pytest.mark.parametrize("iterations", [0, 3])
def test_the_order_is_that_of_loops(iterations):
    """A ragged batch, one sequence of sinks and recent tokens alone."""
    lengths, sinks, recent = [40, 23, 5], 3, 2
    obs = prompt(1, lengths, 40)
    scorer = RetrievalAttention(page_size=4, centroids=5, samples=16, iterations=iterations)
    order = np.asarray(_arrange(scorer, vars(obs), sinks, recent))
    for row, length in enumerate(lengths):
        for head in range(2):
            k_TH = obs.k_BTKH[row, :, head]
            want = arranged_by_loops(scorer, obs.q_BTNH[row], k_TH, head, length, sinks, recent)
            assert order[row, :, head].tolist() == want
    assert order[2, :, 0].tolist() == list(range(40))


def test_an_order_by_hand():
    """Two queries, two centroids; keys that point either way alternate."""
    scorer = RetrievalAttention(page_size=2, centroids=2, samples=2)
    q_T = np.array([[1, 0], [0, 0], [0, 0], [-1, 0], [0, 0], [0, 0]], np.float32)
    k_T = np.array([[9, 9], [-1, 5], [1, 5], [-2, 5], [2, 5], [9, 9]], np.float32)
    obs = PromptKV(
        q_BTNH=q_T[None, :, None], k_BTKH=k_T[None, :, None], v_BTKH=k_T[None, :, None], lengths_B=jnp.array([6])
    )
    # Asked at tokens 0 and 3: the centroids are (1, 0) and (-1, 0), to which keys 2 and 4, and 1 and 3 belong.
    assert _arrange(scorer, vars(obs), 1, 1)[0, :, 0].tolist() == [0, 2, 4, 1, 3, 5]


def stored(select, obs, capacity):
    """Return the cache of a layer after the prompt."""
    batch, length, heads, dim = obs.k_BTKH.shape
    zeros, pages = jnp.zeros((batch, capacity, heads, dim)), -(-capacity // (8 * select.scorer.page_size)) * 8
    cache = LayerCache(k=zeros, v=zeros, summary=jnp.zeros((batch, pages, heads, dim)))
    live_BT = jnp.arange(length)[None] < obs.lengths_B[:, None]
    attend = attend_prompt(obs.lengths_B, select=select)(cache, live_BT)
    return attend(jnp.asarray(obs.q_BTNH), jnp.asarray(obs.k_BTKH), jnp.asarray(obs.v_BTKH))


@pytest.mark.slow
def test_pages_of_one_key_are_exact_retrieval():
    """A step attends to the keys of the largest dot products of its group, the sinks and its own, from any slot."""
    select = TopK(scorer=RetrievalAttention(page_size=1, centroids=4, samples=8), budget=9, sinks=2)
    obs, lengths = prompt(4, [24, 13], 24), np.array([24, 13])
    o_BTNH, cache = stored(select, obs, 32)
    plain = stored(dataclasses.replace(select, scorer=PageMean(page_size=1)), obs, 32)
    np.testing.assert_array_equal(o_BTNH, plain[0])
    assert (np.asarray(cache.k) != np.asarray(plain[1].k)).any()
    q, k, v = draw(7, 2, 1, 6, 8), draw(8, 2, 1, 2, 8), draw(9, 2, 1, 2, 8)
    every = jnp.ones((2, 1), bool)
    attend = attend_cached(jnp.asarray(lengths)[:, None], every, select=select, write_inactive=True)(cache, every)
    out, _ = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    for row, length in enumerate(lengths):
        for head in range(2):
            keys = np.concatenate([obs.k_BTKH[row, :length, head], k[row, :, head]])
            values = np.concatenate([obs.v_BTKH[row, :length, head], v[row, :, head]])
            asked = q[row, 0, 3 * head : 3 * head + 3]
            worth = (asked @ keys.T).max(axis=0)
            worth[[0, 1, length]] = np.inf
            best = np.argsort(-worth)[:9]
            weights = np.exp(asked @ keys[best].T / np.sqrt(8))
            want = weights @ values[best] / weights.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(out[row, 0, 3 * head : 3 * head + 3], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "scorer",
    [
        Quest(page_size=4),
        PageMean(page_size=4),
        TokenSelect(page_size=4),
        RetrievalAttention(page_size=4, centroids=4, samples=8),
    ],
    ids=lambda scorer: type(scorer).__name__,
)
def test_recall_is_that_of_loops(scorer):
    """Which slots the chosen pages hold is read off the scorer; what they catch and cost is counted here."""
    select, lengths = TopK(scorer=scorer, budget=12, sinks=2), [30, 21]
    obs, q_BQNH = prompt(11, lengths, 30), draw(14, 2, 3, 6, 8)
    got, score = _recall(select, vars(obs), jnp.asarray(q_BQNH), 5), jax.jit(scorer.score)
    order = _arrange(scorer, vars(obs), 2, 1)
    order = np.broadcast_to(np.arange(30)[None, :, None], (2, 30, 2)) if order is None else np.asarray(order)
    for row, length in enumerate(lengths):
        pages = -(-length // 4)
        tokens = np.array([[obs.k_BTKH[row, order[row, s, h], h] for h in range(2)] for s in range(length)])
        parts = [tokens[4 * p : min(4 * p + 4, length)] for p in range(pages)]
        means = [part.mean(axis=0) for part in parts]
        bounds = [np.concatenate([part.max(axis=0), part.min(axis=0)], axis=-1) for part in parts]
        summary = np.array(bounds if scorer.kind == "bounds" else means)[None]
        for question in range(3):
            q = q_BQNH[row, question]
            scores = np.array(score(q[None, None], summary, np.array([pages])))[0]
            scores[:, [0, pages - 1]] = np.inf
            for head in range(2):
                chosen = np.argsort(-scores[head])[:3]
                read = [s for p in chosen for s in range(4 * p, min(4 * p + 4, length))]
                mass, top = [], []
                for n in range(3 * head, 3 * head + 3):
                    products = tokens[:, head] @ q[n]
                    weights = np.exp(products / np.sqrt(8))
                    mass.append(weights[read].sum() / weights.sum())
                    top.append(len(set(np.argsort(-products)[:5]) & set(read)) / 5)
                np.testing.assert_allclose(got.mass[row, question, head], np.mean(mass), rtol=1e-4)
                np.testing.assert_allclose(got.top[row, question, head], np.mean(top), rtol=1e-5)
        entries = 12 - (-length % 4)
        numbers = entries * 16 + pages * (16 if scorer.kind == "bounds" else 8)
        np.testing.assert_allclose(got.scanned[row], numbers / (16 * length), rtol=1e-6)


def test_an_arrangement_gathers_what_a_query_wants():
    """Keys of eight kinds, strewn over the text; each query wants one kind, of which there are two pages."""
    kinds = np.random.default_rng(0).permutation(np.repeat(np.arange(8), 16))
    obs = PromptKV(
        q_BTNH=np.eye(8, dtype=np.float32)[np.random.default_rng(1).permutation(kinds)][None, :, None] + 0.0,
        k_BTKH=10 * np.eye(8, dtype=np.float32)[kinds][None, :, None] + 0.01 * draw(2, 1, 128, 1, 8),
        v_BTKH=draw(3, 1, 128, 1, 8),
        lengths_B=jnp.array([128]),
    )
    asked = jnp.eye(8)[None, :, None]
    mass = {}
    for scorer in (PageMean(page_size=8), RetrievalAttention(page_size=8, centroids=32, samples=128)):
        select = TopK(scorer=scorer, budget=32, sinks=0)
        mass[type(scorer)] = float(_recall(select, vars(obs), asked, 16).top.mean())
    assert mass[RetrievalAttention] > 0.95 and mass[PageMean] < 0.6


def test_windows_are_refused():
    sizes = {"d_model": 16, "d_ff": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_length": 64}
    model = Transformer(ModelConfig(vocab_size=61, num_layers=2, windows=(6, 5), **sizes), jax.random.key(1))
    plan = Plan(select=TopK(scorer=RetrievalAttention(page_size=2), budget=8))
    with pytest.raises(NotImplementedError, match=r"arranges what it selects from .* got a window of 6"):
        generate(model, np.zeros((1, 15), np.int32), plan, max_new_tokens=2)


@pytest.mark.parametrize("wrong", [{"centroids": 0}, {"samples": 3}, {"iterations": -1}, {"centroids": 2.0}])
def test_settings_out_of_range_are_refused(tiny_model, wrong):
    scorer = RetrievalAttention(**{"page_size": 2, "centroids": 4, "samples": 8, **wrong})
    with pytest.raises(ValueError, match=f"expected {next(iter(wrong))} of at least"):
        check(Plan(select=TopK(scorer=scorer, budget=8)), tiny_model)


def test_recall_refuses_what_leaves_nothing_unread():
    select, obs = TopK(scorer=Quest(page_size=4), budget=32), prompt(1, [30], 30)
    with pytest.raises(ValueError, match="budget below the 30 tokens"):
        page_recall(select, obs, draw(2, 1, 1, 6, 8))
    with pytest.raises(ValueError, match="at least 1 key, got 0"):
        page_recall(dataclasses.replace(select, budget=8), obs, draw(2, 1, 1, 6, 8), top=0)
