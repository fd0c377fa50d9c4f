"""What a step reads under ``Plan(select=...)``: by hand, against loops in NumPy, and against the papers' own code.

The pages below were printed by Quest's ``local_heavy_hitter_mask`` (mit-han-lab/Quest, 01c1623), TriForce's
``RetrievalCache`` (Infini-AI-Lab/TriForce, 164c8c0) and TokenSelect's ``get_topk_tokens`` (pzs19/TokenSelect, 8e1e97f,
in float32, with its product of heads as its kernel defines it), run with torch on ``draw`` of the same seeds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, check, generate
from dyninf.attention import attend_cached
from dyninf.cache import LayerCache
from dyninf.configs.plans import plans
from dyninf.depth import Confidence, every
from dyninf.kv import PageMean, Quest, Recency, TokenSelect, TopK
from dyninf.kv.pages import choose_pages, mean_read, summary_sizes
from dyninf.models import ModelConfig, Transformer
from pallas_kernels import decode_attention, summarize_pages, topk_pages

SELECTING = {name: plan.select for name, plan in plans(6).items() if isinstance(plan.select, TopK)}
EXITS = every(Confidence(threshold=0.6), step=1)
RECENT = TopK(scorer=Recency(), budget=32)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Compiled as one program each: op by op, every shape would compile a dozen.
summarize = jax.jit(summarize_pages, static_argnames=("page_size", "kind"))
choose = jax.jit(choose_pages, static_argnames="window")
rank = jax.jit(topk_pages, static_argnames=("k", "page_size", "sinks"))


def cache_of(select, k_BSKH, lengths_B, v_BSKH=None):
    """Return the cache of a layer that holds these keys."""
    k = jnp.asarray(k_BSKH)
    pages = summarize(k, jnp.asarray(lengths_B), page_size=select.scorer.page_size, kind=select.scorer.kind)
    return LayerCache(k=k, v=k if v_BSKH is None else jnp.asarray(v_BSKH), summary=pages)


def chosen(scorer, q_NH, k_SKH, **options):
    """Return the pages of each head."""
    select = TopK(scorer=scorer, budget=scorer.page_size)
    cache, count = cache_of(select, k_SKH[None], np.array([len(k_SKH)])), np.array([-(-len(k_SKH) // scorer.page_size)])
    scores = jax.jit(scorer.score)(q_NH[None, None], cache.summary, count)
    return np.asarray(scores[0]), rank(scores, count, page_size=scorer.page_size, **options).pages[0].tolist()


def test_quest_scores_and_chooses_as_the_papers_code():
    scores, pages = chosen(Quest(page_size=4), draw(11, 4, 8), draw(12, 45, 4, 8), k=4)
    first = [4.3274, 2.3450, 4.0661, 3.7966, 7.3473, 5.8766, 5.5753, 6.6664, 2.8787, 3.4051, 5.5936, -1.2020]
    np.testing.assert_allclose(scores[0], first, atol=1e-4)
    assert pages == [[4, 5, 7, 10], [1, 2, 6, 10], [1, 2, 3, 10], [2, 4, 6, 10]]


def test_page_means_choose_as_the_papers_code():
    _, pages = chosen(PageMean(page_size=4), draw(15, 4, 8), draw(16, 40, 4, 8), k=4, sinks=1)
    assert pages == [[0, 1, 3, 8], [0, 1, 5, 9], [0, 4, 7, 9], [0, 3, 7, 8]]


def test_votes_choose_tokens_as_the_papers_code():
    _, pages = chosen(TokenSelect(page_size=1), draw(13, 4, 8), draw(14, 30, 2, 8), k=7)
    assert pages == [[0, 7, 10, 12, 15, 21, 27]] * 2, "one choice for all heads"


def test_scores_of_three_pages_by_hand():
    """One key/value head, two queries, pages of two tokens, the third half full."""
    k_SKH = np.array([[1, 0], [0, 1], [2, -2], [-2, 2], [1, 1]], np.float32)[:, None]
    q_NH = np.array([[1, 1], [1, -1]], np.float32)
    # Bounds: high (1, 1), (2, 2), (1, 1); low (0, 0), (-2, -2), (1, 1).
    # Query (1, 1): 2, 4, 2. Query (1, -1): 1 - 0 = 1, 2 + 2 = 4, 1 - 1 = 0. The larger: 2, 4, 2.
    scores, pages = chosen(Quest(page_size=2), q_NH, k_SKH, k=1)
    assert (scores.tolist(), pages) == ([[2, 4, 2]], [[1]])
    # Means: (0.5, 0.5), (0, 0), (1, 1). Query (1, 1): 1, 0, 2. Query (1, -1): 0, 0, 0.
    scores, pages = chosen(PageMean(page_size=2), q_NH, k_SKH, k=1)
    assert (scores.tolist(), pages) == ([[1, 0, 2]], [[2]])
    # Votes: e, 1, e**2 over their sum 11.107; a third each.
    votes, pages = chosen(TokenSelect(page_size=2), q_NH, k_SKH, k=2)
    np.testing.assert_allclose(votes[0], np.array([np.e, 1, np.e**2]) / 11.107337 + 1 / 3, rtol=1e-5)
    assert pages == [[0, 2]]


def by_loops(select, q_NH, k_SKH, v_SKH, position):
    """Attention of one token to the pages that a Quest selection of ``select`` reads."""
    size, out, live = select.scorer.page_size, np.zeros_like(q_NH), position + 1
    pages = np.arange(-(-live // size))
    forced = (pages * size < select.sinks) | (pages == pages[-1]) | (pages * size + size > live - select.recent)
    for head in range(k_SKH.shape[1]):
        group = range(head * len(q_NH) // k_SKH.shape[1], (head + 1) * len(q_NH) // k_SKH.shape[1])
        bounds = []
        for page in pages:
            keys = k_SKH[page * size : min(page * size + size, live), head]
            high, low = keys.max(axis=0), keys.min(axis=0)
            bounds.append(max(np.maximum(q_NH[n] * high, q_NH[n] * low).sum() for n in group))
        order = sorted(pages, key=lambda page: (not forced[page], -bounds[page]))
        slots = [
            s for page in order[: select.budget // size] for s in range(page * size, min(page * size + size, live))
        ]
        for n in group:
            weights = np.exp(k_SKH[slots, head] @ q_NH[n] / np.sqrt(q_NH.shape[1]))
            out[n] = weights @ v_SKH[slots, head] / weights.sum()
    return out


def test_a_step_attends_to_what_loops_choose():
    """Ragged batch, grouped heads; the summary of the written page is made anew, others are as they were."""
    select = TopK(scorer=Quest(page_size=4), budget=12, sinks=3)
    positions = np.array([6, 25, 16, 11])
    k, v, q = draw(1, 4, 32, 2, 8), draw(2, 4, 32, 2, 8), draw(3, 4, 1, 6, 8)
    written = np.arange(32)[None, :, None, None] < positions[:, None, None, None]
    before = cache_of(select, np.where(written, k, 0.0), positions, v)
    at, live, rows = jnp.asarray(positions)[:, None], jnp.ones((4, 1), bool), np.arange(4)

    @jax.jit
    def attend(cache, q, k, v):
        return attend_cached(at, live, select=select, write_inactive=True)(cache, live)(q, k, v)

    out, after = attend(before, q, k[rows, positions][:, None], v[rows, positions][:, None])
    for row in rows:
        want = by_loops(select, q[row, 0], k[row], v[row], positions[row])
        np.testing.assert_allclose(out[row, 0], want, rtol=1e-4, atol=1e-5)
    whole = summarize(after.k, jnp.asarray(positions + 1), page_size=4, kind="bounds")
    np.testing.assert_array_equal(after.summary, whole)


def test_a_window_is_selected_from_what_it_shows():
    """With room for the pages of the window, the layer reads what it reads without selection."""
    select = TopK(scorer=PageMean(page_size=2), budget=8, sinks=0)
    k, q, at = draw(4, 2, 20, 2, 8), draw(5, 2, 1, 4, 8), jnp.array([[17], [4]])
    cache = cache_of(select, k, np.array([18, 5]))
    index = choose(cache, select, jnp.asarray(q), at, window=6)
    assert index.pages[0].tolist() == [[0, 6, 7, 8]] * 2, "slots 12 to 17, and the first page of no worth"
    attend = jax.jit(functools.partial(decode_attention, window=6))
    got, want = (attend(q, cache.k, cache.v, at, index=part) for part in (index, None))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "page_size"),
    [
        pytest.param(name, size, marks=[pytest.mark.slow] * (size != 4 and name != "select_quest"))
        for size in (1, 4, 16)
        for name in SELECTING
    ],
)
def test_sinks_and_recent_tokens_are_read(name, page_size):
    """The law, whatever the scores: at every length, the slots of the chosen pages hold them."""
    scorer = dataclasses.replace(SELECTING[name].scorer, page_size=page_size)
    select = dataclasses.replace(SELECTING[name], scorer=scorer, sinks=3, recent=6)
    select = dataclasses.replace(select, budget=page_size * (select.sink_pages + select.recent_pages + 1))
    select.validate_selection()
    positions = np.array([0, 15, 16, 37, 63, 79])
    cache = cache_of(select, draw(6, 6, 80, 2, 8), positions + 1)
    index = jax.tree.map(np.asarray, choose(cache, select, draw(7, 6, 1, 4, 8), positions[:, None]))
    for row, position in enumerate(positions):
        for head in range(2):
            pages = index.pages[row, head, : index.counts[row, head]].tolist()
            slots = {page * page_size + offset for page in pages for offset in range(page_size)}
            assert slots >= {s for s in range(position + 1) if s < 3 or s > position - 6}
            assert len(pages) == min(position // page_size + 1, select.budget // page_size)


def summaries_follow_from_keys(state, select, sizes):
    for cache, size in zip(state.cache.layers, sizes, strict=True):
        assert (cache.summary is None) == (size is None)
        if size is None:
            continue
        slots = np.arange(cache.k.shape[1])[None] < np.asarray(state.cache.length)[:, None]
        live = slots if cache.valid is None else slots & np.asarray(cache.valid)
        for page in range(-(-cache.k.shape[1] // 2)):
            for row in range(len(live)):
                keys = np.asarray(cache.k)[row, 2 * page : 2 * page + 2][live[row, 2 * page : 2 * page + 2]]
                want = np.concatenate([keys.max(0), keys.min(0)], axis=-1) if len(keys) else 0.0
                np.testing.assert_array_equal(cache.summary[row, page], np.broadcast_to(want, cache.summary.shape[2:]))


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["mask", pytest.param("propagate", marks=pytest.mark.slow)])
def test_an_exiting_plan_may_select(shallow_roll, fill):
    """Layers that do not run project keys and summarize them; where keys are hidden, summaries leave them out."""
    select = TopK(scorer=Quest(page_size=2), budget=6, sinks=1, dense_layers=1)
    prompts, lengths = np.random.default_rng(2).integers(0, 61, (3, 7)), np.array([7, 4, 5])
    plan = Plan(depth=EXITS, select=select, fill=fill)
    got = shallow_roll(plan, prompts, lengths)
    assert got.stats.needed.min() < 3 and (got.stats.kv_read < got.stats.kv_live).any()
    sizes = summary_sizes(select, 3, shallow_roll.capacity, 8)
    assert sizes[:2] == (None, (16, 16)) and len(sizes) == 3
    summaries_follow_from_keys(got.state, select, sizes)
    masked = shallow_roll(plan, prompts, lengths, driver="masked")
    np.testing.assert_array_equal(got.tokens, masked.tokens)
    ample = dataclasses.replace(plan, select=dataclasses.replace(select, budget=14))
    got, want = (shallow_roll(one, prompts, lengths).tokens for one in (ample, Plan(depth=EXITS, fill=fill)))
    np.testing.assert_array_equal(got, want)


def test_a_state_rolled_back_goes_on_exactly(shallow_roll):
    """Drop tokens that were written, page by page: what follows is what it was the first time."""
    plan = Plan(select=TopK(scorer=Quest(page_size=4), budget=8, sinks=1))
    prompts, lengths = np.random.default_rng(3).integers(0, 61, (2, 7)), np.array([7, 6])
    kept = []
    first = shallow_roll(plan, prompts, lengths, edit=lambda state, step: kept.append(state) or state)
    state = dataclasses.replace(first.state, token=kept[1].token, key=kept[1].key, step=kept[1].step)
    cache = dataclasses.replace(state.cache, length=kept[1].cache.length)
    state = dataclasses.replace(state, cache=cache, recent=kept[1].recent)
    for step in range(1, 6):
        state, _, logits = shallow_roll.step(shallow_roll.model, state, plan, "unrolled")
        np.testing.assert_array_equal(logits, first.logits[:, step + 1])


@pytest.mark.parametrize(
    "scorer",
    # Votes are taken of means.
    [Quest(page_size=2), TokenSelect(page_size=2), pytest.param(PageMean(page_size=2), marks=pytest.mark.slow)],
    ids=["bounds", "votes", "means"],
)
def test_poison_in_unused_pages_changes_nothing(shallow_roll, scorer):
    def poison(state, step):
        layers = []
        for cache in state.cache.layers:
            unused = np.arange(cache.summary.shape[1])[None] * 2 >= np.asarray(state.cache.length)[:, None]
            summary = jnp.where(jnp.asarray(unused)[:, :, None, None], jnp.nan, cache.summary)
            layers.append(dataclasses.replace(cache, summary=summary))
        state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=tuple(layers)))
        return shallow_roll.poison(state, shallow_roll.empty(state))

    prompts, lengths = np.random.default_rng(4).integers(0, 61, (3, 7)), np.array([7, 4, 5])
    plan = Plan(select=TopK(scorer=scorer, budget=6, sinks=1))
    want = shallow_roll(plan, prompts, lengths)
    np.testing.assert_array_equal(shallow_roll(plan, prompts, lengths, edit=poison).logits, want.logits)


def test_a_budget_of_the_whole_cache_is_the_dense_program(shallow_roll):
    prompts, lengths = np.random.default_rng(5).integers(0, 61, (3, 7)), np.array([7, 4, 5])
    got = shallow_roll(Plan(select=TopK(scorer=Quest(page_size=4), budget=shallow_roll.capacity)), prompts, lengths)
    assert got.state.cache.summary_sizes == (None,) * 3
    want = shallow_roll(Plan(), prompts, lengths)
    np.testing.assert_array_equal(got.logits, want.logits)
    np.testing.assert_array_equal(got.stats.kv_read, want.stats.kv_live)


def test_what_is_read_is_counted_by_hand():
    select, sizes = TopK(scorer=Quest(page_size=4), budget=8, sinks=0), (None, (8, 16), (8, 16))
    # 13 tokens are 4 pages; two are read, the last one with its single token: 5. With a dense layer (13 + 5 + 5) / 3.
    # 7 tokens are two pages: all.
    np.testing.assert_allclose(mean_read(select, sizes, jnp.array([13, 7])), [23 / 3, 7], rtol=1e-6)


def test_layers_with_windows_may_select():
    """With room for the window, a layer gives what it gives without selection."""
    sizes = {"d_model": 16, "d_ff": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_length": 64}
    prompts = np.random.default_rng(6).integers(0, 61, (2, 15))
    plan = Plan(select=TopK(scorer=PageMean(page_size=2), budget=8, sinks=0))
    model = Transformer(ModelConfig(vocab_size=61, num_layers=2, windows=(6, 5), **sizes), jax.random.key(1))
    got, want = (generate(model, prompts, which, max_new_tokens=6) for which in (plan, Plan()))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert (got.stats.kv_read <= 8).all() and (got.stats.kv_live >= 16).all()


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (Plan(select=TopK(scorer=Quest(), budget=40)), ValueError, "multiple of page_size=16.*at least 32.*use 48"),
        (Plan(select=TopK(scorer=Quest(), budget=16)), ValueError, "sinks=4 and recent=1, got 16; use 32"),
        (Plan(select=TopK(scorer=Quest(), budget=32, sinks=0, recent=18)), ValueError, "got 32; use 48"),
        (Plan(select=TopK(scorer=Quest(page_size=0), budget=32)), ValueError, "page_size to be a whole number"),
        (Plan(select=TopK(scorer=Quest(), budget=32, dense_layers=-1)), ValueError, "dense_layers to be a whole"),
        (Plan(select=RECENT), ValueError, "expected a PageScorer"),
        (Plan(evict=TopK(scorer=Quest(), budget=32)), ValueError, "expected a KVScorer"),
        (Plan(evict=TopK(scorer=Recency(), budget=32, dense_layers=1)), ValueError, "dense_layers=0"),
        (Plan(select=Quest()), ValueError, "expected select to be TopK"),
        (Plan(select=TopK(scorer=Quest(), budget=32), evict=RECENT), NotImplementedError, "evict=KeepAll"),
        (Plan(select=TopK(scorer=Quest(), budget=32), depth=EXITS, fill="catch_up"), NotImplementedError, "catch_up"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tiny_model, plan, error, message):
    with pytest.raises(error, match=message):
        check(plan, tiny_model)


def test_a_state_without_these_summaries_is_refused(shallow_roll):
    plan = Plan(select=TopK(scorer=Quest(page_size=2), budget=6))
    shallow_roll.step_of_shapes(plan)
    others = (
        Plan(),
        Plan(select=TopK(scorer=PageMean(page_size=2), budget=6)),
        Plan(select=TopK(scorer=Quest(page_size=4), budget=8)),
        dataclasses.replace(plan, select=dataclasses.replace(plan.select, dense_layers=1)),
    )
    for other in others:
        with pytest.raises(ValueError, match="a state that was made for this plan"):
            shallow_roll.step_of_shapes(plan, used=other)
