"""Safetensors files of a Hugging Face folder: bfloat16 bit by bit, shards, damage refused by the name of the file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dyninf.models import Transformer, convert, load, save_hf
from dyninf.models.parameters import named_parameters

NORM = "model.norm.weight"  # 20 numbers


@pytest.fixture
def folder(tmp_path, small):
    """A good Hugging Face folder in float32, to be made bad."""
    save_hf(Transformer(small(), jax.random.key(0)), tmp_path / "good")
    return tmp_path / "good"


def parts(file):
    """The header of a safetensors file and the bytes behind it."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(file, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def assert_refused(folder, file="model.safetensors"):
    """Loading fails with one message that names the file and says what to do."""
    with pytest.raises(ValueError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.startswith(f"expected a safetensors file, got {folder / file} (")
    assert message.endswith("it is truncated, damaged or of another format: fetch it again")
    assert "\n" not in message


def test_bfloat16_by_hand(tmp_path, small):
    # bfloat16 is the upper half of a float32: 1.0 = 0x3F80_0000 and -2.5 = 0xC020_0000, stored low byte first.
    save_hf(Transformer(small(), jax.random.key(0), jnp.bfloat16), tmp_path / "a")
    header, data = parts(tmp_path / "a" / "model.safetensors")
    begin, end = header[NORM]["data_offsets"]
    assert header[NORM]["dtype"] == "BF16"
    assert end - begin == 2 * 20
    join(tmp_path / "a" / "model.safetensors", header, data[:begin] + b"\x80\x3f\x20\xc0" * 10 + data[end:])
    model = load(tmp_path / "a")
    assert model.norm_final.dtype == jnp.bfloat16
    assert model.norm_final[...].astype(jnp.float32).tolist() == [1.0, -2.5] * 10
    save_hf(model, tmp_path / "b")
    header, data = parts(tmp_path / "b" / "model.safetensors")
    assert data[slice(*header[NORM]["data_offsets"])] == b"\x80\x3f\x20\xc0" * 10


def test_default_dtype_is_that_of_most_numbers(folder):
    # Per layer: attention 1440 numbers, MLP 1680, norms 40. In bfloat16 the MLPs and one embedding: 3 * 1680 + 380 =
    # 5420 numbers (10 840 bytes); in float32 the rest: 3 * 1480 + 380 + 20 = 4840 numbers (19 360 bytes).
    tensors = load_file(folder / "model.safetensors")
    half = {name for name in tensors if ".mlp." in name or name == "lm_head.weight"}
    mixed = {name: tensor.astype(jnp.bfloat16) if name in half else tensor for name, tensor in tensors.items()}
    save_file(mixed, folder / "model.safetensors")
    assert {array.dtype for array in named_parameters(load(folder)).values()} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("length", [0, 5, 8, 60, -1])
def test_truncated_file_is_refused(length, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert_refused(folder)


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04" + bytes(60), b"<html></html>", bytes(64)],
    ids=["pointer", "zip", "html", "zeros"],
)
def test_foreign_file_is_refused(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    assert_refused(folder)


@pytest.mark.parametrize(
    "header",
    [b'{"a": ', b"\xff\xfe", b"[1]", b'{"a": 3}'],
    ids=["cut", "binary", "list", "kind"],
)
def test_header_of_another_format_is_refused(header, folder):
    join(folder / "model.safetensors", header, bytes(8))
    assert_refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda begin, end: {"shape": [-20]},
        lambda begin, end: {"shape": [20.5]},
        lambda begin, end: {"shape": [21]},
        lambda begin, end: {"shape": [2**62, 8]},
        lambda begin, end: {"dtype": "F16"},
        lambda begin, end: {"dtype": "F31"},
        lambda begin, end: {"data_offsets": [end, begin]},
        lambda begin, end: {"data_offsets": [begin + 80, end + 80]},
        lambda begin, end: {"data_offsets": [begin - 80, end - 80]},
        lambda begin, end: {"data_offsets": [2**63, 2**63 + 80]},
    ],
    ids=["negative", "real", "size", "overflow", "dtype", "unknown", "order", "gap", "overlap", "outside"],
)
def test_header_that_contradicts_itself_is_refused(change, folder):
    header, data = parts(folder / "model.safetensors")
    header[NORM] |= change(*header[NORM]["data_offsets"])
    join(folder / "model.safetensors", header, data)
    assert_refused(folder)


def test_bytes_behind_the_last_tensor_are_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    assert_refused(folder)


def test_eight_bit_weights_are_refused_by_name(folder):
    header, data = parts(folder / "model.safetensors")
    name = max(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    begin, end = header[name]["data_offsets"]
    header[name] |= {"dtype": "F8_E4M3", "data_offsets": [begin, begin + (end - begin) // 4]}
    join(folder / "model.safetensors", header, data[: begin + (end - begin) // 4])
    with pytest.raises(NotImplementedError, match=f"'{name}' in .*F32, F16, BF16, got F8_E4M3; convert"):
        load(folder)


def test_shards_round_trip(tmp_path, small, monkeypatch):
    model = Transformer(small(), jax.random.key(1), jnp.bfloat16)
    save_hf(model, tmp_path / "whole")
    monkeypatch.setattr(convert, "SHARD_BYTES", 8000)
    save_hf(model, tmp_path / "parts")
    # 10260 numbers (4840 + 5420, as above) of 2 bytes begin in three ranges of 8000 bytes.
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == [
        *("config.json", *shards, "model.safetensors.index.json")
    ]
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2 * 10260}
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    for name, shard in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / "parts" / shard)[name], whole[name])
    loaded = load(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, named_parameters(loaded), named_parameters(model))
    (tmp_path / "parts" / shards[1]).write_bytes((tmp_path / "parts" / shards[1]).read_bytes()[:-1])
    assert_refused(tmp_path / "parts", shards[1])
    (tmp_path / "parts" / shards[1]).unlink()
    with pytest.raises(ValueError, match=f"expected the shard '{shards[1]}', .* found none; fetch it again"):
        load(tmp_path / "parts")


def test_transformers_loads_shards(tmp_path, small, monkeypatch):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = Transformer(small(), jax.random.key(1), jnp.bfloat16)
    monkeypatch.setattr(convert, "SHARD_BYTES", 8000)
    save_hf(model, tmp_path / "parts")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "parts", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values())
    wanted = theirs.model.layers[2].mlp.down_proj.weight.detach().float().numpy().T
    np.testing.assert_array_equal(np.asarray(model.layers[2].w_down[...], np.float32), wanted)


def test_whoever_may_read_the_configuration_may_read_the_weights(folder):
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_a_model_does_not_depend_on_its_file_once_it_is_loaded(folder):
    model, file = load(folder), folder / "model.safetensors"
    wanted = {name: np.array(array) for name, array in named_parameters(model).items()}
    with file.open("r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
        stream.truncate(1)
    jax.tree.map(np.testing.assert_array_equal, named_parameters(model), wanted)


def test_failure_to_write_leaves_what_was_there(folder, monkeypatch):
    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise SafetensorError("no room")

    model, before = load(folder), (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(convert, "save_file", fail)
    with pytest.raises(OSError, match=r"got: no room; free disk space .* \(what was there before is unchanged\)"):
        save_hf(model, folder, overwrite=True)
    assert [file.name for file in folder.parent.iterdir()] == ["good"]
    assert (folder / "model.safetensors").read_bytes() == before


def test_weights_larger_than_the_free_space_are_refused_at_once(folder, monkeypatch):
    model = load(folder)
    monkeypatch.setattr("dyninf.models.atomic.shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(convert, "save_file", lambda *args, **kwargs: pytest.fail("began to write"))
    with pytest.raises(OSError, match="41040 bytes do not fit into 1000 free bytes; free disk space"):
        save_hf(model, folder.parent / "new")


def test_saving_eight_bit_weights_is_refused(folder):
    model = jax.tree.map(lambda array: array.astype(jnp.float8_e4m3fn), load(folder))
    with pytest.raises(NotImplementedError, match="expected float32, float16 or bfloat16 weights, got float8_e4m3fn"):
        save_hf(model, folder.parent / "new")
