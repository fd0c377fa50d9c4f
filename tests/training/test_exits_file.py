"""Files of trained exits: what goes in comes out, and anything else is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dyninf.cli.plan_options import read_plan
from dyninf.depth import AdaptedExit, Confidence, JointExit, MetaExit, StopExit, at_layers, every
from dyninf.training.exits_file import load_exits, save_exits

L, D = 4, 6
POLICIES = {
    "adapted": AdaptedExit.create(jax.random.key(0), L, D, 2, threshold=0.25, first=2),
    "joint": at_layers(JointExit.create(L, bias=-1.0), layers=(1, 3)),
    "meta": MetaExit(gate=jnp.ones((L, D)), bias=jnp.zeros(L), threshold=0.75),
    "stop": StopExit.create(L, D, exit_threshold=1.0, stop_threshold=0.5),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_comes_back_as_it_was(name, tmp_path):
    policy, file = POLICIES[name], tmp_path / "exits.safetensors"
    save_exits(policy, file)
    read = load_exits(file)
    assert read == policy and jax.tree.structure(read) == jax.tree.structure(policy)
    assert [path.name for path in tmp_path.iterdir()] == ["exits.safetensors"]
    trained = jax.tree.map(jnp.asarray, policy)  # thresholds that training made arrays
    save_exits(trained, file)
    assert load_exits(file) == policy


def test_a_file_is_a_plan_whose_threshold_can_be_set(tmp_path):
    file = tmp_path / "exits.safetensors"
    save_exits(POLICIES["joint"], file)
    plan = read_plan(str(file), ["depth.threshold=0.125"], L)
    assert plan.depth.decision_layers(L) == (1, 3) and plan.depth.policy.threshold == 0.125
    assert dataclasses.replace(plan.depth.policy, threshold=0.5) == POLICIES["joint"].policy


@pytest.mark.parametrize("policy", [Confidence(threshold=0.5), every(POLICIES["meta"], step=2)], ids=["rule", "every"])
def test_other_policies_are_refused(policy, tmp_path):
    with pytest.raises(ValueError, match="expected a policy among AdaptedExit"):
        save_exits(policy, tmp_path / "exits.safetensors")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "exits.safetensors"
    with pytest.raises(ValueError, match=r"file of trained exits, got .*exits.safetensors"):
        load_exits(file)
    file.write_text("{}")
    with pytest.raises(ValueError, match="file of trained exits"):
        load_exits(file)
    save_exits(MetaExit(gate=jnp.full((L, D), jnp.nan), bias=jnp.zeros(L), threshold=0.75), file)
    with pytest.raises(ValueError, match="not finite numbers in gate"):
        load_exits(file)
    save_file({"gate": np.ones(3)}, file)
    with pytest.raises(ValueError, match="no header of the format"):
        load_exits(file)
