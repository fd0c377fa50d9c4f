"""Loops of steps: what they hand on and keep comes back as it was, and is one array each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyninf
from dyninf import models, step_loop
from dyninf.configs.plans import plans
from dyninf.indexed import refuse_indexed
from dyninf.step_loop import pack, pack_first, run_steps, step_of, steps_of, unpack


def state_of(batch, length):
    return dyninf.DecodeState(
        token=jnp.arange(batch, dtype=jnp.int32) - 1,
        cache=dyninf.KVCache(layers=(), length=jnp.full(batch, length, jnp.int32)),
        depth=(),
        key=jax.random.split(jax.random.key(0), batch),
        done=jnp.arange(batch) % 3 == 1,
        step=jnp.int32(1),
        stop=jnp.zeros((0, 0), jnp.int32),
        recent=jnp.zeros((batch, 0), jnp.int32),
    )


def equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        if not jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, other)


def test_a_state_and_its_step_come_back(rng):
    state, active = state_of(5, 7), jnp.array([True, False, True, True, False])
    entries = [jnp.asarray(rng.normal(size=5) * 10.0 ** rng.integers(-30, 30, 5), jnp.float32) for _ in range(2)]
    entries[0] = entries[0].at[2].set(jnp.nan)
    needed = jnp.asarray(rng.integers(0, 2**31 - 1, 5), jnp.int32)
    stats = dyninf.StepStats(active=active, needed=needed, run=jnp.int32(9), kv_live=entries[0], kv_read=entries[1])
    packed = pack(state, stats)
    equal(unpack(packed), state)
    equal(unpack(pack_first(state)), state)
    made, kept = steps_of(jnp.stack([step_of(packed), step_of(pack_first(state))]))
    assert made.tolist() == [[-1, -1, 1, 2, -1], [-1] * 5]
    equal(jax.tree.map(lambda leaf: leaf[0], kept), stats)
    assert not kept.active[1].any() and kept.run.tolist() == [9, 0] and not kept.needed[1].any()


def counting(limit):
    """A step that counts in the cache's length, and in what it reports; done at a limit of each sequence."""

    def step(state):
        live = ~state.done
        length = state.cache.length + live
        stats = dyninf.StepStats(active=live, needed=length, run=state.step, kv_live=length / 4, kv_read=-length / 8)
        cache = dataclasses.replace(state.cache, length=length)
        token = jnp.where(live, state.token + 10, state.token)
        return dataclasses.replace(state, cache=cache, token=token, done=length >= limit, step=state.step + 1), stats

    return step


def test_steps_run_until_the_last_sequence_is_done():
    state = dataclasses.replace(state_of(3, 0), done=jnp.zeros(3, bool))
    step = counting(jnp.array([1, 4, 2]))
    made, stats, last = jax.jit(run_steps, static_argnums=(0, 2, 3))(step, state, lambda s: ~s.done.all(), 6)
    assert made.T.tolist() == [[-1, 0, 1], [9, 10, 11], [-1, 20, 21], [-1, 30, -1], [-1, 40, -1], [-1] * 3, [-1] * 3]
    assert stats.run.tolist() == [1, 2, 3, 4, 0, 0] and stats.active.sum(axis=1).tolist() == [3, 2, 1, 1, 0, 0]
    assert stats.needed.tolist() == [[1, 1, 1], [1, 2, 2], [1, 3, 2], [1, 4, 2], [0] * 3, [0] * 3]
    np.testing.assert_array_equal(stats.kv_read, -stats.kv_live / 2)
    assert last.step == 5 and last.token.tolist() == [9, 40, 21] and last.cache.length.tolist() == [1, 4, 2]


def test_no_step_runs_of_a_state_that_is_done_or_where_there_are_none():
    state = dataclasses.replace(state_of(3, 2), done=jnp.ones(3, bool))
    for count in (0, 3):
        made, stats, last = run_steps(counting(9), state, lambda s: ~s.done.all(), count)
        assert made.T.tolist() == [[-1, 0, 1], *[[-1] * 3] * count]
        assert stats.run.shape == (count,) and not stats.active.any()
        equal(last, state)


def test_a_loop_keeps_one_array_of_its_steps():
    """XLA writes each in a kernel of its own."""
    loop = lambda state: run_steps(counting(9), state, lambda s: ~s.done.all(), 77)  # noqa: E731
    (while_,) = [eqn for eqn in jax.make_jaxpr(loop)(state_of(2, 0)).eqns if eqn.primitive.name == "while"]
    carried = [var.aval for var in while_.outvars if var.aval.size and jnp.issubdtype(var.aval.dtype, jnp.integer)]
    assert sorted(aval.shape for aval in carried) == [(), (8, 2), (77, 6, 2)]


def test_a_captured_loop_is_the_same_program(shallow_model, monkeypatch):
    """None of its options may be given inside of another program."""
    prompts = np.arange(8).reshape(2, 4)
    want = dyninf.generate(shallow_model, prompts, max_new_tokens=6)
    monkeypatch.setattr(step_loop, "is_on_one_gpu", lambda token: True)
    equal(dyninf.generate(shallow_model, prompts, max_new_tokens=6), want)
    equal(jax.jit(lambda model: dyninf.generate(model, prompts, max_new_tokens=6))(shallow_model), want)


def test_loops_are_captured_on_gpus_only(monkeypatch):
    monkeypatch.setitem(step_loop.CAPTURED, "xla_gpu_no_such_option", "1")
    program = step_loop.LoopProgram(lambda model, state: state.token)
    program(None, state_of(1, 0))
    monkeypatch.setattr(step_loop, "is_on_one_gpu", lambda token: True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        program(None, state_of(1, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("layers", ["listed", "stacked"])
@pytest.mark.parametrize("name", list(plans(4)))
def test_a_gpu_that_ends_loops_itself_makes_the_same_tokens(wide_model, monkeypatch, name, layers):
    plan, model = plans(4)[name], wide_model if layers == "listed" else models.stack_for_decoding(wide_model)
    if layers == "stacked" and refuse_indexed(plan, model.layers) is not None:
        pytest.skip("needs layers of which each is its own")
    prompts = np.random.default_rng(5).integers(0, 64, (3, 16))
    run = functools.partial(dyninf.generate, model, prompts, plan, max_new_tokens=24, stop=[7, 11, 13])
    got = run()
    monkeypatch.setattr(step_loop, "is_on_one_gpu", lambda token: False)
    equal(got, run())
    assert got.lengths.max() > 1
