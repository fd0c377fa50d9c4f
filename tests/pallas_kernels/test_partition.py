"""Operations on a mesh of eight devices: the results of one device, nothing sent but one number for shared decisions.

Kernels of TPUs are interpreted on every device, and compiled for described TPUs, which refuse them outside of a mark.
"""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pallas_kernels
from pallas_kernels import BlockIndex, KVIndex, dispatch
from pallas_kernels.partition import partitioned, take_rows

B, T, N, K, H, S, P, PAGE = 4, 2, 8, 4, 16, 24, 6, 4
COLLECTIVE = re.compile(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def mesh_of(devices, data=2):
    return Mesh(np.array(devices[:8]).reshape(data, -1), ("data", "tensor"))


def on(mesh, operation):
    """The operation as it is traced for a mesh."""

    def run(*arguments):
        with partitioned(mesh, batch=("data",), heads=("tensor",)):
            return operation(*arguments)

    return run


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def pages(rng, entries=3):
    found = np.stack([np.sort(rng.permutation(P)[:entries]) for _ in range(B * K)]).reshape(B, K, entries)
    return KVIndex(counts=jnp.full((B, K), entries, jnp.int32), pages=jnp.asarray(found, jnp.int32), page_size=PAGE)


def cases(rng):
    """Every marked operation with its arguments, some of stacked caches."""
    x = functools.partial(normal, rng)
    q, k, v, one = x(B, T, N, H), x(B, S, K, H), x(B, S, K, H), (x(B, 1, K, H), x(B, 1, K, H))
    stacked, layer, summary = (x(2, B, S, K, H), x(2, B, S, K, H)), jnp.int32(1), x(B, P, K, 2 * H)
    at, lengths, used = jnp.array([[5], [9], [0], [23]]), jnp.array([24, 7, 1, 13]), jnp.array([6, 2, 1, 4])
    live = jnp.arange(S)[None] < lengths[:, None]
    rows = BlockIndex(
        counts=jnp.full((B, N, 3), 2, jnp.int32),
        blocks=jnp.tile(jnp.array([[0, 1], [0, 1], [1, 2]], jnp.int32), (B, N, 1, 1)),
        block_size=8,
    )
    kind = {"kind": "bounds", "page_size": PAGE}
    prompt = {"lengths_B": lengths, "offset": jnp.int32(0), "with_lse": True}
    codes = jnp.asarray(rng.integers(0, 2**32, (B, 2, K, S)), jnp.uint32)
    hashes = jnp.asarray(rng.integers(0, 2**32, (B, N, 2)), jnp.uint32)
    slots = jnp.asarray(np.sort(rng.permuted(np.tile(np.arange(S), (B, K, 1)), axis=2)[..., :9], axis=2), jnp.int32)
    victims = jnp.asarray(rng.integers(0, 8, (B, K)), jnp.int32)
    level = jnp.array([-jnp.inf, 0.1, 0.4, 0.2])
    gone = (victims, jnp.array([True, True, False, True]), jnp.array([24, 9, 8, 13]), level)
    return {
        "prefill_attention": (q, k, v, prompt),
        "prefill_attention of a whole prompt": (x(B, S, N, H), k, v, {"lengths_B": None, "keep_BT": live}),
        "decode_attention": (q, *stacked, at + jnp.arange(T)[None], {"layer": layer, "index": pages(rng)}),
        "block_sparse_attention": (x(B, S, N, H), k, v, rows, lengths, {"with_lse": True}),
        "append_tokens": (k, v, summary, *one, at, kind),
        "append_and_score": (*stacked, x(2, B, P, K, 2 * H), *one, at, q[:, :1], kind | {"layer": layer}),
        "page_scores": (q, summary, used, {"reduce": "sum"}),
        "topk_pages": (x(B, K, P), used, {"k": 3, "page_size": PAGE, "sinks": 1}),
        "choose_blocks": (jnp.abs(x(B, N, 3, 3)), {"block_size": 8, "budget": 2, "mass": jnp.float32(0.7)}),
        "strided_scores": (x(B, S, N, H), k, {"stride": 4, "block_size": 8, "lengths_B": lengths}),
        "compact_cache": (*stacked, slots, {"layer": layer}),
        "merge_victims": (k, v, *gone, {"momentum": 0.7}),
        "hamming_scores": (codes, hashes, lengths),
    }


NAMES = (
    "prefill_attention", "prefill_attention of a whole prompt", "decode_attention", "block_sparse_attention",
    "append_tokens", "append_and_score", "page_scores", "topk_pages", "choose_blocks", "strided_scores",
    "compact_cache", "merge_victims", "hamming_scores",
)  # fmt: skip


def call(name, rng):
    """The operation of a case as a function of its arrays, and those."""
    case = list(cases(rng)[name])
    options = case.pop() if isinstance(case[-1], dict) else {}
    arrays = {key: value for key, value in options.items() if isinstance(value, jax.Array)}
    rest = {key: value for key, value in options.items() if key not in arrays}
    operation = getattr(pallas_kernels, name.split()[0])
    return lambda case, arrays: operation(*case, **arrays, **rest), (case, arrays)


QUICK = ("prefill_attention", "append_tokens", "choose_blocks", "merge_victims", "compact_cache")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in NAMES])
def test_an_operation_on_a_mesh_sends_nothing(name, rng):
    operation, arguments = call(name, rng)
    want = jax.jit(operation)(*arguments)
    compiled = jax.jit(on(mesh_of(jax.devices()), operation)).lower(*arguments).compile()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), compiled(*arguments), want)
    sent = COLLECTIVE.findall(compiled.as_text())
    # Merging is decided by all heads together: one mean of B numbers.
    assert sent == (["all-reduce"] if name == "merge_victims" else [])
    for leaf in jax.tree.leaves(compiled.output_shardings):
        assert "data" in str(leaf.spec), "the results stay where their sequences are"


def test_what_does_not_divide_is_whole_on_each_device(rng):
    q, k = normal(rng, 3, 5, 6, 8), normal(rng, 3, 5, 2, 8)
    operation = functools.partial(pallas_kernels.prefill_attention, lengths_B=jnp.array([5, 2, 3]))
    got = jax.jit(on(mesh_of(jax.devices()), operation))(q, k, k)
    np.testing.assert_allclose(got, operation(q, k, k), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="one batch and head_dim"):
        on(mesh_of(jax.devices()), operation)(q, k[..., :4], k[..., :4])


@pytest.mark.slow
def test_gradients_are_those_of_one_device(rng):
    q, k, v = normal(rng, B, 5, N, H), normal(rng, B, 5, K, H), normal(rng, B, 5, K, H)
    loss = lambda operation: lambda *qkv: jnp.sum(jnp.sin(operation(*qkv, None)))  # noqa: E731
    want = jax.grad(loss(pallas_kernels.prefill_attention), argnums=(0, 1, 2))(q, k, v)
    got = jax.jit(jax.grad(loss(on(mesh_of(jax.devices()), pallas_kernels.prefill_attention)), argnums=(0, 1, 2)))(
        q, k, v
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("name", ["topk_pages", pytest.param("decode_attention", marks=pytest.mark.slow)])
def test_a_kernel_is_interpreted_on_every_device(name, rng, monkeypatch):
    operation, arguments = call(name, rng)
    want = operation(*arguments)
    package = importlib.import_module(f"pallas_kernels.{ {'decode_attention': 'attention'}.get(name, name) }")
    monkeypatch.setattr(package, "platform", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        got = jax.block_until_ready(jax.jit(on(mesh_of(jax.devices()), operation))(*arguments))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


def test_kernels_compile_for_many_tpus_where_they_are_marked(rng, monkeypatch):
    """The mesh says that they are TPUs."""
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = mesh_of(topology.devices)
    operation, (case, _) = call("topk_pages", rng)
    spec = NamedSharding(mesh, PartitionSpec("data"))
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=spec) for array in case]
    run = lambda *case: operation(case, {})  # noqa: E731
    text = jax.jit(on(mesh, run)).lower(*shapes).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1 and not COLLECTIVE.findall(text)
    monkeypatch.setattr(importlib.import_module("pallas_kernels.topk_pages"), "platform", lambda: "tpu")
    with pytest.raises(NotImplementedError, match="cannot be automatically partitioned"):
        jax.jit(run).lower(*shapes)


def test_kernels_of_whole_layers_say_that_they_run_on_one_device(monkeypatch, caplog):
    package = importlib.import_module("pallas_kernels.layer_products")
    monkeypatch.setattr(package, "platform", lambda: "tpu")
    dispatch._log_once.cache_clear()
    x, weights = jnp.ones((4, 256)), jnp.ones((2, 256, 256))
    run = functools.partial(pallas_kernels.project_add, x, weights, x, 0)
    with partitioned(mesh_of(jax.devices()), batch=("data",), heads=("tensor",)):
        np.testing.assert_array_equal(run(), jnp.full((4, 256), 257.0))
        run()
        with pytest.raises(NotImplementedError, match="mosaic_tpu: is a kernel for one device, got a mesh of 8"):
            run(implementation="mosaic_tpu")
    said = "project_add runs as 'xla': mosaic_tpu: is a kernel for one device, got a mesh of 8"
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.mark.parametrize(
    ("tokens", "rows", "axis"),
    [((1, 1), 24, 0), ((4, 6), 24, 0), ((2, 3), 22, 0), ((4, 6), 24, 1), ((2, 3), 22, 1)],
    ids=["one", "many", "undivided", "columns", "undivided_columns"],
)
def test_devices_take_their_rows_of_an_embedding_and_send_no_table(rng, tokens, rows, axis):
    table, tokens = normal(rng, rows, 5), jnp.asarray(rng.integers(0, rows, tokens), jnp.int32)
    want, table, mesh = table[tokens], table.T if axis else table, mesh_of(jax.devices())
    split = NamedSharding(mesh, PartitionSpec(*(None,) * axis, "tensor" if rows % 4 == 0 else None))

    def run(table, tokens):
        with partitioned(mesh, batch=("data",), vocab=("tensor",)):
            return take_rows(table, tokens, axis=axis)

    compiled = jax.jit(run).lower(jax.device_put(table, split), tokens).compile()
    np.testing.assert_array_equal(compiled(jax.device_put(table, split), tokens), want)
    assert set(COLLECTIVE.findall(compiled.as_text())) == (set() if rows % 4 else {"all-reduce"})
