"""MPCache's two levels and its look at a prompt, and ActQKV's cosines and budgets: by hand, and against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, check, generate
from dyninf.kv import ActQKV, LookOnce, MPCache, PromptKV, Quest, ShadowKV, TopK, entropy_budgets, score_entropies
from dyninf.kv.pages import layer_budgets, mean_read, summary_sizes
from dyninf.models import ModelConfig, Transformer
from pallas_kernels import summarize_pages


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mp_cache_by_loops(scorer, q_NH, k_SKH, live):
    """Scores of the pages of one sequence, of whose keys the first ``live`` pages count."""
    size, num_kv = scorer.page_size, k_SKH.shape[1]
    scores = np.full((num_kv, len(k_SKH) // size), -np.inf)
    for head in range(num_kv):
        group = q_NH[head * len(q_NH) // num_kv : (head + 1) * len(q_NH) // num_kv]

        def worth(keys, group=group):
            point = scorer.alpha * keys.max(axis=0) + (1 - scorer.alpha) * keys.min(axis=0)
            return max(float(q @ point) for q in group)

        keys = k_SKH[: live * size, head]
        clusters = [keys[at : at + 2 * size] for at in range(0, len(keys), 2 * size)]
        order = sorted(range(len(clusters)), key=lambda c: -worth(clusters[c]))
        looked = {0, len(clusters) - 1, *order[: int(len(clusters) * scorer.kept)]}
        for page in range(live):
            if page // 2 in looked:
                scores[head, page] = worth(keys[page * size : (page + 1) * size])
    return scores


@pytest.mark.parametrize("pages", [11, 12])
def test_clusters_then_pages_as_loops_find_them(pages):
    scorer, lives = MPCache(page_size=4, kept=0.4), (pages, 7, 1, 0)
    k_BSKH, q_BTNH = draw(1, 4, pages * 4, 2, 8), draw(2, 4, 1, 6, 8)
    summary = summarize_pages(jnp.asarray(k_BSKH), jnp.array(lives) * 4, page_size=4, kind="bounds")
    summary = jnp.where((jnp.arange(pages)[None] < jnp.array(lives)[:, None])[:, :, None, None], summary, jnp.nan)
    got = scorer.score(jnp.asarray(q_BTNH), summary, jnp.array(lives))
    for row, live in enumerate(lives):
        np.testing.assert_allclose(got[row], mp_cache_by_loops(scorer, q_BTNH[row, 0], k_BSKH[row], live), rtol=1e-5)


def test_losing_clusters_by_hand():
    """Keys of one feature in pages of one: clusters (1, 2), (9, 0), (5, 6), (3, 3), of which one is looked into."""
    k = jnp.array([1.0, 2, 9, 0, 5, 6, 3, 3])[None, :, None, None]
    summary = summarize_pages(k, jnp.array([8]), page_size=1, kind="bounds")
    scores = MPCache(page_size=1, alpha=0.6, kept=0.25).score(jnp.ones((1, 1, 1, 1)), summary, jnp.array([8]))
    # Points of clusters: 1.6, 5.4, 5.6, 3. The third wins, though the second holds the best key; ends are looked into.
    np.testing.assert_allclose(scores[0, 0], [1, 2, -np.inf, -np.inf, 5, 6, 3, 3])


def test_a_look_at_the_prompt_as_loops_see_it():
    q, k, lengths = draw(3, 2, 140, 4, 8), draw(4, 2, 140, 2, 8), (140, 33)
    got = LookOnce(share=0.2).prompt(
        PromptKV(q_BTNH=jnp.asarray(q), k_BTKH=jnp.asarray(k), v_BTKH=jnp.asarray(k), lengths_B=jnp.array(lengths))
    )
    for row, length in enumerate(lengths):
        want = np.zeros((length, 2))
        for at in range(length - int(np.ceil(0.2 * length)), length):
            for head in range(2):
                raw = q[row, at, 2 * head : 2 * head + 2] @ k[row, : at + 1, head].T / np.sqrt(8)
                paid = np.exp(raw - raw.max(axis=1, keepdims=True))
                want[: at + 1, head] = np.maximum(
                    want[: at + 1, head], (paid / paid.sum(axis=1, keepdims=True)).mean(axis=0)
                )
        np.testing.assert_allclose(got[row, :length], want, rtol=1e-4, atol=1e-6)


def test_cosines_by_hand():
    """Means (3, 4), (0, 2), (-1, 0); queries (1, 0) and (0, 5): cosines 0.6 and 0.8, 0 and 1, -1 and 0."""
    summary = jnp.array([[3.0, 4], [0, 2], [-1, 0], [jnp.nan, jnp.nan]])[None, :, None]
    scores = ActQKV().score(jnp.array([[[[1.0, 0], [0, 5]]]]), summary, jnp.array([3]))
    np.testing.assert_allclose(scores[0, 0], [0.8, 1.0, 0.0, -np.inf], atol=1e-6)


def test_budgets_by_entropy_by_hand():
    # 40 pages: 40 * 0.5 / 2 = 10; of 30 a share of 1 / 1.5 is 20; of 10 0.25 / 0.5 is 5, and the last takes 5.
    assert entropy_budgets((0.5, 1.0, 0.25, 0.25), 20, page_size=2, least=2) == (20, 40, 10, 10)
    # No layer has more than twice the mean or less than the least; what is left over goes to those above.
    assert entropy_budgets((1.0, 0.0, 0.0), 20, page_size=2, least=4) == (40, 10, 10)
    with pytest.raises(ValueError, match="multiples of 4"):
        entropy_budgets((1.0,), 18, page_size=4)


@pytest.fixture(scope="module")
def model():
    sizes = {"vocab_size": 64, "num_layers": 4, "d_model": 32, "d_ff": 48, "num_heads": 4, "num_kv_heads": 2}
    return Transformer(ModelConfig(**sizes, head_dim=8, max_length=96, tie_embeddings=True), jax.random.key(0))


def test_layers_read_by_their_own_budgets(model):
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 64, (2, 40)), jnp.int32)
    entropies = score_entropies(model, tokens, ActQKV(page_size=4))
    assert entropies.shape == (4,) and np.all((entropies > 0) & (entropies <= 1))
    budgets = (*entropy_budgets(entropies[:3], 12, page_size=4, least=8), 64)
    select = TopK(scorer=ActQKV(page_size=4), budget=budgets, sinks=0)
    out = generate(model, tokens, Plan(select=select), max_new_tokens=6)
    live = np.arange(41, 46)[:, None] + np.zeros((1, 2))
    held = np.ceil(live / 4) * 4
    want = live - sum(np.maximum(held - budget, 0) for budget in budgets[:3]) / 4
    np.testing.assert_allclose(out.stats.kv_read, want, rtol=1e-6)
    whole = TopK(scorer=ActQKV(page_size=4), budget=(64, 64, 64, 64), sinks=0)
    dense, all_read = (generate(model, tokens, plan, max_new_tokens=6) for plan in (Plan(), Plan(select=whole)))
    np.testing.assert_array_equal(all_read.tokens, dense.tokens)
    assert not np.array_equal(out.stats.kv_read, dense.stats.kv_read)


def test_sizes_of_layers():
    select = TopK(scorer=Quest(page_size=4), budget=(8, 16, 64), dense_layers=1)
    assert layer_budgets(select, 3) == (8, 16, 64)
    sizes = summary_sizes(select, 3, 64, 8)
    assert sizes == (None, (16, 16), None)
    # The second layer reads 16 of 40, the others everything.
    np.testing.assert_allclose(mean_read(select, sizes, jnp.array([40.0])), [40 - 24 / 3])


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (TopK(scorer=ActQKV(page_size=4), budget=(8, 8), sinks=0), "one budget for each of 4 layers"),
        (TopK(scorer=ActQKV(page_size=4), budget=(8, 8, 6, 8), sinks=0), r"use \(8, 8, 8, 8\)"),
        (TopK(scorer=ShadowKV(rank=4, outliers=1), budget=(16,) * 4, sinks=0), "one budget for all layers"),
        (TopK(scorer=MPCache(alpha=1.5), budget=64), "alpha to be a number between 0 and 1"),
        (TopK(scorer=MPCache(kept=-0.1), budget=64), "kept to be a number"),
    ],
    ids=str,
)
def test_bad_numbers_are_refused(model, select, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(select=select), model)


def test_a_share_of_nothing_is_refused(model):
    with pytest.raises(ValueError, match="share to be a number"):
        check(Plan(evict=TopK(scorer=LookOnce(share=0.0), budget=64)), model)
    with pytest.raises(ValueError, match="two pages of 32"):
        score_entropies(model, jnp.zeros((1, 40), jnp.int32), ActQKV())
