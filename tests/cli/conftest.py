"""One tiny random model, with its tokenizer and held-out text, for all tests of the command line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyninf
from dyninf import models
from dyninf.models.parameters import named_parameters, with_parameters
from dyninf.training.data import train_tokenizer

TEXTS = (
    "def add(a, b):\n    return a + b\n\n\ndef name(self):\n    return self.name\n" * 6,
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n# größer: 🙂\n" * 6,
    "import os\nfor path in os.listdir('.'):\n    print(path)\n" * 6,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of a model of 4 layers that predicts some tokens of its text, differently at every layer."""
    root = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXTS, 290)
    tokenizer.save(str(root / "tokenizer.json"))
    config = models.ModelConfig(
        vocab_size=290,
        num_layers=4,
        d_model=24,
        d_ff=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        max_length=96,
        eos_ids=(0,),
    )
    model = models.Transformer(config, jax.random.key(1))
    model = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, model)
    model = with_parameters(model, named_parameters(model) | {"unembedding": fit_readout(model, tokenizer)})
    models.save_hf(model, root / "tiny", tokenizer_file=root / "tokenizer.json")
    lines = [json.dumps({"name": f"{i}.py", "package": "p", "licence": "MIT", "text": t}) for i, t in enumerate(TEXTS)]
    (root / "tiny" / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(root / "tiny")


def fit_readout(model, tokenizer):
    """The vocabulary matrix [D, V] that maps final states to the next tokens of the texts by least squares."""
    states, following, layer_states = [], [], jax.jit(dyninf.layer_states)
    for text in TEXTS:
        ids = np.asarray(tokenizer.encode(text).ids[:80])
        x = np.asarray(layer_states(model, ids[None, :-1])[-1, 0])
        states.append(x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True)))
        following.append(np.eye(model.config.vocab_size)[ids[1:]])
    fitted, *_ = np.linalg.lstsq(np.concatenate(states), np.concatenate(following), rcond=None)
    return jnp.asarray(8 * fitted, jnp.float32)


@pytest.fixture(scope="session")
def loaded(folder):
    """The same model and tokenizer as the commands load them."""
    return models.load(folder), models.load_tokenizer(folder)
