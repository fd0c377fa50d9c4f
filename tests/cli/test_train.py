"""The command train; the loop itself has tests of its own."""

import pytest

from dyninf.cli import main, train
from dyninf.configs.training import TINY, TINY_RECIPE


def test_changes_reach_model_and_recipe():
    changes = ["model.num_layers=5", "recipe.learning_rate=1e-4", "recipe.compute_dtype=bfloat16"]
    model, recipe = train.configure("tiny", changes)
    assert (model.num_layers, model.d_model) == (5, TINY.d_model)
    assert (recipe.learning_rate, recipe.compute_dtype, recipe.steps) == (1e-4, "bfloat16", TINY_RECIPE.steps)


@pytest.mark.parametrize("change", ["recipe.stepz=1", "steps=1", "recipe.steps=a", "recipe.steps=0", "model.d_ff"])
def test_a_wrong_change_is_refused(change):
    with pytest.raises(ValueError, match="expected"):
        train.configure("tiny", [change])


def test_the_command_prepares_trains_and_names_the_model(monkeypatch, tmp_path, capsys):
    calls = []

    def prepare(folders, run, *, vocab_size, report):
        calls.append((folders, run, vocab_size))
        report({"event": "collected", "documents": 3})

    def loop(config, recipe, run, *, report):
        calls.append((config.vocab_size, recipe.steps))
        report({"event": "resumed", "step": 5})
        report({"event": "step", "step": 10, "loss": 4.25, "tokens_per_second": 77})
        report({"event": "eval", "step": 10, "exit_losses": [5.5, 4.5]})
        return run / "model"

    monkeypatch.setattr(train, "prepare", prepare)
    monkeypatch.setattr(train, "train", loop)
    arguments = ["src", "--run", str(tmp_path), "--set", "recipe.steps=40", "--set", "model.vocab_size=300"]
    assert main(["train", *arguments]) == 0
    assert calls == [(["src"], tmp_path, 300), (300, 40)]
    shown = capsys.readouterr()
    assert f"dyninf generate --model {tmp_path / 'model'}" in shown.out
    assert shown.err.splitlines() == [
        "collected: documents 3",
        "resumed: step 5",
        "step 10: loss 4.2500, 77 tokens/s",
        "step 10: held-out loss by exit layer: 5.500 4.500",
    ]


def test_folders_without_text_are_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["train", str(tmp_path / "empty"), "--run", str(tmp_path / "run")]) == 2
    assert "expected text files" in capsys.readouterr().err
