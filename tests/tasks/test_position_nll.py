"""Negative log-likelihood by position against NumPy."""

from itertools import pairwise

import jax
import numpy as np
import pytest

import dyninf
from dyninf.depth import ExitAt
from dyninf.tasks import position_nll
from dyninf.tasks.position_nll import bucket_means, doubling_edges


def nll_of(model, tokens, plan=None):
    """The loss of tokens 1 to T-1 from the logits of the whole text."""
    logits = np.asarray(jax.jit(dyninf.forward)(model, tokens[:, :-1], plan).logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[:, :, 0]


def test_bucket_means_by_hand():
    nll, positions = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[1, 2, 3, 4]])
    out = bucket_means(nll, positions, (1, 3, 4, 9, 12), np.array([[True, True, True, False]]))
    np.testing.assert_array_equal(out.mean, [1.5, 3.0, np.nan, np.nan])  # the 4 is not live
    assert out.count.tolist() == [2, 1, 0, 0]
    assert bucket_means(nll, positions, (2, 4)).mean.tolist() == [2.5]  # positions 1 and 4 are in no bucket


@pytest.mark.parametrize(
    ("length", "edges"), [(2, (1, 2)), (64, (1, 64)), (65, (1, 64, 65)), (300, (1, 64, 128, 256, 300))]
)
def test_edges_double(length, edges):
    assert doubling_edges(length) == edges


@pytest.mark.parametrize("plan", [None, dyninf.Plan(depth=ExitAt(layer=1))], ids=["dense", "exit"])
def test_it_agrees_with_the_logits_of_the_whole_text(random_model, rng, plan):
    tokens, lengths, edges = rng.integers(0, 56, (3, 40)), np.array([40, 2, 17]), (1, 2, 8, 30, 40)
    # Chunks of 16 do not divide 39 predictions, batches of 2 do not divide 3 texts.
    out = position_nll(random_model, plan, tokens, lengths=lengths, edges=edges, batch_size=2, chunk=16)
    nll = nll_of(random_model, tokens, plan)
    live = np.arange(1, 40)[None] < lengths[:, None]
    for i, (low, high) in enumerate(pairwise(edges)):
        values = nll[:, low - 1 : high - 1][live[:, low - 1 : high - 1]]
        assert out.count[i] == len(values)
        np.testing.assert_allclose(out.mean[i], values.mean(), rtol=1e-5)
    assert out.count.sum() == 39 + 1 + 16


def test_a_text_may_fill_the_context_and_what_is_beyond_a_length_is_ignored(random_model, rng):
    tokens = rng.integers(0, 56, 65)  # 64 inputs for a context of 64
    padded = np.stack([tokens, np.where(np.arange(65) < 30, tokens, -7)])
    out = position_nll(random_model, None, padded, lengths=[65, 30], edges=(1, 30, 65), batch_size=2)
    assert out.count.tolist() == [58, 35] and np.isfinite(out.mean).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros(66, int)}, "context of 64 and the token after it, got 66 tokens"),
        ({"tokens": np.zeros(1, int)}, "at least 2 tokens"),
        ({"tokens": np.full(5, 56)}, "between 0 and 55"),
        ({"tokens": np.zeros(9)}, "integer ids"),
        ({"lengths": [1]}, "one length of 2 to 9"),
        ({"lengths": [3, 3]}, "one length of 2 to 9"),
        ({"edges": (5, 5)}, "ascending edges"),
        ({"prompt_lengths": [0]}, "one prompt length of at least 1"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_bad_requests_are_refused(random_model, change, message):
    with pytest.raises(ValueError, match=message):
        position_nll(random_model, None, **({"tokens": np.zeros(9, int)} | change))
