"""Read and write safetensors files one tensor at a time, bfloat16 included.

A file is an 8-byte little-endian header length, a JSON header (``name -> dtype, shape, data_offsets``) and the bytes of
the tensors without gaps. The header is checked completely, against the size of the file too, before a byte of data is
read. Numpy cannot name bfloat16 and the numpy front end of the safetensors package cannot return it, so the bytes are
read here and viewed as ``jnp.bfloat16``; at any time only one tensor is in memory.

Source: the format description of the safetensors project.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format
_ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies: its file, the name of its dtype, its shape, and its bytes ``[begin, end)`` of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: str | os.PathLike) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, without reading their data.

    Raises:
        ValueError: if the file is truncated, is too long, or its header contradicts itself.
        NotImplementedError: if a tensor has a dtype this reader does not know.
    """
    file = Path(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"expected a safetensors header of at most {max(min(size - 8, MAX_HEADER_BYTES), 0)} bytes in {file} "
                f"({size} bytes), got a length of {length}; the file is truncated or not safetensors: fetch it again"
            )
        header = _parse(stream.read(length), file)
    header.pop("__metadata__", None)
    tensors = [_entry(name, value, file, 8 + length) for name, value in header.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    end = 8 + length
    for tensor in tensors:
        if tensor.begin != end:
            raise ValueError(
                f"expected {tensor.name!r} in {file} to begin at byte {end}, right after the tensor before it, "
                f"got {tensor.begin}; the file is damaged: fetch it again"
            )
        end = tensor.end
    if size != end:
        state = "truncated" if size < end else "longer than its header says"
        raise ValueError(f"expected {file} to hold {end} bytes, got {size}; the file is {state}: fetch it again")
    return {tensor.name: tensor for tensor in tensors}


def read_tensor(tensor: StoredTensor) -> np.ndarray:
    """Return the data of one tensor in its stored dtype.

    Raises:
        ValueError: if the file has become shorter since its header was read.
        NotImplementedError: if the dtype is not float32, float16 or bfloat16.
    """
    if tensor.dtype not in DTYPES:
        raise NotImplementedError(
            f"expected {tensor.name!r} in {tensor.file} to be one of {', '.join(DTYPES)}, got {tensor.dtype}; "
            "convert the checkpoint to bfloat16 or float32"
        )
    data = np.fromfile(tensor.file, np.uint8, tensor.end - tensor.begin, offset=tensor.begin)
    if data.size != tensor.end - tensor.begin:
        raise ValueError(
            f"expected {tensor.end - tensor.begin} bytes of {tensor.name!r} in {tensor.file}, got {data.size}; "
            "the file was changed while it was read: load it again"
        )
    return data.view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def write_tensors(
    file: str | os.PathLike, layout: Mapping[str, tuple[Any, tuple[int, ...]]], fetch: Callable[[str], np.ndarray]
) -> None:
    """Write a safetensors file, fetching one tensor after another, and flush it to the disk.

    Args:
        layout: dtype and shape of every tensor by its name.
        fetch: returns the data of a name; called once for each, in the order of ``layout``.

    Raises:
        ValueError: if what was fetched has another dtype or shape than ``layout`` says.
        NotImplementedError: if a dtype is not float32, float16 or bfloat16.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        if np.dtype(dtype) not in codes:
            raise NotImplementedError(f"expected {name!r} to be float32, float16 or bfloat16, got {np.dtype(dtype)}")
        begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": codes[np.dtype(dtype)], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in layout.items():
            data = np.ascontiguousarray(fetch(name))
            if (data.dtype, data.shape) != (np.dtype(dtype), tuple(shape)):
                raise ValueError(f"expected {name!r} to be {np.dtype(dtype)} {shape}, got {data.dtype} {data.shape}")
            stream.write(data.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def _parse(text: bytes, file: Path) -> dict:
    def unique(pairs: list) -> dict:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name twice")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON header in {file}, got {error}; fetch the file again") from None
    if not isinstance(header, dict):
        raise ValueError(f"expected a JSON object as the header of {file}, got {type(header).__name__}")
    return header


def _entry(name: str, value: Any, file: Path, data_begin: int) -> StoredTensor:
    value = value if isinstance(value, dict) else {}
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"expected dtype, shape and data_offsets of {name!r} in {file}, got {value}")
    if dtype not in _ITEM_BYTES:
        raise NotImplementedError(f"expected {name!r} in {file} to have one of {sorted(_ITEM_BYTES)}, got {dtype}")
    wanted = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != wanted:
        raise ValueError(
            f"expected {wanted} bytes for {name!r} in {file} ({dtype} {shape}), got data_offsets {offsets}; "
            "the file is damaged: fetch it again"
        )
    begin, end = (data_begin + offset for offset in offsets)
    return StoredTensor(name=name, file=file, dtype=dtype, shape=tuple(shape), begin=begin, end=end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
