"""Hugging Face checkpoints: logits equal transformers', every tensor lands in its place, bad files are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dyninf.models import RopeScaling, Transformer, load, save_hf, stack_layers
from dyninf.models.parameters import named_parameters

TOKENS = np.array([[1, 5, 3, 9, 0, 7, 2, 10, 4, 6, 8, 1, 3], [2, 2, 17, 11, 16, 1, 0, 13, 5, 18, 4, 3, 12]])
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
# name -> (class prefix, fields of the configuration that differ from SIZES)
FAMILIES = {
    "llama2-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama2-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama3-gqa": ("Llama", {"head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 100.0}}),
    "llama3.2": ("Llama", {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 100.0}, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 8}),
}
SIZES = {
    "vocab_size": 19,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path, small):
    """A good Hugging Face folder, to be made bad."""
    save_hf(Transformer(small(), jax.random.key(0)), tmp_path / "good")
    return tmp_path / "good"


def edit(file, **changes):
    """Change fields of a JSON file; None removes a field."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def edit_tensors(folder, **changes):
    """Change tensors of model.safetensors (names with _ for .); None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        name = next((stored for stored in tensors if stored.replace(".", "_") == name), name)
        tensors = {**tensors, name: value}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, folder / "model.safetensors")


def reference(family, changes, path, **saving):
    """Write a random transformers model to `path`; return its logits of TOKENS."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + ("norm" in name))
        model.save_pretrained(path, **saving)
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def relative_error(got, wanted):
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, tmp_path, logits_of):
    family, changes = FAMILIES[name]
    wanted = reference(family, changes, tmp_path)
    assert relative_error(logits_of(load(tmp_path), TOKENS), wanted) <= 1e-4


def test_sharded_checkpoint_equals_transformers(tmp_path, logits_of):
    wanted = reference("Qwen2", {}, tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert relative_error(logits_of(load(tmp_path), TOKENS), wanted) <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoint_loads_exactly(dtype, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert {str(array.dtype) for array in named_parameters(model).values()} == {dtype}
    wanted = theirs.model.layers[1].mlp.down_proj.weight.detach().float().numpy().T
    np.testing.assert_array_equal(np.asarray(model.layers[1].w_down[...], np.float32), wanted)


@pytest.mark.parametrize("name", ["llama3.2", "mistral", "qwen2-window", "qwen3"])
def test_transformers_loads_what_save_hf_writes(name, tmp_path):
    family, changes = FAMILIES[name]
    wanted = reference(family, changes, tmp_path / "theirs")
    save_hf(load(tmp_path / "theirs"), tmp_path / "ours")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == f"{family}ForCausalLM"
    assert not any(report.values())
    with torch.no_grad():
        assert relative_error(model(torch.tensor(TOKENS)).logits.numpy(), wanted) <= 1e-6


def test_logits_of_stored_numbers(tmp_path, logits_of):
    # Weight number i of tensor j (names sorted): sin(0.37 i j) / 2, plus 1 in norms. The logits were computed once with
    # transformers' LlamaForCausalLM in float32: positions 0, 6 and 12, tokens 0 to 3.
    wanted = [
        [0.6315185, -0.3688208, 0.09399426, 0.1839233],
        [1.031288, -0.8728123, 0.6856338, -0.4759082],
        [1.390507, -1.255878, 1.079948, -0.8685046],
    ]
    values = SIZES | {
        "architectures": ["LlamaForCausalLM"],
        **{"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 6},
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "rope_scaling": LLAMA3_ROPE | {"factor": 4.0, "original_max_position_embeddings": 16},
    }
    shapes = {"lm_head.weight": (11, 8), "model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    for i in range(2):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (8,)
        for name, shape in {"q": (24, 8), "k": (12, 8), "v": (12, 8), "o": (8, 24)}.items():
            shapes[f"model.layers.{i}.self_attn.{name}_proj.weight"] = shape
        for name, shape in {"gate": (12, 8), "up": (12, 8), "down": (8, 12)}.items():
            shapes[f"model.layers.{i}.mlp.{name}_proj.weight"] = shape
    tensors = {}
    for j, name in enumerate(sorted(shapes), start=1):
        numbers = np.sin(np.arange(1, np.prod(shapes[name]) + 1) * j * 0.37) * 0.5 + ("norm" in name)
        tensors[name] = numbers.astype(np.float32).reshape(shapes[name])
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(tensors, tmp_path / "model.safetensors")
    got = logits_of(load(tmp_path), TOKENS[:1])[0, ::6, :4]
    assert relative_error(got, np.array(wanted)) <= 1e-5


def test_query_heads_of_one_kv_head_are_the_neighbours(folder):
    # N 4, K 2, so G 2: their query head 3 is ours [k=1, g=1], rows 18 to 24 of q_proj; key 1 is rows 6 to 12 of k_proj.
    tensors = load_file(folder / "model.safetensors")
    layer = load(folder).layers[2]
    query, key = (tensors[f"model.layers.2.self_attn.{x}_proj.weight"] for x in "qk")
    np.testing.assert_array_equal(layer.wqkv[:, 1, 1], query[18:24].T)
    np.testing.assert_array_equal(layer.wqkv[:, 1, 2], key[6:12].T)
    np.testing.assert_array_equal(layer.w_gate_up[:, 1], tensors["model.layers.2.mlp.up_proj.weight"].T)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True, "bos_id": 3, "eos_ids": (1, 2)},
        {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_length=16), "rope_theta": 500000.0},
        {"rope_scaling": RopeScaling(kind="linear", factor=2.0), "eos_ids": (4,)},
        {"windows": (7, 7, 7)},
        {"qkv_bias": True, "windows": (None, 7, None)},
        {"qk_norm": True, "norm_eps": 1e-6},
    ],
    ids=["tied", "llama3", "linear", "mistral", "qwen2", "qwen3"],
)
def test_save_hf_round_trips(changes, small, tmp_path):
    model = Transformer(small(**changes), jax.random.key(1), jnp.bfloat16)
    (tmp_path / "tokens").write_text("{}")
    save_hf(stack_layers(model) if len(set(model.config.windows or (1,))) == 1 else model, tmp_path / "a" / "b")
    save_hf(model, tmp_path / "a" / "b", overwrite=True, tokenizer_file=tmp_path / "tokens")
    loaded = load(tmp_path / "a" / "b")
    assert loaded.config == model.config
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, named_parameters(loaded), named_parameters(model))
    assert {file.name for file in (tmp_path / "a").rglob("*")} == {
        *("b", "config.json", "model.safetensors", "tokenizer.json")
    }


def test_dtype_is_converted_and_checked(folder):
    exact, model = load(folder), load(folder, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(model.layers[0].wqkv[...], exact.layers[0].wqkv[...].astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="expected a floating-point dtype, got int8"):
        load(folder, dtype=jnp.int8)


def test_harmless_extra_tensors_are_ignored(folder, tmp_path, small):
    edit_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)})
    load(folder)
    save_hf(Transformer(small(tie_embeddings=True), jax.random.key(0)), tmp_path / "tied")
    edit_tensors(tmp_path / "tied", **{"lm_head.weight": np.ones((19, 20), np.float32)})
    assert load(tmp_path / "tied").unembedding is None


def test_end_tokens_come_from_the_generation_config(folder):
    edit(folder / "config.json", eos_token_id=3)
    assert load(folder).config.eos_ids == (3,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert load(folder).config.eos_ids == (3, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_layers_1_mlp_up_proj_weight": None},
            r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' in .* found none",
        ),
        ({"surplus": np.zeros(3, np.float32)}, "expected no tensor beside .* got 'surplus'"),
        ({"model_norm_weight": np.zeros(21, np.float32)}, r"'model\.norm\.weight' .* shape \(20,\), got \(21,\)"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_tensors_that_do_not_fit_are_refused(changes, message, folder):
    edit_tensors(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_integer_weights_are_refused(folder):
    edit_tensors(folder, model_norm_weight=np.zeros(20, np.int64))
    with pytest.raises(NotImplementedError, match=r"'model\.norm\.weight' .* F32, F16, BF16, got I64"):
        load(folder)


def test_nothing_is_read_before_everything_was_checked(folder, monkeypatch):
    edit_tensors(folder, model_norm_weight=np.zeros(21, np.float32))
    monkeypatch.setattr("dyninf.models.convert._read", lambda *args: pytest.fail("read a tensor"))
    with pytest.raises(ValueError, match="shape"):
        load(folder)


def test_only_one_parameter_is_on_the_host_at_a_time(folder, monkeypatch):
    from dyninf.models import convert

    events, read, place = [], convert._read, convert._place
    monkeypatch.setattr(convert, "_read", lambda *args: events.append("read") or read(*args))
    monkeypatch.setattr(convert, "_place", lambda *args: events.append("place") or place(*args))
    load(folder)
    assert events == ["read", "place"] * (3 + 3 * 6)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"lm_head.weight": "gone.safetensors"}, "shard 'gone.safetensors'.* found none"),
        ({"lm_head.weight": "../good/model.safetensors"}, "shard '../good/model.safetensors'"),
        ({"absent": "part.safetensors"}, "'absent' in .* found none"),
        ({"lm_head.weight": None}, "'lm_head.weight' in no file by"),
        ("not a map", "weight_map"),
    ],
    ids=["shard", "outside", "tensor", "unnamed", "format"],
)
def test_bad_index_is_refused(index, message, folder):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    places = dict.fromkeys(load_file(folder / "part.safetensors"), "part.safetensors")
    if isinstance(index, dict):
        index = {name: file for name, file in (places | index).items() if file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_folder_without_safetensors_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"got \['config.json', 'pytorch_model.bin'\].*nothing is ever unpickled"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"got \['pytorch_model.bin'\]; pickled weights .* refused.* save_pretrained"):
        load(folder)


@pytest.mark.parametrize("text", [None, "{", "[]"], ids=["absent", "cut", "list"])
def test_bad_config_file_is_refused(text, folder):
    (folder / "config.json").unlink() if text is None else (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"expected (config.json in|JSON in|a JSON object in)"):
        load(folder)
