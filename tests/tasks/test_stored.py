"""Samples kept in files: found again, never mistaken, made again when damaged."""

import json

import numpy as np
import pytest

from dyninf.tasks import load_or_make, make_samples, stored
from dyninf.tasks.sample import from_record, to_record
from dyninf.tasks.stored import fingerprint

REQUEST = {"name": "niah_multiquery", "length": 600, "seed": 0, "count": 2}


@pytest.fixture
def made(tokenizer, tmp_path, monkeypatch):
    """A folder with one file, and how often samples were made since."""
    calls = []
    load_or_make(tmp_path, tokenizer=tokenizer, **REQUEST)

    def counted(*args, **rule):
        calls.append(args)
        return make_samples(*args, **rule)

    monkeypatch.setattr(stored, "make_samples", counted)
    return tmp_path, calls


def test_samples_are_read_back_as_they_were_made(tokenizer, made):
    folder, calls = made
    assert load_or_make(folder, tokenizer=tokenizer, **REQUEST) == make_samples(tokenizer=tokenizer, **REQUEST)
    assert not calls and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "change", [{"name": "niah_multikey_1"}, {"length": 601}, {"seed": 1}, {"count": 1}, {"depth": 0.5}]
)
def test_another_request_has_another_file(tokenizer, made, change):
    folder, calls = made
    load_or_make(folder, tokenizer=tokenizer, **REQUEST | change)
    assert len(calls) == 1 and len(list(folder.iterdir())) == 2


def test_a_parameter_at_its_default_is_the_same_request(tokenizer, made):
    folder, calls = made
    load_or_make(folder, tokenizer=tokenizer, **REQUEST, depth=None, num_queries=4)
    load_or_make(folder, tokenizer=tokenizer, **REQUEST | {"seed": np.int64(0)})
    assert not calls


def test_another_version_or_tokenizer_has_another_file(tokenizer, made, words, monkeypatch):
    folder, calls = made
    load_or_make(folder, tokenizer=words, **REQUEST)
    monkeypatch.setattr(stored, "VERSION", 99)
    load_or_make(folder, tokenizer=tokenizer, **REQUEST)
    assert len(calls) == 2 and len(list(folder.iterdir())) == 3


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


DAMAGE = {
    "cut": lambda path: path.write_text(path.read_text(encoding="utf-8")[:-50], encoding="utf-8"),
    "a line lost": lambda path: path.write_text("\n".join(lines_of(path)[:-1]), encoding="utf-8"),
    "an answer changed": lambda path: path.write_text(
        path.read_text(encoding="utf-8").replace('"answers": ["', '"answers": ["1'), encoding="utf-8"
    ),
    "empty": lambda path: path.write_text("", encoding="utf-8"),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "other version": lambda path: path.write_text(
        path.read_text(encoding="utf-8").replace('"version": 1', '"version": 0'), encoding="utf-8"
    ),
    "not samples": lambda path: path.write_text("[]\n{}\n", encoding="utf-8"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_made_again(tokenizer, made, damage):
    folder, calls = made
    (path,) = folder.iterdir()
    before = path.read_bytes()
    damage(path)
    assert path.read_bytes() != before
    samples = load_or_make(folder, tokenizer=tokenizer, **REQUEST)
    assert len(calls) == 1 and samples == make_samples(tokenizer=tokenizer, **REQUEST)
    assert path.read_bytes() == before and list(folder.iterdir()) == [path]


def test_a_failed_write_leaves_nothing_behind(tokenizer, made, monkeypatch):
    folder, _ = made
    before = list(folder.iterdir())

    def refuse(*_):
        raise OSError("no room")

    monkeypatch.setattr(stored.os, "replace", refuse)
    with pytest.raises(OSError, match="no room"):
        load_or_make(folder, tokenizer=tokenizer, **REQUEST | {"seed": 5})
    assert list(folder.iterdir()) == before


def test_a_new_folder_is_made_and_a_file_refused(tokenizer, tmp_path):
    load_or_make(tmp_path / "a" / "b", tokenizer=tokenizer, **REQUEST)
    (path,) = (tmp_path / "a" / "b").iterdir()
    assert json.loads(lines_of(path)[0])["rule"]["num_queries"] == 4
    with pytest.raises(ValueError, match="expected a folder to keep samples in, got the file"):
        load_or_make(path, tokenizer=tokenizer, **REQUEST)
    with pytest.raises(ValueError, match="one of the tasks"):
        load_or_make(tmp_path, tokenizer=tokenizer, **REQUEST | {"name": "nothing"})


def test_fingerprints_tell_tokenizers_apart(tokenizer, words):
    assert len({fingerprint(tokenizer), fingerprint(words), fingerprint(type(words)(before=[1]))}) == 3
    assert fingerprint(type(words)()) == fingerprint(type(words)())


@pytest.mark.parametrize("record", [[], {"task": "t"}, None])
def test_a_record_that_is_no_sample_is_refused(record):
    with pytest.raises(ValueError, match="expected a sample with the fields"):
        from_record(record)


def test_a_record_of_another_shape_is_refused(tokenizer):
    record = to_record(make_samples("passkey", tokenizer, 300, 0, 1)[0])
    with pytest.raises(ValueError, match="expected lists of ids"):
        from_record(record | {"answers": "text"})
