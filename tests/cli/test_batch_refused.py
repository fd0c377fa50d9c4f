"""The command batch: lines and jobs that are refused, and what is left of the rest."""

import errno
import fcntl

import pytest

import dyninf
from dyninf.cli import batch, main
from dyninf.configs.plans import plans
from tests.cli.test_batch import alone, command, rows_of, tokens_of, write

LINES = [{"tokens": [7, 8, 9]}, {"tokens": [5]}]


@pytest.fixture
def begun(folder, tmp_path):
    """The input and the output of a finished job, and what the output holds."""
    source, target = write(tmp_path / "prompts.jsonl", LINES), tmp_path / "out.jsonl"
    assert main(command(folder, source, target)) == 0
    return source, target, target.read_bytes()


BAD = [
    (b"", "got an empty line"),
    (b"{", "expected a JSON object"),
    (b'"text"', "expected a JSON object, got str"),
    (b"\xff", "expected UTF-8"),
    (b'{"prompt": "a", "metadata": NaN}', "expected a JSON object"),
    (b'{"prompt": "a", "metadata": 1e999}', "expected a JSON object"),
    (b"[" * 100_000, "expected a JSON object"),
    ({}, "expected either prompt or tokens, got neither"),
    ({"prompt": None}, "got neither"),
    ({"prompt": "a", "tokens": [1]}, "got both"),
    ({"prompt": 3}, "expected prompt to be a text"),
    ({"prompt": ""}, "at least one token"),
    ({"prompt": "\ud800"}, "whole characters"),
    ({"prompt": "x = 1\n" * 60}, "the model's context of 96"),
    ({"tokens": []}, "at least one token"),
    ({"tokens": "abc"}, "expected tokens to be a list"),
    ({"tokens": [290]}, "token ids between 0 and 289, got 290"),
    ({"tokens": [-1]}, "got -1"),
    ({"tokens": [True]}, "got True"),
    ({"tokens": [10**30]}, "token ids between 0 and 289"),
    ({"tokens": [5], "max_new_tokens": 0}, "at least 1, got 0"),
    ({"tokens": [5], "max_new_tokens": 96}, "got 1 + 96"),
    ({"tokens": [5], "max_new_tokens": "6"}, "at least 1, got '6'"),
    ({"tokens": [5], "seed": -1}, "expected seed"),
    ({"tokens": [5], "seed": 2**32}, "expected seed"),
    ({"tokens": [5], "id": 1.5}, "expected id"),
    ({"tokens": [5], "id": [1]}, "expected id"),
    ({"tokens": [5], "id": 1}, "which is that of line 1"),
    ({"tokens": [5], "max_tokens": 5}, "got 'max_tokens'; put others into metadata"),
]


def test_a_bad_line_is_reported_and_stops_nothing(folder, loaded, tmp_path, capsys):
    good = {"tokens": [7, 8, 9]}
    source, target = write(tmp_path / "in.jsonl", [good, *(line for line, _ in BAD), good]), tmp_path / "out.jsonl"
    assert main(command(folder, source, target)) == 1
    rows = {row["line"]: row for row in rows_of(target)}
    assert sorted(rows) == list(range(1, len(BAD) + 3))
    for number, (line, said) in enumerate(BAD, start=2):
        assert said in rows[number]["error"], line
        assert "\n" not in rows[number]["error"] and len(rows[number]["error"]) < 250
    assert (
        rows[1]["tokens"] == rows[len(BAD) + 2]["tokens"] == tokens_of(alone(loaded, good, plans(4)["exit_half"]), good)
    )
    err = capsys.readouterr().err
    assert f"{len(BAD)} of {len(BAD) + 2} lines failed, the first in line 2: " in err and err.count("\n") == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--input", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--input", "/dev/null"], "cannot be read twice"),
        (["--input", "EMPTY"], "at least one line"),
        (["--output", "no/such/folder/out.jsonl"], "folder that exists"),
        (["--output", "/proc/out.jsonl"], "/proc/out.jsonl"),
        (["--output", "/dev/null"], "which is none"),
        (["--output", "INPUT"], "not the input"),
        (["--plan", "fast"], "expected a plan among"),
        (["--model", "nowhere"], "nowhere"),
        (["--shard", "2/2"], "--shard I/N"),
        (["--shard", "1"], "--shard I/N"),
        (["--batch", "0"], "--batch of at least 1"),
        (["--seed", "-1"], "--seed between 0"),
        (["--top-p", "2"], "between 0 and 1"),
        (["--plan", "evict_h2o", "--prefill-chunk", "4"], "read in chunks"),
        (["--plan", "sparse_a_shape", "--prefill-chunk", "3"], "a chunk of a multiple of"),
    ],
    ids=lambda value: "-".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_bad_job_is_refused_before_any_work(changes, said, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batch, "answer", None)
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    (tmp_path / "empty").write_bytes(b"")
    named = {"INPUT": str(source), "EMPTY": str(tmp_path / "empty")}
    before = source.read_bytes()
    assert main(command(folder, source, target, *(named.get(change, change) for change in changes))) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("dyninf: error: ") and err.count("\n") == 1
    assert source.read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == ["empty", "in.jsonl"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--plan", "dense"], "plan: 'depth=ExitAt(layer=2)' -> 'dense'"),
        (["--temperature", "0.5"], "sampler=Chain"),
        (["--seed", "1"], "seed: 0 -> 1"),
        (["--max-new-tokens", "7"], "max_new_tokens: 6 -> 7"),
        (["--dtype", "bfloat16"], "dtype: 'float32' -> 'bfloat16'"),
        (["--prefill-chunk", "8"], "prefill_chunk: None -> 8"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_output_of_another_job_is_refused(changes, said, begun, folder, capsys):
    source, target, results = begun
    target.write_bytes(results[:-5])
    assert main(command(folder, source, target, *changes)) == 2
    assert said in capsys.readouterr().err and target.read_bytes() == results[:-5]


def test_an_output_of_another_input_version_or_kind_is_refused(begun, folder, tmp_path, capsys, monkeypatch):
    source, target, results = begun
    header = tmp_path / "out.jsonl.job.json"

    def refused(said, source=source):
        before = target.read_bytes(), header.read_bytes() if header.exists() else None
        assert main(command(folder, source, target)) == 2
        assert said in capsys.readouterr().err
        assert before == (target.read_bytes(), header.read_bytes() if header.exists() else None)

    refused("input: ", write(tmp_path / "other.jsonl", LINES[1:]))
    monkeypatch.setattr(dyninf, "__version__", "99")
    refused("dyninf: ")
    monkeypatch.undo()
    target.write_bytes(results + b'{"line": 1}\n')  # twice
    refused(f"in line {len(LINES) + 1}")
    target.write_bytes(b"my diary\n" + results)
    refused("in line 1;")
    target.write_bytes(results)
    header.write_bytes(b"{}")
    refused("something else")
    header.unlink()
    refused("with out.jsonl.job.json beside it")
    with target.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused("no other process")


def test_a_full_disk_keeps_what_was_written(begun, folder, monkeypatch, capsys):
    source, target, results = begun
    target.write_bytes(results.splitlines(keepends=True)[0])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dyninf.cli.batch_output.os.fsync", full)
    assert main(command(folder, source, target)) == 2
    err = capsys.readouterr().err
    assert "No space left on device; finished lines are kept" in err and err.count("\n") == 1
    monkeypatch.undo()
    assert main(command(folder, source, target)) == 0 and target.read_bytes() == results
