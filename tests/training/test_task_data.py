"""Training on token tasks: batches, their masks, what is held out, and a run from the command line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.cli import main
from dyninf.cli.train import read_tasks
from dyninf.configs.training import TINY, TINY_RECIPE
from dyninf.models import load, load_tokenizer
from dyninf.training.loop import prepare, train_tasks
from dyninf.training.step import eval_step, init_state, train_step
from dyninf.training.task_data import TaskData

DATA = TaskData(tasks=(("needle", 1.0), ("multivalue", 2.0)))
SHAPE = {"batch_size": 3, "length": 120, "seed": 5}


def test_batches_are_functions_of_seed_and_step():
    tokens, mask = DATA.batch(4, **SHAPE)
    assert tokens.shape == (3, 121) and mask.shape == (3, 120) and tokens.dtype == np.int32
    assert np.array_equal(tokens, DATA.batch(4, **SHAPE)[0])
    assert not np.array_equal(tokens, DATA.batch(5, **SHAPE)[0])
    assert not np.array_equal(tokens, DATA.held_out().batch(4, **SHAPE)[0])
    # One answer of one token, or four values of a key: all of them are values, and nothing else is predicted.
    assert set(mask.sum(axis=1)) <= {1, 2, 3, 4, 5} and np.isin(tokens[:, 1:][mask], DATA.vocabulary.values).any()


def test_several_questions_make_several_answers():
    many = dataclasses.replace(DATA, questions=8)
    tokens, mask = many.batch(4, **SHAPE)
    assert mask.sum() > DATA.batch(4, **SHAPE)[1].sum() and np.isin(tokens[:, 1:][mask], DATA.vocabulary.values).all()
    assert np.array_equal(tokens, many.batch(4, **SHAPE)[0])
    with pytest.raises(ValueError, match="questions to be an integer of at least 1"):
        dataclasses.replace(DATA, questions=0).check(120)


def test_only_answers_count():
    config = dataclasses.replace(TINY, vocab_size=DATA.vocabulary.size, num_layers=2)
    recipe = dataclasses.replace(TINY_RECIPE, length=120, batch_size=3)
    state = init_state(config, recipe)
    tokens, mask = map(jnp.asarray, DATA.batch(0, **SHAPE))
    losses_L = eval_step(state.model, tokens, recipe, mask)
    # Whatever stands behind the last answer of a row reaches no predicted token.
    behind = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 0
    changed = jnp.concatenate([tokens[:, :1], jnp.where(behind, 9, tokens[:, 1:])], axis=1)
    np.testing.assert_allclose(eval_step(state.model, changed, recipe, mask), losses_L, rtol=1e-5)
    assert np.all(np.abs(losses_L - eval_step(state.model, tokens, recipe)) > 1e-4)
    state, metrics = train_step(state, tokens, recipe, mask)
    assert int(state.step) == 1 and np.isfinite(metrics["loss"])
    assert metrics["final_loss"] == pytest.approx(float(losses_L[-1]), rel=1e-4)


def test_the_tokenizer_names_every_id():
    tokenizer, words = DATA.tokenizer(), DATA.vocabulary
    assert tokenizer.get_vocab_size() == words.size
    ids = [words.BOS, words.KEY, words.keys[12], words.VALUE, words.values[7], words.noise[-1]]
    assert tokenizer.encode("[BOS] [KEY] k12 [VALUE] v7 n127").ids == ids
    assert tokenizer.decode(ids) == "[BOS] [KEY] k12 [VALUE] v7 n127"


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path, capsys):
    sizes = ("steps=2", "length=160", "batch_size=2", "eval_every=2", "eval_batches=1", "save_every=2", "warmup=1")
    changes = [part for size in sizes for part in ("--set", f"recipe.{size}")] + ["--set", "model.num_layers=2"]
    arguments = ["train", "--run", str(tmp_path / "run"), *changes]
    assert main([*arguments, "--tasks", "needle,tracking=2", "--questions", "4"]) == 0
    model = load(tmp_path / "run" / "model")
    assert (
        model.config.vocab_size == DATA.vocabulary.size == load_tokenizer(tmp_path / "run" / "model").get_vocab_size()
    )
    begun = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert begun["data"]["tasks"] == {"needle": 1.0, "tracking": 2.0} and begun["data"]["questions"] == 4
    assert all(bool(jnp.all(jnp.isfinite(leaf.astype(jnp.float32)))) for leaf in jax.tree.leaves(model))
    capsys.readouterr()
    for tasks, said in (("needle", "data.tasks"), ("bogus", "one of the token tasks"), ("needle,needle", "different")):
        assert main([*arguments, "--tasks", tasks]) == 2
        assert said in capsys.readouterr().err
    assert main([*arguments, "folder", "--tasks", "needle"]) == 2
    assert "one of them" in capsys.readouterr().err
    assert main([*arguments, "folder", "--questions", "4"]) == 2
    assert "--questions beside --tasks" in capsys.readouterr().err
    assert main(["train", "--run", str(tmp_path / "short"), "--tasks", "tracking", "--set", "recipe.length=64"]) == 2
    assert "at least" in capsys.readouterr().err and not (tmp_path / "short").exists()


def test_text_and_tasks_do_not_share_a_run(run, tmp_path, write_files):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match=r"run directory without text to train on tasks, got '.*run'"):
        train_tasks(TINY, TINY_RECIPE, run, tasks={"needle": 1.0}, report=list)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "recipe.json").write_text('{"data": {"tasks": {"needle": 1.0, "tracking": 2.0}}}')
    with pytest.raises(
        ValueError, match=r"without tasks to train on text, got '.*tasks', begun with needle, tracking;"
    ):
        prepare([write_files(tmp_path / "source", 40)], tasks, vocab_size=300, report=list)
    assert [path.name for path in tasks.iterdir()] == ["recipe.json"]


def test_tasks_that_do_not_fit_leave_nothing(tmp_path):
    short, run = dataclasses.replace(TINY_RECIPE, length=20), tmp_path / "run"
    with pytest.raises(ValueError, match=r"'needle', got 5; with recipe\.length=20 rows have 5 to 21 tokens"):
        train_tasks(TINY, short, run, tasks={"needle": 1.0}, report=list)
    with pytest.raises(ValueError, match="for each of 2 tasks, one of them above 0"):
        train_tasks(TINY, TINY_RECIPE, run, tasks={"needle": 0.0, "tracking": 0.0}, report=list)
    with pytest.raises(ValueError, match="one of the shipped models"):
        train_tasks(TINY, TINY_RECIPE, run, tasks={"needle": 1.0}, report=list, init="nothing")
    assert not run.exists()


def test_weights_are_read():
    assert read_tasks("needle, tracking=2.5") == {"needle": 1.0, "tracking": 2.5}
    for text in ("", "needle,", "needle=x", "=1"):
        with pytest.raises(ValueError, match="expected"):
            read_tasks(text)
