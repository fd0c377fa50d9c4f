"""The named plans on models of any depth; what they do is held to the laws of tests/test_plan_laws.py."""

import pytest

from dyninf.configs.plans import plans
from dyninf.depth import DepthDecay
from dyninf.kv import TopK
from dyninf.sparsity import Dense


@pytest.mark.parametrize("num_layers", [4, 5, 6, 8, 12, 16, 32])
def test_named_plans_fit_models_of_any_depth(num_layers):
    for name, plan in plans(num_layers).items():
        plan.depth.validate(num_layers)
        kept = plan.depth.static_layers(num_layers)
        saves = kept is None or len(kept) < num_layers or TopK in (type(plan.evict), type(plan.select))
        plan.sparsity.validate(num_layers, 4)
        saves |= not isinstance(plan.sparsity, Dense)
        assert saves or name == "dense", f"{name} is dense at {num_layers} layers"
        assert kept is not None or isinstance(plan.depth, DepthDecay) or plan.depth.decision_layers(num_layers)
