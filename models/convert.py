"""Read and write Hugging Face checkpoints: ``config.json`` beside safetensors, whole or in shards.

:func:`_layout` says once, for both directions, which tensors of theirs make one parameter of ours. Their matrices are
``[out, in]``, ours are in the order they are contracted; their query head n is ours [k, g] with n = k * G + g.
Everything is checked (names, shapes, dtypes, file lengths) before the first weight is read; then one parameter after
another is read, fused on the host and transposed on the device, so that host memory stays near the largest of them. On
a mesh only what the devices of this process hold is read. Saving holds one file on the host. The safetensors package
reads and writes the files; its numpy front end knows bfloat16 because jax registers that dtype with numpy.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dyninf.models.atomic import replace_folder, reserve
from dyninf.models.config import ModelConfig
from dyninf.models.hf_config import config_from_hf, config_to_hf, eos_ids
from dyninf.models.hf_files import DTYPES, INDEX, SINGLE, Stored, read_json, some, stored_tensors
from dyninf.models.parameters import abstract_model, named_parameters, with_parameters
from dyninf.models.sharding import Placement, parameter_shardings
from dyninf.models.transformer import Transformer, unstack_layers

SHARD_BYTES = 4 * 10**9  # a file gets no further tensor from here on: all of a file is on the host when it is written


@dataclasses.dataclass(frozen=True)
class _Fused:
    """One parameter: ``shape`` in their axis order, the tensors that fill parts of it, the axes that make it ours."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    parts: tuple[tuple[str, tuple[int, ...], Any], ...]  # name, shape in the file, index into the fused array


def load_hf(path: str | os.PathLike, dtype: Any = None, where: Placement | None = None) -> Transformer:
    """Return the model of a Hugging Face folder (Llama, Mistral, Qwen2 or Qwen3; safetensors only).

    Args:
        dtype: dtype of the weights; ``None`` for the one that most of the stored numbers have.
        where: mesh and rules; ``None`` for the default device.

    Raises:
        ValueError: if a file or tensor is missing, in excess, truncated or of the wrong shape, or cannot be split over
            the mesh; before any is loaded.
        NotImplementedError: if the model cannot be represented; names the field of config.json or the dtype.
    """
    path = Path(path)
    stored = stored_tensors(path)
    values = read_json(path / "config.json")
    config = config_from_hf(values)
    if (path / "generation_config.json").is_file():
        # Chat models name their end of turn only here.
        config = dataclasses.replace(
            config, eos_ids=eos_ids(read_json(path / "generation_config.json")) or config.eos_ids
        )
    layout = _layout(config)
    _check(path, layout, stored, config.tie_embeddings)
    dtype = np.dtype(_main_dtype(layout, stored) if dtype is None else dtype)
    model = abstract_model(config, dtype)
    shapes = {name: array.shape for name, array in named_parameters(model).items()}
    shardings = dict.fromkeys(layout) if where is None else parameter_shardings(shapes, config, where)
    arrays = {}
    for name, fused in layout.items():
        whole = _read(fused, stored) if where is None else _read_shards(fused, stored, shardings[name])
        # Wait for each: dispatch is asynchronous, and reading ahead would pile up parameters on the host.
        arrays[name] = jax.block_until_ready(_place(whole, fused.axes, dtype, shardings[name]))
    return with_parameters(model, arrays)


def save_hf(
    model: Transformer,
    path: str | os.PathLike,
    *,
    overwrite: bool = False,
    tokenizer_file: str | os.PathLike | None = None,
) -> None:
    """Write the model as a Hugging Face folder that transformers can load: config.json and model.safetensors.

    Models of more than ``SHARD_BYTES`` become shards with an index. The folder appears whole or not at all; see
    :func:`dyninf.models.atomic.replace_folder`.

    Args:
        overwrite: replace a Hugging Face folder that is there.
        tokenizer_file: a ``tokenizer.json`` to copy beside the weights.

    Raises:
        ValueError: if ``path`` exists and may not be replaced, or the tokenizer file does not exist.
        NotImplementedError: if no Hugging Face architecture has this combination of switches, for the dtype, or in one
            of several processes, which :func:`dyninf.models.save` serves.
        OSError: if writing fails; what was at ``path`` is unchanged.
    """
    if jax.process_count() > 1:
        raise NotImplementedError(f"expected one process, got one of {jax.process_count()}; use dyninf.models.save")
    model = model if isinstance(model.layers, nnx.List) else unstack_layers(model)
    if tokenizer_file is not None and not Path(tokenizer_file).is_file():
        raise ValueError(f"expected a tokenizer file, got {tokenizer_file}, which does not exist")
    arrays, layout = named_parameters(model), _layout(model.config)
    values = config_to_hf(model.config, str(arrays["embedding"].dtype))
    if unknown := {array.dtype for array in arrays.values()} - set(DTYPES.values()):
        raise NotImplementedError(f"expected float32, float16 or bfloat16 weights, got {unknown.pop()}; convert them")
    places = {part[0]: (name, part) for name, fused in layout.items() for part in fused.parts}
    sizes = {theirs: math.prod(part[1]) * arrays[name].dtype.itemsize for theirs, (name, part) in places.items()}
    files = _files(sizes)

    def fetch(hf_name: str) -> np.ndarray:
        name, (_, shape, index) = places[hf_name]
        fused = layout[name]
        theirs = jnp.transpose(arrays[name], tuple(np.argsort(fused.axes)))
        return np.ascontiguousarray(theirs[index].reshape(shape))  # the package writes strided arrays wrongly

    with replace_folder(path, marker="config.json", overwrite=overwrite) as folder:
        reserve(folder, (sum(sizes[name] for name in names) for names in files.values()))
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        for file, names in files.items():
            _write(folder / file, {name: fetch(name) for name in names})
            shutil.copymode(folder / "config.json", folder / file)  # safetensors 0.8 lets only the owner read it
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, folder / "tokenizer.json")


def _layout(config: ModelConfig) -> dict[str, _Fused]:
    d, f, v, h = config.d_model, config.d_ff, config.vocab_size, config.head_dim
    n, k, m = config.num_heads, config.num_kv_heads, config.group_size + 2
    whole, qkv = np.s_[...], {"q": np.s_[:, :-2], "k": np.s_[:, -2], "v": np.s_[:, -1]}
    out = {"q": n * h, "k": k * h, "v": k * h}

    def norm(name: str, size: int) -> _Fused:
        return _Fused((size,), (0,), ((f"{name}.weight", (size,), whole),))

    layout = {"embedding": _Fused((v, d), (0, 1), (("model.embed_tokens.weight", (v, d), whole),))}
    for i in range(config.num_layers):
        ours, attention, mlp = f"layers.{i}", f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        weights = tuple((f"{attention}.{x}_proj.weight", (out[x], d), index) for x, index in qkv.items())
        biases = tuple((f"{attention}.{x}_proj.bias", (out[x],), index) for x, index in qkv.items())
        gate_up = tuple((f"{mlp}.{x}_proj.weight", (f, d), np.s_[j]) for j, x in enumerate(("gate", "up")))
        layout[f"{ours}.norm_attn"] = norm(f"model.layers.{i}.input_layernorm", d)
        layout[f"{ours}.wqkv"] = _Fused((k, m, h, d), (3, 0, 1, 2), weights)
        if config.qkv_bias:
            layout[f"{ours}.bqkv"] = _Fused((k, m, h), (0, 1, 2), biases)
        if config.qk_norm:
            layout[f"{ours}.norm_q"] = norm(f"{attention}.q_norm", h)
            layout[f"{ours}.norm_k"] = norm(f"{attention}.k_norm", h)
        layout[f"{ours}.wo"] = _Fused((d, n, h), (1, 2, 0), ((f"{attention}.o_proj.weight", (d, n * h), whole),))
        layout[f"{ours}.norm_mlp"] = norm(f"model.layers.{i}.post_attention_layernorm", d)
        layout[f"{ours}.w_gate_up"] = _Fused((2, f, d), (2, 0, 1), gate_up)
        layout[f"{ours}.w_down"] = _Fused((d, f), (1, 0), ((f"{mlp}.down_proj.weight", (d, f), whole),))
    layout["norm_final"] = norm("model.norm", d)
    if not config.tie_embeddings:
        layout["unembedding"] = _Fused((v, d), (1, 0), (("lm_head.weight", (v, d), whole),))
    return layout


def _files(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the tensors of each file, in order; ``sizes`` has the bytes of each tensor."""
    groups: dict[int, list[str]] = {}
    for name, begin in zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False):
        groups.setdefault(begin // SHARD_BYTES, []).append(name)
    if len(groups) == 1:
        return {SINGLE: list(sizes)}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups.values(), start=1)}


def _write(file: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})  # transformers asks for the format
    except SafetensorError as error:
        raise OSError(str(error)) from error
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _check(path: Path, layout: dict[str, _Fused], stored: dict[str, Stored], tied: bool) -> None:
    parts = {name: shape for fused in layout.values() for name, shape, _ in fused.parts}
    if missing := sorted(set(parts) - set(stored)):
        raise ValueError(f"expected the tensor {some(missing)} in {path}, found none; config.json is of another model")
    # Old checkpoints carry rotary frequencies, which follow from the configuration, or a copy of the tied embedding.
    known = {name for name in stored if name.endswith("rotary_emb.inv_freq")} | ({"lm_head.weight"} if tied else set())
    if extra := sorted(set(stored) - set(parts) - known):
        raise ValueError(f"expected no tensor beside those of config.json, got {some(extra)} in {path}")
    for name, shape in parts.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"expected {name!r} in {stored[name].file} to have shape {shape}, got {stored[name].shape}"
            )
        if stored[name].dtype not in DTYPES:
            raise NotImplementedError(
                f"expected {name!r} in {stored[name].file} to be one of {', '.join(DTYPES)}, got {stored[name].dtype}; "
                "convert the checkpoint to bfloat16 or float32"
            )


def _main_dtype(layout: dict[str, _Fused], stored: dict[str, Stored]) -> np.dtype:
    sizes = Counter()
    for tensor in (stored[name] for fused in layout.values() for name, _, _ in fused.parts):
        sizes[tensor.dtype] += math.prod(tensor.shape)
    return DTYPES[sizes.most_common(1)[0][0]]


def _read(fused: _Fused, stored: dict[str, Stored], index: tuple[slice, ...] | None = None) -> np.ndarray:
    """Return a parameter in their order of axes, or what is at ``index`` of it; parts are never cut from each other."""
    index = (slice(None),) * len(fused.shape) if index is None else index
    bounds = [entry.indices(size)[:2] for entry, size in zip(index, fused.shape, strict=True)]
    whole = None
    for name, _, place in fused.parts:
        shape, inner = _part(fused.shape, bounds, place)
        read = stored[name].read(shape, inner)
        if len(fused.parts) == 1:
            return read
        if whole is None:
            dtype = jnp.result_type(*(DTYPES[stored[part].dtype] for part, _, _ in fused.parts))
            whole = np.empty([last - first for first, last in bounds], dtype)
        whole[place] = read
    return whole


def _part(shape: tuple[int, ...], bounds: list[tuple[int, int]], place: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the shape of the part of a parameter at ``place``, and the bounds of what is read of it."""
    places = () if place is ... else place if isinstance(place, tuple) else (place,)
    sizes, inner = [], []
    for axis, size in enumerate(shape):
        entry = places[axis] if axis < len(places) else slice(None)
        if isinstance(entry, int):
            continue
        sizes.append(len(range(*entry.indices(size))))
        inner.append(bounds[axis] if entry == slice(None) else (0, sizes[-1]))
    return sizes, inner


def _read_shards(fused: _Fused, stored: dict[str, Stored], sharding: NamedSharding) -> jax.Array:
    """Return a parameter in their order of axes on a mesh; each part of it is read once, whoever holds it."""
    known = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((entry.start, entry.stop) for entry in index)
        if key not in known:
            known[key] = _read(fused, stored, index)
        return known[key]

    theirs = [None] * len(fused.axes)
    for entry, axis in zip(sharding.spec, fused.axes, strict=True):
        theirs[axis] = entry
    return jax.make_array_from_callback(fused.shape, NamedSharding(sharding.mesh, PartitionSpec(*theirs)), read)


@functools.partial(jax.jit, static_argnames=("axes", "dtype", "sharding"))
def _place(whole: jax.Array, axes: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None) -> jax.Array:
    ours = jnp.transpose(whole, axes).astype(dtype)
    return ours if sharding is None else jax.lax.with_sharding_constraint(ours, sharding)
