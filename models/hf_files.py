"""The safetensors files of a Hugging Face folder: what they hold, checked, and parts of tensors read one by one."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of an open file: what the header says about it, and how to read its data."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    part: Any
    whole: Callable[[], np.ndarray]

    def read(self, shape: Sequence[int], bounds: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return the numbers between ``bounds`` of the tensor as an array of ``shape``, whose axes split its own.

        Read from the file is no more than that, but where an axis that is not the first of those that split one is
        bounded.
        """
        if all(bound == (0, size) for bound, size in zip(bounds, shape, strict=True)):
            return self.whole().reshape(shape)
        outer, inner, found, axis = [], [], [], 0
        for size in self.shape:
            begin = axis
            while math.prod(shape[begin:axis]) != size or axis == begin:
                axis += 1
            step = math.prod(shape[begin + 1 : axis])
            first, last = bounds[begin]
            outer.append(slice(first * step, last * step))
            inner += [slice(None), *(slice(*bound) for bound in bounds[begin + 1 : axis])]
            found += [last - first, *shape[begin + 1 : axis]]
        return self.part[tuple(outer)].reshape(found)[tuple(inner)]


def read_json(file: str | os.PathLike) -> dict[str, Any]:
    """Return the JSON object in ``file``.

    Raises:
        ValueError: if the file does not exist or holds no JSON object.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"expected {file.name} in {file.parent}, found none; is this the folder of a model?")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {file}, got {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object in {file}, got {type(values).__name__}")
    return values


def _open(file: Path) -> dict[str, Stored]:
    try:
        opened = safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"expected a safetensors file, got {file} ({file.stat().st_size} bytes): {error}; "
            "it is truncated, damaged or of another format: fetch it again"
        ) from error
    slices = {name: opened.get_slice(name) for name in opened.keys()}
    return {
        name: Stored(file, part.get_dtype(), tuple(part.get_shape()), part, functools.partial(opened.get_tensor, name))
        for name, part in slices.items()
    }


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Return the tensors of a folder by name, from one file or from the shards of an index; reads no data.

    Raises:
        ValueError: if a file or tensor is missing, damaged or not where the index says.
    """
    if (path / SINGLE).is_file():
        return _open(path / SINGLE)
    if not (path / INDEX).is_file():
        raise ValueError(
            f"expected {SINGLE} or {INDEX} in {path}, got {sorted(file.name for file in path.iterdir())[:8]}; pickled "
            "weights (.bin, .pt, .pth) are refused, nothing is ever unpickled: if you trust them, load them with "
            "transformers (from_pretrained) and write them with save_pretrained, which makes safetensors"
        )
    places = read_json(path / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"expected weight_map in {path / INDEX} to name a file for each tensor, got {places!r:.80}")
    stored: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not (path / file).is_file():
            raise ValueError(f"expected the shard {file!r}, named by {INDEX}, in {path}, found none; fetch it again")
        for name, tensor in _open(path / file).items():
            if places.get(name) != file:
                raise ValueError(f"expected {name!r} in {places.get(name, 'no file')} by {INDEX}, got it in {file}")
            stored[name] = tensor
    if missing := sorted(set(places) - set(stored)):
        raise ValueError(f"expected {some(missing)} in {path}, named by {INDEX}, found none; fetch the shards again")
    return stored


def some(names: list[str]) -> str:
    """Return the first of many names, for a message."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
