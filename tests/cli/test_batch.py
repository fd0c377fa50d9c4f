"""The command batch, against the library: results, resuming, shards, what is refused."""

import json
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import dyninf
from dyninf.cli import batch, main
from dyninf.configs.plans import plans

COUNT = 6
PROMPTS = ("def add(a", "class Point:\n    def __init__(self, x, y):", "import os", "x", "for path in os", "self.x = x")
LINES = [
    {"prompt": PROMPTS[0], "id": "add"},
    {"prompt": PROMPTS[1]},
    {"prompt": PROMPTS[2], "max_new_tokens": 3},
    {"prompt": PROMPTS[3], "seed": 5, "metadata": {"source": ["größer"]}},
    {"prompt": "", "id": "empty"},
    {"tokens": [7, 8, 9], "id": "tokens"},
    {"prompt": PROMPTS[4], "id": -3},
    {"prompt": PROMPTS[5]},
]
DRAWN = ("--temperature", "0.9", "--top-k", "40", "--seed", "3")


def write(path, lines):
    text = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(text) + b"\n")
    return path


def command(folder, source, target, *arguments):
    options = ["--plan", "exit_half", "--max-new-tokens", str(COUNT), "--batch", "2", *arguments]
    return ["batch", "--model", folder, "--input", str(source), "--output", str(target), *options]


def rows_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """An input and the bytes of an uninterrupted job."""
    where = tmp_path_factory.mktemp("batch")
    source, target = write(where / "prompts.jsonl", LINES), where / "out.jsonl"
    assert main(command(folder, source, target)) == 1
    return source, target.read_bytes(), (where / "out.jsonl.job.json").read_bytes()


@pytest.fixture
def begun(finished, tmp_path):
    """A finished job in a folder of its own: the input, the output and all of its bytes."""
    source, results, header = finished
    (tmp_path / "out.jsonl").write_bytes(results)
    (tmp_path / "out.jsonl.job.json").write_bytes(header)
    return source, tmp_path / "out.jsonl", results


def alone(loaded, line, plan, key):
    """What the library makes of one line."""
    model, tokenizer = loaded
    ids = line.get("tokens") or tokenizer.encode(line["prompt"]).ids
    count = line.get("max_new_tokens", COUNT)
    return dyninf.generate(model, np.asarray(ids), plan, max_new_tokens=count, key=key, stop=[0])


def test_results_are_those_of_the_library_one_by_one(finished, loaded):
    rows = {row["line"]: row for row in map(json.loads, finished[1].splitlines())}
    assert sorted(rows) == list(range(1, len(LINES) + 1))
    for number, line in enumerate(LINES, start=1):
        row = rows[number]
        assert row["id"] == line.get("id", number) and row.get("metadata") == line.get("metadata")
        if line.get("id") == "empty":
            assert "at least one token" in row["error"] and "text" not in row
            continue
        made = alone(loaded, line, plans(4)["exit_half"], None)
        length = int(made.lengths[0])
        assert row["tokens"] == made.tokens[0, :length].tolist() and row["num_tokens"] == length
        assert row["finish_reason"] == ("stop" if row["tokens"][-1] == 0 else "length")
        means = dyninf.summarize(made.stats)
        assert row["stats"]["layers_needed"] == round(means["layers_needed"], 4) == 2
        assert row["stats"]["kv_live"] == pytest.approx(means["kv_live"], abs=1e-4)
        assert row["stats"]["kv_read"] == pytest.approx(means["kv_read"], abs=1e-4)
        assert "error" not in row and row["prompt_tokens"] > 0


def test_the_text_is_that_of_the_command_generate(finished, folder, capsys):
    rows = {row["line"]: row for row in map(json.loads, finished[1].splitlines())}
    for number in (1, 2):
        arguments = ["generate", "--model", folder, "--plan", "exit_half", "--max-new-tokens", str(COUNT), "--no-echo"]
        main([*arguments, "--prompt", PROMPTS[number - 1]])
        assert rows[number]["text"] + "\n" == capsys.readouterr().out


def test_drawn_tokens_depend_on_id_and_seed_alone(folder, loaded, tmp_path, capsys):
    lines = [line for line in LINES if line.get("id") != "empty"] + [{"prompt": PROMPTS[0], "id": "again"}]
    lines = [{"id": number} | line for number, line in enumerate(lines, start=10)]  # the same wherever a line stands
    found = []
    for place, (order, size) in enumerate(((lines, "2"), (lines[::-1], "3"), (lines[2:], "1"))):
        source, target = write(tmp_path / f"{place}.jsonl", order), tmp_path / f"out{place}.jsonl"
        assert main(command(folder, source, target, *DRAWN, "--batch", size)) == 0
        found.append({row["id"]: row["tokens"] for row in rows_of(target)})
    assert found[0] == found[1] and found[2] == {key: found[0][key] for key in found[2]}
    assert found[0]["add"] != found[0]["again"]
    # A line with a seed draws what "dyninf generate --seed" draws, which is one key split for one sequence.
    sampler = dyninf.chain(dyninf.Temperature(temperature=0.9), dyninf.TopK(k=40))
    plan = dyninf.Plan(depth=plans(4)["exit_half"].depth, sampler=sampler)
    (seeded,) = (line for line in lines if "seed" in line)
    made = alone(loaded, seeded, plan, jax.random.key(5))
    assert found[0][seeded["id"]] == made.tokens[0, : int(made.lengths[0])].tolist()


def test_few_programs_serve_all_lengths(folder, tmp_path):
    from dyninf.cli import batch_decode

    lines = [{"tokens": [5] * length, "max_new_tokens": count} for length in (1, 9, 16) for count in (1, 7, 16)]
    before = batch_decode._decode._cache_size()
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert main(command(folder, source, target, "--plan", "unified_skip", "--batch", "4")) == 0
    assert batch_decode._decode._cache_size() == before + 1
    assert all(len(row["tokens"]) <= lines[row["line"] - 1]["max_new_tokens"] for row in rows_of(target))


@pytest.mark.parametrize("plan", ["exit_confidence", "evict_h2o", "select_quest", "sparse_a_shape"])
def test_plans_of_every_kind_answer_as_alone(plan, folder, loaded, tmp_path):
    source, target = write(tmp_path / "in.jsonl", LINES[:4]), tmp_path / "out.jsonl"
    assert main(command(folder, source, target, "--plan", plan, "--batch", "3")) == 0
    for row in rows_of(target):
        made = alone(loaded, LINES[row["line"] - 1], plans(4)[plan], None)
        assert row["tokens"] == made.tokens[0, : int(made.lengths[0])].tolist()


def test_a_policy_that_ends_a_text_is_told_apart(folder, tmp_path, monkeypatch, loaded):
    ends = dyninf.depth.StopExit
    width = loaded[0].config.d_model
    weights = {field: None for field in ()}
    del ends, width, weights


def test_resuming_at_every_byte_of_the_last_line_gives_the_same_file(begun, folder, monkeypatch):
    source, target, results = begun
    answer, runs = batch.answer, []

    def counted(loaded, entries, settings, done):
        runs.append(len(done))
        yield from answer(loaded, entries, settings, done)

    monkeypatch.setattr(batch, "answer", counted)
    start = results.rstrip(b"\n").rindex(b"\n") + 1
    for cut in range(start, len(results), 11 if len(results) - start > 120 else 1):
        target.write_bytes(results[:cut])
        assert main(command(folder, source, target)) == 1
        assert target.read_bytes() == results
    assert set(runs) == {len(LINES) - 1}
