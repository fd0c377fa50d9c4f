"""Whole runs in processes of their own: finished, killed and started again, and stopped by a full disk.

The processes share compiled programs through JAX's compilation cache, and report whatever they unpickle.
"""

import dataclasses
import json
import os
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
from dyninf import models
from dyninf.training import checkpoints, loop, meshes
from dyninf.training.data import TokenData, fingerprint
from dyninf.training.step import init_state

PROGRAM = """
import json, resource, sys

from dyninf.models import ModelConfig
from dyninf.training.loop import train
from dyninf.training.recipe import Recipe

run, config, recipe, limit_after = sys.argv[1], *map(json.loads, sys.argv[2:])


def watch(event, arguments):
    if event == "pickle.find_class":
        print("unpickled", arguments, flush=True)


def report(event):
    print(json.dumps(event), flush=True)
    if event["event"] == "saved" and event["step"] == limit_after:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))


sys.addaudithook(watch)
try:
    train(ModelConfig(**config), Recipe(**recipe), run, report=report)
except OSError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory, config, recipe):
    """Start a process that trains in a directory; once step ``limit_after`` is saved it cannot write large files."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    described = [json.dumps(dataclasses.asdict(value)) for value in (config, recipe)]

    def start(run, limit_after=-1):
        command = [sys.executable, "-c", PROGRAM, str(run), *described, str(limit_after)]
        return subprocess.Popen(
            command, env=os.environ | settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return start


@pytest.fixture(scope="module")
def finished(copy_data, start, tmp_path_factory):
    """A run directory that was never interrupted, and what the process said; must not be changed."""
    folder = copy_data(tmp_path_factory.mktemp("finished") / "run")
    said, complaints = start(folder).communicate(timeout=240)
    assert complaints == ""
    return folder, said


def events_of(said):
    return [json.loads(line) for line in said.splitlines()]


def log_of(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def test_a_run_makes_a_model_that_loads(finished, config):
    run, said = finished
    events = events_of(said)
    model, tokenizer = models.load(run / "model"), models.load_tokenizer(run / "model")
    assert model.config == dataclasses.replace(config, eos_ids=(0,))
    assert fingerprint(tokenizer) == fingerprint(models.load_tokenizer(run))
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [10, 20, 30, 40, 50, 60, 64]
    assert [event["step"] for event in events if event["event"] == "saved"] == [*range(3, 64, 3), 64]
    assert steps[0]["final_loss"] > 5 > 4 > steps[-1]["final_loss"]  # log 300 is 5.7
    assert all(event["tokens_per_second"] > 0 for event in steps)
    assert [event for event in events if event["event"] in ("step", "eval")] == [
        json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()
    ]
    # The last evaluation, with the weights as they were saved (bfloat16).
    last = [event for event in events if event["event"] == "eval"][-1]
    held_out = TokenData.open(run / "heldout.tokens")
    tokens = np.concatenate([held_out.batch(i, batch_size=2, length=16, seed=0) for i in range(2)])
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
    logits = jax.jit(dyninf.forward)(model, tokens[:, :-1]).logits
    loss = -np.mean(np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[:, 1:, None], -1))
    assert last["step"] == 64 and len(last["exit_losses"]) == 3
    assert abs(loss - last["exit_losses"][-1]) < 0.02


def test_nothing_is_unpickled(finished):
    assert "unpickled" not in finished[1]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_losses_and_the_same_model(finished, run, start, config, recipe):
    expected, resumed = finished[0], []
    for number in range(2):
        process = start(run)
        log, aim = run / "log.jsonl", 10 + 20 * number
        deadline = time.monotonic() + 120
        while not (log.exists() and f'"step": {aim},' in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.005)
        moment = random.uniform(0, 0.5)  # not from a seed: any moment must do, inside a save, an evaluation, a step
        time.sleep(moment)
        process.kill()
        said, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"ended before the kill at {moment} s"
        resumed += [event["step"] for event in events_of(said[: said.rfind("\n")]) if event["event"] == "resumed"]
        with log.open("ab") as file:
            file.write(b'{"event": "step", "step": 1\xff'[: 10 + 30 * number])
    said, complaints = start(run).communicate(timeout=240)
    assert complaints == ""
    resumed += [event["step"] for event in events_of(said) if event["event"] == "resumed"]
    assert len(resumed) == 2 and 9 <= resumed[0] <= resumed[1] and resumed[1] >= 27
    assert log_of(run) == log_of(expected)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (run / "model" / name).read_bytes() == (expected / "model" / name).read_bytes()
    states = [checkpoints.restore(folder / "checkpoints", init_state(config, recipe)) for folder in (run, expected)]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *states)))


def test_a_full_disk_is_one_error_and_the_run_goes_on_from_the_checkpoint_before(finished, run, start, config, recipe):
    said, complaints = start(run, limit_after=12).communicate(timeout=240)
    *events, refused = said.splitlines()
    assert complaints == ""
    assert refused.startswith("refused: could not write the checkpoint of step 15 in ") and "File too large" in refused
    assert json.loads(events[-1]) == {"event": "saved", "step": 12}
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["12", "9"]
    state = checkpoints.restore(run / "checkpoints", init_state(config, recipe))
    assert int(state.step) == 12
    assert log_of(run) == log_of(finished[0])[:1]


def test_a_finished_run_only_writes_its_model_again(finished, config, recipe, monkeypatch):
    monkeypatch.setattr(meshes, "train_step", None)
    before = {file: file.read_bytes() for file in sorted(finished[0].rglob("*")) if file.is_file()}
    events = []
    assert loop.train(config, recipe, finished[0], report=events.append) == finished[0] / "model"
    assert events == [{"event": "resumed", "step": 64}]
    assert before == {file: file.read_bytes() for file in sorted(finished[0].rglob("*")) if file.is_file()}
