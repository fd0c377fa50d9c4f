"""The command batch, against the library: results, resuming, shards, what is refused."""

import argparse
import json
import operator
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyninf
from dyninf.cli import batch, batch_decode, main
from dyninf.cli.plan_options import read_plan
from dyninf.configs.plans import plans
from dyninf.depth.base import EXIT, RUN
from dyninf.pytree import pytree

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


def alone(loaded, line, plan, key=None):
    """What the library makes of one line by itself; padded, so that one program serves all."""
    model, tokenizer = loaded
    ids = line.get("tokens") or tokenizer.encode(line["prompt"]).ids
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(ids)] = ids
    return dyninf.generate(model, padded, plan, max_new_tokens=COUNT, key=key, lengths=[len(ids)], stop=[0])


def tokens_of(made, line):
    return made.tokens[0, : int(made.lengths[0])].tolist()[: line.get("max_new_tokens", COUNT)]


def test_results_are_those_of_the_library_one_by_one(finished, loaded):
    rows = {row["line"]: row for row in map(json.loads, finished[1].splitlines())}
    assert sorted(rows) == list(range(1, len(LINES) + 1))
    for number, line in enumerate(LINES, start=1):
        row = rows[number]
        assert row["id"] == line.get("id", number) and row.get("metadata") == line.get("metadata")
        if line.get("id") == "empty":
            assert "at least one token" in row["error"] and "text" not in row
            continue
        made = alone(loaded, line, plans(4)["exit_half"])
        assert row["tokens"] == tokens_of(made, line) and row["num_tokens"] == len(row["tokens"])
        assert row["finish_reason"] == ("stop" if row["tokens"][-1] == 0 else "length")
        assert row["stats"]["layers_needed"] == 2 and "error" not in row and row["prompt_tokens"] > 0
        if "max_new_tokens" not in line:
            means = dyninf.summarize(made.stats)
            assert row["stats"] == pytest.approx({name: means[name] for name in row["stats"]}, abs=1e-4)


def test_the_text_is_what_the_tokens_add_to_the_prompt(finished, loaded):
    for row in map(json.loads, finished[1].splitlines()):
        if "prompt" in LINES[row["line"] - 1] and "error" not in row:
            prompt = loaded[1].encode(LINES[row["line"] - 1]["prompt"]).ids
            whole = loaded[1].decode([*prompt, *(token for token in row["tokens"] if token)])
            assert row["text"] == whole[len(loaded[1].decode(prompt)) :].rstrip("\ufffd")  # whole characters only


def test_drawn_tokens_depend_on_id_and_seed_alone(folder, loaded, tmp_path, capsys):
    lines = [line for line in LINES[2:] if line.get("id") != "empty"]
    lines += [{"prompt": PROMPTS[0], "id": "add"}, {"prompt": PROMPTS[0], "id": "again"}]
    lines = [{"id": number} | line for number, line in enumerate(lines, start=10)]  # the same wherever a line stands
    found = []
    for place, (order, size) in enumerate(((lines, "2"), (lines[::-1], "2"), (lines[1:], "2"))):
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
    assert found[0][seeded["id"]] == tokens_of(made, seeded)


def test_few_programs_serve_all_lengths(folder, tmp_path):
    lines = [{"tokens": [5] * length, "max_new_tokens": count} for length in (1, 9, 16) for count in (1, 7, 16)]
    before = batch_decode._decode.plain._cache_size()
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert main(command(folder, source, target, "--batch", "3")) == 0
    assert batch_decode._decode.plain._cache_size() <= before + 1
    assert all(len(row["tokens"]) <= lines[row["line"] - 1]["max_new_tokens"] for row in rows_of(target))


@pytest.mark.slow
def test_exits_answer_as_alone(folder, loaded, tmp_path):
    change = "depth.threshold=0.5"
    plan = read_plan("exit_confidence", [change], 4)
    check_plan(plan, folder, loaded, tmp_path, "--plan", "exit_confidence", "--set", change)


@pytest.mark.slow
def test_a_small_cache_answers_as_alone(folder, loaded, tmp_path):
    change = "evict.budget=8"
    check_plan(read_plan("evict_tova", [change], 4), folder, loaded, tmp_path, "--plan", "evict_tova", "--set", change)


@pytest.mark.slow
@pytest.mark.parametrize("plan", plans(4))
def test_every_plan_answers_as_alone(plan, folder, loaded, tmp_path):
    check_plan(plans(4)[plan], folder, loaded, tmp_path, "--plan", plan)


def check_plan(plan, folder, loaded, where, *arguments):
    lines = [LINES[0], LINES[2], LINES[3]]
    source, target = write(where / "in.jsonl", lines), where / "out.jsonl"
    assert main(command(folder, source, target, *arguments, "--batch", "3")) == 0
    for row in rows_of(target):
        line = lines[row["line"] - 1]
        assert row["tokens"] == tokens_of(alone(loaded, line, plan), line)


@pytree()
class EndAt(dyninf.depth.DepthPolicy):
    """End every text at its third token."""

    def init(self, shape_BT):
        return jnp.zeros(shape_BT, bool)

    def update(self, state, obs):
        ends_BT = obs.step_BT + 1 == 3
        return jnp.where(ends_BT, EXIT, RUN), ends_BT

    def stops(self, state):
        return state

    def decision_layers(self, num_layers):
        return (2,)


def test_a_text_that_its_plan_ended_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "read_plan", lambda *_: dyninf.Plan(depth=EndAt()))
    lines = [{"tokens": [5, 6]}, {"tokens": [7, 8], "max_new_tokens": 2}, {"tokens": [9], "max_new_tokens": 1}]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert main(command(folder, source, target, "--batch", "4")) == 0
    rows = rows_of(target)
    assert [(row["num_tokens"], row["finish_reason"]) for row in rows] == [(3, "plan"), (2, "length"), (1, "length")]
    # 4, 4 and, where it ended, 2 layers.
    assert rows[0]["stats"]["layers_needed"] == 3.3333 and rows[2]["stats"]["layers_needed"] is None


def test_resuming_at_every_byte_of_the_last_line_gives_the_same_file(begun, folder, monkeypatch):
    source, target, results = begun
    fake_answers(monkeypatch, results)
    loaded = batch.load(argparse.Namespace(model=folder, dtype=None))
    monkeypatch.setattr(batch, "load", lambda _: loaded)
    for cut in range(results.rstrip(b"\n").rindex(b"\n") + 1, len(results) + 1):
        target.write_bytes(results[:cut])
        assert main(command(folder, source, target)) == 1
        assert target.read_bytes() == results


def fake_answers(monkeypatch, results):
    """Answer with the lines that are missing, without the time it takes to make them."""

    def answer(loaded, entries, settings, done):
        yield [row for row in map(json.loads, results.splitlines()) if row["line"] not in done]

    monkeypatch.setattr(batch, "answer", answer)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 0.97])
def test_resuming_in_the_middle_gives_the_same_file(share, begun, folder, capsys):
    source, target, results = begun
    target.write_bytes(results[: int(share * len(results))])
    assert main(command(folder, source, target)) == 1
    assert target.read_bytes() == results
    err = capsys.readouterr().err
    assert f"dyninf: 1 of {len(LINES)} lines failed, the first in line 5: " in err


def test_a_finished_job_runs_nothing_and_another_batch_may_finish_it(begun, folder, monkeypatch):
    source, target, results = begun
    target.write_bytes(results[:-3])
    assert main(command(folder, source, target, "--batch", "3")) == 1
    key = operator.itemgetter("line")
    assert sorted(rows_of(target), key=key) == sorted(map(json.loads, results.splitlines()), key=key)
    monkeypatch.setattr(batch_decode, "_start", None)
    before = target.read_bytes()
    assert main(command(folder, source, target)) == 1 and target.read_bytes() == before


def test_ctrl_c_keeps_what_is_finished(begun, folder, monkeypatch, capsys):
    source, target, results = begun
    target.unlink()

    def answer(*_):
        yield [json.loads(results.splitlines()[0])]
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "answer", answer)
    assert main(command(folder, source, target)) == 130
    assert f"after 1 of {len(LINES)} lines" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command(folder, source, target)) == 1 and target.read_bytes() == results


def test_shards_together_give_every_line_once(begun, folder, tmp_path, capsys):
    source, _, results = begun
    rows = []
    for place in range(3):
        target = tmp_path / f"shard{place}.jsonl"
        main(command(folder, source, target, "--shard", f"{place}/3"))
        found = rows_of(target)
        assert all((row["line"] - 1) % 3 == place for row in found)
        rows += found
    key = operator.itemgetter("line")
    assert sorted(rows, key=key) == sorted(map(json.loads, results.splitlines()), key=key)
    assert main(command(folder, source, tmp_path / "shard0.jsonl", "--shard", "1/3")) == 2
    assert "shard: '0/3' -> '1/3'" in capsys.readouterr().err
    assert main(command(folder, source, tmp_path / "none.jsonl", "--shard", "98/99")) == 0
    assert (tmp_path / "none.jsonl").read_bytes() == b""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_job_resumes_to_the_same_file(seed, folder, tmp_path):
    lines = [{"prompt": PROMPTS[i % 6] * (1 + i % 3), "max_new_tokens": 1 + 5 * i % 40} for i in range(24)] + [b"{"]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert main(command(folder, source, target, *DRAWN)) == 1
    whole = target.read_bytes()
    target.unlink()
    wanted = random.Random(seed).randrange(len(whole) - 200)
    process = subprocess.Popen([sys.executable, "-m", "dyninf", *command(folder, source, target, *DRAWN)])
    while process.poll() is None and (not target.exists() or target.stat().st_size <= wanted):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert wanted < target.stat().st_size < len(whole) and whole.startswith(target.read_bytes())
    assert main(command(folder, source, target, *DRAWN)) == 1
    assert target.read_bytes() == whole
