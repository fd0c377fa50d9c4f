"""Weights read straight onto a mesh: only what its devices hold, one parameter at a time."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.models import Transformer, convert, hf_files, load, make_mesh, model_shardings, place, save, save_hf
from dyninf.models.parameters import named_parameters

EVEN = {"vocab_size": 64, "d_model": 24, "d_ff": 40, "num_heads": 8, "num_kv_heads": 4, "qkv_bias": True}
MESHES = [{"tensor": 8}, {"tensor": 2, "data": 4}, {"fsdp": 4, "tensor": 2}]


@pytest.fixture
def model(small):
    return Transformer(small(**EVEN), jax.random.key(0), jnp.bfloat16)


@pytest.fixture
def folder(model, tmp_path, monkeypatch):
    """A Hugging Face folder of several shards."""
    monkeypatch.setattr(convert, "SHARD_BYTES", 8000)
    save_hf(model, tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    return tmp_path / "hf"


def assert_placed(got, model, mesh, rules=None):
    jax.tree.map(np.testing.assert_array_equal, named_parameters(got), named_parameters(model))
    meant = named_parameters(model_shardings(model, mesh, rules))
    for name, array in named_parameters(got).items():
        assert array.sharding.is_equivalent_to(meant[name], array.ndim), name


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_shards_are_read_onto_a_mesh(axes, folder, model):
    mesh = make_mesh(axes)
    assert_placed(load(folder, mesh=mesh), model, mesh)


def test_head_dim_can_be_split_too(folder, model):
    mesh, rules = make_mesh({"tensor": 2}), {"head_dim": "tensor", "heads": None, "kv_heads": None}
    assert_placed(load(folder, mesh=mesh, rules=rules), model, mesh, rules)


def test_the_dtype_is_converted_on_the_devices(folder, model):
    got = load(folder, mesh=make_mesh({"tensor": 2}), dtype=jnp.float32)
    np.testing.assert_array_equal(got.layers[2].wqkv[...], model.layers[2].wqkv[...].astype(jnp.float32))


@pytest.fixture
def reads(monkeypatch):
    """The numbers of every array that was read of a file."""
    sizes, read = [], hf_files.Stored.read

    def counted(*arguments):
        part = read(*arguments)
        sizes.append(part.size)
        return part

    monkeypatch.setattr(hf_files.Stored, "read", counted)
    return sizes


def test_every_number_is_read_once(folder, reads, model):
    load(folder, mesh=make_mesh({"tensor": 4, "data": 2}))  # both devices of the data axis hold the same
    assert sum(reads) == sum(array.size for array in named_parameters(model).values())


def test_a_process_reads_what_its_devices_hold(folder, reads):
    """A device of four is asked for its part of the fused queries, keys and values [K 4, G+2 4, H 6, D 24]."""
    layout, stored = convert._layout(load(folder).config), hf_files.stored_tensors(folder)
    reads.clear()
    fused = layout["layers.1.wqkv"]
    part = convert._read(fused, stored, np.s_[1:2, :, :, 6:12])
    whole = convert._read(fused, stored)
    np.testing.assert_array_equal(part, whole[1:2, :, :, 6:12])
    assert reads[:3] == [2 * 6 * 6, 6 * 6, 6 * 6]  # of queries, keys and values


def test_host_memory_is_that_of_about_one_parameter(small, tmp_path):
    # The largest of 75 parameters is w_gate_up: 128 * 2 * 640 numbers, 640 KiB of 14 MiB.
    sizes = {"vocab_size": 64, "d_model": 128, "d_ff": 640, "num_heads": 8, "num_kv_heads": 8, "head_dim": 16}
    model = Transformer(small(**sizes, num_layers=12), jax.random.key(0))
    save_hf(model, tmp_path / "hf")
    largest = max(array.nbytes for array in named_parameters(model).values())
    total = sum(array.nbytes for array in named_parameters(model).values())
    mesh = make_mesh({"tensor": 8})
    load(tmp_path / "hf", mesh=mesh)  # compiles
    tracemalloc.start()
    try:
        load(tmp_path / "hf", mesh=mesh)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest / 2 < peak < 2.5 * largest < total / 4


@pytest.mark.parametrize("axes", [{"tensor": 3}, {"fsdp": 5}], ids=str)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_read(axes, folder, reads):
    with pytest.raises(ValueError, match="to divide by"):
        load(folder, mesh=make_mesh(axes))
    assert not reads


def test_rules_need_a_mesh(folder):
    with pytest.raises(ValueError, match=r"a mesh for the rules, got none; pass mesh="):
        load(folder, rules={"vocab": None})


def test_a_checkpoint_of_one_mesh_is_restored_on_another(model, tmp_path):
    eight, other = make_mesh({"data": 1, "tensor": 8}), make_mesh({"data": 4, "tensor": 2})
    save(place(model, eight), tmp_path / "a")
    assert_placed(load(tmp_path / "a", mesh=other), model, other)
    assert {len(array.sharding.device_set) for array in named_parameters(load(tmp_path / "a")).values()} == {1}
    save(load(tmp_path / "a"), tmp_path / "b")
    assert_placed(load(tmp_path / "b", mesh=eight), model, eight)
    with pytest.raises(ValueError, match=r"'kv_heads' of layers\.0\.bqkv to divide by tensor=3, got 4"):
        load(tmp_path / "a", mesh=make_mesh({"tensor": 3}), rules={"vocab": None})
