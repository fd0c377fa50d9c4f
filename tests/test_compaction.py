"""Compaction changes no result: the driver ``Compact`` against ``segments``, and what the hardware runs under it."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Compact, Plan, decode_step, generate, prefill, pytree
from dyninf.depth import EXIT, RUN, SKIP, Confidence, DepthPolicy, ExitAt, Patience, every, first_of

L, V, B, T = 6, 61, 5, 4
LENGTHS = np.array([4, 2, 3, 4, 1])
PROMPTS = np.random.default_rng(0).integers(0, V, (B, T))


@pytree()
class Scheduled(DepthPolicy):
    """Exit row b of step s before layer ``exits[s, b]``; rows that leave at L run every layer."""

    exits: jax.Array

    def update(self, state, obs):
        exits_BT = jnp.asarray(self.exits)[obs.step_BT, jnp.arange(B)[:, None]]
        return jnp.where(obs.layer >= exits_BT, EXIT, RUN), state


@pytree()
class Routed(DepthPolicy):
    """Skip a layer where a feature of the state is negative; what stands in for the layer turns the state around."""

    shortcut: bool = False
    skips = True

    def update(self, state, obs):
        return jnp.where(obs.x_BTD[..., 0] < 0, SKIP, RUN), state

    def decision_layers(self, num_layers):
        return (1, 2, 4)

    def skip_state(self, state, obs):
        return jnp.where(self.shortcut, obs.x_BTD[..., ::-1], obs.x_BTD)


@pytree()
class Behind(DepthPolicy):
    """Exit before layers 2 and 4 where a feature of the state that entered the layer before is negative."""

    def update(self, state, obs):
        return jnp.where(obs.prev_BTD[..., 0] < 0, EXIT, RUN), state

    def decision_layers(self, num_layers):
        return (2, 4)


PLANS = {
    "propagate": Plan(depth=first_of(Confidence(threshold=0.9), ExitAt(layer=5))),
    "mask": Plan(depth=every(first_of(Confidence(threshold=0.8), Patience(patience=2)), step=2), fill="mask"),
    "previous": Plan(depth=Behind()),
    "shortcuts": Plan(depth=Routed(shortcut=True)),
}
# In slow runs: groups as the first one; tests/test_skip_state.py and tests/test_catch_up.py also compact with a mask.
ALIKE = ("mask", "previous", "shortcuts")


def assert_same(got, want):
    np.testing.assert_array_equal(got.tokens, want.tokens)
    # Logits and keys reach 30 and 100; products over fewer rows add in another order.
    np.testing.assert_allclose(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got.stats.needed, want.stats.needed)
    np.testing.assert_array_equal(got.stats.run, want.stats.run)
    for cache, wanted in zip(got.state.cache.layers, want.state.cache.layers, strict=True):
        np.testing.assert_allclose(cache.k, wanted.k, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(cache.v, wanted.v, rtol=1e-4, atol=1e-3)
        assert wanted.valid is None or (cache.valid == wanted.valid).all()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in PLANS])
def test_compact_is_segments(roll, name):
    want = roll(PLANS[name], PROMPTS, LENGTHS, driver="segments")
    assert_same(roll(PLANS[name], PROMPTS, LENGTHS, driver=Compact(capacity=3)), want)
    depths = want.stats.needed
    assert (depths.min(axis=1) < depths.max(axis=1)).any(), "the rows never differed"


def test_finished_rows_need_no_place(roll):
    """Three rows of five are done: they take none of the three places and write nothing."""
    rows = np.array([False, True, True, False, True])

    def finish(state, step):
        return dataclasses.replace(state, done=jnp.asarray(rows))

    plan = PLANS["propagate"]
    want = roll(plan, PROMPTS, LENGTHS, driver="segments", edit=finish)
    got = roll(plan, PROMPTS, LENGTHS, driver=Compact(capacity=3), edit=finish)
    assert_same(got, want)
    for cache in got.state.cache.layers:
        assert not np.asarray(cache.k)[rows, LENGTHS[rows].max() :].any(), "a row that is done wrote to its cache"


def counting(model):
    """The model, telling when it runs with how many rows each layer is called: ``seen[(layer, rows)]``."""
    seen = collections.Counter()

    @pytree(static=("index",))
    class Counted:
        layer: object
        index: int

        def __call__(self, x, positions, attend):
            jax.debug.callback(lambda _: seen.update([(self.index, x.shape[0])]), x[0, 0, 0])
            return self.layer(x, positions, attend)

        def project_kv(self, x, positions):
            return self.layer.project_kv(x, positions)

    @pytree()
    class Model:
        inner: object
        layers: list

        def embed(self, tokens):
            return self.inner.embed(tokens)

        def unembed(self, x):
            return self.inner.unembed(x)

    layers = [Counted(layer=layer, index=index) for index, layer in enumerate(model.layers)]
    return Model(inner=model, layers=layers), seen


def test_groups_run_on_gathered_rows_when_they_fit(roll):
    # Rows that run layer l, by hand, for two places. Step 0: 5 rows run layer 0; rows 0, 2 and 3 run layers 1 and 2
    # (too many: all rows run); row 0 alone runs layers 3 to 5 in two places. Step 1: everybody leaves at layer 2.
    # Step 2: rows 0 and 1 run layers 1 to 5.
    exits = jnp.array([[6, 1, 3, 3, 1], [2, 2, 2, 2, 2], [6, 6, 1, 1, 1]])
    want = [{0: 5, 1: 5, 2: 5, 3: 2, 4: 2, 5: 2}, {0: 5, 1: 5}, {0: 5, 1: 2, 2: 2, 3: 2, 4: 2, 5: 2}]
    model, seen = counting(roll.model)
    roll, ran = type(roll)(model), []
    roll.steps = 3

    def look(state, step):
        jax.effects_barrier()
        ran.append(dict(seen))
        seen.clear()
        return state

    got = roll(Plan(depth=Scheduled(exits=exits)), PROMPTS, LENGTHS, driver=Compact(capacity=2), edit=look)
    look(None, 3)
    assert ran[1:] == [{(layer, rows): 1 for layer, rows in step.items()} for step in want]
    np.testing.assert_array_equal(got.stats.needed, exits)
    np.testing.assert_array_equal(got.stats.run, [6, 2, 6])


def operands(jaxpr):
    """Every operation of a program and of the programs inside it as (name, shape of its first operand)."""
    for equation in jaxpr.eqns:
        if equation.invars:
            yield equation.primitive.name, getattr(equation.invars[0].aval, "shape", ())
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            if hasattr(value, "jaxpr"):
                yield from operands(value.jaxpr)


def test_the_cache_is_not_gathered(tiny_model):
    plan, spec = PLANS["propagate"], CacheSpec(capacity=9)
    _, state = jax.eval_shape(
        lambda model: prefill(model, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), plan, spec, jax.random.key(0)),
        tiny_model,
    )
    program = jax.make_jaxpr(lambda m, s: decode_step(m, s, plan, driver=Compact(capacity=2)))(tiny_model, state)
    found = list(operands(program.jaxpr))
    cache = state.cache.layers[0].k.shape
    assert ("scatter", cache) in found, "the writes to the cache were not found"
    gathers = {shape for name, shape in found if name in ("gather", "dynamic_slice", "sort", "concatenate")}
    assert (B, 1, 24) in gathers and cache not in gathers


@pytest.mark.parametrize("capacity", [0, -1, 2.5, "2", None])
def test_a_capacity_that_no_batch_could_have_is_refused(capacity):
    with pytest.raises(ValueError, match="expected capacity to be an integer of at least 1, got"):
        Compact(capacity=capacity)


@pytest.mark.parametrize("capacity", [B, B + 1])
def test_a_capacity_of_the_whole_batch_is_refused(tiny_model, capacity):
    with pytest.raises(ValueError, match=f"below the batch of {B}, got .*use 'segments'"):
        generate(tiny_model, PROMPTS, max_new_tokens=2, driver=Compact(capacity=capacity))


@pytest.mark.parametrize("driver", ["compact", "", 3, Compact])
def test_an_unknown_driver_is_refused(tiny_model, driver):
    with pytest.raises(ValueError, match=r"expected driver to be one of .* or Compact\(capacity=...\), got"):
        generate(tiny_model, PROMPTS, max_new_tokens=2, driver=driver)


def test_drivers_compare_by_value():
    assert Compact(capacity=2) == Compact(capacity=2) != Compact(capacity=3)
    assert len({Compact(capacity=2), Compact(capacity=2)}) == 1


def test_generate_gives_the_same_tokens(tiny_model):
    plan, sizes = Plan(depth=ExitAt(layer=2)), {"max_new_tokens": 5, "lengths": LENGTHS}
    want = generate(tiny_model, PROMPTS, plan, **sizes)
    got = generate(tiny_model, PROMPTS, plan, **sizes, driver=Compact(capacity=2))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.stats.needed, want.stats.needed)
