"""Checkpoints: bit for bit back, whole or not at all, and one clear error for everything else."""

import dataclasses
import logging
import pickle
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dyninf.training import checkpoints
from dyninf.training.step import TrainState


def make_state(step, shape=(3, 5)):
    values = np.random.default_rng(step).standard_normal(shape).astype(np.float32)
    values[0, :2] = np.nan, -0.0
    narrow = jnp.asarray(values[1:], jnp.bfloat16)
    return TrainState(model={"w": jnp.asarray(values), "b": narrow}, optimizer=(jnp.int32(7),), step=jnp.int32(step))


def same(a, b):
    return [x.tobytes() for x in map(np.asarray, jax.tree.leaves(a))] == [
        x.tobytes() for x in map(np.asarray, jax.tree.leaves(b))
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 4 and 12, which must not be changed."""
    folder = tmp_path_factory.mktemp("saved")
    for step in (4, 12):
        checkpoints.save(folder, make_state(step))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_the_last_state_comes_back_bit_for_bit(folder):
    assert checkpoints.latest(folder) == 12  # 4 comes after 12 in a directory listing
    restored = checkpoints.restore(folder, make_state(0))
    assert same(restored, make_state(12)) and not same(restored, make_state(4))
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [leaf.dtype for leaf in jax.tree.leaves(make_state(0))]


def test_the_last_two_are_kept(folder):
    checkpoints.save(folder, make_state(100))
    assert sorted(path.name for path in folder.iterdir()) == ["100", "12"]
    assert same(checkpoints.restore(folder, make_state(0)), make_state(100))


def test_without_a_checkpoint(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.latest(tmp_path / "missing") is None
    with pytest.raises(ValueError, match="got none"):
        checkpoints.restore(tmp_path, make_state(0))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="got a file"):
        checkpoints.latest(tmp_path / "file")


def test_what_is_no_checkpoint_is_not_looked_at(folder):
    for name in ("best", ".20.incomplete", "20.orbax-checkpoint-tmp", "-1", "²"):
        (folder / name).mkdir()
    (folder / "99").write_text("a file")
    assert checkpoints.latest(folder) == 12
    checkpoints.save(folder, make_state(20))
    assert (folder / "best").is_dir() and checkpoints.latest(folder) == 20


def delete(path):
    path.unlink()


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 0x11
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [delete, halve, flip])
def test_any_damaged_file_is_refused_in_one_line_and_the_one_before_is_left(damage, saved, tmp_path, capfd):
    files = [file.relative_to(saved) for file in sorted((saved / "12").rglob("*")) if file.is_file()]
    assert len(files) > 8
    for number, file in enumerate(files):
        folder = Path(shutil.copytree(saved, tmp_path / str(number)))
        damage(folder / file)
        with pytest.raises(ValueError, match=rf"expected a whole checkpoint .*/{number}/12'.* delete that folder") as e:
            checkpoints.restore(folder, make_state(0))
        assert "\n" not in str(e.value)
    assert capfd.readouterr() == ("", "")
    shutil.rmtree(folder / "12")  # as the message says
    assert same(checkpoints.restore(folder, make_state(0)), make_state(4))


def test_another_run_is_refused(folder):
    with pytest.raises(ValueError, match="'leaf_0000' missing or changed"):
        checkpoints.restore(folder, make_state(0, shape=(3, 4)))
    fewer = dataclasses.replace(make_state(0), optimizer=())
    with pytest.raises(ValueError, match="missing or changed"):
        checkpoints.restore(folder, fewer)
    (folder / "12").rename(folder / "30")
    with pytest.raises(ValueError, match="/30', got 'step' missing or changed"):
        checkpoints.restore(folder, make_state(0))


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_foreign_folder_is_refused_and_nothing_is_unpickled(folder, tmp_path):
    evil = pickle.dumps(Touch(tmp_path / "unpickled"))
    pickle.loads(evil)
    (tmp_path / "unpickled").unlink()  # so it works
    for number, names in enumerate((["state.pkl"], ["checkpoint.json", "arrays/_METADATA"], ["checkpoint"])):
        for name in names:
            file = folder / str(13 + number) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(evil)
        with pytest.raises(ValueError, match=rf"expected a whole checkpoint of this run in .*/{13 + number}'"):
            checkpoints.restore(folder, make_state(0))
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("error", [ValueError("RESOURCE_EXHAUSTED: no space\nmany\nlines"), OSError(28, "No space")])
def test_a_failed_save_is_one_os_error_and_leaves_no_trace(error, folder, monkeypatch):
    before = sorted(folder.rglob("*"))

    def write_some(self, path, args):
        path.mkdir(parents=True)
        (path / "part").write_bytes(b"1234")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", write_some)
        with pytest.raises(OSError, match=r"checkpoint of step 15 .*(no space|No space).*free disk space") as caught:
            checkpoints.save(folder, make_state(15))
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before
    assert same(checkpoints.restore(folder, make_state(0)), make_state(12))
    assert logging.getLogger("absl").level != logging.CRITICAL
    checkpoints.save(folder, make_state(15))
    assert checkpoints.latest(folder) == 15


def test_too_little_space_is_found_before_writing(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 7))
    with pytest.raises(OSError, match=re.escape("do not fit into 7 free bytes")):
        checkpoints.save(folder, make_state(15))
    assert checkpoints.latest(folder) == 12
