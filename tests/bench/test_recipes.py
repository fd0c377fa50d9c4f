"""The scripts that compare recipes and judge stops: their arithmetic, and both from end to end on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bench import recipes, stops, tables
from dyninf import models
from dyninf.configs.training import TINY, TINY_RECIPE
from dyninf.training.corpus import Document
from dyninf.training.data import pack, train_tokenizer

BENCH = Path(__file__).resolve().parents[2] / "bench"
WORDS = ("self", "value", "index", "total", "result", "item", "node", "left", "right", "count", "name", "path")
SMALL = "model.num_layers=4 model.d_model=16 model.d_ff=24 model.num_heads=2 model.head_dim=8 recipe.exit_period=2"
SHORT = "recipe.batch_size=2 recipe.length=32 recipe.warmup=1"


def test_an_accuracy_between_two_points_of_a_curve():
    curve = [
        {"layers": layers, "accuracy": right} for layers, right in ((8.0, 0.6), (2.0, 0.2), (4.0, 0.5), (2.0, 0.3))
    ]
    assert tables.interpolate(curve, 6.0) == pytest.approx(0.55)  # half way from 4 to 8 layers
    assert tables.interpolate(curve, 3.0) == pytest.approx(0.4)
    assert tables.interpolate(curve, 1.9) is None and tables.interpolate(curve, 8.1) is None


def test_how_completions_are_judged():
    made, text = np.array([[5, 6, 7, 8], [1, 6, 7, 8], [5, 6, 0, 8]]), np.array([[5, 6, 7, 8]] * 3)
    assert stops.useful_tokens(made, text).tolist() == [4, 0, 2]
    assert stops.rouge_l(made[0], text[0]) == 1.0
    # The longest common subsequence of 8 5 7 9 and 5 6 7 8 is 5 7; 2 * 2 / (4 + 4).
    assert stops.rouge_l(np.array([8, 5, 7, 9]), text[0]) == 0.5
    assert stops.rouge_l(text[0][:2], text[0]) == pytest.approx(2 * 2 / 6)  # stopped after two
    batches = stops.in_batches(np.arange(5)[:, None], 2)
    assert [rows[:, 0].tolist() for rows in batches] == [[0, 1], [2, 3], [4, 4]]


def test_the_recipes_of_the_variants():
    soft = recipes.of_kind(TINY_RECIPE, "soft", 40, TINY.num_layers)
    plain = recipes.of_kind(TINY_RECIPE, "plain", 400, 32)
    assert (soft.kind, soft.steps, soft.exit_period, soft.warmup, soft.phase) == ("soft", 40, 1, 2, 5)
    assert (plain.exit_period, plain.warmup, plain.eval_every) == (TINY_RECIPE.exit_period, 20, 400)
    assert recipes.of_kind(TINY_RECIPE, "jei", 3, 32).exit_period == 4


@pytest.fixture
def data(tmp_path):
    """A run directory with packed tokens."""
    rng = np.random.default_rng(0)
    texts = ["\n".join(" ".join(rng.choice(WORDS, 8)) for _ in range(40)) for _ in range(6)]
    documents = [Document(name=f"{number}.py", text=text) for number, text in enumerate(texts)]
    tokenizer, run = train_tokenizer(texts, 300), tmp_path / "data"
    run.mkdir()
    tokenizer.save(str(run / "tokenizer.json"))
    pack(documents[1:], tokenizer, run / "train.tokens")
    pack(documents[:1], tokenizer, run / "heldout.tokens")
    (tmp_path / "heldout.py").write_text(texts[0])
    return run


def run_script(name, *arguments):
    """Run a script and return its rows."""
    changes = [argument for change in (SMALL + " " + SHORT).split() for argument in ("--set", change)]
    command = [sys.executable, BENCH / name, *map(str, arguments), *changes]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_every_variant_sees_the_same_tokens_and_is_measured(data, tmp_path):
    rows = run_script(
        "recipes.py", "--data", data, "--steps", 8, "--windows", 2, "--prices", "0.1,0.7", "--thresholds", "0,0.5,1"
    )
    assert [row["variant"] for row in rows] == ["layerskip", "soft", "plain", "frozen", "jei", "jei"]
    assert {row["training_tokens"] for row in rows} == {8 * 2 * 32}
    assert [row["head_steps"] for row in rows] == [0, 0, 0, 2, 2, 2]
    assert len({row["backbone_parameters"] for row in rows}) == 1
    for row in rows:
        assert len(row["exits"]) == 4 and all(0 <= right <= 1 for right in row["exits"])
        first, _, last = row["curve"]
        assert first["layers"] == 1 and last["layers"] == 4 and last["accuracy"] == pytest.approx(row["exits"][-1])
        added = row["parameters"] - row["backbone_parameters"]
        assert added == 0 if row["head_steps"] == 0 else added > 0


@pytest.mark.slow
def test_stops_are_judged_on_tokens_and_completions(data, tmp_path):
    vocab_size = models.load_tokenizer(data).get_vocab_size()
    sizes = {"num_layers": 4, "d_model": 16, "d_ff": 24, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = models.ModelConfig(vocab_size=vocab_size, max_length=256, tie_embeddings=True, **sizes)
    model = models.Transformer(config, jax.random.key(0))
    models.save_hf(model, tmp_path / "model", tokenizer_file=data / "tokenizer.json")
    options = ["--model", tmp_path / "model", "--heldout", tmp_path / "heldout.py", "--config", "tiny"]
    options += ["--run", data, "--stop-thresholds", "1,0", "--exit-thresholds", "1"]
    rows = run_script("stops.py", *options, "--tokens", 128, "--window", 64, "--completions", 2, "--batch", 2)
    never, always = rows
    assert never["stopped"] == never["tokens_saved"] == never["layers_saved"] == never["useful_lost"] == 0
    assert always["stopped"] > 0 and always["hopeless"] == never["hopeless"]
