"""Data-dependent exits: every measure by hand, strictness at the threshold, and what each policy pays for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Plan, check, decode_step, prefill
from dyninf.depth import EXIT, RUN, Confidence, LayerObs, Patience, Saturation, after_layer, every, exits
from dyninf.models import Transformer
from pallas_kernels.readout import read_logits


def observe(logits=None, x=((1.0, 0.0),), prev=((1.0, 0.0),), *, first=False, layer=1):
    """An observation of one sequence per row."""
    x_BTD, prev_BTD = jnp.asarray(x)[:, None], jnp.asarray(prev)[:, None]

    def thunk():
        if logits is None:
            raise AssertionError("read the logits")
        return jnp.asarray(logits)[:, None]

    step_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    return LayerObs(
        layer=layer, num_layers=6, first=first, x_BTD=x_BTD, prev_BTD=prev_BTD, step_BT=step_BT, logits=thunk
    )


def confidence(logits, measure):
    return exits.confidence(read_logits(logits), measure)


def action(policy, obs, state=()):
    found, _ = policy.update(state, obs)
    return np.asarray(found)[:, 0].tolist()


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("max_prob", 0.5),
        ("margin", 0.25),  # 1/2 - 1/4
        # H = 1/2 ln 2 + 2 * 1/4 ln 4 = 1.039721, ln 3 = 1.098612: 1 - 0.946395
        ("entropy", 0.053605),
    ],
)
def test_measures_by_hand(measure, value):
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    np.testing.assert_allclose(confidence(logits, measure), [[value]], atol=2e-6)
    np.testing.assert_allclose(confidence(logits + 7.5, measure), [[value]], atol=2e-6)


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
def test_measures_against_numpy_and_within_zero_and_one(measure, rng):
    logits = rng.normal(size=(4, 5, 61)) * np.array([0.0, 1.0, 5.0, 200.0])[:, None, None]
    shifted = logits - logits.max(-1, keepdims=True)
    probs = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    ordered = np.sort(probs, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = 1 + np.where(probs > 0, probs * np.log(probs), 0).sum(-1) / np.log(61)
    want = {"max_prob": ordered[..., -1], "margin": ordered[..., -1] - ordered[..., -2], "entropy": entropy}[measure]
    got = confidence(jnp.asarray(logits, jnp.float32), measure)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert (got <= 1).all() and (got > -1e-6).all()


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
def test_impossible_tokens_do_not_spoil_a_measure(measure):
    # Models with a padded vocabulary give the padding logits of -inf.
    logits = jnp.log(jnp.array([[[0.75, 0.25, 0.0, 0.0]]]))
    # 1 - (0.75 ln(4/3) + 0.25 ln 4) / ln 4 = 1 - 0.562335 / 1.386294
    want = {"max_prob": 0.75, "margin": 0.5, "entropy": 0.594361}[measure]
    np.testing.assert_allclose(confidence(logits, measure), [[want]], atol=2e-6)


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
def test_confidence_exits_above_the_threshold_and_never_at_one(measure):
    certain = jnp.array([[1000.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert action(Confidence(threshold=0.99, measure=measure), observe(certain)) == [EXIT, RUN]
    assert action(Confidence(threshold=1.0, measure=measure), observe(certain)) == [RUN, RUN]


def test_confidence_at_the_threshold_runs_on():
    quarter = jnp.zeros((1, 4))  # four equal tokens: exactly 1/4
    assert action(Confidence(threshold=0.25), observe(quarter)) == [RUN]
    assert action(Confidence(threshold=0.24), observe(quarter)) == [EXIT]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf], ids=str)
def test_logits_that_are_not_numbers_never_exit(bad):
    logits = jnp.full((1, 4), bad)
    for measure in ("max_prob", "margin", "entropy"):
        assert action(Confidence(threshold=0.0, measure=measure), observe(logits)) == [RUN]
    state = Patience().init((1, 1))
    for _ in range(3):
        answer, state = Patience(patience=1).update(state, observe(logits))
        assert answer.tolist() == [[RUN]]


def test_a_policy_takes_the_readout_it_is_handed():
    """A model's own readout serves instead of its logits."""
    obs = observe()
    obs = LayerObs(**{**obs.__dict__, "readout": lambda: read_logits(jnp.array([[[1000.0, 0.0, 0.0]]]))})
    assert action(Confidence(threshold=0.9), obs) == [EXIT]
    assert action(Patience(patience=1), obs, (jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))) == [EXIT]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_readout_of_our_models_is_that_of_their_logits(tiny_model, rng, tied):
    config = dataclasses.replace(tiny_model.config, num_layers=1, tie_embeddings=tied)
    model = Transformer(config, jax.random.key(0))
    x_BTD = jnp.asarray(rng.normal(size=(2, 40, 24)), jnp.float32)
    got, want = jax.jit(lambda model, x: (model.readout(x), read_logits(model.unembed(x))))(model, x_BTD)
    assert got.num_tokens == want.num_tokens == 61 and got.token.shape == (2, 40)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6), got, want)


def test_saturation_by_hand_and_without_logits():
    # cos = (3 * 4 + 4 * 3) / (5 * 5) = 0.96 in the first row, 0 in the second, -1 in the third, 0 / 0 in the last.
    obs = observe(
        x=[[3.0, 4.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], prev=[[4.0, 3.0], [0.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]
    )
    assert action(Saturation(threshold=0.95), obs) == [EXIT, RUN, RUN, RUN]
    assert action(Saturation(threshold=0.97), obs) == [RUN, RUN, RUN, RUN]


def test_saturation_never_exits_at_one(rng):
    x = rng.normal(size=(1000, 7)).astype(np.float32)
    assert set(action(Saturation(threshold=1.0), observe(x=x, prev=x))) == {RUN}
    assert set(action(Saturation(threshold=1.0), observe(x=3 * x, prev=x))) == {RUN}


@pytest.mark.parametrize(
    ("patience", "exits"),
    [
        # Predictions 5 5 5 2 2 2: unchanged for 0, 1, 2, 0, 1, 2 decisions.
        (1, [RUN, EXIT, EXIT, RUN, EXIT, EXIT]),
        (2, [RUN, RUN, EXIT, RUN, RUN, EXIT]),
        (3, [RUN] * 6),
    ],
)
def test_patience_by_hand(patience, exits):
    policy = Patience(patience=patience)
    # The token before ended with three unchanged predictions of 5, which must not count for this one.
    state = (jnp.array([[5]], jnp.int32), jnp.array([[3]], jnp.int32))
    found = []
    for number, token in enumerate([5, 5, 5, 2, 2, 2]):
        obs = observe(jax.nn.one_hot(jnp.array([token]), 9), first=number == 0)
        answer, state = policy.update(state, obs)
        found.append(int(answer[0, 0]))
    assert found == exits


def count_readouts(monkeypatch, model, policy):
    """How often the program of one decode step multiplies by the vocabulary matrix."""
    calls = []
    for name in ("unembed", "readout"):
        plain = getattr(type(model), name)
        monkeypatch.setattr(type(model), name, lambda self, x, plain=plain: calls.append(1) or plain(self, x))
    plan, tokens, lengths = Plan(depth=policy), jnp.zeros((2, 3), jnp.int32), jnp.array([3, 2])
    shapes = jax.eval_shape(
        lambda m, p: prefill(m, tokens, lengths, p, CacheSpec(capacity=5), jax.random.key(0)), model, plan
    )
    calls.clear()
    jax.eval_shape(decode_step, model, shapes[1], plan)
    return len(calls)


@pytest.mark.parametrize(
    ("policy", "readouts"),
    [
        (Saturation(threshold=0.5), 1),
        (Confidence(threshold=0.5), 6),  # before layers 1 to 5, and the last one
        (every(Confidence(threshold=0.5), step=2), 3),
        (after_layer(Patience(patience=1), layer=4), 3),
    ],
    ids=["saturation", "confidence", "every_2", "patience_after_4"],
)
def test_a_policy_pays_only_for_what_it_reads(monkeypatch, tiny_model, policy, readouts):
    assert count_readouts(monkeypatch, tiny_model, policy) == readouts


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Confidence(threshold=1.1), "threshold .* between 0 and 1, got 1.1"),
        (Confidence(threshold=-0.1), "threshold .* got -0.1"),
        (Confidence(threshold=float("nan")), "threshold .* got nan"),
        (Confidence(threshold=jnp.float32(2)), "threshold .* got Array"),
        (Confidence(threshold="0.9"), "threshold .* got '0.9'"),
        (Confidence(threshold=[0.5, 0.6]), "threshold .* number"),
        (Confidence(threshold=0.5, measure="softmax"), "got 'softmax'"),
        (Saturation(threshold=7), "threshold .* got 7"),
        (Patience(patience=0), "patience .* got 0"),
        (Patience(patience=float("nan")), "patience .* got nan"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(tiny_model, policy, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(depth=policy), tiny_model)


@pytest.mark.parametrize("threshold", [0, 1, 0.5, np.float64(0.5), jnp.bfloat16(0.5), jnp.float32(1)], ids=repr)
def test_numbers_of_any_type_are_accepted(tiny_model, threshold):
    check(Plan(depth=Confidence(threshold=threshold)), tiny_model)
