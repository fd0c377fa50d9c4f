"""config.json of Hugging Face: both spellings are read, and what cannot be represented is refused by name."""

import pytest

from dyninf.models import RopeScaling
from dyninf.models.hf_config import config_from_hf, config_to_hf

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 19,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def test_old_and_new_spelling_of_the_rope_settings_agree():
    values = LLAMA | {"bos_token_id": 1, "eos_token_id": [2, 3]}
    old = config_from_hf(values | {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE, "head_dim": None})
    new = config_from_hf(values | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}})
    older = {("type" if name == "rope_type" else name): value for name, value in LLAMA3_ROPE.items()}
    assert old == new == config_from_hf(values | {"rope_theta": 5e5, "rope_scaling": older})
    assert old.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_length=8)
    assert (old.rope_theta, old.head_dim, old.eos_ids, old.norm_eps) == (5e5, 6, (2, 3), 1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, NotImplementedError, "LlamaForCausalLM, Mistral.*got 'GPT2LMHead"),
        ({"architectures": None}, NotImplementedError, "Qwen3ForCausalLM, got None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, NotImplementedError, "rope type .* got 'yarn'"),
        ({"rope_parameters": {"full_attention": {}}}, NotImplementedError, "same rope_parameters for every layer"),
        ({"partial_rotary_factor": 0.5}, NotImplementedError, "partial_rotary_factor=1.0"),
        ({"attention_bias": True}, NotImplementedError, "attention_bias=False"),
        ({"mlp_bias": True}, NotImplementedError, "mlp_bias=False"),
        ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act='silu'.*'gelu'"),
        ({"quantization_config": {"bits": 4}}, NotImplementedError, "quantization_config"),
        ({"layer_types": ["sliding_attention"] * 3}, NotImplementedError, "layer_types"),
        ({"layer_types": ["linear_attention"] * 3}, NotImplementedError, "linear_attention"),
        ({"layer_types": ["full_attention"]}, ValueError, "name 3 layers"),
        ({"hidden_size": None}, ValueError, "hidden_size in config.json, got none"),
        ({"num_hidden_layers": "3"}, ValueError, "num_hidden_layers .* type int, got '3'"),
        ({"num_key_value_heads": 3}, ValueError, "multiple of num_kv_heads=3"),
        ({"num_attention_heads": 0, "num_key_value_heads": 1}, ValueError, "multiple of num_attention_heads"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ValueError, "low_freq_factor"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, ValueError, "low_freq_factor < high_freq_factor"),
        ({"eos_token_id": "stop"}, ValueError, "eos_token_id"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_config_that_cannot_be_read_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        config_from_hf(LLAMA | changes)


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("Mistral", {}, (4096, 4096, 4096)),
        ("Mistral", {"sliding_window": 7}, (7, 7, 7)),
        ("Mistral", {"sliding_window": None}, None),
        ("Qwen2", {"sliding_window": 7}, None),
        ("Qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2}, (None, None, 7)),
        ("Qwen3", {"use_sliding_window": True, "max_window_layers": 28}, None),
        (
            "Qwen3",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (7, None, 7),
        ),
    ],
    ids=["absent", "mistral", "null", "unused", "from-layer", "beyond", "types"],
)
def test_windows(family, changes, windows):
    assert config_from_hf(LLAMA | {"architectures": [f"{family}ForCausalLM"]} | changes).windows == windows


@pytest.mark.parametrize(
    "changes", [{"qkv_bias": True, "qk_norm": True}, {"windows": (3, None, 3)}, {"windows": (3, 4, 3)}], ids=str
)
def test_config_that_they_do_not_have_is_not_written(changes, small):
    with pytest.raises(NotImplementedError, match=r"no .*architecture"):
        config_to_hf(small(**changes), "float32")
