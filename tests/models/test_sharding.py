"""Placement on a mesh: the tables against real arrays, what is refused, and what is said once."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dyninf import CacheSpec, Plan
from dyninf.cache import init_cache, stack_caches
from dyninf.configs.plans import plans
from dyninf.decode_state import cache_layout
from dyninf.kv import Quest, ShadowKV, TokenSelect, TopK
from dyninf.models import (
    Transformer,
    cache_shardings,
    make_mesh,
    model_shardings,
    parse_mesh,
    place,
    stack_for_decoding,
    stack_layers,
    token_sharding,
)
from dyninf.models.parameters import abstract_model, named_parameters
from dyninf.models.sharding import CACHES

EVEN = {"vocab_size": 64, "d_model": 24, "d_ff": 40, "num_heads": 8, "num_kv_heads": 4}


@pytest.fixture
def config(small):
    """Sizes that the meshes below split evenly (V 64, L 3, D 24, F 40, N 8, K 4, H 6)."""
    return small(**EVEN, qkv_bias=True, qk_norm=True)


def specs(tree):
    return {name: sharding.spec for name, sharding in named_parameters(tree).items()}


def test_parameters_lie_as_the_table_says(config):
    mesh = make_mesh({"tensor": 4, "fsdp": 2})
    got = specs(model_shardings(abstract_model(config), mesh))
    tensor, fsdp = ("tensor",), ("fsdp",)
    layer = {
        "norm_attn": P(None),
        "wqkv": P(fsdp, tensor, None, None),
        "bqkv": P(tensor, None, None),
        "norm_q": P(None),
        "norm_k": P(None),
        "wo": P(tensor, None, fsdp),
        "norm_mlp": P(None),
        "w_gate_up": P(fsdp, None, tensor),
        "w_down": P(tensor, fsdp),
    }
    whole = {"embedding": P(tensor, fsdp), "unembedding": P(fsdp, tensor), "norm_final": P(None)}
    assert got == whole | {f"layers.{i}.{name}": spec for i in range(3) for name, spec in layer.items()}


def test_stacked_parameters_lie_as_those_of_layers_do(config):
    mesh = make_mesh({"tensor": 4, "fsdp": 2})
    model = Transformer(config, jax.random.key(0))
    one, stacked = (specs(model_shardings(made, mesh)) for made in (model, stack_layers(model)))
    for name, spec in stacked.items():
        assert spec == (P(None, *one[f"layers.0.{name[7:]}"]) if name.startswith("layers.") else one[name])
    joined = specs(model_shardings(stack_for_decoding(model), mesh))
    assert joined["layers.stack.wqkv"] == P(None, ("fsdp",), ("tensor",))
    assert joined["layers.stack.bqkv"] == P(None, ("tensor",))
    assert joined["layers.stack.wo"] == P(None, ("tensor",), ("fsdp",))
    assert joined["layers.stack.w_gate_up"] == P(None, None, ("fsdp",), ("tensor",))
    assert joined["layers.stack.w_down"] == stacked["layers.w_down"]


def test_a_placed_model_is_the_model_in_parts(config):
    model, mesh = Transformer(config, jax.random.key(0)), make_mesh({"tensor": 4, "data": 2})
    placed = place(model, mesh)
    jax.tree.map(np.testing.assert_array_equal, named_parameters(placed), named_parameters(model))
    # wqkv [24, 4, 4, 6] on four devices of heads: [24, 1, 4, 6] each, the same for both of the data axis.
    assert [part.data.shape for part in placed.layers[0].wqkv[...].addressable_shards] == [(24, 1, 4, 6)] * 8


def test_rules_change_single_axes(config):
    mesh = make_mesh({"tensor": 2, "data": 4})
    got = specs(model_shardings(abstract_model(config), mesh, rules={"vocab": None, "embed": ["data"]}))
    assert got["embedding"] == P(None, ("data",))
    assert got["layers.1.w_down"] == P(("tensor",), ("data",))


def test_few_key_value_heads_are_replicated_and_this_is_said_once(config, caplog):
    model = abstract_model(dataclasses.replace(config, num_kv_heads=2))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            got = specs(model_shardings(model, make_mesh({"tensor": 4, "data": 2})))
    assert got["layers.0.wqkv"] == P(None, None, None, None)
    assert got["layers.0.wo"] == P(("tensor",), None, None)  # query heads are enough
    assert [record.message[:47] for record in caplog.records] == ["2 key/value heads on 4 devices (tensor=4): what"]


@pytest.mark.parametrize(
    ("changes", "axes", "rules", "message"),
    [
        (
            {"vocab_size": 61},
            {"tensor": 4},
            None,
            r"axis 'vocab' of embedding to divide by tensor=4, got 61; use anoth",
        ),
        ({"d_ff": 42}, {"tensor": 4}, None, r"'mlp' of layers\.0\.w_down to divide by tensor=4, got 42"),
        ({"num_heads": 12, "num_kv_heads": 6}, {"tensor": 4}, None, r"'kv_heads' of layers\.0\.bqkv .*tensor=4, got 6"),
        ({}, {"fsdp": 5}, None, r"'embed' of embedding to divide by fsdp=5, got 24; .*rules={'embed': None}"),
        ({}, {"tensor": 2}, {"embed": "tensor"}, r"once in embedding, got 'tensor' for 'vocab' and 'embed'; change"),
        ({}, {"tensor": 2}, {"vocab": "tensr"}, r"rule for 'vocab' to have axes of the mesh \(tensor\), got tensr"),
        ({}, {"tensor": 2}, {"vocabulary": None}, r"logical axes batch, .*, got vocabulary"),
        ({}, {"model": 2}, None, r"a rule for every axis of the mesh, got none for model; add one to rules"),
    ],
    ids=["vocab", "mlp", "kv_heads", "embed", "twice", "unknown", "logical", "idle"],
)
def test_what_does_not_fit_is_refused(changes, axes, rules, message, config):
    model = abstract_model(dataclasses.replace(config, **changes))
    with pytest.raises(ValueError, match=message):
        model_shardings(model, make_mesh(axes), rules)


def test_heads_are_never_cut_where_their_axis_is_joined_with_others(config):
    # The 4 * 4 * 6 = 96 numbers of the biases divide by 3, four key/value heads do not.
    model = stack_for_decoding(Transformer(config, jax.random.key(0)))
    with pytest.raises(ValueError, match=r"'kv_heads' of layers\.stack\.bqkv to divide by tensor=3, got 4"):
        model_shardings(model, make_mesh({"tensor": 3}), {"vocab": None, "mlp": None, "heads": None})


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 4, "data": 4}, r"mesh of 1 to 8 devices, got data=4 x tensor=4 = 16"),
        ({"tensor": 0}, r"positive sizes, got {'tensor': 0}"),
        ({"tensor": 2.0}, r"positive sizes"),
        ({}, r"got no axes"),
        ("tensor=4", r"sizes by name such as {'tensor': 4}, got 'tensor=4'"),
    ],
    ids=["large", "zero", "real", "empty", "text"],
)
def test_a_bad_mesh_is_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(axes)


def test_devices_of_the_tensor_axis_are_neighbours():
    mesh = make_mesh({"tensor": 4, "data": 2})
    assert mesh.axis_names == ("data", "tensor")
    assert [[device.id for device in row] for row in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert make_mesh({"data": 2}, jax.devices()[3:]).devices.tolist() == jax.devices()[3:5]


def test_a_mesh_of_explicit_axes_is_refused(config):
    mesh = Mesh(np.array(jax.devices()), ("tensor",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match=r"automatic axes, got .*Explicit.*make_mesh"):
        model_shardings(abstract_model(config), mesh)


def test_a_mesh_is_parsed():
    assert parse_mesh("tensor=4, data=2") == {"tensor": 4, "data": 2}


@pytest.mark.parametrize("text", ["", "tensor", "tensor=", "tensor=0", "tensor=-1", "tensor=2,tensor=2", "model=2"])
def test_a_mesh_that_is_written_otherwise_is_refused(text):
    with pytest.raises(ValueError, match=r"NAME=SIZE.*data, fsdp, sequence, tensor"):
        parse_mesh(text)


def test_tokens_are_split_by_batch_and_length():
    mesh = make_mesh({"data": 2, "sequence": 2, "fsdp": 2})
    assert token_sharding((8, 6), mesh).spec == P(("data", "fsdp"), ("sequence",))
    assert token_sharding((8,), mesh).spec == P(("data", "fsdp"))
    with pytest.raises(ValueError, match=r"'batch' of the tokens to divide by data=2 x fsdp=2, got 6"):
        token_sharding((6, 6), mesh)


def cache_of(plan, model, batch=8, length=7):
    spec = CacheSpec(capacity=20)
    return init_cache(model, batch, spec, **cache_layout(plan, model, batch, length, spec))


SELECT = {"budget": 8, "sinks": 0, "recent": 1}
CASES = {
    "dense": (Plan(), {"k", "v", "length"}),
    "masked": (plans(4)["exit_confidence_masked"], {"k", "v", "length", "valid"}),
    "evict": (
        Plan(evict=dataclasses.replace(plans(4)["evict_d2o"].evict, budget=8, recent=2)),
        {"k", "v", "length", "positions", "scores", "threshold"},
    ),
    "select": (Plan(select=TopK(scorer=Quest(page_size=2), **SELECT)), {"k", "v", "length", "summary"}),
    "reused": (
        Plan(select=TopK(scorer=TokenSelect(page_size=2), reuse=0.9, **SELECT)),
        {"k", "v", "length", "summary", "choice.scores", "choice.q"},
    ),
    "own": (
        Plan(select=TopK(scorer=ShadowKV(page_size=2, rank=3, outliers=1), budget=2, sinks=0, recent=1)),
        {"k", "v", "length", "u", "sv", "landmarks", "choosable", "outliers", "start"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_caches_are_split_by_batch_and_heads(name, config):
    plan, held = CASES[name]
    cache = cache_of(plan, Transformer(config, jax.random.key(0)))
    found = set()
    leaves = jax.tree_util.tree_leaves_with_path(cache_shardings(cache, make_mesh({"tensor": 4, "data": 2})))
    for (path, sharding), array in zip(leaves, jax.tree.leaves(cache), strict=True):
        names = [entry.name for entry in path if hasattr(entry, "name")][-2:]
        name = ".".join(names) if names[0] == "choice" else names[-1]
        found.add(name)
        meant = [{"batch": "data", "kv_heads": "tensor", "heads": "tensor"}.get(axis) for axis in CACHES[name]]
        assert list(sharding.spec) == meant
        assert all(array.shape[i] == 4 for i, axis in enumerate(CACHES[name]) if axis == "kv_heads")
    assert found == held


def test_stacked_caches_keep_their_layers_together(config):
    cache = cache_of(Plan(), Transformer(config, jax.random.key(0)))
    stacked = dataclasses.replace(cache, layers=stack_caches(cache.layers))
    got = cache_shardings(stacked, make_mesh({"tensor": 4, "data": 2}))
    assert got.layers.k.spec == got.layers.v.spec == P(None, ("data",), None, ("tensor",), None)
    assert jax.device_put(stacked, got).layers.k.addressable_shards[0].data.shape == (3, 4, 20, 1, 6)


def test_arrays_of_own_caches_that_are_unknown_are_split_by_batch(config):
    got = cache_shardings({"codes": jnp.zeros((8, 3))}, make_mesh({"data": 8}))
    assert isinstance(got["codes"], NamedSharding) and got["codes"].spec == P(("data",), None)
    with pytest.raises(ValueError, match=r"'batch' of the cache's \['codes'\] to divide by data=8, got 3"):
        cache_shardings({"codes": jnp.zeros((3, 3))}, make_mesh({"data": 8}))


def test_a_mesh_may_cut_an_axis_of_a_slice():
    pytest.importorskip("libtpu", reason="needs libtpu to describe a TPU slice: pip install dyninf[tpu]")
    from jax.experimental import topologies

    mesh = make_mesh({"data": 8, "tensor": 8}, topologies.get_topology_desc("v5p:4x4x4", "tpu").devices)
    assert dict(mesh.shape) == {"data": 8, "tensor": 8} and len({device.id for device in mesh.devices.flat}) == 64
