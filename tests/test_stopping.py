"""Texts that a depth policy ends: ``DepthPolicy.stops`` while generating."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Plan, generate, stream
from dyninf.depth import Confidence, DepthPolicy, RunAll, after_layer, every, first_of
from dyninf.depth.base import EXIT, RUN
from dyninf.prompts import PAD
from dyninf.pytree import pytree

PROMPT = jnp.array([[3, 14, 15, 9], [26, 5, 35, 8], [9, 7, 9, 3]])


@pytree()
class EndAt(DepthPolicy):
    """End sequence b at its generated token ``at_B[b]`` (the prompt's is number 0), at the second layer."""

    at_B: jax.Array

    def init(self, shape_BT):
        return jnp.zeros(shape_BT, bool)

    def update(self, state, obs):
        ends_BT = obs.step_BT + 1 == self.at_B[:, None]
        return jnp.where(ends_BT, EXIT, RUN), ends_BT

    def stops(self, state):
        return state

    def decision_layers(self, num_layers):
        return (2,)


@pytest.mark.parametrize("driver", ["segments", pytest.param("masked", marks=pytest.mark.slow), "scan"])
def test_an_ended_text_gets_no_token_and_leaves_the_others_alone(shallow_model, driver):
    dense = generate(shallow_model, PROMPT, max_new_tokens=6)
    ended = generate(
        shallow_model, PROMPT, Plan(depth=EndAt(at_B=jnp.array([2, 99, 5]))), max_new_tokens=6, driver=driver
    )
    assert ended.lengths.tolist() == [2, 6, 5]
    assert ended.stopped.tolist() == [True, False, True]
    for row, length in enumerate((2, 6, 5)):
        assert np.array_equal(ended.tokens[row, :length], dense.tokens[row, :length])
        assert np.all(ended.tokens[row, length:] == PAD)
    # Token 2 of the first sequence left at layer 2; nothing ran for it afterwards.
    assert ended.stats.needed[:, 0].tolist() == [3, 2, 0, 0, 0]


def test_the_loop_ends_with_the_last_text(shallow_model):
    plan = Plan(depth=EndAt(at_B=jnp.array([1, 2, 2])))
    ended = generate(shallow_model, PROMPT, plan, max_new_tokens=6)
    assert ended.lengths.tolist() == [1, 2, 2]
    assert np.any(ended.stats.active, axis=1).tolist() == [True, True, False, False, False]
    streamed = [token.tolist() for token, _ in stream(shallow_model, PROMPT, plan, max_new_tokens=6)]
    assert streamed == [*ended.tokens[:, :3].T.tolist()]


def test_combinators_pass_it_on():
    ends = jnp.array([[True], [False]])
    policy, sure = EndAt(at_B=jnp.array([1, 1])), Confidence(threshold=0.9)
    assert every(policy, step=2).stops(ends) is ends
    assert after_layer(policy, layer=1).stops(ends) is ends
    assert np.array_equal(first_of(sure, policy, policy).stops(((), ends, ~ends)), [[True], [True]])
    assert first_of(sure).stops(((),)) is None and RunAll().stops(()) is None
