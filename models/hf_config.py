"""Translate the ``config.json`` of a Hugging Face checkpoint to a :class:`ModelConfig` and back.

What a field means here is what it means there; a value that this transformer cannot represent is refused by name and
never ignored. Both spellings of the rotary settings are read: ``rope_theta`` and ``rope_scaling`` (transformers 4) and
``rope_parameters`` (transformers 5).
"""

from collections.abc import Mapping
from typing import Any

from dyninf.models.config import ModelConfig, RopeScaling

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# field -> the only value that can be represented; a field that is absent has it
_FIXED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,  # it also puts a bias on the output projection; Qwen2 has its own biases and ignores it
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
_SLIDING_WINDOW = 4096  # what Mistral and Qwen mean when sliding_window is absent (null means none)


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration that the contents of a ``config.json`` describe.

    Raises:
        ValueError: if a field is missing or has a value of the wrong kind.
        NotImplementedError: if the architecture, the rope type or another field cannot be represented; names it.
    """
    family = _family(values)
    for field, only in _FIXED.items():
        ignored = family == "Qwen2" and field == "attention_bias"
        if values.get(field) is not None and values[field] != only and not ignored:
            raise NotImplementedError(f"expected {field}={only!r} in config.json, got {values[field]!r}")
    d_model, num_heads = _get(values, "hidden_size", int), _get(values, "num_attention_heads", int)
    if values.get("head_dim") is None and family != "Qwen3" and (num_heads < 1 or d_model % num_heads):
        raise ValueError(f"expected hidden_size to be a multiple of num_attention_heads, got {d_model} and {num_heads}")
    head_dim = 128 if family == "Qwen3" else d_model // max(num_heads, 1)
    theta, scaling = _rope(values)
    return ModelConfig(
        vocab_size=_get(values, "vocab_size", int),
        num_layers=_get(values, "num_hidden_layers", int),
        d_model=d_model,
        d_ff=_get(values, "intermediate_size", int),
        num_heads=num_heads,
        num_kv_heads=_get(values, "num_key_value_heads", int, num_heads),
        head_dim=_get(values, "head_dim", int, head_dim),
        max_length=_get(values, "max_position_embeddings", int),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_get(values, "rms_norm_eps", float, 1e-6),
        tie_embeddings=_get(values, "tie_word_embeddings", bool, False),
        qkv_bias=family == "Qwen2",
        qk_norm=family == "Qwen3",
        windows=_windows(values, family),
        bos_id=None if values.get("bos_token_id") is None else _get(values, "bos_token_id", int),
        eos_ids=eos_ids(values),
    )


def eos_ids(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the end tokens of a ``config.json`` or ``generation_config.json``: an integer, a list or nothing."""
    value = values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int for number in ids):
        raise ValueError(f"expected eos_token_id to be an integer or a list of integers, got {value!r}")
    return tuple(ids)


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the contents of a ``config.json`` that transformers reads as the same model.

    Args:
        dtype: name of the dtype of the weights ("float32", "bfloat16", "float16").

    Raises:
        NotImplementedError: if no Hugging Face architecture has this combination of switches.
    """
    windows = set(config.windows or ()) or {None}
    sizes = windows - {None}
    if config.qkv_bias and config.qk_norm:
        raise NotImplementedError("expected qkv_bias or qk_norm, got both; no Hugging Face architecture has them")
    if len(sizes) > 1 or (len(windows) > 1 and not (config.qkv_bias or config.qk_norm)):
        raise NotImplementedError(f"expected one window for all layers, got {config.windows}; no architecture has them")
    family = "Qwen3" if config.qk_norm else "Qwen2" if config.qkv_bias else "Mistral" if sizes else "Llama"
    values = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_to_hf(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
    }
    if family == "Mistral":
        values["sliding_window"] = sizes.pop()
    if family.startswith("Qwen"):
        layers = range(config.num_layers)
        kinds = ["full_attention" if config.window(layer) is None else "sliding_attention" for layer in layers]
        values |= {"use_sliding_window": bool(sizes), "layer_types": kinds, "sliding_window": next(iter(sizes), None)}
    return values


def _family(values: Mapping[str, Any]) -> str:
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if name not in ARCHITECTURES:
        raise NotImplementedError(f"expected one of the architectures {', '.join(ARCHITECTURES)}, got {name!r}")
    return name.removesuffix("ForCausalLM")


def _get(values: Mapping[str, Any], field: str, kind: type, default: Any = None) -> Any:
    value = values.get(field)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"expected {field} in config.json, got none; the file is incomplete")
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds:
        raise ValueError(f"expected {field} in config.json to be of type {kind.__name__}, got {value!r}")
    return kind(value)


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    settings = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"expected rope_parameters or rope_scaling to be an object, got {settings!r}")
    if any(isinstance(value, Mapping) for value in settings.values()):
        raise NotImplementedError(f"expected the same rope_parameters for every layer, got {dict(settings)}")
    if settings.get("partial_rotary_factor") not in (None, 1.0):
        raise NotImplementedError(f"expected partial_rotary_factor=1.0, got {settings['partial_rotary_factor']!r}")
    theta = _get(settings, "rope_theta", float, values.get("rope_theta") or 10000.0)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=_get(settings, "factor", float))
    if kind != "llama3":
        raise NotImplementedError(f"expected the rope type default, linear or llama3, got {kind!r}")
    lengths = {**settings, **values}  # the field beside rope_scaling wins over the one inside
    return theta, RopeScaling(
        kind="llama3",
        factor=_get(settings, "factor", float),
        low_freq_factor=_get(settings, "low_freq_factor", float),
        high_freq_factor=_get(settings, "high_freq_factor", float),
        original_length=_get(lengths, "original_max_position_embeddings", int, values.get("max_position_embeddings")),
    )


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }


def _windows(values: Mapping[str, Any], family: str) -> tuple[int | None, ...] | None:
    num_layers, kinds = _get(values, "num_hidden_layers", int), values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != num_layers):
        raise ValueError(f"expected layer_types to name {num_layers} layers, got {kinds!r}")
    if unknown := sorted(set(kinds or ()) - {"full_attention", "sliding_attention"}):
        raise NotImplementedError(f"expected layer_types full_attention or sliding_attention, got {unknown}")
    if family == "Llama" or (family != "Mistral" and not values.get("use_sliding_window")):
        return _no_window(kinds, family)
    first = 0 if family == "Mistral" else _get(values, "max_window_layers", int, 28)
    kinds = kinds or ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if family == "Mistral" and "full_attention" in kinds:
        raise NotImplementedError(f"expected sliding_attention in every layer of Mistral, got layer_types={kinds}")
    if "sliding_attention" not in kinds or ("sliding_window" in values and values["sliding_window"] is None):
        return None
    window = _get(values, "sliding_window", int, _SLIDING_WINDOW)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _no_window(kinds: list | None, family: str) -> None:
    if "sliding_attention" in (kinds or ()):
        raise NotImplementedError(f"expected full_attention in every layer of this {family}, got layer_types={kinds}")
