"""One tiny random model, with its tokenizer and held-out text, for all tests of the command line."""

import json

import jax
import pytest

from dyninf import models
from dyninf.training.data import train_tokenizer

TEXTS = (
    "def add(a, b):\n    return a + b\n\n\ndef name(self):\n    return self.name\n" * 6,
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n# größer: 🙂\n" * 6,
    "import os\nfor path in os.listdir('.'):\n    print(path)\n" * 6,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of a model of 4 layers whose weights are large enough that layers matter."""
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
        tie_embeddings=True,
        eos_ids=(0,),
    )
    model = models.Transformer(config, jax.random.key(1))
    model = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, model)
    models.save_hf(model, root / "tiny", tokenizer_file=root / "tokenizer.json")
    lines = [json.dumps({"name": f"{i}.py", "package": "p", "licence": "MIT", "text": t}) for i, t in enumerate(TEXTS)]
    (root / "tiny" / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(root / "tiny")


@pytest.fixture(scope="session")
def loaded(folder):
    """The same model and tokenizer as the commands load them."""
    return models.load(folder), models.load_tokenizer(folder)
