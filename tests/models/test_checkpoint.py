"""Our checkpoints: exact round trips, damage refused, and what was saved before survives a full disk and a kill."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from dyninf.models import RopeScaling, Transformer, available, load, load_tokenizer, save, save_hf, stack_layers
from dyninf.models.parameters import named_parameters


@pytest.fixture
def saved(tmp_path, small):
    """A model and the checkpoint it was saved to."""
    model = Transformer(small(), jax.random.key(0))
    save(model, tmp_path / "model")
    return model, tmp_path / "model"


def assert_same(got, wanted):
    assert got.config == wanted.config
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(wanted)]
    jax.tree.map(np.testing.assert_array_equal, named_parameters(got), named_parameters(wanted))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True, "eos_ids": (1, 2), "rope_scaling": RopeScaling(kind="linear", factor=2.0)},
        {"qkv_bias": True, "qk_norm": True, "windows": (3, None, 4)},
    ],
    ids=["tied", "windows"],
)
def test_round_trip_is_exact(changes, dtype, small, tmp_path):
    model = Transformer(small(**changes), jax.random.key(1), dtype)
    save(model, tmp_path / "a" / "b")
    assert_same(load(tmp_path / "a" / "b"), model)
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"b"}


def test_dtype_is_converted(saved):
    model, path = saved
    loaded = load(path, dtype=jnp.bfloat16)
    assert {array.dtype for array in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(loaded.layers[2].wo[...], model.layers[2].wo[...].astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="floating-point"):
        load(path, dtype=jnp.int32)


def test_stacked_layers_are_saved_one_by_one(saved, tmp_path):
    model, _ = saved
    save(stack_layers(model), tmp_path / "stacked")
    assert_same(load(tmp_path / "stacked"), model)


def test_existing_checkpoint_is_replaced_only_on_request(saved, small):
    model, path = saved
    other = Transformer(small(d_ff=8), jax.random.key(2))
    with pytest.raises(ValueError, match="overwrite=True"):
        save(other, path)
    assert_same(load(path), model)
    save(other, path, overwrite=True)
    assert_same(load(path), other)
    assert [file.name for file in path.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("write", [save, save_hf])
def test_other_folders_are_never_replaced(write, saved, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(ValueError, match="choose another path"):
            write(saved[0], tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").exists()
    assert (tmp_path / "file").exists()


def test_checkpoint_survives_a_kill_at_any_moment(saved, small):
    model, path = saved
    aside, half = path.with_name(".model.replaced"), path.with_name(".model.incomplete")
    half.mkdir()  # killed while the new folder was filled
    (half / "junk").write_text("x")
    assert_same(load(path), model)
    path.rename(aside)  # killed between the two renames
    assert_same(load(path), model)
    with pytest.raises(ValueError, match="overwrite=True"):
        save(model, path)
    assert path.is_dir()
    path.rename(aside)
    other = Transformer(small(d_ff=8), jax.random.key(2))
    save(other, path, overwrite=True)
    assert_same(load(path), other)
    assert [file.name for file in path.parent.iterdir()] == ["model"]


FULL_DISK = """
import resource, sys
import jax
from dyninf.models import ModelConfig, Transformer, save, save_hf

sizes = dict(vocab_size=300, num_layers=1, d_model=64, d_ff=64, num_heads=2, num_kv_heads=1, head_dim=32)
model = Transformer(ModelConfig(**sizes, max_length=8), jax.random.key(0))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # the embedding alone has 76 800 bytes
for write, name in ((save, "model"), (save_hf, "hf"), (save, "fresh")):
    try:
        write(model, f"{sys.argv[1]}/{name}", overwrite=True)
    except OSError as error:
        print(error)
"""


def test_full_disk_leaves_the_existing_checkpoint_alone(saved, tmp_path):
    model, path = saved
    save_hf(model, tmp_path / "hf")
    command = [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert len(lines) == 3
    for line, name in zip(lines, ("model", "hf", "fresh"), strict=True):
        assert line.startswith(f"expected to write {tmp_path / name}, got: ")
        assert "File too large" in line
        assert line.endswith(
            "free disk space or choose another path, then save again (what was there before is unchanged)"
        )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hf", "model"]
    assert_same(load(path), model)
    assert_same(load(tmp_path / "hf"), model)


def test_weights_larger_than_the_free_space_are_refused_at_once(saved, monkeypatch):
    model, path = saved
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("dyninf.models.atomic.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="bytes do not fit into 1000 free bytes; free disk space"):
        save(model, path, overwrite=True)
    assert_same(load(path), model)


@pytest.mark.parametrize("error", [ValueError("no room\nat all"), KeyboardInterrupt()], ids=["orbax", "interrupt"])
def test_failure_of_orbax_leaves_the_existing_checkpoint_alone(error, saved, monkeypatch):
    model, path = saved

    def fail(checkpointer, folder, args):
        folder.mkdir()
        raise error

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", fail)
    with pytest.raises((OSError, KeyboardInterrupt), match=r"got: no room; free disk|^$"):
        save(model, path, overwrite=True)
    assert [file.name for file in path.parent.iterdir()] == ["model"]
    assert_same(load(path), model)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_layers": 4}, ValueError, r"'layers\.3\..*' in .* found none"),
        ({"num_layers": 2}, ValueError, r"got 'layers\.2\..*'"),
        ({"d_ff": 30}, ValueError, r"shape \(30, 20\), got \(28, 20\)"),
        ({"d_ff": 0}, ValueError, "d_ff to be a positive integer"),
        ({"colour": 1}, ValueError, "configuration of a model .* 'colour'"),
        ({"eos_ids": None}, ValueError, "configuration of a model"),
        ({"format": 9}, NotImplementedError, "format 1 .* got 9"),
        ({"config": None}, ValueError, "configuration of the model"),
        ({"files": None}, ValueError, "sizes of the files"),
    ],
    ids=["missing", "extra", "shape", "size", "field", "kind", "format", "none", "files"],
)
def test_configuration_that_does_not_fit_is_refused(changes, error, message, saved):
    _, path = saved
    top = {name: value for name, value in changes.items() if name in ("format", "config", "files")}
    config = json.loads((path / "dyninf.json").read_text())["config"] | changes
    edit(path / "dyninf.json", **(top or {"config": config}))
    with pytest.raises(error, match=message):
        load(path)


@pytest.mark.parametrize("damage", ["gone", "cut", "unlisted"])
def test_damaged_arrays_are_refused(damage, saved):
    _, path = saved
    if damage == "gone":
        (path / "arrays").rename(path / "elsewhere")
    elif damage == "cut":
        file = max((path / "arrays").rglob("d/*"), key=lambda file: file.stat().st_size)
        file.write_bytes(file.read_bytes()[:-1])
    else:
        (path / "arrays" / "_METADATA").unlink()
        edit(path / "dyninf.json", files={})
    with pytest.raises(ValueError, match=r"expected the (file|arrays) .* the checkpoint is incomplete or damaged"):
        load(path)


def test_what_orbax_finds_damaged_is_refused(saved, monkeypatch):
    def fail(checkpointer, folder, args):
        raise RuntimeError("checksum\nof a chunk")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", fail)
    with pytest.raises(ValueError, match="got RuntimeError: checksum; the checkpoint is incomplete or damaged"):
        load(saved[1])


def test_tokenizer_lies_beside_the_model(saved, tmp_path):
    model, path = saved
    with pytest.raises(ValueError, match=r"tokenizer\.json in .*, found none"):
        load_tokenizer(path)
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "t.json"))
    for write in (save, save_hf):
        with pytest.raises(ValueError, match="does not exist"):
            write(model, tmp_path / "new", tokenizer_file=tmp_path / "none.json")
        write(model, tmp_path / write.__name__, tokenizer_file=tmp_path / "t.json")
        assert load_tokenizer(tmp_path / write.__name__).encode("b").ids == [1]
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a tokenizer in"):
        load_tokenizer(path)


def test_unknown_names_list_what_exists(tmp_path, monkeypatch, saved):
    monkeypatch.setattr("dyninf.models.loading._PRETRAINED", tmp_path / "pretrained")
    assert available() == ()
    with pytest.raises(ValueError, match=r"shipped models \(none\), got nothing-here"):
        load("nothing-here")
    save_hf(saved[0], tmp_path / "pretrained" / "tiny")
    assert available() == ("tiny",)
    assert_same(load("tiny"), saved[0])
    with pytest.raises(ValueError, match=r"shipped models \(tiny\), got tinny; models are not downloaded"):
        load("tinny")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="got the file"):
        load(tmp_path / "file")


def test_shipped_models_load():
    for name in available():
        assert load(name).config.vocab_size == load_tokenizer(name).get_vocab_size()
