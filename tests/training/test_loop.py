"""The training loop: the data it makes, and everything it refuses before or during a run.

Whole runs are in test_resume.py; here no step is compiled.
"""

import dataclasses
import fcntl
import json

import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import models
from dyninf.training import checkpoints, meshes
from dyninf.training.data import TokenData, fingerprint
from dyninf.training.loop import train
from dyninf.training.step import init_state


@pytest.fixture
def begun(run, config, recipe, monkeypatch):
    """A run directory with the checkpoint of its last step."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(meshes, "train_step", stop)
        train(config, recipe, run, report=list)
    state = dataclasses.replace(init_state(config, recipe), step=jnp.int32(recipe.steps))
    checkpoints.save(run / "checkpoints", state)
    return run


def test_prepare_makes_data_once(write_files, make, config, tmp_path):
    source = write_files(tmp_path / "source", 30)
    (source / "again.py").write_text((source / "file_3.py").read_text() + "\n")
    events = make(source, tmp_path / "run")
    assert [(e["event"], e.get("documents"), e.get("split")) for e in events] == [
        ("collected", 31, None),
        ("deduplicated", 30, None),
        ("packed", None, "heldout"),
        ("packed", None, "train"),
    ]
    tokenizer = models.load_tokenizer(tmp_path / "run")
    assert tokenizer.get_vocab_size() == config.vocab_size
    parts = [TokenData.open(tmp_path / "run" / f"{name}.tokens") for name in ("train", "heldout")]
    assert [part.tokenizer_sha256 for part in parts] == [fingerprint(tokenizer)] * 2
    assert parts[0].num_documents + parts[1].num_documents == 30 and parts[1].num_documents < 10
    texts = [tokenizer.decode(part.tokens.tolist(), skip_special_tokens=False) for part in parts]
    kept = [file.read_text() for file in sorted(source.glob("file_*.py"))]
    assert all((text in texts[0]) != (text in texts[1]) for text in kept)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}
    source.rename(tmp_path / "moved")  # the data are there, the folder need not be
    assert make(source, tmp_path / "run") == []
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}
    (tmp_path / "run" / "corpus.json").unlink()  # as if a kill had come before the last file
    (tmp_path / "moved").rename(source)
    assert len(make(source, tmp_path / "run")) == 4


def test_prepare_reads_the_suffixes_it_is_given(write_files, make, tmp_path):
    events = make(write_files(tmp_path / "source", 20, suffix=".md"), tmp_path / "run", suffixes=(".md", ".txt"))
    assert events[0] == {"event": "collected", "documents": 20}


@pytest.mark.parametrize("count", [3, 8, 19])
def test_a_few_files_are_enough(count, write_files, make, tmp_path):
    make(write_files(tmp_path / "source", count), tmp_path / "run")
    held_out = TokenData.open(tmp_path / "run" / "heldout.tokens").num_documents
    assert 1 <= held_out <= max(1, 0.6 * count)


def test_prepare_refuses_what_it_cannot_use(write_files, make, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"expected an existing folder, got .*nowhere"):
        make(tmp_path / "nowhere", run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected text files"):
        make(tmp_path / "empty", run)
    with pytest.raises(ValueError, match="got 1 that differ; give more files"):
        make(write_files(tmp_path / "one", 1), run)
    with pytest.raises(ValueError, match="vocab_size"):
        make(write_files(tmp_path / "some", 9), run, vocab_size=100)
    assert not run.exists()  # a wrong path leaves nothing behind
    run.write_text("a file")
    with pytest.raises(OSError, match="run"):
        make(tmp_path / "some", run)


@pytest.mark.parametrize(
    ("folder", "changes", "named"),
    [
        ("other", {}, r"corpus.folders: \['source'\] -> \['other'\]"),
        ("source", {"vocab_size": 400}, "corpus.vocab_size: 300 -> 400"),
        ("source", {"suffixes": (".md",)}, r"corpus.suffixes: \['.py'\] -> \['.md'\]"),
    ],
)
def test_data_made_from_something_else_is_refused_by_name(folder, changes, named, make, run, tmp_path):
    with pytest.raises(ValueError, match=f"{named}; use another run directory"):
        make(tmp_path / folder, run, **changes)


@pytest.mark.parametrize(
    ("part", "field", "value", "named"),
    [
        ("recipe", "learning_rate", 1e-3, "recipe.learning_rate: 0.003 -> 0.001"),
        ("recipe", "steps", 65, "recipe.steps: 64 -> 65"),
        ("model", "d_ff", 48, "model.d_ff: 40 -> 48"),
    ],
)
def test_another_recipe_or_model_is_refused_by_name(part, field, value, named, begun, config, recipe):
    made = {"model": config, "recipe": recipe}
    made[part] = dataclasses.replace(made[part], **{field: value})
    with pytest.raises(ValueError, match=f"begun with, got {named}; use another run directory"):
        train(*made.values(), begun, report=list)


def test_before_the_first_checkpoint_the_recipe_may_change(run, config, recipe, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(meshes, "train_step", stop)
    for tried in (recipe, dataclasses.replace(recipe, learning_rate=1e-3)):
        with pytest.raises(KeyboardInterrupt):
            train(config, tried, run, report=list)
    assert json.loads((run / "recipe.json").read_text())["recipe"]["learning_rate"] == 1e-3


def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint_holds_it(run, config, recipe, monkeypatch):
    def step(state, tokens, recipe, mask):
        loss = np.nan if state.step == 5 else 1.0
        return dataclasses.replace(state, step=state.step + 1), {"loss": loss, "grad_norm": 1.0}

    monkeypatch.setattr(meshes, "train_step", step)
    with pytest.raises(ValueError, match=r"finite loss .* at step 6.*lower learning rate"):
        train(config, recipe, run, report=list)
    assert checkpoints.latest(run / "checkpoints") == 3


def test_a_run_goes_on_with_the_step_after_its_checkpoint_and_logs_every_step_once(run, config, recipe, monkeypatch):
    read, steps = {}, []

    def step(state, tokens, recipe, mask):
        number = int(state.step)
        if number == 31 and steps.count(number) == 0:  # step 30 is logged and saved, 31 is not
            steps.append(number)
            raise KeyboardInterrupt
        steps.append(number)
        read.setdefault(number, []).append(np.asarray(tokens))
        return dataclasses.replace(state, step=state.step + 1), {"loss": 1.0 + number, "grad_norm": 2.0}

    monkeypatch.setattr(meshes, "train_step", step)
    monkeypatch.setattr(meshes, "eval_step", lambda *_: np.zeros(3))
    recipe = dataclasses.replace(recipe, save_every=14)
    with pytest.raises(KeyboardInterrupt):
        train(config, recipe, run, report=list)
    with (run / "log.jsonl").open("ab") as log:
        log.write(b'[1]\n{"step": "28"}\nnull\n{"event": "step", "step": 2\xff')
    train(config, recipe, run, report=list)
    assert steps == [*range(32), *range(28, 64)]
    data = TokenData.open(run / "train.tokens")
    for number, batches in read.items():
        for batch in batches:
            np.testing.assert_array_equal(batch, data.batch(number, batch_size=2, length=16, seed=recipe.seed))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "eval"] == [25, 50, 64]
    logged = [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]
    assert logged == [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.0), (50, 50.0), (60, 60.0), (64, 64.0)]


def damage_checkpoint(run):
    next((run / "checkpoints" / "64").rglob("manifest.ocdbt")).write_bytes(b"")


def foreign_checkpoint(run):
    (run / "checkpoints" / "99").mkdir()


def cut_recipe(run):
    (run / "recipe.json").write_text('{"model": {')


def odd_recipe(run):
    (run / "recipe.json").write_text("[1]")


def lose_recipe(run):
    (run / "recipe.json").unlink()


def other_tokenizer(run):
    text = (run / "tokenizer.json").read_text()
    (run / "tokenizer.json").unlink()
    (run / "tokenizer.json").write_text(text.replace('"ignore_merges": false', '"ignore_merges": true'))


def cut_tokenizer(run):
    (run / "tokenizer.json").unlink()
    (run / "tokenizer.json").write_text('{"version')


def lose_data(run):
    (run / "heldout.tokens.json").unlink()


def cut_data(run):
    raw = (run / "train.tokens").read_bytes()
    (run / "train.tokens").unlink()
    (run / "train.tokens").write_bytes(raw[:-2])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_checkpoint, "whole checkpoint of this run in .*/64'.*manifest.ocdbt' missing or changed"),
        (foreign_checkpoint, "whole checkpoint of this run in .*/99', got no checkpoint.json"),
        (cut_recipe, "how the run was begun in .*recipe.json"),
        (odd_recipe, "how the run was begun in .*recipe.json"),
        (lose_recipe, "how the run was begun in .*recipe.json"),
        (other_tokenizer, "tokens of another tokenizer"),
        (cut_tokenizer, "expected a tokenizer in .*tokenizer.json"),
        (lose_data, "expected a header at .*heldout.tokens.json"),
        (cut_data, "the file is truncated"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_run_is_refused_in_one_line(damage, said, begun, config, recipe):
    damage(begun)
    with pytest.raises(ValueError, match=said) as caught:
        train(config, recipe, begun, report=list)
    assert "\n" not in str(caught.value)


def test_train_refuses_what_cannot_work_before_any_work(run, config, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(meshes, "init_state", None)
    with pytest.raises(ValueError, match="expected the data of a run"):
        train(config, recipe, tmp_path / "nowhere", report=list)
    with pytest.raises(ValueError, match="max_length=32, got 33"):
        train(config, dataclasses.replace(recipe, length=33), run, report=list)
    long = dataclasses.replace(recipe, length=30_000)
    with pytest.raises(ValueError, match=r"at least 60000 tokens of training text .* more text in another run"):
        train(config, long, run, report=list)
    medium = dataclasses.replace(recipe, length=TokenData.open(run / "train.tokens").tokens.size // 2)
    with pytest.raises(ValueError, match="tokens of held-out text"):
        train(dataclasses.replace(config, max_length=10**6), medium, run, report=list)
    (run / "checkpoints").write_text("a file")
    with pytest.raises(ValueError, match="folder of checkpoints"):
        train(config, recipe, run, report=list)
    assert not (run / "recipe.json").exists()


def test_two_processes_do_not_share_a_run(run, config, recipe):
    with (run / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="got one that is at work there"):
            train(config, recipe, run, report=list)
