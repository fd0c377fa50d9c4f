"""Compile a decode step for accelerators that this machine does not have.

The TPU part runs libtpu's compiler for a described v5e slice; the GPU part lowers for CUDA and stops there.
"""

import jax
import jax.numpy as jnp
import pytest

from dyninf import CacheSpec, Plan, decode_step, prefill
from dyninf.depth import Confidence, ExitAt, every

PLANS = {
    "exits": Plan(depth=every(Confidence(threshold=0.9), step=2)),
    "masked_exits": Plan(depth=every(Confidence(threshold=0.9), step=3), fill="mask"),
    "static": Plan(depth=ExitAt(layer=3)),
}


def step_shapes(model, plan, dtype=jnp.bfloat16):
    """Shapes of the model in a dtype, of the state after a prompt, and of the plan."""
    model = jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree), model)
    tokens, lengths, key = jnp.zeros((2, 5), jnp.int32), jnp.array([5, 3]), jax.random.key(0)
    plan = jax.eval_shape(lambda plan: plan, plan)
    state = jax.eval_shape(
        lambda model, plan: prefill(model, tokens, lengths, plan, CacheSpec(capacity=16), key)[1], model, plan
    )
    return model, state, plan


@pytest.mark.parametrize("name", PLANS)
def test_a_decode_step_compiles_for_a_tpu(tiny_model, name):
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = jax.sharding.Mesh(topology.devices[:1], ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        step_shapes(tiny_model, PLANS[name]),
    )
    compiled = jax.jit(decode_step, donate_argnums=1, out_shardings=sharding).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes >= 0
    text = compiled.as_text()
    assert ("conditional" in text) == (name != "static"), "exits are conditionals, static schedules have none"


@pytest.mark.parametrize("name", PLANS)
def test_a_decode_step_lowers_for_cuda(tiny_model, name):
    shapes = step_shapes(tiny_model, PLANS[name])
    leaves, structure = jax.tree.flatten(shapes)

    def step(*leaves):
        state, stats = decode_step(*jax.tree.unflatten(structure, leaves))
        return state.token, stats.needed

    exported = jax.export.export(jax.jit(step), platforms=["cuda"])(*leaves)
    assert exported.platforms == ("cuda",) and "stablehlo" in exported.mlir_module()
    assert [aval.shape for aval in exported.out_avals] == [(2,), (2,)]
