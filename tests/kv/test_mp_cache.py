"""MPCache's two scorers: by hand, against loops in NumPy, and the selection against the paper's own code.

The scores and pages below were printed by the decode step of zwxandy/MPCache (55e401b) with its ``group_key_min_max``
and ``groupidx_to_groupidx``, clusters of 8 and 4, run with torch on ``draw`` of the same seeds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, check
from dyninf.kv import LookOnce, MPCache, PromptKV, TopK
from pallas_kernels import summarize_pages, topk_pages


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def scores_of(scorer, q_NH, k_SKH, spare=0):
    """Return the scores of the pages in use; ``spare`` unused ones behind them hold no numbers."""
    count = -(-len(k_SKH) // scorer.page_size)
    bounds = summarize_pages(
        jnp.asarray(k_SKH)[None], jnp.array([len(k_SKH)]), page_size=scorer.page_size, kind="bounds"
    )
    bounds = jnp.pad(bounds, ((0, 0), (0, spare), (0, 0), (0, 0)), constant_values=jnp.nan)
    scores = jax.jit(scorer.score)(jnp.asarray(q_NH)[None, None], bounds, jnp.array([count]))
    assert scores.shape[-1] == count + spare and np.all(np.asarray(scores[..., count:]) == -np.inf)
    return np.asarray(scores[0, :, :count])


@pytest.mark.parametrize("spare", [0, 4])
def test_pages_are_those_of_the_papers_code(spare):
    """20 pages in 10 clusters, of which 5 stay beside the first one, and here the last one too."""
    scores = scores_of(MPCache(page_size=4), draw(21, 3, 8), draw(22, 80, 3, 8), spare)
    official = [-1.618, -0.3384, 1.2287, 1.0039, 1.0102, 2.4965, 1.3684, -0.4327, *[-np.inf] * 6]
    official += [-1.8319, 2.5639, -0.4161, 0.8373]
    np.testing.assert_allclose(scores[0, :18], official, atol=1e-4)
    lost = [[8, 9, 10, 11, 12, 13], [2, 3, 6, 7, 8, 9, 14, 15], [2, 3, 8, 9, 16, 17]]
    assert [np.flatnonzero(row == -np.inf).tolist() for row in scores] == lost
    best = topk_pages(jnp.asarray(scores)[None], jnp.array([20]), k=7, page_size=4, sinks=1, recent=1).pages[0]
    pages = [[0, 2, 4, 5, 6, 15], [0, 4, 11, 12, 13, 16], [0, 5, 7, 10, 11, 13]]
    assert best.tolist() == [[*row, 19] for row in pages]


def test_two_levels_by_hand():
    """One feature, pages of one token, five of them: clusters (1, 5), (4, 2), (0) of which one stays beside the ends.

    With alpha = 0.5 clusters are worth 3, 3 and 0; half of three is one, and both of 3 are as good. Half as many for a
    query of the other sign: 0 wins, and the first stays as the first.
    """
    k = np.array([1, 5, 4, 2, 0], np.float32)[:, None, None]
    scorer = MPCache(page_size=1, alpha=0.5)
    assert scores_of(scorer, np.ones((1, 1), np.float32), k).tolist() == [[1, 5, 4, 2, 0]]
    assert scores_of(scorer, -np.ones((1, 1), np.float32), k).tolist() == [[-1, -5, -np.inf, -np.inf, 0]]
    # All of them stay.
    assert scores_of(MPCache(page_size=1, keep=1.0), -np.ones((1, 1), np.float32), k).tolist() == [[-1, -5, -4, -2, 0]]


def test_the_last_look_by_hand():
    """Five tokens, one looks: its weights, keys of 0 and ln 2 with one feature, are 1/8, 2/8, 2/8, 1/8, 2/8."""
    k = np.array([0, 1, 1, 0, 1], np.float32)[:, None, None] * np.log(2)
    got = LookOnce().prompt(observed(np.ones((5, 1, 1), np.float32)[None], k[None], [5]))
    np.testing.assert_allclose(got[0, :, 0], [1 / 8, 2 / 8, 2 / 8, 1 / 8, 2 / 8], rtol=1e-6)


def observed(q, k, lengths):
    q, k = jnp.asarray(q), jnp.asarray(k)
    return PromptKV(q_BTNH=q, k_BTKH=k, v_BTKH=k, lengths_B=jnp.asarray(lengths))


def test_looks_are_what_loops_give():
    """Prompts on both sides of the bound, more lookers than a chunk holds, padding that is no number."""
    q, k, lengths = draw(23, 2, 400, 4, 8), draw(24, 2, 400, 2, 8), [400, 290]
    q[1, 290:], k[1, 290:] = 1e9, 1e9
    got = LookOnce(share=0.5, long_share=0.1, long=300).prompt(observed(q, k, lengths))
    for row, (length, looking) in enumerate(zip(lengths, (40, 145), strict=True)):
        want = np.zeros((length, 2))
        for t in range(length - looking, length):
            for head in range(2):
                logits = k[row, : t + 1, head] @ q[row, t, 2 * head : 2 * head + 2].T / np.sqrt(8)
                weights = np.exp(logits) / np.exp(logits).sum(axis=0)
                want[: t + 1, head] = np.maximum(want[: t + 1, head], weights.mean(axis=1))
        np.testing.assert_allclose(got[row, :length], want, rtol=2e-4, atol=1e-6)


def test_generated_tokens_outlive_those_of_the_prompt():
    arrived = LookOnce().arrive(jnp.zeros((2, 3, 4)), jnp.array([7, 8]))
    assert arrived.shape == (2, 3) and (arrived[1] > arrived[0]).all() and (arrived > 1).all()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(select=TopK(scorer=MPCache(alpha=1.5), budget=64)), "alpha from 0 to 1 for MPCache, got 1.5"),
        (Plan(select=TopK(scorer=MPCache(keep=0.0), budget=64)), "keep above 0 and at most 1 for MPCache, got 0.0"),
        (Plan(evict=TopK(scorer=LookOnce(share=0.0), budget=64)), "expected share above 0 and at most 1"),
        (Plan(evict=TopK(scorer=LookOnce(long_share=2), budget=64)), "expected long_share above 0"),
    ],
)
def test_a_scorer_out_of_range_is_refused(tiny_model, plan, message):
    with pytest.raises(ValueError, match=message):
        check(plan, tiny_model)
