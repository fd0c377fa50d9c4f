"""Going on from a trained model: its tokenizer, its weights and its config begin the run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import models
from dyninf.training import meshes
from dyninf.training.data import fingerprint
from dyninf.training.loop import prepare, train


@pytest.fixture
def trained(run, config, tmp_path):
    """A model folder such as a run leaves, with the tokenizer of the shared run directory."""
    vocab_size = models.load_tokenizer(run).get_vocab_size()
    model = models.Transformer(dataclasses.replace(config, vocab_size=vocab_size), jax.random.key(7))
    models.save_hf(model, tmp_path / "trained", tokenizer_file=run / "tokenizer.json")
    return tmp_path / "trained"


@pytest.fixture
def begin(trained, write_files, recipe, config, tmp_path, monkeypatch):
    """Prepare a run from the trained model and return the state that its first step is given."""

    def start():
        folder, seen = tmp_path / "more", []
        if not folder.exists():
            source = write_files(tmp_path / "source", 30)
            prepare([source], folder, vocab_size=config.vocab_size, report=list, init=str(trained))

        def catch(state, *_):
            seen.append(state)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(meshes, "train_step", catch)
            other = dataclasses.replace(config, num_layers=2)  # the trained model's own config counts
            train(other, recipe, folder, report=list, init=str(trained))
        return folder, seen[0]

    return start


def test_weights_and_tokenizer_are_those_of_the_model(begin, trained):
    folder, state = begin()
    assert fingerprint(models.load_tokenizer(folder)) == fingerprint(models.load_tokenizer(trained))
    model = models.load(trained, dtype=jnp.float32)
    assert state.model.config == dataclasses.replace(model.config, eos_ids=(0,)) or state.model.config == model.config
    got = models.unstack_layers(state.model)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(model), strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_array_equal(mine, theirs)


def test_another_beginning_is_refused_once_a_run_has_data(begin, trained, config, tmp_path):
    begin()
    with pytest.raises(ValueError, match=r"corpus\.init: .*trained' -> None"):
        prepare([tmp_path / "source"], tmp_path / "more", vocab_size=config.vocab_size, report=list)
