"""Static schedules: which layers they keep, what they refuse, and that they compile to no control flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Plan, check, decode_step, prefill
from dyninf.depth import Confidence, ExitAt, RunAll, SkipLayers, UnifiedSkip, every

# Worked out on paper for 30 layers: budget = int(30 / s), interval = int(30 / (budget - 1)), first and last kept.
UNIFIED = {
    1.0: tuple(range(30)),
    2.0: (*range(0, 27, 2), 29),  # budget 15, interval int(30 / 14) = 2: 0, 2, ..., 26 and 29
    3.0: (*range(0, 25, 3), 29),  # budget 10, interval int(30 / 9) = 3: 0, 3, ..., 24 and 29
    5.0: (0, 6, 12, 18, 24, 29),  # budget 6, interval 30 / 5 = 6
    10.0: (0, 15, 29),  # budget 3, interval 30 / 2 = 15
    15.0: (0, 29),  # budget 2: nothing between
}


@pytest.mark.parametrize("speedup", UNIFIED)
def test_unified_skip_by_hand(speedup):
    assert UnifiedSkip(speedup=speedup).static_layers(30) == UNIFIED[speedup]


@pytest.mark.parametrize("num_layers", [2, 3, 7, 12, 16, 30, 32, 80])
def test_unified_skip_keeps_the_budget_and_both_ends(num_layers):
    for speedup in np.linspace(1, num_layers / 2, 37):
        policy = UnifiedSkip(speedup=float(speedup))
        policy.validate(num_layers)
        kept = policy.static_layers(num_layers)
        assert len(kept) == max(2, int(num_layers / speedup))
        assert kept[0] == 0 and kept[-1] == num_layers - 1 and list(kept) == sorted(set(kept))
        gaps = np.diff(kept)[:-1]
        assert len(set(gaps.tolist())) <= 1, "layers between the ends are evenly spaced"


@pytest.mark.parametrize(
    ("policy", "kept", "prompt"),
    [
        (RunAll(), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)),
        (ExitAt(layer=2), (0, 1), (0, 1)),
        (ExitAt(layer=5), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)),
        (SkipLayers(layers=(1, 3)), (0, 2, 4), (0, 2, 4)),
        (SkipLayers(layers=(1, 3), prompt=False), (0, 2, 4), (0, 1, 2, 3, 4)),
        (SkipLayers(layers=()), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)),
        (UnifiedSkip(speedup=2.5), (0, 4), (0, 1, 2, 3, 4)),
    ],
    ids=str,
)
def test_layers_of_decoded_tokens_and_of_the_prompt(policy, kept, prompt):
    policy.validate(5)
    assert policy.static_layers(5) == kept and policy.prefill_layers(5) == prompt


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ExitAt(layer=0), "between 1 and 6, got 0"),
        (ExitAt(layer=7), "between 1 and 6, got 7"),
        (ExitAt(layer=2.0), "integer between 1 and 6, got 2.0"),
        (SkipLayers(layers=(6,)), "between 0 and 5, got 6"),
        (SkipLayers(layers=(-1,)), "between 0 and 5, got -1"),
        (SkipLayers(layers=(0, 1, 2, 3, 4, 5)), "at least one layer left to run"),
        (UnifiedSkip(speedup=0.5), "between 1 and 3, got 0.5"),
        (UnifiedSkip(speedup=3.5), "between 1 and 3, got 3.5"),
        (UnifiedSkip(speedup=float("nan")), "between 1 and 3, got nan"),
    ],
    ids=str,
)
def test_a_schedule_that_does_not_fit_is_refused(tiny_model, policy, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(depth=policy), tiny_model)


def primitives(jaxpr):
    """Every primitive of a program, also inside others."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def programs(model, plan):
    tokens, lengths = jnp.zeros((2, 3), jnp.int32), jnp.array([3, 2])
    spec, key = CacheSpec(capacity=5), jax.random.key(0)
    _, state = jax.eval_shape(lambda m, p: prefill(m, tokens, lengths, p, spec, key), model, plan)
    both = (
        jax.make_jaxpr(lambda m, p: prefill(m, tokens, lengths, p, spec, key))(model, plan),
        jax.make_jaxpr(decode_step)(model, state, plan),
    )
    return [list(primitives(program.jaxpr)) for program in both]


@pytest.mark.parametrize(
    "policy", [RunAll(), ExitAt(layer=2), SkipLayers(layers=(1, 4)), UnifiedSkip(speedup=2.0)], ids=str
)
def test_static_schedules_compile_to_the_kept_layers_and_no_control_flow(tiny_model, policy):
    dense = programs(tiny_model, Plan())
    kept = (len(policy.prefill_layers(6)), len(policy.static_layers(6)))
    for found, whole, layers in zip(programs(tiny_model, Plan(depth=policy)), dense, kept, strict=True):
        assert not {"cond", "while", "scan"} & set(found)
        # One readout, and the same number of products for every layer.
        assert found.count("dot_general") - 1 == (whole.count("dot_general") - 1) * layers // 6


def test_exits_compile_to_one_conditional_per_decision(tiny_model):
    _, step = programs(tiny_model, Plan(depth=every(Confidence(threshold=0.9), step=2)))
    assert step.count("cond") == 2  # before layers 2 and 4
