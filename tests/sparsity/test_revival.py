"""Dropped tokens that return: against a stack that revives one token at a time, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Compact, Plan, decode_step, forward, generate, prefill, stream
from dyninf.depth import Confidence, ExitAt, every
from dyninf.generate import advance_step
from dyninf.models import stack_for_decoding
from dyninf.sparsity import LazyLLM

T, STEPS, LENGTHS = 14, 4, np.array([14, 6])
TOKENS = np.random.default_rng(0).integers(0, 61, (2, T))
FED = np.random.default_rng(1).integers(0, 61, (2, STEPS))
LAZY = LazyLLM(layers=(3, 4), budgets=(8, 4), revive=2)  # layer 3 is above the one stage and judges for the other
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits reach 30; the same sums in another order
QUICK = {"xla_backend_optimization_level": 0}

fill = jax.jit(prefill, static_argnames=("spec", "chunk"), compiler_options=QUICK)
step = jax.jit(advance_step, static_argnames=("driver",), compiler_options=QUICK)


def start(model, plan, lengths=LENGTHS):
    return fill(model, jnp.asarray(TOKENS), jnp.asarray(lengths), plan, CacheSpec(capacity=32), jax.random.key(0))


def shapes(model, plan):
    """The state after the prompts, as shapes."""
    spec, key = CacheSpec(capacity=32), jax.random.key(0)
    return jax.eval_shape(lambda m: prefill(m, jnp.asarray(TOKENS), jnp.asarray(LENGTHS), plan, spec, key)[1], model)


class Stack:
    """One text through the layers of a model by the definition: one token at a time, no padding, no arrays of a budget.

    ``kept[layer][position]`` are the key and the value of a token that has run the layer, ``waiting[layer][position]``
    the state in which one was dropped before it. ``revived`` and ``left`` count what returned and what was chosen but
    had to wait, by step and stage.
    """

    def __init__(self, model, policy):
        self.model, self.stages, self.revive = model, dict(policy.stages), policy.revive
        self.kept = [{} for _ in model.layers]
        self.waiting = {layer: {} for layer in self.stages}
        self.revived, self.left = [], []

    def layer(self, number, x, position, read=None):
        """The state after a layer, and what the token paid to each position that it read: all, or those in ``read``."""
        paid = {}

        def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None):
            q, k, v = (np.asarray(part[0, 0], np.float64) for part in (q_BTNH, k_BTKH, v_BTKH))
            self.kept[number][position] = k, v
            at = sorted(p for p in self.kept[number] if p <= position and (read is None or p in read or p == position))
            keys, values = (np.stack([self.kept[number][p][i] for p in at]) for i in (0, 1))
            keys, values = (np.repeat(part, len(q) // len(k), axis=1) for part in (keys, values))
            scores = np.einsum("nh,snh->ns", q, keys) * q.shape[1] ** -0.5
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            paid.update(zip(at, weights.mean(axis=0), strict=True))
            return jnp.asarray(np.einsum("ns,snh->nh", weights, values), jnp.float32)[None, None], None

        x, _ = self.model.layers[number](x, jnp.asarray([[position]]), attend)
        return x, paid

    def prompt(self, tokens):
        self.length, paid = len(tokens), {}
        states = {p: self.model.embed(jnp.asarray([[token]])) for p, token in enumerate(tokens)}
        for number in range(len(self.model.layers)):
            if number in self.stages and len(states) > self.stages[number]:
                others = sorted(sorted(states)[:-1], key=lambda p: (-paid[p], p))
                for p in others[self.stages[number] - 1 :]:
                    self.waiting[number][p] = states.pop(p)
            for p in sorted(states):
                states[p], paid = self.layer(number, states[p], p)
        return self.read(states[self.length - 1])

    def token(self, token, position):
        x, read, paid = self.model.embed(jnp.asarray([[token]])), None, {}
        ends = dict(zip(self.stages, [*list(self.stages)[1:], len(self.model.layers)], strict=True))
        for number in range(len(self.model.layers)):
            if number in self.stages:
                chosen = sorted((p for p in paid if p < self.length), key=lambda p: (-paid[p], p))
                chosen = chosen[: self.stages[number]]
                read = {*chosen, *range(self.length, position)}
                missing = [p for p in chosen if p not in self.kept[number]]
                for p in sorted(missing[: self.revive]):
                    self.bring_back(p, number, ends[number], read)
                self.revived.append(len(missing[: self.revive]))
                self.left.append(len(missing[self.revive :]))
            x, paid = self.layer(number, x, position, read)
        return self.read(x)

    def bring_back(self, position, first, end, read):
        x = self.waiting[first].pop(position)
        for number in range(first, end):
            x, _ = self.layer(number, x, position, read)
        if end < len(self.model.layers):
            self.waiting[end][position] = x

    def read(self, x):
        return np.asarray(self.model.unembed(x))[0, -1]


def poisoned(state):
    """The state with NaN in every slot that holds no token, those of dropped tokens among them."""
    layers = tuple(
        dataclasses.replace(
            cache, **{name: jnp.where(cache.valid[:, :, None, None], getattr(cache, name), jnp.nan) for name in "kv"}
        )
        for cache in state.cache.layers
    )
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=layers))


def check_caches(state, stacks):
    for row, stack in enumerate(stacks):
        for cache, kept in zip(state.cache.layers, stack.kept, strict=True):
            at = np.array(sorted(kept))
            assert np.nonzero(np.asarray(cache.valid)[row])[0].tolist() == at.tolist()
            np.testing.assert_allclose(cache.k[row, at], [kept[p][0] for p in at], **CLOSE)
            np.testing.assert_allclose(cache.v[row, at], [kept[p][1] for p in at], **CLOSE)


def compare(model, policy, rows):
    """Decode the given tokens with both, from prompts whose empty slots are NaN; return the stacks."""
    plan, stacks = Plan(sparsity=policy), [Stack(model, policy) for _ in range(rows)]
    logits, state = start(model, plan)
    want = [stack.prompt(TOKENS[row, : LENGTHS[row]]) for row, stack in enumerate(stacks)]
    np.testing.assert_allclose(logits[:rows], want, **CLOSE)
    check_caches(state, stacks)
    for number in range(STEPS):
        before = [np.asarray(cache.valid) for cache in state.cache.layers]
        state = dataclasses.replace(poisoned(state), token=jnp.asarray(FED[:, number]))
        state, logits, _, stats = step(model, state, plan)
        want = [stack.token(FED[row, number], LENGTHS[row] + number) for row, stack in enumerate(stacks)]
        np.testing.assert_allclose(logits[:rows], want, **CLOSE)
        check_caches(state, stacks)
        after = [np.asarray(cache.valid) for cache in state.cache.layers]
        assert (np.array(after) >= before).all(), "what has returned stays"
        assert (stats.needed == 6).all() and stats.run == 6
    return stacks


def test_steps_are_those_of_a_stack_that_revives_one_token_at_a_time(tiny_model):
    long, short = compare(tiny_model, LAZY, rows=2)
    # Without these the comparison would say little: each stage brings tokens back, two in a step and one, and leaves
    # some for later; a prompt of six tokens has none to bring back at the stage of eight.
    revived, left = (np.reshape(part, (STEPS, 2)) for part in (long.revived, long.left))
    assert revived.any(axis=0).all() and {1, 2} <= set(revived.ravel()) and left.any()
    assert not any(short.revived[::2]) and any(short.revived[1::2])


@pytest.mark.slow
def test_enough_revivals_leave_none_of_the_chosen_out(tiny_model):
    (stack,) = compare(tiny_model, dataclasses.replace(LAZY, revive=T), rows=1)
    assert max(stack.revived) > 2 and not any(stack.left)


@pytest.mark.slow
def test_budgets_of_the_whole_prompt_are_dense(tiny_model):
    # Prompts of nine tokens in an array of 14: the stages exist, and drop nothing.
    whole, results = Plan(sparsity=dataclasses.replace(LAZY, budgets=(10, 9))), []
    for plan in (whole, Plan()):
        logits, state = start(tiny_model, plan, lengths=np.array([9, 6]))
        assert plan == Plan() or len(state.pending.states) == 2
        results.append([logits])
        for number in range(STEPS):
            state = dataclasses.replace(state, token=jnp.asarray(FED[:, number]))
            state, logits, _, _ = step(tiny_model, state, plan)
            results[-1].append(logits)
    np.testing.assert_allclose(*results, **CLOSE)


def test_plans_keep_the_states_that_they_need(tiny_model):
    waiting = [shapes(tiny_model, Plan(sparsity=dataclasses.replace(LAZY, revive=count))).pending for count in (0, 1)]
    assert waiting[0] is None and shapes(tiny_model, Plan()).pending is None
    assert [states.shape for states in waiting[1].states] == [(2, T, 24)] * 2
    # A budget of the array's width drops nothing.
    one = shapes(tiny_model, Plan(sparsity=dataclasses.replace(LAZY, budgets=(T, 4)))).pending
    assert one.stages == ((4, 4),) and len(one.states) == 1


@pytest.mark.slow
def test_generating_streaming_and_stacked_layers_agree(tiny_model):
    plan, options = Plan(sparsity=LAZY), {"max_new_tokens": 5, "lengths": LENGTHS}
    want = generate(tiny_model, TOKENS, plan, **options).tokens
    streamed = [token for token, _ in stream(tiny_model, TOKENS, plan, **options)]
    np.testing.assert_array_equal(np.stack(streamed, axis=1), want)
    np.testing.assert_array_equal(generate(stack_for_decoding(tiny_model), TOKENS, plan, **options).tokens, want)
    for row, length in enumerate(LENGTHS):
        alone = generate(tiny_model, TOKENS[[row], :length], plan, max_new_tokens=5).tokens
        np.testing.assert_array_equal(alone[0], want[row])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"revive": -1}, ValueError, "revive of LazyLLM to be an integer between 0 and inf, got -1"),
        ({"revive": 1.5}, ValueError, "revive of LazyLLM .* got 1.5"),
        ({"depth": ExitAt(layer=3)}, NotImplementedError, r"depth=RunAll\(\) for LazyLLM with revive=2, got ExitAt"),
        ({"depth": every(Confidence(threshold=0.5), step=2)}, NotImplementedError, r"depth=RunAll\(\) .* got Restr"),
    ],
    ids=["negative", "fraction", "static", "exits"],
)
def test_what_cannot_be_had_together_is_refused(tiny_model, change, error, message):
    sparsity = dataclasses.replace(LAZY, revive=change.get("revive", LAZY.revive))
    plan = Plan(sparsity=sparsity, depth=change.get("depth", Plan().depth))
    for read in (
        lambda: generate(tiny_model, TOKENS, plan, max_new_tokens=2),
        lambda: forward(tiny_model, jnp.asarray(TOKENS), plan, prompt_lengths=jnp.asarray(LENGTHS)),
    ):
        with pytest.raises(error, match=message):
            read()


@pytest.mark.parametrize("driver", ["masked", "segments", "scan", Compact(capacity=1)], ids=str)
def test_other_drivers_and_chunks_are_refused(tiny_model, driver):
    plan = Plan(sparsity=LAZY)
    with pytest.raises(ValueError, match="driver 'unrolled' for LazyLLM with revive=2, got " + re.escape(repr(driver))):
        generate(tiny_model, TOKENS, plan, max_new_tokens=2, driver=driver)
    with pytest.raises(NotImplementedError, match="drops no token for prompts read in chunks"):
        generate(tiny_model, TOKENS, plan, max_new_tokens=2, prefill_chunk=8)


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        (LAZY, dataclasses.replace(LAZY, revive=0)),
        (dataclasses.replace(LAZY, revive=0), LAZY),
        (LAZY, dataclasses.replace(LAZY, revive=3)),
        (LAZY, dataclasses.replace(LAZY, budgets=(8, 3))),
    ],
    ids=["none_asked", "none_made", "more", "budgets"],
)
def test_a_state_of_another_revival_is_refused(tiny_model, made, asked):
    state = shapes(tiny_model, Plan(sparsity=made))
    with pytest.raises(ValueError, match="expected a state that was made for this plan"):
        jax.eval_shape(lambda m, s: decode_step(m, s, Plan(sparsity=asked)), tiny_model, state)
