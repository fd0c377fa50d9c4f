"""Safetensors files: read and written like the safetensors package does, bfloat16 bit by bit, damage refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dyninf.models.safetensors_io import read_header, read_tensor, write_tensors


@pytest.fixture
def file(tmp_path, rng):
    """A good file with a float32 [2, 3] named a and a float16 [5] named b."""
    tensors = {"a": rng.random((2, 3), np.float32), "b": rng.random(5).astype(np.float16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def write_raw(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_package_writes(file):
    wanted = load_file(file)
    got = {name: read_tensor(tensor) for name, tensor in read_header(file).items()}
    assert set(got) == {"a", "b"}
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype
        np.testing.assert_array_equal(got[name], wanted[name])


def test_the_package_reads_what_is_written(tmp_path, rng):
    tensors = {"b": rng.random((3, 4), np.float32).T, "a": rng.random(5).astype(np.float16)}
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "x", layout, tensors.__getitem__)
    got = load_file(tmp_path / "x")
    assert got["b"].shape == (4, 3)
    np.testing.assert_array_equal(got["b"], tensors["b"])
    np.testing.assert_array_equal(got["a"], tensors["a"])


def test_bfloat16_by_hand(tmp_path):
    # bfloat16 is the upper half of a float32: 1.0 = 0x3F80_0000 and -2.5 = 0xC020_0000, stored low byte first.
    write_raw(tmp_path / "x", {"w": entry("BF16", [2, 1], 0, 4)}, bytes([0x80, 0x3F, 0x20, 0xC0]))
    got = read_tensor(read_header(tmp_path / "x")["w"])
    assert got.dtype == jnp.bfloat16
    assert got.astype(np.float32).tolist() == [[1.0], [-2.5]]
    write_tensors(tmp_path / "y", {"w": (jnp.bfloat16, (2, 1))}, lambda name: got)
    assert (tmp_path / "y").read_bytes()[-4:] == bytes([0x80, 0x3F, 0x20, 0xC0])


@pytest.mark.parametrize("length", [0, 5, 8, 60, -1])
def test_truncated_file_is_refused(length, file):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="truncated"):
        read_header(file)


def test_file_that_shrinks_while_it_is_read_is_refused(file):
    tensor = read_header(file)["b"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"expected 10 bytes of 'b' .* got 9"):
        read_tensor(tensor)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": ', "JSON header"),
        (b"\xff\xfe", "JSON header"),
        (b"[1]", "JSON object .* got list"),
        (b'{"a": 1, "a": 2}', "a name twice"),
        ({"a": 3}, "dtype, shape and data_offsets of 'a'"),
        ({"a": entry("F32", [-1], 0, 8)}, "dtype, shape and data_offsets of 'a'"),
        ({"a": entry("F32", [1.5], 0, 8)}, "dtype, shape and data_offsets of 'a'"),
        ({"a": entry("F32", [3], 0, 8)}, "12 bytes for 'a' .* got data_offsets"),
        ({"a": entry("F32", [2], 8, 0)}, "8 bytes for 'a'"),
        ({"a": entry("F32", [1], 4, 8)}, "begin at byte"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, "'b' .* begin at byte"),
        ({"a": entry("F32", [1], 0, 4)}, "longer than its header says"),
        ({"a": entry("F32", [3], 0, 12)}, "truncated"),
    ],
    ids=[
        "cut",
        "binary",
        "list",
        "twice",
        "kind",
        "negative",
        "real",
        "size",
        "order",
        "gap",
        "overlap",
        "long",
        "short",
    ],
)
def test_header_that_contradicts_itself_is_refused(header, message, tmp_path):
    write_raw(tmp_path / "x", header, bytes(8))
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "x")


def test_enormous_header_length_is_refused(tmp_path):
    (tmp_path / "x").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="at most 2 bytes"):
        read_header(tmp_path / "x")


def test_unknown_dtype_is_refused(tmp_path):
    write_raw(tmp_path / "x", {"a": entry("F4", [16], 0, 8)}, bytes(8))
    with pytest.raises(NotImplementedError, match="got F4"):
        read_header(tmp_path / "x")
    with pytest.raises(NotImplementedError, match=r"'a' .* got int32"):
        write_tensors(tmp_path / "y", {"a": (np.int32, (1,))}, lambda name: np.zeros(1, np.int32))


def test_writing_another_shape_than_announced_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected 'a' to be float32 \(2,\), got float32 \(3,\)"):
        write_tensors(tmp_path / "x", {"a": (np.float32, (2,))}, lambda name: np.zeros(3, np.float32))
