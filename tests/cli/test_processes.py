"""``dyninf batch`` and ``generate`` on a mesh, in one process and in two that ``jax.distributed`` joins."""

import argparse
import json
import os
import socket
import subprocess
import sys
import time

import jax
import pytest

from dyninf.cli import main
from dyninf.cli.processes import ENVIRONMENT, join
from dyninf.models import processes

LINES = [
    {"prompt": "def add(a", "id": "add"},
    {"prompt": "self.x = x"},
    {"prompt": "", "id": "empty"},
    {"prompt": "import os", "max_new_tokens": 3},
    {"tokens": [7, 8, 9], "seed": 5},
]
MESH = ("--mesh", "data=2,tensor=2")


def command(folder, where, target, *arguments):
    options = ("--plan", "exit_half", "--max-new-tokens", "6", "--batch", "2")
    return [
        "batch",
        "--model",
        folder,
        "--input",
        str(where / "in.jsonl"),
        "--output",
        str(target),
        *options,
        *arguments,
    ]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A folder with an input, and the bytes of a job on one device."""
    where = tmp_path_factory.mktemp("mesh")
    (where / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert main(command(folder, where, where / "out.jsonl")) == 1  # one line is empty
    return where, (where / "out.jsonl").read_bytes()


@pytest.mark.slow  # two processes, below, run the same on the same mesh
def test_a_mesh_gives_the_lines_of_one_device_and_another_one_goes_on(finished, folder, tmp_path):
    where, results = finished
    target = tmp_path / "out.jsonl"
    assert main(command(folder, where, target, *MESH)) == 1
    assert target.read_bytes() == results
    target.write_bytes(results[: len(results) // 2])
    assert main(command(folder, where, target, "--mesh", "data=2")) == 1
    assert target.read_bytes() == results


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--mesh", "data=16"), "expected a mesh of 1 to 8 devices, got data=16 = 16"),
        (("--mesh", "tensor=4"), "to divide by tensor=4, got"),
        (
            ("--mesh", "data=4"),
            "expected --batch to divide by the 4 parts in which the mesh splits it (data x fsdp), got 2",
        ),
        (("--mesh", "rows=2"), "expected a mesh as NAME=SIZE"),
        (("--coordinator", "here"), "expected --coordinator HOST:PORT, got 'here'"),
        (
            ("--num-processes", "2", "--process-id", "2"),
            "expected --process-id from 0 to --num-processes - 1, got 2 of 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_work(arguments, message, finished, folder, tmp_path, capsys):
    target = tmp_path / "out.jsonl"
    assert main(command(folder, finished[0], target, *arguments)) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_options_come_before_the_environment_and_that_before_what_jax_finds(monkeypatch):
    for variable in ENVIRONMENT.values():
        monkeypatch.delenv(variable, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: calls.append(given))

    def asked(**options):
        join(argparse.Namespace(**{"distributed": False} | dict.fromkeys(ENVIRONMENT) | options))

    asked(distributed=True)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host0:8476")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    asked()  # one process, whatever the environment says
    asked(distributed=True)
    asked(process_id=2)
    assert calls == [(None, None, None), ("host0:8476", 4, 1), ("host0:8476", 4, 2)]
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(ValueError, match="a whole number in JAX_PROCESS_ID, got 'first'"):
        asked(distributed=True)

    def refuse(*_, **__):
        raise RuntimeError("nobody\nthere")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(
        ValueError, match="join the processes of this job, got: nobody there; give each of them --coord"
    ):
        asked(process_id=2)


def start_two(commands):
    """Start a command in each of two processes, of two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_NUM_PROCESSES": "2"}
    environment |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_COORDINATOR_ADDRESS": address}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "dyninf", *line, "--process-id", str(place)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place, line in enumerate(commands)
    ]


def run_two(commands):
    """The exit status, output and errors of each of two processes."""
    processes = start_two(commands)
    ends = [process.communicate(timeout=280) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


def test_two_processes_give_the_lines_of_one(finished, folder, tmp_path):
    where, results = finished
    target = tmp_path / "out.jsonl"
    first, second = run_two([command(folder, where, target, *MESH)] * 2)
    assert (first[0], second[0]) == (1, 1), (first, second)
    assert target.read_bytes() == results
    assert "1 of 5 lines failed" in first[2] and "lines" not in second[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", [0, 1])
def test_a_job_that_was_killed_goes_on_in_two_processes(place, finished, folder, tmp_path):
    lines = [{"tokens": [5 + i] * (1 + i % 16), "max_new_tokens": 1 + 7 * i % 16} for i in range(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn, target = ("--temperature", "0.9", *MESH), tmp_path / "out.jsonl"
    assert main(command(folder, tmp_path, target, *drawn)) == 0
    whole = target.read_bytes()
    target.unlink()
    processes = start_two([command(folder, tmp_path, target, *drawn)] * 2)
    while not target.exists() or target.stat().st_size < len(whole) // 4:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.001)
    for process in (processes[place], processes[1 - place]):
        process.kill()
        process.communicate()
    assert whole.startswith(target.read_bytes()) and target.stat().st_size < len(whole)
    assert [end[0] for end in run_two([command(folder, tmp_path, target, *drawn)] * 2)] == [0, 0]
    assert target.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--plan", "dense"), "expected the same of every process, got plan: 'exit_half' -> 'dense'"),
        (("--input", "other"), "expected the same of every process, got input: '"),
        (("--input", "missing"), "process 1 of 2: [Errno 2] No such file or directory"),
        (("--batch", "0"), "process 1 of 2: expected --batch of at least 1, got 0"),
    ],
)
def test_processes_that_disagree_stop_before_work(arguments, message, finished, folder, tmp_path):
    arguments = [str(tmp_path / "other") if part == "other" else part for part in arguments]
    (tmp_path / "other").write_text('{"prompt": "x"}\n')
    line, target = command(folder, finished[0], tmp_path / "out.jsonl", *MESH), tmp_path / "out.jsonl"
    first, second = run_two([line, [*line, *arguments]])
    assert (first[0], second[0]) == (2, 2)
    assert first[2].count("dyninf: error: ") == 1 and message in first[2]
    assert second[2].count("dyninf: error: ") == 1 and not target.exists()


@pytest.mark.slow
def test_two_processes_need_a_mesh_of_all_their_devices(finished, folder, tmp_path):
    for _, _, err in run_two([command(folder, finished[0], tmp_path / "out.jsonl", "--mesh", "data=2")] * 2):
        assert "expected --mesh over all 4 devices of 2 processes, got data=2; use data=4, for one" in err


@pytest.mark.slow
def test_two_processes_generate_what_one_does(folder, capsys):
    line = ["generate", "--model", folder, "--max-new-tokens", "12", "--plan", "exit_half"]
    assert main([*line, "--prompt", "def add(a"]) == 0
    alone = capsys.readouterr().out
    # What the second process is given to continue is not read.
    first, second = run_two([[*line, *MESH, "--prompt", "def add(a"], [*line, *MESH, "--prompt", "other"]])
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert first[1].endswith(alone) and alone not in second[1]  # behind what the collectives say
    assert "12 tokens" in first[2] and "agreement with dense" in first[2] and "tokens" not in second[2]


def test_what_one_process_finds_all_raise(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda value: [value, "expected this"])
    with pytest.raises(ValueError, match=r"^process 1 of 2: expected this$"), processes.together():
        pass
    with pytest.raises(OSError, match=r"^mine$"), processes.together():
        raise OSError("mine")
    monkeypatch.setattr(processes, "gather", lambda value: [value, value, {"plan": "dense", "jax": "1"}])
    processes.agree({"jax": "1", "plan": "dense"})
    with pytest.raises(
        ValueError, match=r"got jax: '2' -> '1'; dyninf: 3 -> None \(process 0 -> process 2\); give all"
    ):
        processes.agree({"jax": "2", "plan": "dense", "dyninf": 3})
