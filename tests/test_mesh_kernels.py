"""Decode steps on eight devices with the kernels of accelerators: compiled for TPUs and lowered for CUDA without any,
and interpreted against one device.
"""

import collections
import dataclasses
import importlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dyninf import CacheSpec, Plan, decode_step, kv, models, prefill
from dyninf.models import cache_shardings, make_mesh, model_shardings, on_mesh, place

B, AXES = 4, {"data": 2, "tensor": 4}
SIZES = {"vocab_size": 64, "num_layers": 3, "d_model": 64, "d_ff": 96, "num_heads": 8, "num_kv_heads": 4}
CONFIG = models.ModelConfig(**SIZES, head_dim=128, max_length=512, tie_embeddings=True)
PLAN = Plan(select=kv.TopK(scorer=kv.Quest(page_size=16), budget=64, sinks=16, recent=16, dense_layers=1))
COLLECTIVE = re.compile(
    r"= \(?(\w+\[[\d,]*\])\S* (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\b"
)


@pytest.fixture
def pretend(monkeypatch):
    """Let operations choose as they would on another platform."""

    def become(platform):
        for name in ("append_tokens", "attention", "page_scores", "topk_pages"):
            package = importlib.import_module(f"pallas_kernels.{name}")
            monkeypatch.setattr(package, "platform", lambda: platform)
            monkeypatch.setattr(package, "capability", lambda: "9.0", raising=False)

    return become


def start(model, plan=PLAN):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (B, 80)))
    lengths, keys = jnp.array([80, 9, 73, 41]), jax.random.split(jax.random.key(1), B)
    return prefill(model, tokens, lengths, plan, CacheSpec(capacity=256), keys)[1]


def abstract_step(mesh, config=CONFIG, plan=PLAN, lay=lambda model: model):
    """A step as a function of arrays, and the shapes and shardings of these in bfloat16."""
    model = jax.eval_shape(lambda: lay(models.Transformer(config, jax.random.key(0))))
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model)
    state, whole = jax.eval_shape(start, model, plan), NamedSharding(mesh, PartitionSpec())
    where = jax.tree.map(lambda leaf: whole, state)
    where = dataclasses.replace(where, cache=cache_shardings(state.cache, mesh))
    leaves, structure = jax.tree.flatten((on_mesh(model, mesh), state))
    shardings = jax.tree.leaves((model_shardings(model, mesh), where))

    def step(*leaves):
        model, state = jax.tree.unflatten(structure, leaves)
        state, stats = decode_step(model, state, plan)
        return state.token, stats.kv_read

    given = zip(leaves, shardings, strict=True)
    return step, [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for leaf, sharding in given]


def test_a_step_compiles_to_kernels_for_many_tpus():
    """By hand: attention of the layer that reads everything; scores, choice and attention of the two others. What is
    sent is what plain JAX sends: sums of an embedding and of two products a layer, and the best tokens of the parts.
    """
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    step, shapes = abstract_step(make_mesh(AXES, topologies.get_topology_desc("v5e:2x4", "tpu").devices))
    text = jax.jit(step).lower(*shapes).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1 + 2 * 3
    sent = collections.Counter((kind, shape) for shape, kind in COLLECTIVE.findall(text))
    assert sent.pop(("all-reduce", "bf16[2,1,64]")) in (2 * 3, 2 * 3 + 1)  # an embedding may be gathered otherwise
    assert all(kind == "all-gather" and shape[:3] in ("f32", "s32") for kind, shape in sent)


def test_a_step_of_stacked_layers_compiles_to_kernels_for_many_tpus():
    """By hand, in the loop over layers: queries, keys and values; attention; output projection, hidden layer and down
    projection, with a sum over devices behind either projection. No sum is XLA's but that of the embedding.
    """
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    mesh = make_mesh(AXES, topologies.get_topology_desc("v5e:2x4", "tpu").devices)
    config = dataclasses.replace(CONFIG, d_model=256, d_ff=512)
    step, shapes = abstract_step(mesh, config, Plan(), models.stack_for_decoding)
    text = jax.jit(step).lower(*shapes).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 5 + 2
    assert [shape for shape, kind in COLLECTIVE.findall(text) if kind == "all-reduce"] == ["bf16[2,1,256]"]


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the GPU kernels need jax 0.11.2")
def test_a_step_lowers_to_the_kernels_of_many_gpus(pretend, monkeypatch):
    """By hand: storing and attention of the layer that reads everything; storing with scores, choice and attention."""
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    mesh = AbstractMesh((2, 4), tuple(AXES), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    step, shapes = abstract_step(mesh)
    pretend("gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(core_count=132)])
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(step), platforms=["cuda"], disabled_checks=unchecked)(*shapes)
    assert exported.nr_devices == 8 and exported.mlir_module().count("@mosaic_gpu_v2") == 1 + 2 * 3


@pytest.mark.slow
def test_steps_with_interpreted_kernels_are_those_of_one_device(pretend):
    model, mesh = models.Transformer(CONFIG, jax.random.key(0)), make_mesh(AXES)
    want, split = start(model), on_mesh(place(model, mesh), mesh)
    got = jax.jit(start)(split)
    step = jax.jit(decode_step)
    wanted = []
    for _ in range(3):
        want, stats = step(model, want, PLAN)
        wanted.append((want.token, stats.kv_read))
    pretend("tpu")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        for expected in wanted:
            got, stats = jax.block_until_ready(step(split, got, PLAN))
            jax.tree.map(np.testing.assert_array_equal, (got.token, stats.kv_read), expected)
    same = lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-4)  # noqa: E731  (as the laws of plans)
    jax.tree.map(same, got.cache.layers, want.cache.layers)
