"""Layers on a mesh of GPUs that add their products by a kernel: where they do, that XLA leaves the inbox where it is,
and that they generate what one device generates.
"""

import collections
import dataclasses
import functools
import importlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dyninf import CacheSpec, Plan, decode_step, forward, generate, prefill
from dyninf.cli.task_eval import fingerprint
from dyninf.depth import Confidence, every
from dyninf.kv import Quest, TopK
from dyninf.models import make_mesh, model_shardings, on_mesh, place, stack_for_decoding
from dyninf.models.mesh_model import MeshModel
from dyninf.models.sharding import placement
from pallas_kernels import few_rows
from pallas_kernels.add_devices import ADD_DEVICES, add_product, mosaic_gpu
from pallas_kernels.dispatch import MOSAIC_GPU_JAX, Implementation
from pallas_kernels.exchange import EMPTY_BITS
from pallas_kernels.partition import partitioned

B, T, V, L = 8, 9, 64, 4
PLANS = {
    "dense": Plan(),
    "exits": Plan(depth=every(Confidence(threshold=0.9), step=1)),
    "selects": Plan(select=TopK(scorer=Quest(page_size=2), budget=8, sinks=2, recent=2)),
}
CALLS = re.compile(r"call @add_devices\w*\(")
module = importlib.import_module("pallas_kernels.add_devices")


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(0, V, (B, T))


def start(model, prompts, plan):
    keys = jax.random.split(jax.random.key(1), B)
    return prefill(model, jnp.asarray(prompts), jnp.full(B, T), plan, CacheSpec(capacity=32), keys)[1]


def with_inbox(model, mesh):
    """The model on a mesh with an inbox that is only described."""
    shape, spec = mosaic_gpu.inbox_shape(mesh.size, mesh.shape["tensor"], 64), PartitionSpec(mesh.axis_names)
    inbox = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))
    return MeshModel(model=model, where=placement(mesh), inbox=inbox)


@pytest.fixture
def stand_in(monkeypatch):
    """Let another function do what the kernel does, on any platform."""

    def become(run):
        refuse = lambda inbox, **facts: None if inbox else "no inbox"  # noqa: E731
        kernel = Implementation(name="mosaic_gpu", refuse=refuse, run=run, splits=True)
        monkeypatch.setattr(module, "ADD_DEVICES", (kernel, ADD_DEVICES[-1]))

    return become


@pytest.fixture
def lowered(monkeypatch, wide_model, prompts):
    """How many kernels there are in a function of a model on GPUs that are described, and of a state or prompts."""
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    mesh = AbstractMesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability="9.0", core_count=132)])
    monkeypatch.setattr(module, "platform", lambda: "gpu")

    def lower(function, given, lay=lambda model: model, dtype=jnp.bfloat16):
        shape = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where)  # noqa: E731
        model = jax.eval_shape(lambda: lay(wide_model))
        model = with_inbox(jax.tree.map(shape, model, model_shardings(model, mesh)), mesh)
        given = jax.eval_shape(given, dataclasses.replace(model, inbox=None))
        whole = NamedSharding(mesh, PartitionSpec())
        given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), given)
        leaves, structure = jax.tree.flatten((model, given))
        allowed = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
        flat = lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves)))  # noqa: E731
        text = jax.export.export(jax.jit(flat), platforms=["cuda"], disabled_checks=allowed)(*leaves).mlir_module()
        return len(CALLS.findall(text))

    return lower


on_simulated_meshes = pytest.mark.parametrize(
    ("plan", "axes"),
    [
        ("exits", {"data": 2, "tensor": 4}),
        pytest.param("dense", {"tensor": 8}, marks=pytest.mark.slow),
        pytest.param("dense", {"tensor": 4}, marks=pytest.mark.slow),
        pytest.param("selects", {"data": 2, "tensor": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
needs_mosaic = pytest.mark.skipif(jax.__version_info__ < MOSAIC_GPU_JAX, reason="jax runs the kernel from 0.11.2 on")


@needs_mosaic
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_lowers_to_two_kernels_a_layer(lowered, prompts, plan):
    plan = PLANS[plan]
    step = lambda model, state: decode_step(model, state, plan)  # noqa: E731
    assert lowered(step, lambda model: start(model, prompts, plan)) == 2 * L


@needs_mosaic
def test_layers_taken_from_a_stack_have_the_inbox_too(lowered, prompts):
    step = lambda model, state: decode_step(model, state, PLANS["selects"], driver="unrolled")  # noqa: E731
    assert lowered(step, lambda model: start(model, prompts, PLANS["selects"]), stack_for_decoding) == 2 * L


@needs_mosaic
def test_other_programs_add_by_xla(lowered, prompts, monkeypatch):
    """Prompts; layers that were stacked as trees; programs that do not get the inbox; float16; many numbers."""
    tokens = lambda model: jnp.asarray(prompts)  # noqa: E731
    state = lambda model: start(model, prompts, Plan())  # noqa: E731
    assert lowered(lambda model, tokens: forward(model, tokens).logits, tokens) == 0
    assert lowered(lambda model, state: decode_step(model, state, Plan(), driver="scan"), state) == 0
    without = lambda model: dataclasses.replace(model, inbox=None)  # noqa: E731
    assert lowered(lambda model, state: decode_step(without(model), state, Plan()), state) == 0
    constant = lambda model: dataclasses.replace(model, inbox=np.zeros(model.inbox.shape, np.int32))  # noqa: E731
    assert lowered(lambda model, state: decode_step(constant(model), state, Plan()), state) == 0
    assert lowered(lambda model, state: decode_step(model, state, Plan()), state, dtype=jnp.float16) == 0
    for few, kernels in ((255, 0), (256, 2 * L)):  # of the four rows of a device and 64 features
        monkeypatch.setattr(module, "FEW", few)
        assert lowered(lambda model, state: decode_step(model, state, Plan()), state) == kernels


def test_the_parts_of_a_product_are_float32(stand_in):
    seen = []

    def run(part, residual, mesh, axes, inbox):
        seen.append(part.dtype)
        return residual + jax.lax.psum(part, axes).astype(residual.dtype)

    stand_in(run)
    mesh = make_mesh({"tensor": 4})

    @jax.jit
    def product(residual, y, weights, inbox):
        with partitioned(mesh, heads=("tensor",), inbox=inbox):
            return add_product(residual, y, weights)

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 1, 8), (2, 1, 12), (12, 8)
    given = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    got = product(*given, jnp.zeros((4, 1, 1, 1, 1), jnp.int32))
    residual, y, weights = (np.asarray(array, np.float32) for array in given)
    assert seen == [jnp.float32]
    np.testing.assert_allclose(np.asarray(got, np.float32), residual + y @ weights, rtol=2**-7, atol=2**-7)


def test_a_product_that_xla_adds_up_has_no_rows_repeated(monkeypatch):
    for name in ("add_devices", "few_rows"):
        monkeypatch.setattr(importlib.import_module(f"pallas_kernels.{name}"), "platform", lambda: "gpu")
    monkeypatch.setattr(few_rows, "WEIGHTS", range(1, 10**6))
    mesh = make_mesh({"tensor": 4})

    def product(residual, y, weights):
        with partitioned(mesh, heads=("tensor",)):
            return add_product(residual, y, weights)

    given = [jnp.ones(shape, jnp.bfloat16) for shape in ((1, 1, 8), (1, 1, 12), (12, 8))]
    (equation,) = (one for one in jax.make_jaxpr(product)(*given).eqns if one.primitive.name == "dot_general")
    assert equation.outvars[0].aval.shape == (1, 1, 8)


@pytest.mark.parametrize("heads", [False, True], ids=["mlp", "heads"])
def test_away_from_a_mesh_nothing_changes(heads):
    inner, spec = ((4, 3), "BTNH,NHD->BTD") if heads else ((12,), "BTF,FD->BTD")
    given = [jnp.ones(shape, jnp.bfloat16) for shape in ((2, 1, 8), (2, 1, *inner), (*inner, 8))]
    want = lambda residual, y, weights: residual + jnp.einsum(spec, y, weights)  # noqa: E731
    assert str(jax.make_jaxpr(add_product)(*given)) == str(jax.make_jaxpr(want)(*given))


def test_a_mesh_of_cpus_has_no_inbox(wide_model):
    mesh = make_mesh({"tensor": 4})
    model = on_mesh(wide_model, mesh)
    assert model.inbox is None and len(jax.tree.leaves(model)) == len(jax.tree.leaves(wide_model))


def test_the_inbox_is_no_weight(wide_model):
    """Work that is done on one mesh goes on on another, and a layer is as large as its weights."""
    mesh = make_mesh({"tensor": 4})
    model = dataclasses.replace(on_mesh(wide_model, mesh), inbox=jnp.ones(3))
    assert fingerprint(model) == fingerprint(wide_model)
    assert jax.tree.structure(model.layers[0]) == jax.tree.structure(on_mesh(wide_model, mesh).layers[0])
    assert model.layers[0].inbox is model.inbox and jax.tree.map(lambda leaf: leaf, model.layers[0]).inbox is None


@on_simulated_meshes
def test_xla_hands_the_inbox_of_a_loop_to_every_call(wide_model, prompts, stand_in, plan, axes):
    """It is an argument of the program, and of every loop and branch; nothing else makes an array of its shape."""

    @functools.partial(jax.jit, static_argnames=("mesh", "axes"))
    def run(part, residual, mesh, axes, inbox):
        return jax.pure_callback(lambda part, *_: part, jax.typeof(residual), part, residual, inbox)

    stand_in(run)
    mesh, plan = make_mesh(axes), PLANS[plan]
    state = jax.jit(start, static_argnums=2)(on_mesh(place(wide_model, mesh), mesh), prompts, plan)
    model = with_inbox(place(wide_model, mesh), mesh)

    def loop(model, state):
        go = lambda state: (state.step < 6) & ~jnp.all(state.done)  # noqa: E731
        return jax.lax.while_loop(go, lambda state: decode_step(model, state, plan)[0], state)

    text = jax.jit(loop, donate_argnums=1).lower(model, state).compile().as_text()
    local = ",".join(map(str, (1, *model.inbox.shape[1:])))
    made = collections.Counter(re.findall(rf"= s32\[{local}\]\S* ([\w-]+)\(", text))
    assert len(re.findall(r"custom_call_target=\"\w*python_cpu_callback\"", text)) == 2 * L
    assert made.pop("parameter") == 1 and set(made) == {"get-tuple-element"}


@on_simulated_meshes
def test_a_sum_in_place_of_the_kernel_gives_the_tokens_of_one_device(wide_model, prompts, stand_in, plan, axes):
    def run(part, residual, mesh, axes, inbox):
        assert part.shape == residual.shape == (B // mesh.shape.get("data", 1), 64) and inbox.shape[0] == 1
        return residual + jax.lax.psum(part, axes).astype(residual.dtype)

    stand_in(run)
    mesh, options = make_mesh(axes), {"max_new_tokens": 8, "stop": [3, [5, 9]]}
    model = with_inbox(place(wide_model, mesh), mesh)
    inbox = jax.device_put(jnp.zeros(model.inbox.shape, jnp.int32), model.inbox.sharding)
    model = dataclasses.replace(model, inbox=inbox)
    want, got = (generate(one, prompts, PLANS[plan], **options) for one in (wide_model, model))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    jax.tree.map(np.testing.assert_array_equal, got.stats, want.stats)
    assert (np.asarray(want.stats.run) < L).any() == (plan == "exits")


@pytest.mark.multigpu
@pytest.mark.timeout(240, method="thread")
@pytest.mark.parametrize("axes", [{"tensor": 2}, {"tensor": 4}, {"data": 2, "tensor": 2}], ids=["2", "4", "2x2"])
@pytest.mark.parametrize("plan", PLANS)
def test_gpus_generate_what_one_generates(wide_model, prompts, plan, axes):
    if len(jax.devices()) < (count := int(np.prod(list(axes.values())))):
        pytest.skip(f"needs {count} GPUs, found {len(jax.devices())}")
    mesh, plan = make_mesh(axes, jax.devices()[:count]), PLANS[plan]
    model = on_mesh(place(wide_model, mesh), mesh)
    state = jax.jit(start, static_argnums=2)(model, prompts, plan)
    text = jax.jit(decode_step).lower(model, state, plan).as_text()
    assert len(CALLS.findall(text)) == 2 * L
    options = {"max_new_tokens": 20, "stop": [3, [5, 9]]}
    want = generate(wide_model, prompts, plan, **options)
    for _ in range(3):
        got = generate(model, prompts, plan, **options)
        np.testing.assert_array_equal(got.tokens, want.tokens)
    assert (np.asarray(model.inbox)[:, :-1] == np.int32(EMPTY_BITS)).all()
