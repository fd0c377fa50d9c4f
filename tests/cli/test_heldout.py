"""Held-out text as windows."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from dyninf import models
from dyninf.cli import common, heldout
from dyninf.training.corpus import Document

TEXTS = ["def f():\n    return 'größe 🙂'\n", "x = 1\n" * 9, "# \u4f60\u597d\n"]


def documents():
    return [Document(name=str(number), text=text) for number, text in enumerate(TEXTS)]


@pytest.mark.parametrize("separator", [0, None], ids=["separator", "none"])
@pytest.mark.parametrize("length", [5, 7, 1000])
def test_every_token_is_predicted_once_and_bytes_add_up(length, separator, loaded):
    tokenizer = loaded[1]
    windows = heldout.cut_windows(documents(), tokenizer, length=length, separator=separator)
    stream = []
    for text in TEXTS:
        stream += ([] if separator is None else [separator]) + tokenizer.encode(text).ids
    assert windows.targets[windows.live].tolist() == stream[1:]
    assert windows.inputs[windows.live].tolist() == stream[:-1]
    total = sum(len(text.encode()) for text in TEXTS)
    first = 0 if separator is not None else len(tokenizer.decode(stream[:1]).encode())
    assert windows.num_bytes.sum() == total - first


def test_bytes_of_each_token_by_hand(loaded):
    tokenizer = loaded[1]
    ids = tokenizer.encode("x🙂y").ids
    windows = heldout.cut_windows([Document(name="a", text="x🙂y")], tokenizer, length=100, separator=0)
    # The face is four bytes; the first of its tokens stands for all of them, the others for none.
    assert windows.num_bytes[0].tolist() == [1, 4, *[0] * (len(ids) - 3), 1]


def test_a_limit_spreads_windows_over_the_text(loaded):
    whole = heldout.cut_windows(documents(), loaded[1], length=6, separator=0)
    some = heldout.cut_windows(documents(), loaded[1], length=6, separator=0, max_tokens=18)
    assert some.inputs.shape == (3, 6)
    rows = [row.tolist() for row in whole.inputs]
    places = [rows.index(row.tolist()) for row in some.inputs]
    assert places[0] == 0 and places[-1] == len(rows) - 2 and np.all(np.diff(places) > 0)


def options(folder, **changes):
    arguments = argparse.Namespace(model=folder, dtype=None, **changes)
    return common.load(arguments)


def test_the_text_beside_the_model_is_the_default(folder):
    found = heldout.read_documents(options(folder), None)
    assert [document.name for document in found] == ["0.py", "1.py", "2.py"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"texd": "y"}\n', "line 2"),
        ("a.jsonl", b"not json\n", "line 1"),
        ("a.jsonl", b'{"text": 3}\n', "line 1"),
        ("a.jsonl", b"\n\n", "got none"),
        ("a.txt", b" \n", "got none"),
        ("a.txt", b"\xff", "UTF-8"),
        ("folder/a.bin", b"x", "expected text files"),
    ],
    ids=["field", "json", "number", "no-lines", "blank", "bytes", "folder"],
)
def test_data_without_text_is_refused(name, content, said, folder, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    data = path.parent if "/" in name else path
    with pytest.raises(ValueError, match=said):
        heldout.read_documents(options(folder), str(data))


def test_a_model_without_text_beside_it_asks_for_data(folder, tmp_path):
    models.save_hf(models.load(folder), tmp_path / "bare", tokenizer_file=Path(folder) / "tokenizer.json")
    with pytest.raises(ValueError, match="--data"):
        heldout.read_documents(options(str(tmp_path / "bare")), None)


def test_text_of_one_token_is_refused(loaded):
    with pytest.raises(ValueError, match="two tokens"):
        heldout.cut_windows([Document(name="a", text="x")], loaded[1], length=4, separator=None)
