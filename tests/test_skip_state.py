"""States that a policy puts in the place of a skipped layer's output: ``DepthPolicy.skip_state`` under every driver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Compact, Plan, forward, layer_states, pytree
from dyninf.depth import EXIT, RUN, SKIP, DepthPolicy, SkipLayers

L, V, B, T, STEPS = 6, 61, 3, 4, 6
LENGTHS = np.array([4, 2, 3])
PROMPTS = np.random.default_rng(0).integers(0, V, (B, T))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytree()
class Reversed(DepthPolicy):
    """Skip layers 1, 2 and 4 where a feature of the state is negative; the state goes on with its features reversed.

    The policy's state remembers which layer was asked for last; the answer before layer 5 is to exit.
    """

    skips = True

    def init(self, shape_BT):
        return jnp.full(shape_BT, -1, jnp.int32)

    def update(self, state, obs):
        state = jnp.full_like(state, obs.layer)
        skip_BT = jnp.where(obs.x_BTD[..., 0] < 0, SKIP, RUN)
        return jnp.where(obs.layer == 5, jnp.where(obs.x_BTD[..., 1] < 0, EXIT, RUN), skip_BT), state

    def decision_layers(self, num_layers):
        return (1, 2, 4, 5)

    def skip_state(self, state, obs):
        # Only right if it sees the state that update has just returned, and the states before and after a layer.
        return obs.x_BTD[..., ::-1] + (state - obs.layer)[..., None] + 0.1 * (obs.x_BTD - obs.prev_BTD)


@pytree(static=("layers", "prompt"))
class Pruned(SkipLayers):
    """Skip layers for prompt and text alike; what stands in for them halves the state."""

    def skip_state(self, state, obs):
        return 0.5 * obs.x_BTD


def test_the_drivers_agree(roll):
    plan = Plan(depth=Reversed(), fill="mask")
    want = roll(plan, PROMPTS, LENGTHS, driver="masked")
    assert 2 < len(set(want.stats.needed.ravel().tolist())), "the tokens did not differ"
    assert (want.stats.run == L).all()
    for driver in ("segments", "scan", Compact(capacity=2)):
        got = roll(plan, PROMPTS, LENGTHS, driver=driver)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.logits, want.logits, **CLOSE)
        np.testing.assert_array_equal(got.stats.needed, want.stats.needed)


def test_teacher_forcing_is_decoding(roll):
    plan = Plan(depth=Reversed(), fill="mask")
    want = roll(plan, PROMPTS, LENGTHS, driver="segments")
    text = np.zeros((B, T + STEPS), np.int32)
    for row, length in enumerate(LENGTHS):
        text[row, : length + STEPS] = [*PROMPTS[row, :length], *want.tokens[row, :STEPS]]
    sizes = {"lengths": jnp.asarray(LENGTHS + STEPS), "prompt_lengths": jnp.asarray(LENGTHS)}
    out = roll.forward(roll.model, jnp.asarray(text), plan, **sizes)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(out.logits[row, length - 1 : length + STEPS], want.logits[row], **CLOSE)


@pytest.mark.parametrize("driver", ["unrolled", "masked"])
def test_a_static_schedule_by_hand(roll, driver):
    """One token, layers 0 and 5 kept: four halvings between them are a sixteenth."""
    plan = Plan(depth=Pruned(layers=(1, 2, 3, 4)))
    token = jnp.array([[7]])
    first = jax.jit(layer_states)(roll.model, token)[1]
    positions, attend = jnp.zeros((1, 1), jnp.int32), lambda q, k, v, window=None: (jnp.repeat(v, 3, axis=2), None)
    last, _ = roll.model.layers[5](first / 16, positions, attend)  # a lone token attends to its own value
    out = roll.forward(roll.model, token, plan)
    np.testing.assert_allclose(out.states, last, **CLOSE)
    # The prompt takes the same way, and so do the tokens after it.
    got = roll(plan, np.array([[7, 1]]), np.array([1]), driver=driver)
    np.testing.assert_allclose(got.logits[0, 0], roll.model.unembed(last)[0, 0], **CLOSE)
    text = jnp.asarray([[7, *got.tokens[0, :STEPS]]])
    np.testing.assert_allclose(got.logits[0], roll.forward(roll.model, text, plan).logits[0], **CLOSE)


def test_policies_without_it_cost_nothing(roll):
    def length(depth):
        return len(jax.make_jaxpr(lambda m, t: forward(m, t, Plan(depth=depth)))(roll.model, jnp.array([[7]])).eqns)

    layers = (1, 2, 3, 4)
    assert SkipLayers(layers=layers).skip_state((), None) is None
    assert length(SkipLayers(layers=layers)) < length(Pruned(layers=layers))
