"""Compile a decode step for accelerators that this machine does not have.

The TPU part runs libtpu's compiler for a described v5e slice; the GPU part lowers for CUDA and stops there.
"""

import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dyninf import CacheSpec, Plan, decode_step, kv, models, prefill
from dyninf.depth import Confidence, ExitAt, every

PLANS = {
    "exits": Plan(depth=every(Confidence(threshold=0.9), step=1)),
    "masked_exits": Plan(depth=every(Confidence(threshold=0.9), step=2), fill="mask"),
    "static": Plan(depth=ExitAt(layer=2)),
}


def step_shapes(model, plan, dtype=jnp.bfloat16, capacity=16):
    """Shapes of the model in a dtype, of the state after a prompt, and of the plan."""
    model = jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree), model)
    tokens, lengths, key = jnp.zeros((2, 5), jnp.int32), jnp.array([5, 3]), jax.random.key(0)
    plan = jax.eval_shape(lambda plan: plan, plan)
    state = jax.eval_shape(
        lambda model, plan: prefill(model, tokens, lengths, plan, CacheSpec(capacity=capacity), key)[1], model, plan
    )
    return model, state, plan


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "masked_exits")) for n in PLANS])
def test_a_decode_step_compiles_for_a_tpu(shallow_model, name):
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = jax.sharding.Mesh(topology.devices[:1], ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        step_shapes(shallow_model, PLANS[name]),
    )
    compiled = jax.jit(decode_step, donate_argnums=1, out_shardings=sharding).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes >= 0
    text = compiled.as_text()
    assert ("conditional" in text) == (name != "static"), "exits are conditionals, static schedules have none"


@pytest.mark.parametrize("name", PLANS)
def test_a_decode_step_lowers_for_cuda(shallow_model, name):
    shapes = step_shapes(shallow_model, PLANS[name])
    leaves, structure = jax.tree.flatten(shapes)

    def step(*leaves):
        state, stats = decode_step(*jax.tree.unflatten(structure, leaves))
        return state.token, stats.needed

    exported = jax.export.export(jax.jit(step), platforms=["cuda"])(*leaves)
    assert exported.platforms == ("cuda",) and "stablehlo" in exported.mlir_module()
    assert [aval.shape for aval in exported.out_avals] == [(2,), (2,)]


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the GPU kernels need jax 0.11.2")
@pytest.mark.parametrize(
    ("plan", "names", "kernels"),
    [
        # One for the layer that reads everything; storing with scores, choice and attention for each of the others.
        (
            Plan(select=kv.TopK(scorer=kv.Quest(page_size=16), budget=64, sinks=16, recent=16, dense_layers=1)),
            ("append_tokens", "attention", "page_scores", "topk_pages"),
            1 + 2 * 3,
        ),
        # The same for choices that are kept: scores where they are asked for.
        (
            Plan(select=kv.TopK(scorer=kv.Quest(page_size=16), budget=64, sinks=16, recent=16, reuse=0.9, share=2)),
            ("append_tokens", "attention", "page_scores", "topk_pages"),
            3 * 3 + 2,
        ),
        # The nearest keys and the merged entries of each layer.
        (Plan(evict=kv.TopK(scorer=kv.D2O(), budget=64, recent=8)), ("merge_tokens",), 3 * 2),
    ],
    ids=["select", "kept", "merge"],
)
def test_a_loop_lowers_to_the_kernels_of_a_gpu(monkeypatch, plan, names, kernels):
    sizes = {"vocab_size": 64, "num_layers": 3, "d_model": 64, "d_ff": 96, "num_heads": 4, "num_kv_heads": 2}
    config = models.ModelConfig(**sizes, head_dim=64, max_length=512, tie_embeddings=True)
    model = jax.eval_shape(lambda: models.Transformer(config, jax.random.key(0)))
    leaves, structure = jax.tree.flatten(step_shapes(model, plan, capacity=256))
    for name in names:
        operation = importlib.import_module(f"pallas_kernels.{name}")
        monkeypatch.setattr(operation, "platform", lambda: "gpu")
        monkeypatch.setattr(operation, "capability", lambda: "9.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(core_count=132)])

    def loop(*leaves):
        model, state, plan = jax.tree.unflatten(structure, leaves)
        state, needed = jax.lax.scan(lambda state, _: (decode_step(model, state, plan)[0], state.step), state, length=2)
        return state.token, needed

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(jax.jit(loop), platforms=["cuda"], disabled_checks=unchecked)(*leaves)
    assert exported.mlir_module().count("@mosaic_gpu_v2") == kernels
