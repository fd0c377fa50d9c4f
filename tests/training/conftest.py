"""One minute model, its recipe and its data, for all tests that train."""

import os
import random

import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.models import ModelConfig
from dyninf.models.parameters import abstract_model, named_parameters, with_parameters
from dyninf.training.loop import prepare
from dyninf.training.recipe import Recipe

WORDS = ("self", "value", "index", "total", "result", "item", "node", "left", "right", "count", "name", "path")


@pytest.fixture(scope="session")
def config():
    """The smallest model in which all axes differ."""
    return ModelConfig(
        vocab_size=300,
        num_layers=3,
        d_model=24,
        d_ff=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        max_length=32,
        tie_embeddings=True,
    )


@pytest.fixture(scope="session")
def lively():
    """Make a model in which every array matters: at the usual initial weights biases are zero and updates tiny."""

    def make(config):
        model, rng = abstract_model(config), np.random.default_rng(1)
        arrays = {
            name: jnp.asarray(rng.normal(size=a.shape) * (0.3 if a.ndim > 1 else 0.1) + (a.ndim == 1), jnp.float32)
            for name, a in named_parameters(model).items()
        }
        return with_parameters(model, arrays)

    return make


@pytest.fixture(scope="session")
def recipe():
    """A run of a second, with intervals that do not divide each other."""
    return Recipe(
        steps=64,
        batch_size=2,
        length=16,
        warmup=5,
        exit_period=2,
        compute_dtype="float32",
        chunk=16,
        eval_every=25,
        eval_batches=2,
        save_every=3,
    )


@pytest.fixture(scope="session")
def write_files():
    """Make a folder of files that are not duplicates of each other."""

    def write(folder, count, lines=12, suffix=".py"):
        folder.mkdir()
        for number in range(count):
            rng = random.Random(number)
            text = "".join(
                f"def {rng.choice(WORDS)}_{rng.randrange(999)}({rng.choice(WORDS)}):\n"
                f"    return {rng.choice(WORDS)} + {rng.choice(WORDS)}.{rng.choice(WORDS)}({rng.randrange(999)})\n"
                for _ in range(lines)
            )
            (folder / f"file_{number}{suffix}").write_text(text)
        return folder

    return write


@pytest.fixture(scope="session")
def make(config):
    """Prepare a run directory and return the events."""

    def make(folder, run, **changes):
        events = []
        prepare([folder], run, **{"vocab_size": config.vocab_size, "report": events.append} | changes)
        return events

    return make


@pytest.fixture(scope="session")
def copy_data(tmp_path_factory, write_files, make):
    """Make a run directory with data and nothing else. Its files are links: delete them before changing them."""
    root = tmp_path_factory.mktemp("data")
    make(write_files(root / "source", 40), root / "run")

    def copy(folder):
        folder.mkdir()
        for file in (root / "run").iterdir():
            os.link(file, folder / file.name)
        return folder

    return copy


@pytest.fixture
def run(copy_data, tmp_path):
    """A run directory of one's own."""
    return copy_data(tmp_path / "run")
