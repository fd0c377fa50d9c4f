"""``dyninf eval --tasks``: rows, resuming, what is refused, pictures."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dyninf.cli import main, task_eval
from dyninf.configs.training import TINY
from dyninf.models import Transformer, save_hf
from dyninf.training.task_data import TaskData


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model with the vocabulary of token tasks."""
    folder, data = tmp_path_factory.mktemp("recall"), TaskData(tasks=(("needle", 1.0),))
    config = dataclasses.replace(TINY, vocab_size=data.vocabulary.size, num_layers=4, max_length=256)
    (folder / "tokenizer.json").write_text(data.tokenizer().to_str(), encoding="utf-8")
    random = Transformer(config, jax.random.key(0), jnp.float32)
    save_hf(random, folder / "model", tokenizer_file=folder / "tokenizer.json")
    return str(folder / "model")


@pytest.fixture
def measured(monkeypatch):
    """The (plan, task) pairs that were measured, without the time it takes to measure them."""
    pairs = []

    def answer(loaded, plan, samples, arguments):
        pairs.append((plan, samples[0].task))
        return {"score": 0.5, "exact": 0.25, "by_depth": [1.0, None, 0.0, 0.5, 0.5], "depth_counts": [1, 0, 1, 1, 1]}

    def time(loaded, plan, sample):
        return {"seconds_per_token": 0.001, "layers_run": 2.0, "kv_read": 60.0, "tokens_held": 120.0}

    monkeypatch.setattr(task_eval, "_answer", answer)
    monkeypatch.setattr(task_eval, "_time", time)
    return pairs


def test_a_row_for_each_plan_and_task(model, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    arguments = ["eval", "--model", model, "--tasks", "needle", "--lengths", "96", "--samples", "2"]
    assert main([*arguments, "--plans", "dense,exit_half", "--query", "after", "--jsonl", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["plan"], row["task"], row["length"], row["query"]) for row in rows] == [
        ("dense", "needle", 96, "after"),
        ("exit_half", "needle", 96, "after"),
    ]
    assert [row["layers_run"] for row in rows] == [4, 2] and all(0 <= row["score"] <= 1 for row in rows)
    assert sum(rows[0]["depth_counts"]) == 2 and rows[0]["kv_read"] == rows[0]["kv_live"]
    assert "exit_half" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_counts_nothing_twice(model, tmp_path, measured):
    file = tmp_path / "rows.jsonl"
    arguments = ["eval", "--model", model, "--lengths", "96", "--samples", "2", "--jsonl", str(file)]
    assert main([*arguments, "--tasks", "needle"]) == 0 and len(measured) == 1
    with file.open("a") as stream:
        stream.write('{"bench": "task", "versi')  # a kill while writing
    assert main([*arguments, "--tasks", "needle,multivalue", "--plans", "dense,exit_half"]) == 0
    assert [task for _, task in measured] == ["needle", "needle", "multivalue", "multivalue"]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({task_eval._key(row) for row in rows}) == len(rows) == 4
    assert main([*arguments, "--tasks", "needle,multivalue"]) == 0 and len(measured) == 4
    assert main([*arguments, "--tasks", "needle", "--seed", "1"]) == 0 and len(measured) == 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"version": 0}\n', "expected rows of"),
        (b"some notes\n", "expected rows of"),
        (b"notes without an end", "expected rows of"),
        (b'notes\n{"bench": "task", "versi', "expected rows of"),
        (b"\xff\xfe", "got no text"),
    ],
    ids=["fields", "notes", "one_line", "cut", "bytes"],
)
def test_a_file_of_something_else_is_left_alone(model, tmp_path, measured, capsys, content, said):
    file = tmp_path / "rows.jsonl"
    arguments = ["eval", "--model", model, "--tasks", "needle", "--lengths", "96", "--samples", "2"]
    file.write_bytes(content)
    assert main([*arguments, "--jsonl", str(file)]) == 2
    assert said in capsys.readouterr().err and file.read_bytes() == content and not measured


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"version": 1', '"version": 7', "expected rows of version 1"),
        ('"plan": "dense"', '"plan": ["dense"]', "expected rows of"),
        ('"score"', '"skore"', "expected rows of"),
    ],
    ids=["version", "key", "column"],
)
def test_rows_that_cannot_be_read_are_left_alone(model, tmp_path, measured, capsys, old, new, said):
    file = tmp_path / "rows.jsonl"
    arguments = ["eval", "--model", model, "--tasks", "needle", "--lengths", "96", "--samples", "2"]
    assert main([*arguments, "--jsonl", str(file)]) == 0
    text = file.read_text().replace(old, new)
    file.write_text(text)
    assert main([*arguments, "--jsonl", str(file)]) == 2
    assert said in capsys.readouterr().err and file.read_text() == text and len(measured) == 1


def test_a_row_that_lacks_only_its_end_of_line_stays(model, tmp_path, measured):
    file = tmp_path / "rows.jsonl"
    arguments = ["eval", "--model", model, "--lengths", "96", "--samples", "2", "--jsonl", str(file)]
    assert main([*arguments, "--tasks", "needle"]) == 0
    file.write_text(file.read_text().rstrip("\n"))
    assert main([*arguments, "--tasks", "needle,multivalue"]) == 0 and len(measured) == 2
    assert [json.loads(line)["task"] for line in file.read_text().splitlines()] == ["needle", "multivalue"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "bogus"], "expected tasks among text, tokens"),
        (["--tasks", "needle", "--lengths", "512"], "up to the context"),
        (["--tasks", "needle", "--lengths", "8"], "at least"),
        (["--tasks", "needle", "--lengths", "x"], "lengths such as"),
        (["--tasks", "needle", "--samples", "0"], "--samples of at least 1"),
        (["--tasks", "needle", "--plan", "exit_half"], "got --plan, which is for text"),
        (["--tasks", "needle", "--plans", "bogus"], "expected a plan among"),
        (["--tasks", "passkey", "--lengths", "200"], "tokenizer"),
        (["--tasks", "needle", "--jsonl", "/no/such/folder/rows"], "a folder that exists"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[1:]),
)
def test_what_cannot_be_measured_is_refused_before_any_work(model, measured, capsys, options, said):
    assert main(["eval", "--model", model, *options]) == 2
    assert said in capsys.readouterr().err and not measured


def test_a_vocabulary_too_small_for_token_tasks_is_said():
    config = dataclasses.replace(TINY, vocab_size=300)
    loaded = SimpleNamespace(name="small", model=SimpleNamespace(config=config))
    with pytest.raises(ValueError, match=r"got small with 300 ids; train one with dyninf train --tasks"):
        task_eval.make(loaded, "needle", 96, None)


def test_plots_need_matplotlib(model, measured, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = ["eval", "--model", model, "--tasks", "needle", "--lengths", "96", "--plots", str(tmp_path / "plots")]
    assert main(arguments) == 2
    assert "pip install matplotlib" in capsys.readouterr().err and not (tmp_path / "plots").exists()


def test_plots_are_drawn(model, measured, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["eval", "--model", model, "--tasks", "needle", "--lengths", "96", "--plots", str(tmp_path)]
    assert main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "needle_depth.png",
        "quality_budget.png",
        "quality_time.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
