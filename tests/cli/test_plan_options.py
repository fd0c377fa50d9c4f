"""Plans on the command line."""

import jax
import pytest

import dyninf
from dyninf import depth
from dyninf.cli.plan_options import check_plan, fields, policies, read_plan, read_plans
from dyninf.configs.plans import plans


@pytest.mark.parametrize(
    ("name", "change", "read"),
    [
        ("exit_confidence", "depth.threshold=0.5", lambda plan: plan.depth.policy.threshold == 0.5),
        ("exit_confidence", "depth.policy.threshold=0.5", lambda plan: plan.depth.policy.threshold == 0.5),
        ("exit_confidence", "depth.measure=margin", lambda plan: plan.depth.policy.measure == "margin"),
        ("exit_confidence", "depth.layers=2,3", lambda plan: plan.depth.layers == (2, 3)),
        ("exit_confidence", "depth.step=3", lambda plan: plan.depth.step == 3),
        ("exit_confidence", "fill=mask", lambda plan: plan.fill == "mask"),
        ("exit_calm", "depth.threshold=0.5", lambda plan: plan.depth.policy.policy.threshold == 0.5),
        ("exit_calm", "depth.length=7", lambda plan: plan.depth.policy.length == 7.0),
        ("exit_first_of", "depth.patience=5", lambda plan: plan.depth.policy.policies[1].patience == 5),
        ("exit_first_of", "depth.policies.0.threshold=1", lambda plan: plan.depth.policy.policies[0].threshold == 1.0),
        ("skip_middle", "depth.layers=1", lambda plan: plan.depth.layers == (1,)),
        ("skip_middle", "depth.prompt=true", lambda plan: plan.depth.prompt is True),
        ("select_votes", "select.reuse=0.8", lambda plan: plan.select.reuse == 0.8),
        ("select_reused", "select.reuse=1", lambda plan: plan.select.reuse == 1.0),
        ("exit_half", "depth.layer=3", lambda plan: plan.depth.layer == 3),
        ("exit_budget", "depth.thresholds=1,0.5,0", lambda plan: plan.depth.policies[0].thresholds == (1.0, 0.5, 0.0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_change_reaches_its_field_and_no_other(name, change, read):
    before, after = plans(8)[name], read_plan(name, [change], 8)
    assert read(after)
    assert type(after.depth) is type(before.depth)
    changed = {path for path, value in fields(after).items() if fields(before)[path] != value}
    assert changed <= {change.partition("=")[0].replace("policy.", "").replace("policies.0.", "")}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("depth.unknown=1", "depth.step=1"),
        ("depth=1", "depth.threshold=0.9"),
        ("sparsity=1", "expected a field"),
        ("depth.policies.5.threshold=1", "expected a field"),
        ("depth.threshold", "expected PATH=VALUE"),
        ("=1", "expected PATH=VALUE"),
        ("depth.step=1.5", "expected a whole number for depth.step, got '1.5'"),
        ("depth.layers=a", "expected numbers like 3,4"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(change, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        read_plan("exit_first_of", [change], 8)


def test_a_field_of_two_policies_must_be_named_by_its_place(monkeypatch):
    two = dyninf.Plan(depth=depth.first_of(depth.Confidence(threshold=0.9), depth.Saturation(threshold=0.98)))
    monkeypatch.setattr("dyninf.cli.plan_options.plans", lambda num_layers: {"two": two})
    with pytest.raises(ValueError, match=r"policies\.0\.threshold"):
        read_plan("two", ["depth.threshold=0.5"], 8)
    changed = read_plan("two", ["depth.policies.1.threshold=0.5"], 8)
    assert [policy.threshold for policy in changed.depth.policies] == [0.9, 0.5]


def test_several_plans_with_changes_and_lists_of_layers():
    read = read_plans("dense,skip_middle@depth.layers=3,4@depth.prompt=true, exit_patience@depth.patience=1", 8)
    assert list(read) == ["dense", "skip_middle@depth.layers=3,4@depth.prompt=true", "exit_patience@depth.patience=1"]
    skipping = read["skip_middle@depth.layers=3,4@depth.prompt=true"].depth
    assert (skipping.layers, skipping.prompt) == ((3, 4), True)
    assert read["dense"] == dyninf.Plan()


def test_every_field_that_is_listed_can_be_set():
    for name, plan in plans(8).items():
        for path, value in fields(plan).items():
            if value is not None:
                text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                assert read_plan(name, [f"{path}={text}"], 8) == plan


def test_policies_are_found_inside_wrappers():
    names = [type(policy).__name__ for policy in policies(plans(8)["exit_first_of"].depth)]
    assert names == ["Restricted", "FirstOf", "Confidence", "Patience"]


def test_exits_for_a_model_of_another_width_are_refused(loaded):
    model, width = loaded[0], loaded[0].config.d_model
    makers = {
        "AdaptedExit": lambda d: depth.AdaptedExit.create(jax.random.key(0), 4, d, 2),
        "MetaExit": lambda d: depth.after_layer(depth.MetaExit.create(4, d), layer=1),
        "StopExit": lambda d: depth.at_layers(depth.StopExit.create(4, d), layers=(1, 3)),
    }
    for name, make in makers.items():
        check_plan(dyninf.Plan(depth=make(width)), model)
        with pytest.raises(
            ValueError, match=f"d_model=24, got {name} with weights for 23; take those that were trained"
        ):
            check_plan(dyninf.Plan(depth=make(width - 1)), model)
    with pytest.raises(ValueError, match="layer"):
        check_plan(dyninf.Plan(depth=depth.ExitAt(layer=5)), model)
