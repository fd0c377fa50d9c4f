"""Catching up: keys and values are the dense model's, whatever tokens exited where; the window and its overflow.

A schedule forces exits, so that every state can be written down. The dense model's cache and states of the same text
are the oracle.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Compact, Plan, decode_step, forward, generate, layer_states, prefill, pytree
from dyninf.depth import EXIT, RUN, Confidence, DepthPolicy, ExitAt, UnifiedSkip, at_layers

L, V, B, T, STEPS, W = 6, 61, 3, 5, 6, 2
LENGTHS = np.array([5, 3, 4])
PROMPTS = np.random.default_rng(0).integers(0, V - 1, (B, T))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits reach 30; the same sums in another order
# The layer before which each step of each sequence wants to exit; 6 runs every layer.
WANTED = [[2, 4, 3, 6, 1, 1], [6, 5, 2, 2, 2, 6], [0, 1, 1, 1, 0, 1]]
# asked layers -> (what each step needs, and the layers at which the two entries of the window wait after it), by hand.
CASES = {
    # A third token in a row may not exit: step 2 of the first sequence runs every layer and empties the window.
    # Waiting tokens advance to where the newest has gone (2 to 4 in step 1) but not back (5 stays 5).
    (0, 1, 2, 3, 4, 5): (
        [[2, 4, 6, 6, 1, 1], [6, 5, 2, 6, 2, 6], [0, 1, 6, 1, 0, 6]],
        [
            [[2, 6], [4, 4], [6, 6], [6, 6], [1, 6], [1, 1]],
            [[6, 6], [5, 6], [5, 2], [6, 6], [2, 6], [6, 6]],
            [[0, 6], [1, 1], [6, 6], [1, 6], [1, 0], [6, 6]],
        ],
    ),
    # Asked before layers 2 and 4 only: 0 and 1 become 2, 3 becomes 4, 5 becomes 6.
    (2, 4): (
        [[2, 4, 6, 6, 2, 2], [6, 6, 2, 2, 6, 6], [2, 2, 6, 2, 2, 6]],
        [
            [[2, 6], [4, 4], [6, 6], [6, 6], [2, 6], [2, 2]],
            [[6, 6], [6, 6], [2, 6], [2, 2], [6, 6], [6, 6]],
            [[2, 6], [2, 2], [6, 6], [2, 6], [2, 2], [6, 6]],
        ],
    ),
}


@pytree()
class Scheduled(DepthPolicy):
    """Exit row b of step s before layer ``exits[b, s]``."""

    exits: jax.Array

    def update(self, state, obs):
        exits_BT = jnp.asarray(self.exits)[jnp.arange(B)[:, None], obs.step_BT]
        return jnp.where(obs.layer >= exits_BT, EXIT, RUN), state


@pytest.fixture(scope="module", params=CASES, ids=["every_layer", "two_layers"])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def plan(case):
    return Plan(depth=at_layers(Scheduled(exits=np.array(WANTED)), layers=case), fill="catch_up", window=W)


@pytest.fixture(scope="module")
def base(roll, plan):
    """The rollout and the state before each step and after the last."""
    states = []

    def keep(state, step):
        states.append(state)
        return state

    got = roll(plan, PROMPTS, LENGTHS, edit=keep)
    return got, [*states, got.state]


@pytest.fixture(scope="module")
def text(base):
    """Prompts and generated tokens of every sequence as one."""
    got, _ = base
    text = np.zeros((B, T + STEPS), np.int32)
    for row, length in enumerate(LENGTHS):
        text[row, :length] = PROMPTS[row, :length]
        text[row, length : length + STEPS] = got.tokens[row, :STEPS]
    return text


def waiting(state):
    """Mark the entries that waiting tokens have not written ``[L, B, S]``."""
    missing = np.zeros((L, B, state.cache.capacity), bool)
    for row, layers in enumerate(np.asarray(state.pending.layer_BW)):
        count = int((layers < L).sum())
        assert (layers[count:] == L).all(), "free entries come last"
        for entry, layer in enumerate(layers[:count]):
            missing[layer:, row, int(state.cache.length[row]) - count + entry] = True
    return missing


def test_needs_and_window_by_hand(base, case):
    (got, states), (needed, layers) = base, CASES[case]
    np.testing.assert_array_equal(got.stats.needed.T, needed)
    np.testing.assert_array_equal(np.stack([state.pending.layer_BW for state in states[1:]], axis=1), layers)
    # Waiting tokens trigger no layers: the batch runs what its deepest new token needs.
    np.testing.assert_array_equal(got.stats.run, np.max(needed, axis=0))
    assert (np.asarray(states[0].pending.layer_BW) == L).all()


def test_keys_and_values_are_those_of_the_dense_model(roll, base, text):
    _, states = base
    _, dense = roll.prefill(roll.model, text, jnp.asarray(LENGTHS + STEPS), Plan(), roll.spec, jax.random.key(0))
    for state in states:
        missing, filled = waiting(state), ~roll.empty(state)
        for layer, (cache, want) in enumerate(zip(state.cache.layers, dense.cache.layers, strict=True)):
            written = (filled & ~missing)[layer]
            for one, other in ((cache.k, want.k), (cache.v, want.v)):
                np.testing.assert_allclose(np.asarray(one)[written], np.asarray(other)[written], **CLOSE)
            assert not np.asarray(cache.k)[~written].any(), "written before its time"
    assert not waiting(states[3])[:, 0].any() and waiting(states[2])[:, 0].any()


def test_predictions_are_those_of_the_dense_states(tiny_model, base, text):
    got, _ = base
    states = jax.jit(layer_states)(tiny_model, text)
    for row, length in enumerate(LENGTHS):
        for step in range(STEPS):
            state = states[got.stats.needed[step, row], row, length + step]
            want = tiny_model.unembed(state[None, None])[0, 0]
            np.testing.assert_allclose(got.logits[row, step + 1], want, **CLOSE)


def test_entries_that_are_missing_are_never_read(roll, plan, base):
    want, _ = base

    def poison(state, step):
        return roll.poison(state, roll.empty(state) | waiting(state))

    np.testing.assert_array_equal(roll(plan, PROMPTS, LENGTHS, edit=poison).logits, want.logits)


def test_teacher_forcing_exits_where_decoding_does(roll, plan, base, text):
    got, _ = base
    sizes = {"lengths": jnp.asarray(LENGTHS + STEPS), "prompt_lengths": jnp.asarray(LENGTHS)}
    out = roll.forward(roll.model, jnp.asarray(text), plan, **sizes)
    for row, length in enumerate(LENGTHS):
        logits = np.asarray(out.logits)[row, length - 1 : length + STEPS]
        np.testing.assert_allclose(logits, got.logits[row], **CLOSE)
        np.testing.assert_array_equal(out.needed[row, length : length + STEPS], got.stats.needed[:, row])
        assert (np.asarray(out.needed)[row, :length] == L).all() and not out.needed[row, length + STEPS :].any()


def test_a_window_of_the_whole_text_lets_every_token_exit(shallow_model):
    always = at_layers(Scheduled(exits=np.ones((B, STEPS), int)), layers=(1,))
    plan = Plan(depth=always, fill="catch_up", window=STEPS)
    got = generate(shallow_model, PROMPTS, plan, max_new_tokens=STEPS + 1, lengths=LENGTHS)
    assert (got.stats.needed == 1).all() and (got.stats.run == 1).all()


def test_schedules_without_gaps_keep_no_window(tiny_model):
    for depth in (ExitAt(layer=3), Plan().depth):
        _, state = jax.eval_shape(begin, tiny_model, Plan(depth=depth, fill="catch_up"))
        assert state.pending is None


@pytree()
class Holed:
    """A model that embeds token 60 as NaN."""

    inner: object

    @property
    def layers(self):
        return self.inner.layers

    def embed(self, tokens):
        return jnp.where((tokens == V - 1)[..., None], jnp.nan, self.inner.embed(tokens))

    def unembed(self, x):
        return self.inner.unembed(x)


@pytest.mark.parametrize(
    ("driver", "fill"),
    [
        ("segments", "catch_up"),
        ("segments", "propagate"),
        pytest.param("masked", "mask", marks=pytest.mark.slow),  # decides as "scan" does
        ("scan", "mask"),
        (Compact(capacity=2), "mask"),
    ],
    ids=["catch_up", "segments", "masked", "scan", "compact"],
)
def test_states_that_are_not_numbers_never_exit(shallow_model, driver, fill):
    plan = Plan(depth=at_layers(Scheduled(exits=np.ones((B, 1), int)), layers=(1, 2)), fill=fill)
    model = Holed(inner=shallow_model)
    _, state = begin(model, plan)
    state = dataclasses.replace(state, token=jnp.array([4, V - 1, 5]))
    state, stats = jax.jit(lambda m, s: decode_step(m, s, plan, driver=driver))(model, state)
    assert stats.needed.tolist() == [1, 3, 1]
    if fill == "catch_up":
        assert np.isfinite(state.pending.x_BWD).all()
        text = jnp.array([[1, 4], [1, V - 1], [1, 5]])
        assert jax.jit(forward)(model, text, plan).needed.tolist() == [[3, 1], [3, 3], [3, 1]]


@jax.jit
def begin(model, plan):
    spec = CacheSpec(capacity=12)
    return prefill(model, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), plan, spec, jax.random.key(0))


EXITS = Confidence(threshold=0.9)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(depth=EXITS, fill="catch_up", window=0), "expected the window to be an integer between 1 and inf, got 0"),
        (Plan(depth=EXITS, window=-1), "the window .* got -1"),
        (Plan(depth=EXITS, fill="catch_up", window=2.5), "the window .* got 2.5"),
        (Plan(depth=UnifiedSkip(speedup=2.0), fill="catch_up"), "which skips layers; use 'propagate' or 'mask'"),
        (Plan(depth=EXITS, fill="catchup"), "expected fill 'propagate', 'mask' or 'catch_up', got 'catchup'"),
        (Plan(depth=at_layers(EXITS, layers=(2, L)), fill="catch_up"), "a decision layer of this model .* got 6"),
    ],
    ids=["window_0", "window_negative", "window_float", "skips", "fill", "no_such_exit"],
)
def test_plans_that_cannot_catch_up_are_refused(tiny_model, plan, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model, PROMPTS, plan, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        forward(tiny_model, jnp.asarray(PROMPTS), plan)


@pytest.mark.parametrize("driver", ["masked", "scan", Compact(capacity=2)], ids=["masked", "scan", "compact"])
def test_drivers_that_cannot_catch_up_are_refused(tiny_model, driver):
    with pytest.raises(ValueError, match="expected driver 'segments' for fill='catch_up'"):
        generate(tiny_model, PROMPTS, Plan(depth=EXITS, fill="catch_up"), max_new_tokens=2, driver=driver)
    if driver != "masked":
        with pytest.raises(ValueError, match="expected driver 'masked' for a text"):
            forward(tiny_model, jnp.asarray(PROMPTS), Plan(depth=EXITS, fill="catch_up"), driver=driver)


@pytest.mark.parametrize("changes", [{"fill": "propagate"}, {"window": W + 1}], ids=["fill", "window"])
def test_a_state_with_another_window_is_refused(tiny_model, changes):
    plan = Plan(depth=EXITS, fill="catch_up", window=W)
    _, state = jax.eval_shape(begin, tiny_model, plan)
    other = dataclasses.replace(plan, **changes)
    with pytest.raises(ValueError, match="expected a state that was made for this plan"):
        jax.eval_shape(lambda m, s: decode_step(m, s, other), tiny_model, state)
