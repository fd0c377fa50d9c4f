"""Exits by candidate tokens: features and predictor by hand over several decisions, and what never exits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, check
from dyninf.depth import EXIT, RUN, CandidateExit, LayerObs
from dyninf.depth.candidates import features
from pallas_kernels.readout import read_logits

NAN = float("nan")
L, M, H = 6, 2, 1


def policy_of(**changes):
    """At every layer the predictor is sigmoid(4 relu(p_0 - change of p_0 / 2) - 3)."""
    w_in = jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 0.0, -0.5, 0.0])[None, :, None], (L, 3 * M, H))
    policy = CandidateExit(w_in=w_in, b_in=jnp.zeros((L, H)), w_out=jnp.full((L, H), 4.0), b_out=jnp.full(L, -3.0))
    return dataclasses.replace(policy, **changes)


def decide(policy, *decisions):
    """The actions of one token at layers 1, 2, ... whose logits are given, and the last state."""
    state, found = policy.init((1, 1)), []
    for number, logits in enumerate(decisions):
        obs = LayerObs(
            layer=1 + number,
            num_layers=L,
            first=number == 0,
            x_BTD=None,
            prev_BTD=None,
            step_BT=jnp.zeros((1, 1), jnp.int32),
            logits=lambda logits=logits: jnp.asarray(logits, jnp.float32)[None, None],
        )
        action, state = policy.update(state, obs)
        found.append(int(action[0, 0]))
    return found, state


def test_by_hand():
    # Candidates 0 and 2 with p_0 = sigmoid(2 - 1) = 0.731059, all of it new: 2 * 0.731059 - 3 = -1.54, sigmoid 0.177.
    first = [2.0, 0.0, 1.0, -1.0]
    # Now p_0 = sigmoid(3 - 1) = 0.880797, 0.149738 more: 4 * (0.880797 - 0.074869) - 3 = 0.223712, sigmoid 0.5557.
    second = [3.0, 0.0, 1.0, -1.0]
    found, (ids, probs) = decide(policy_of(), first, second)
    assert found == [RUN, EXIT]
    np.testing.assert_array_equal(ids, [[[0, 2]]])
    np.testing.assert_allclose(probs, [[[0.880797, 0.119203]]], rtol=1e-5)
    assert decide(policy_of(threshold=0.1765), first, second)[0] == [EXIT, EXIT]
    assert decide(policy_of(threshold=0.1775), first, second)[0] == [RUN, EXIT]
    assert decide(policy_of(threshold=0.5555), first, second)[0] == [RUN, EXIT]
    assert decide(policy_of(threshold=0.5559), first, second)[0] == [RUN, RUN]
    # The same candidates, but token 1 is now the most probable of all: no candidate, no exit.
    assert decide(policy_of(), first, [3.0, 9.0, 1.0, -1.0])[0] == [RUN, RUN]


def test_later_decisions_read_the_candidates_alone_until_the_network_proposes():
    """What must not be read is not a number; the decisions are those of ``test_by_hand``."""
    first, second, poison = ([2.0, 0.0, 1.0, -1.0], [3.0, 0.0, 1.0, -1.0], [NAN] * 4)
    asked = []

    def obs(number, *, logits, few, all_of_them):
        def token_logits(ids_BTM):
            asked.append(ids_BTM)
            return jnp.take_along_axis(jnp.array([[few]]), ids_BTM, axis=-1)

        return LayerObs(
            layer=number,
            num_layers=L,
            first=number == 1,
            x_BTD=None,
            prev_BTD=None,
            step_BT=jnp.zeros((1, 1), jnp.int32),
            logits=lambda: jnp.array([[logits]]),
            readout=lambda: read_logits(jnp.array([[all_of_them]])),
            token_logits=token_logits,
        )

    def answers(threshold, best):
        policy = policy_of(threshold=threshold)
        action, state = policy.update(policy.init((1, 1)), obs(1, logits=first, few=poison, all_of_them=poison))
        assert action.tolist() == [[RUN]]
        action, (ids, probs) = policy.update(state, obs(2, logits=poison, few=second, all_of_them=best))
        assert ids.tolist() == [[[0, 2]]] and np.isfinite(probs).all()
        return action.tolist()

    assert answers(0.5, second) == [[EXIT]]
    assert answers(0.5, [3.0, 9.0, 1.0, -1.0]) == [[RUN]]
    assert answers(0.5559, poison) == [[RUN]]
    assert answers(0.5, poison) == [[RUN]], "the check of a proposal reads everything"
    assert asked[-1].shape == (1, 1, M)


def test_the_token_before_leaves_no_trace():
    stale = (jnp.array([[[3, 1]]], jnp.int32), jnp.array([[[0.1, 0.9]]], jnp.float32))
    policy = policy_of()
    logits = jnp.array([[[2.0, 0.0, 1.0, -1.0]]])
    obs = LayerObs(
        layer=1, num_layers=L, first=True, x_BTD=None, prev_BTD=None, step_BT=jnp.zeros((1, 1)), logits=lambda: logits
    )
    for got, want in zip(policy.update(stale, obs)[1], policy.update(policy.init((1, 1)), obs)[1], strict=True):
        np.testing.assert_array_equal(got, want)


def test_features_by_hand():
    # softmax(ln 3, 0) = 3/4, 1/4
    got = features(jnp.array([[[np.log(3.0), 0.0]]]), jnp.array([[[0.5, 0.5]]]))
    np.testing.assert_allclose(got, [[[1.098612, 0.0, 0.75, 0.25, 0.25, -0.25]]], rtol=1e-6)


def test_what_never_exits():
    sure = [50.0, 0.0, 1.0, -1.0]
    assert decide(policy_of(), sure, sure)[0] == [RUN, EXIT]
    assert decide(policy_of(threshold=1.0), sure, sure)[0] == [RUN, RUN]
    assert decide(policy_of(), [NAN] * 4, [NAN, 0.0, 1.0, 2.0])[0] == [RUN, RUN]
    assert decide(CandidateExit.create(jax.random.key(0), L, candidates=2, hidden=3), sure, sure)[0] == [RUN, RUN]


def test_created_policies_fit(tiny_model):
    policy = CandidateExit.create(jax.random.key(0), L)
    check(Plan(depth=policy), tiny_model)
    assert policy.num_candidates == 4 and policy.w_in.shape == (6, 12, 512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_in": jnp.zeros((5, 6, 1))}, r"w_in of 3 axes, the first of 6 layers, got shape \(5, 6, 1\)"),
        ({"w_in": jnp.zeros((L, 5, H))}, r"w_in \[L, 3 M, H\], .* got \(6, 5, 1\)"),
        ({"b_in": jnp.zeros((L, 2))}, r"b_in and w_out \[L, H\], got .*\(6, 2\)"),
        ({"w_out": jnp.zeros(L)}, r"w_out of 2 axes, .* got shape \(6,\)"),
        ({"b_out": jnp.zeros(1)}, r"b_out of 1 axes, .* got shape \(1,\)"),
        ({"threshold": -1.0}, "threshold to be a number between 0 and 1, got -1.0"),
    ],
    ids=["layers", "features", "b_in", "w_out", "b_out", "threshold"],
)
def test_what_does_not_fit_is_refused(tiny_model, changes, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(depth=policy_of(**changes)), tiny_model)
