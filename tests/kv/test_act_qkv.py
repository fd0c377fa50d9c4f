"""ActQKV's cosines, and budgets of a selection by layer: by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, check, generate
from dyninf.kv import ActQKV, Quest, ShadowKV, TopK, entropy_budgets, score_entropies
from dyninf.kv.pages import layer_budgets, mean_read, summary_sizes
from dyninf.models import ModelConfig, Transformer


def test_cosines_by_hand():
    """Means (3, 4), (0, 2), (-1, 0); queries (1, 0) and (0, 5): cosines 0.6 and 0.8, 0 and 1, -1 and 0."""
    summary = jnp.array([[3.0, 4], [0, 2], [-1, 0], [jnp.nan, jnp.nan]])[None, :, None]
    scores = jax.jit(ActQKV().score)(jnp.array([[[[1.0, 0], [0, 5]]]]), summary, jnp.array([3]))
    np.testing.assert_allclose(scores[0, 0], [0.8, 1.0, 0.0, -np.inf], atol=1e-6)


def test_budgets_by_entropy_by_hand():
    # 40 pages: 40 * 0.5 / 2 = 10; of 30 a share of 1 / 1.5 is 20; of 10 0.25 / 0.5 is 5, and the last takes 5.
    assert entropy_budgets((0.5, 1.0, 0.25, 0.25), 20, page_size=2, least=2) == (20, 40, 10, 10)
    # No layer has more than twice the mean or less than the least; what is left over goes to those above.
    assert entropy_budgets((1.0, 0.0, 0.0), 20, page_size=2, least=4) == (40, 10, 10)
    # 24 pages: 18 are cut to 16; of 8 a share of 2 / 3 is 5, which leaves too few for the last one.
    assert entropy_budgets((0.9, 0.2, 0.1), 64, page_size=8, least=32) == (128, 32, 32)
    # 18 pages: 0 is raised to 1; of 17 a share of 0.1 is 2, which leaves more than the last one may have.
    assert entropy_budgets((0.0, 0.1, 0.9), 12, page_size=2, least=2) == (2, 10, 24)
    with pytest.raises(ValueError, match="multiples of 4"):
        entropy_budgets((1.0,), 18, page_size=4)


@pytest.fixture(scope="module")
def model():
    sizes = {"vocab_size": 64, "num_layers": 4, "d_model": 32, "d_ff": 48, "num_heads": 4, "num_kv_heads": 2}
    return Transformer(ModelConfig(**sizes, head_dim=8, max_length=96, tie_embeddings=True), jax.random.key(0))


@pytest.mark.slow
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
    ],
    ids=str,
)
def test_bad_numbers_are_refused(model, select, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(select=select), model)


def test_short_texts_are_refused(model):
    with pytest.raises(ValueError, match="two pages of 32"):
        score_entropies(model, jnp.zeros((1, 40), jnp.int32), ActQKV())
