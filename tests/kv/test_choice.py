"""Scores that are remembered from step to step and from layer to layer: by hand, and against runs without a memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Compact, Plan, check, generate, stream
from dyninf.attention import attend_cached
from dyninf.cache import Choice, LayerCache
from dyninf.depth import Confidence, SkipLayers, UnifiedSkip, every
from dyninf.kv import PageMean, Quest, ReadAll, Recency, TopK
from dyninf.kv.choice import choice_kinds, lend, remember_scores
from dyninf.kv.pages import choose_pages
from dyninf.pytree import pytree
from pallas_kernels import summarize_pages

EXITS = every(Confidence(threshold=0.6), step=1)
PROMPTS, LENGTHS = np.random.default_rng(2).integers(0, 61, (3, 7)), np.array([7, 4, 5])


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Tally:
    """A count that may be a static field."""

    count = 0


@pytree(static=("page_size", "tally"))
class Counted(PageMean):
    """Counts its scorings while they are traced, for programs without control flow."""

    tally: Tally

    def score(self, q_BTNH, summary_BPKX, num_pages_B):
        self.tally.count += 1
        return PageMean.score(self, q_BTNH, summary_BPKX, num_pages_B)


def cache_by_hand(positions):
    """Two sequences, one head of two features; pages of two keys whose means are (1, 0), (0, 1), (-1, 0), (0, -1)."""
    means = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    k = jnp.asarray(np.repeat(means, 2, axis=0)[None, :, None].repeat(2, axis=0))
    pages = summarize_pages(k, jnp.asarray(positions) + 1, page_size=2, kind="mean")
    choice = Choice(scores=jnp.full((2, 1, 4), -jnp.inf), q=jnp.zeros((2, 1, 2)))
    return LayerCache(k=k, v=k, summary=pages, choice=choice)


def asked(cache, select, angles, positions, asking=(True, True)):
    """Return the cache after a step of queries at these angles (degrees), and the pages that are chosen."""
    radians = np.radians(np.array(angles, np.float32))
    q = jnp.asarray(np.stack([np.cos(radians), np.sin(radians)], axis=1)[:, None, None])
    at = jnp.asarray(positions)[:, None]
    cache, pages = _asked(cache, select, q, at, jnp.array(asking)[:, None])
    return cache, pages.tolist()


@jax.jit
def _asked(cache, select, q, at, asking):
    cache = remember_scores(cache, select, q, at, asking)
    return cache, choose_pages(cache, select, q, at).pages[:, 0]


def test_scores_are_kept_while_queries_stay_alike_by_hand():
    """The cosine of 25 degrees is 0.906, that of 26 is 0.899; the angle is from the last scoring, not the last step."""
    select = TopK(scorer=PageMean(page_size=2), budget=6, sinks=0, recent=3, reuse=0.9)
    at = [7, 7]
    cache, pages = asked(cache_by_hand(at), select, [30, 60], at)
    assert pages == [[0, 2, 3], [1, 2, 3]], "two recent pages, and the mean nearest to the query"
    np.testing.assert_allclose(cache.choice.scores[0, 0], [np.sqrt(3) / 2, 0.5, -np.sqrt(3) / 2, -0.5], atol=1e-6)
    # 54 degrees would choose page 1; 24 from 30, so that the old scores serve. 26 from 60 in the second: it scores.
    cache, pages = asked(cache, select, [54, 34], at)
    assert pages == [[0, 2, 3], [0, 2, 3]]
    np.testing.assert_allclose(cache.choice.q[0, 0], [np.sqrt(3) / 2, 0.5], atol=1e-6)
    # Another 24 degrees: 48 from the last scoring.
    cache, pages = asked(cache, select, [78, 34], at)
    assert pages == [[1, 2, 3], [0, 2, 3]]
    # Who does not run the layer keeps everything.
    after, pages = asked(cache, select, [0, 180], at, asking=(True, False))
    assert pages == [[0, 2, 3], [0, 2, 3]]
    np.testing.assert_array_equal(after.choice.q[1], cache.choice.q[1])
    np.testing.assert_array_equal(after.choice.scores[1], cache.choice.scores[1])


def test_a_page_without_a_score_is_read_while_recent_and_scored_then():
    select, size = TopK(scorer=PageMean(page_size=2), budget=4, sinks=0, recent=1, reuse=0.9), 2
    cache, pages = asked(cache_by_hand([2, 2]), select, [90, 90], [2, 2])
    assert pages == [[0, 1], [0, 1]] and np.isneginf(cache.choice.scores[:, :, 2:]).all()
    kept = dataclasses.replace(cache_by_hand([4, 3]), choice=cache.choice)
    cache, pages = asked(kept, select, [90, 90], [4, 3])
    assert pages == [[1, 2], [0, 1]], "the page that began is the recent one"
    np.testing.assert_array_equal(cache.choice.scores, kept.choice.scores)
    kept = dataclasses.replace(cache_by_hand([6, 5]), choice=cache.choice)
    cache, _ = asked(kept, select, [90, 90], [6, 5])
    used = np.isfinite(cache.choice.scores[:, 0]).sum(axis=1)
    assert used.tolist() == [6 // size + 1, 2], "page 2 of the first sequence is not recent any more"


def test_a_layer_takes_the_scores_of_the_one_before():
    scores = jnp.asarray(draw(1, 2, 1, 4))
    leader = dataclasses.replace(cache_by_hand([7, 7]), choice=Choice(scores=scores, q=jnp.zeros((2, 1, 2))))
    follower = dataclasses.replace(cache_by_hand([7, 7]), choice=Choice(scores=0 * scores, leads=False))
    lent = lend((leader,), follower)
    np.testing.assert_array_equal(lent.choice.scores, scores)
    assert lent.choice.q is None and not lent.choice.leads
    assert lend((leader,), leader) is leader and lend((), follower) is follower and lend((leader,), None) is None
    dense = dataclasses.replace(leader, summary=None, choice=None)
    assert lend((leader,), dense) is dense
    select = TopK(scorer=PageMean(page_size=2), budget=4, sinks=0, share=2)
    at, asking = jnp.array([[7], [7]]), jnp.ones((2, 1), bool)
    assert remember_scores(lent, select, jnp.zeros((2, 1, 1, 2)), at, asking) is lent


def test_which_layers_lead():
    size, select = (8, 16), TopK(scorer=PageMean(), budget=64, reuse=0.9, share=2)
    leads, follows = (True, True), (False, False)
    assert choice_kinds(select, [None, size, size, size, None, size]) == (None, leads, follows, leads, None, leads)
    assert choice_kinds(dataclasses.replace(select, share=1), [None, size, size]) == (None, leads, leads)
    assert choice_kinds(dataclasses.replace(select, reuse=None), [size, size]) == ((True, False), follows)
    assert choice_kinds(dataclasses.replace(select, reuse=None, share=1), [size]) == (None,)
    assert choice_kinds(ReadAll(), [None]) == (None,)


def test_windows_leave_pages_out_of_remembered_scores():
    select = TopK(scorer=PageMean(page_size=2), budget=4, sinks=0, share=2)
    cache, at = cache_by_hand([7, 7]), jnp.array([[7], [7]])
    follower = dataclasses.replace(cache, choice=Choice(scores=jnp.array([[[9.0, 1, 2, 3]]] * 2), leads=False))
    q = jnp.zeros((2, 1, 1, 2))
    choose = jax.jit(choose_pages, static_argnames="window")
    assert choose(follower, select, q, at).pages[0].tolist() == [[0, 3]]
    assert choose(follower, select, q, at, window=6).pages[0].tolist() == [[2, 3]], "slots 2 to 7"


@pytest.mark.slow
def test_a_threshold_that_always_asks_is_no_reuse(roll):
    """Cosines of 1 and more are rare; below that every step scores, and choices are those without a memory."""
    plan = Plan(select=TopK(scorer=Quest(page_size=2), budget=6, sinks=1))
    want = roll(plan, PROMPTS, LENGTHS)
    reuse = dataclasses.replace(plan, select=dataclasses.replace(plan.select, reuse=1.0))
    got = roll(reuse, PROMPTS, LENGTHS)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    always = dataclasses.replace(plan, select=dataclasses.replace(plan.select, reuse=-1.0))
    kept = roll(always, PROMPTS, LENGTHS)
    assert (np.abs(kept.logits - want.logits) > 1e-3).any(), "scores were not reused"


def test_layers_share_the_scores_of_the_first(roll):
    """A scorer that counts: of four layers that select, two score; all choose as the first of their pair."""
    tally = Tally()
    select = TopK(scorer=Counted(page_size=2, tally=tally), budget=6, sinks=1, dense_layers=2, share=2)
    got = roll(Plan(select=select), PROMPTS, LENGTHS)
    assert tally.count == 2
    caches = got.state.cache.layers
    assert [cache.choice is not None for cache in caches] == [False] * 2 + [True] * 4
    for leader, follower in ((2, 3), (4, 5)):
        np.testing.assert_array_equal(caches[leader].choice.scores, caches[follower].choice.scores)
    assert (np.asarray(caches[2].choice.scores) != np.asarray(caches[4].choice.scores)).any()


@pytest.mark.parametrize(
    ("depth", "driver"),
    [
        pytest.param(EXITS, "masked", id="exits-masked", marks=pytest.mark.slow),
        pytest.param(EXITS, Compact(capacity=2), id="exits-compact"),
        pytest.param(UnifiedSkip(speedup=2.0), "masked", id="skips-masked"),
        pytest.param(UnifiedSkip(speedup=2.0), Compact(capacity=2), id="skips-compact", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("fill", ["propagate", pytest.param("mask", marks=pytest.mark.slow)])
def test_drivers_agree_where_leaders_do_not_run(roll, shallow_roll, depth, driver, fill):
    """Who exits passes over the second leader of a shallow model, too; skips take a deeper one."""
    roll, share = (shallow_roll, 2) if depth == EXITS else (roll, 3)
    select = TopK(scorer=Quest(page_size=2), budget=6, sinks=1, share=share, reuse=0.5)
    plan = Plan(depth=depth, select=select, fill=fill)
    want = roll(plan, PROMPTS, LENGTHS)
    assert want.stats.needed.min() < len(roll.model.layers)
    got = roll(plan, PROMPTS, LENGTHS, driver=driver)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logits, want.logits, rtol=1e-4, atol=1e-4)


def test_streaming_is_generating(shallow_model):
    """The state is given away at every step; layers that share scores must not share their memory."""
    plan = Plan(select=TopK(scorer=Quest(page_size=2), budget=6, sinks=1, share=2, reuse=0.5))
    whole = generate(shallow_model, PROMPTS, plan, max_new_tokens=8, lengths=LENGTHS)
    steps = [tokens for tokens, _ in stream(shallow_model, PROMPTS, plan, max_new_tokens=8, lengths=LENGTHS)]
    np.testing.assert_array_equal(np.stack(steps, axis=1), whole.tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0}, "share to be a whole number of at least 1"),
        ({"reuse": 1.5}, "reuse to be a number between -1 and 1"),
        ({"reuse": "often"}, "reuse to be a number"),
    ],
)
def test_settings_out_of_range_are_refused(tiny_model, change, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(select=TopK(scorer=Quest(), budget=32, **change)), tiny_model)


@pytest.mark.parametrize("change", [{"share": 2}, {"reuse": 0.9}])
def test_eviction_remembers_no_choice(tiny_model, change):
    with pytest.raises(ValueError, match="reuse=None and share=1 for TopK that evicts"):
        check(Plan(evict=TopK(scorer=Recency(), budget=32, **change)), tiny_model)


def test_what_cannot_share_is_refused(roll, tiny_model):
    select = TopK(scorer=Quest(page_size=2), budget=6, dense_layers=1, share=2)
    with pytest.raises(
        ValueError, match="another driver than 'scan' for layers that share a choice of pages, got share=2"
    ):
        roll.step_of_shapes(Plan(select=select, depth=EXITS), driver="scan")
    with pytest.raises(ValueError, match="layer 4 without layer 3"):
        check(Plan(select=select, depth=SkipLayers(layers=(3,))), tiny_model)
    check(Plan(select=select, depth=SkipLayers(layers=(4,))), tiny_model)
    roll.step_of_shapes(Plan(select=select))
    for other in ({"share": 1}, {"share": 3}, {"reuse": 0.9}):
        plan = Plan(select=dataclasses.replace(select, **other))
        with pytest.raises(ValueError, match="a state that was made for this plan"):
            roll.step_of_shapes(Plan(select=select), used=plan)


def test_a_step_reads_what_it_remembers():
    """One step through attention: an old choice that this query would not make."""
    select = TopK(scorer=PageMean(page_size=2), budget=4, sinks=0, reuse=0.5)
    cache = cache_by_hand([7, 7])
    old = Choice(scores=jnp.array([[[0.0, 5.0, 1.0, 0.0]]] * 2), q=jnp.array([[[1.0, 0.1]]] * 2))
    cache = dataclasses.replace(cache, choice=old)
    live = jnp.ones((2, 1), bool)
    at, k = jnp.array([[7], [7]]), jnp.array([[[[0.0, -1.0]]]] * 2)

    @jax.jit
    def step(cache, q, k):
        return attend_cached(at, live, select=select, write_inactive=True)(cache, live)(q, k, k)

    out, _ = step(cache, jnp.array([[[[1.0, 0.0]]]] * 2), k)
    # Pages 1 and 3, keys (0, 1) and (0, -1), of equal weight; page 0 would have been the choice of this query.
    np.testing.assert_allclose(out[0, 0, 0], [0.0, 0.0], atol=1e-6)
