"""Scores of exits against the policies that will compare them: the same numbers, samples, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, layer_states
from dyninf.depth import Confidence, Patience, Saturation, Thresholds, every
from dyninf.models import Transformer, stack_layers
from dyninf.training.calibrate_scores import collect_agreement, collect_scores

RULES = (
    Confidence(threshold=1.0),
    Confidence(threshold=1.0, measure="margin"),
    Confidence(threshold=1.0, measure="entropy"),
    Saturation(threshold=1.0),
)
LAYERS = (1, 3, 4)
LENGTHS = np.array([7, 0, 5, 1, 2, 7, 3, 6, 4, 7])


@pytest.fixture(scope="module")
def texts():
    tokens = np.random.default_rng(0).integers(0, 61, size=(len(LENGTHS), 7))
    return np.where(np.arange(7)[None] < LENGTHS[:, None], tokens, 0)


@pytest.mark.parametrize(("rule", "place"), [(RULES[1], 1), (RULES[3], 2)], ids=["margin", "saturation"])
def test_a_policy_exits_where_the_scores_say(tiny_model, roll, texts, rule, place):
    scores = collect_scores(tiny_model, texts, LENGTHS, rule, LAYERS)
    assert scores.shape == (np.maximum(LENGTHS - 1, 0).sum(), 3) and scores.dtype == np.float32
    assert len(np.unique(scores[:, place])) > 20
    # Between the two scores in the middle, so that rounding does not decide.
    ordered = np.unique(scores[:, place])
    threshold = ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean()
    # With one exit its states are the dense model's, as the scores are.
    depth = Thresholds(policy=rule, thresholds=threshold[None], layers=LAYERS[place : place + 1])
    needed = roll.forward(tiny_model, texts, Plan(depth=depth), lengths=jnp.asarray(LENGTHS)).needed
    kept = (np.arange(7)[None] > 0) & (np.arange(7)[None] < LENGTHS[:, None])
    np.testing.assert_array_equal(np.asarray(needed)[kept] == LAYERS[place], scores[:, place] > threshold)


def test_chunks_and_batches_change_nothing(tiny_model, texts):
    rule = RULES[1]
    whole = collect_scores(tiny_model, texts, LENGTHS, rule, LAYERS)
    alone = [
        collect_scores(tiny_model, texts[row : row + 1], LENGTHS[row : row + 1], rule, LAYERS, chunk=5)
        for row in range(len(texts))
    ]
    np.testing.assert_allclose(np.concatenate(alone), whole, atol=1e-5)
    full = collect_scores(tiny_model, texts[:1], None, rule, LAYERS, chunk=5)
    np.testing.assert_allclose(full, whole[:6], atol=1e-5)


def test_agreement_is_with_the_dense_prediction(tiny_model, texts):
    exits = (1, 3, 6)
    found = collect_agreement(tiny_model, texts, LENGTHS, exits)
    states_LBTD = jax.jit(layer_states)(tiny_model, texts, jnp.asarray(LENGTHS))
    unembed = jax.jit(tiny_model.unembed)
    tokens_EBT = np.stack([np.asarray(unembed(states_LBTD[layer])).argmax(-1) for layer in exits])
    kept = (np.arange(7)[None] > 0) & (np.arange(7)[None] < LENGTHS[:, None])
    np.testing.assert_array_equal(found, (tokens_EBT == tokens_EBT[-1:])[:, kept].T)
    assert found.dtype == bool and found[:, 2].all() and 0 < found[:, 1].mean() < 1


def test_logits_exist_for_one_chunk_only(tiny_model, texts, monkeypatch):
    shapes, readout = [], Transformer.readout
    monkeypatch.setattr(Transformer, "readout", lambda self, x: shapes.append(x.shape) or readout(self, x))
    collect_scores(tiny_model, texts, LENGTHS, RULES[0], LAYERS, chunk=6)
    # One program reads 6 of the 56 tokens of 8 texts at a time, for all exits.
    assert shapes == [(1, 6, 24)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rule": Patience(patience=2)}, NotImplementedError, "Confidence or Saturation, .* got Patience"),
        ({"rule": every(RULES[0], step=2)}, NotImplementedError, "without combinators"),
        ({"rule": Confidence(threshold=1.0, measure="softmax")}, ValueError, "'softmax'"),
        ({"layers": (0, 2)}, ValueError, r"after 1 to 6 layers, got \(0, 2\)"),
        ({"layers": (7,)}, ValueError, "after 1 to 6 layers"),
        ({"layers": ()}, ValueError, "after 1 to 6 layers"),
        ({"tokens": np.zeros((2, 0), int)}, ValueError, r"ids \[B, T\], got int64 of shape \(2, 0\)"),
        ({"tokens": np.zeros(3, int)}, ValueError, r"of shape \(3,\)"),
        ({"tokens": np.zeros((2, 7))}, ValueError, "got float64"),
        ({"lengths": [3]}, ValueError, "2 lengths from 0 to 7"),
        ({"lengths": [3, 8]}, ValueError, "2 lengths from 0 to 7"),
    ],
    ids=str,
)
def test_bad_input_is_refused(tiny_model, changes, error, message):
    arguments = {"tokens": np.zeros((2, 7), int), "lengths": None, "rule": RULES[0], "layers": (2,)}
    with pytest.raises(error, match=message):
        collect_scores(tiny_model, **(arguments | changes))


def test_stacked_layers_are_refused(tiny_model):
    with pytest.raises(ValueError, match="unstack"):
        collect_scores(stack_layers(tiny_model), np.zeros((2, 7), int), None, RULES[0], (2,))
