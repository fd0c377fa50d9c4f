"""Tests of the tokenizer, packed token files and stateless batches."""

import json
import os

import numpy as np
import pytest
from tokenizers import Tokenizer

from dyninf.training.corpus import Document
from dyninf.training.data import END_OF_TEXT, FORMAT, TokenData, fingerprint, pack, train_tokenizer

SAMPLE = [
    "def add(first, second):\n    total = first + second\n    return total\n\n\nclass Sum:\n    def __init__(self):\n"
    "        self.total = 0\n\n    def add(self, number):\n        self.total += number\n        return self.total\n",
    "for number in range(1234):\n    if number % 7 == 0:\n        print(number)\n    else:\n        continue\n",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SAMPLE * 3, 320)


def _numbered(tmp_path, count: int, dtype: str = "uint16", vocab_size: int = 1000) -> TokenData:
    """Write a token file holding 0, 1, 2, ... with a hand-made header, and open it."""
    path = tmp_path / "tokens.bin"
    path.write_bytes(np.arange(count).astype(np.dtype(dtype).newbyteorder("<")).tobytes())
    header = {"format": FORMAT, "dtype": dtype, "count": count, "vocab_size": vocab_size, "num_documents": 1}
    (tmp_path / "tokens.bin.json").write_text(json.dumps(header | {"tokenizer_sha256": "0" * 64}))
    return TokenData.open(path)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(SAMPLE[0], id="code"),
        pytest.param("", id="empty"),
        pytest.param("  \t\n\n   x\r\n \r y  z   ", id="whitespace"),
        pytest.param("x = 'Größe \u6587\u5b57 \U0001f600 e\u0301 \u00a0\u2028\ufeff'\0\x7f", id="unicode and controls"),
        pytest.param("<|endoftext|> a<|endoftext|>\n", id="spelt-out end of text"),
        pytest.param("3.14159 1234567 0x1F __init__ a_b.c(d)[e]{f}", id="numbers and signs"),
    ],
)
def test_tokenizer_round_trip(tokenizer, text):
    for candidate in (tokenizer, Tokenizer.from_str(tokenizer.to_str())):
        ids = candidate.encode(text).ids
        assert candidate.decode(ids, skip_special_tokens=False) == text
        assert candidate.decode(ids) == text
        assert 0 not in ids


def test_tokenizer_every_byte_and_random_text(tokenizer):
    points = np.concatenate([np.arange(0xD800), np.arange(0xE000, 0x110000, 211)])
    text = "".join(map(chr, np.random.default_rng(7).permutation(points)))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_pieces(tokenizer):
    def pieces(text: str) -> list[str]:
        return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    # A line end takes the whole indent with it, a word one leading sign or space, a digit nothing.
    assert pieces("if x:\n\n        return self.total  # 42\n") == [
        *("if", " x", ":", "\n\n        ", "return", " self", ".total", " ", " #", " ", "4", "2", "\n"),
    ]
    assert pieces("__init__ = a_b") == ["__", "init", "__", " =", " a", "_b"]


def test_tokenizer_indent_is_one_token(tokenizer):
    for indent in ("\n    ", "\n        "):
        assert len(tokenizer.encode(indent).ids) == 1
        assert tokenizer.encode("x" + indent + "return").ids[1:-1] == tokenizer.encode(indent).ids
    assert len(tokenizer.encode("1234").ids) == 4


def test_tokenizer_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == 320
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.decode([0]) == END_OF_TEXT
    more = train_tokenizer(SAMPLE, 300, (END_OF_TEXT, "<|fill|>"))
    assert [more.token_to_id(token) for token in (END_OF_TEXT, "<|fill|>")] == [0, 1]
    assert more.get_vocab_size() == 300
    # The smallest vocabulary has no merge at all: one id a byte.
    assert len(train_tokenizer(SAMPLE, 257).encode("def é").ids) == len("def é".encode())


def test_tokenizer_is_deterministic(tokenizer, tmp_path):
    again = train_tokenizer(iter(SAMPLE * 3), 320)
    assert fingerprint(again) == fingerprint(tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert fingerprint(Tokenizer.from_file(str(tmp_path / "tokenizer.json"))) == fingerprint(tokenizer)
    assert fingerprint(train_tokenizer(SAMPLE, 319)) != fingerprint(tokenizer)


@pytest.mark.parametrize(
    ("vocab_size", "special_tokens", "message"),
    [
        pytest.param(257, (END_OF_TEXT, "<|x|>"), r"got vocab_size=257; use at least 258", id="too small"),
        pytest.param(300, (), "expected special_tokens to begin with", id="none"),
        pytest.param(300, ("<|x|>", END_OF_TEXT), "expected special_tokens to begin with", id="not first"),
        pytest.param(300, (END_OF_TEXT, END_OF_TEXT), "expected different special tokens", id="twice"),
    ],
)
def test_tokenizer_refuses(vocab_size, special_tokens, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(SAMPLE, vocab_size, special_tokens)


def test_pack_stores_documents(tokenizer, tmp_path):
    documents = [Document(name=str(number), text=text) for number, text in enumerate([*SAMPLE, "x", "é<|endoftext|>"])]
    data = pack(iter(documents), tokenizer, tmp_path / "tokens.bin")
    expected = [token for document in documents for token in [*tokenizer.encode(document.text).ids, 0]]
    assert data.tokens.tolist() == expected
    assert (data.tokens.dtype, data.vocab_size, data.num_documents) == (np.dtype("<u2"), 320, 4)
    assert data.tokenizer_sha256 == fingerprint(tokenizer)
    assert (tmp_path / "tokens.bin").read_bytes() == np.asarray(expected, "<u2").tobytes()
    header = json.loads((tmp_path / "tokens.bin.json").read_text())
    assert header.pop("tokenizer_sha256") == fingerprint(tokenizer)
    assert list(header.values()) == [FORMAT, "uint16", len(expected), 320, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens.bin", "tokens.bin.json"]
    with pytest.raises(ValueError, match="read-only"):
        data.tokens[0] = 1


def test_pack_more_documents_than_one_chunk(tokenizer, tmp_path):
    documents = [Document(name=str(number), text=f"x{number}") for number in range(600)]
    data = pack(documents, tokenizer, tmp_path / "tokens.bin")
    texts = tokenizer.decode(data.tokens.tolist()).split(END_OF_TEXT)
    assert texts == [*(f"x{number}" for number in range(600)), ""]


def test_pack_uses_four_bytes_for_a_large_vocabulary(tokenizer, tmp_path):
    description = json.loads(tokenizer.to_str())
    vocabulary = description["model"]["vocab"]
    vocabulary |= {f"unused{number}": number for number in range(len(vocabulary), 65_537)}
    large = Tokenizer.from_str(json.dumps(description))
    data = pack([Document(name="a", text="total")], large, tmp_path / "tokens.bin")
    assert data.tokens.dtype == np.dtype("<u4")
    assert data.tokens.tolist() == [*tokenizer.encode("total").ids, 0]


def test_pack_replaces_only_when_complete(tokenizer, tmp_path):
    path = tmp_path / "tokens.bin"
    pack([Document(name="a", text="first")], tokenizer, path)
    before = path.read_bytes()

    def failing():
        yield Document(name="b", text="second")
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        pack(failing(), tokenizer, path)
    with pytest.raises(ValueError, match="expected at least one document, got none"):
        pack([], tokenizer, path)
    assert path.read_bytes() == before
    assert TokenData.open(path).num_documents == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["tokens.bin", "tokens.bin.json"]


def test_pack_interrupted_between_renames(tokenizer, tmp_path, monkeypatch):
    # New tokens must never meet the old header: after a crash in between there is no header.
    path = tmp_path / "tokens.bin"
    pack([Document(name="a", text="first")], tokenizer, path)
    replace = os.replace

    def replace_tokens_only(source, target):
        if str(target).endswith(".json"):
            raise OSError("interrupted")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_tokens_only)
    with pytest.raises(OSError, match="interrupted"):
        pack([Document(name="b", text="other")], tokenizer, path)
    with pytest.raises(ValueError, match="expected a header at"):
        TokenData.open(path)


def test_pack_refuses_foreign_tokenizer(tokenizer, tmp_path):
    description = json.loads(tokenizer.to_str())
    del description["model"]["vocab"][END_OF_TEXT]
    foreign = Tokenizer.from_str(json.dumps(description))
    with pytest.raises(ValueError, match=r"expected '<\|endoftext\|>' at id 0, got None"):
        pack([Document(name="a", text="x")], foreign, tmp_path / "tokens.bin")


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        pytest.param({}, 22, "expected 24 bytes .*12 tokens of uint16.* got 22; the file is truncated", id="truncated"),
        pytest.param({}, 26, "expected 24 bytes .* got 26", id="too long"),
        pytest.param({}, None, "expected a token file at", id="no tokens"),
        pytest.param(None, 24, "expected a header at .*, got nothing", id="no header"),
        pytest.param("\x80\x04 not json", 24, "expected JSON in", id="not JSON"),
        pytest.param("[1, 2]", 24, "expected format 'dyninf-tokens-1' in .* got 'list'", id="not a table"),
        pytest.param({"format": "other"}, 24, "expected format 'dyninf-tokens-1' in .* got 'other'", id="foreign"),
        pytest.param({"dtype": "object"}, 24, "expected a complete header", id="foreign dtype"),
        pytest.param({"dtype": ["uint16"]}, 24, "expected a complete header", id="dtype is a list"),
        pytest.param({"count": 0}, 0, "expected a complete header", id="no count"),
        pytest.param({"count": True}, 2, "expected a complete header", id="count is no number"),
        pytest.param({"vocab_size": None}, 24, "expected a complete header", id="no vocabulary"),
        pytest.param({"tokenizer_sha256": 3}, 24, "expected a complete header", id="no fingerprint"),
    ],
)
def test_open_refuses(tmp_path, header, size, message):
    path = tmp_path / "tokens.bin"
    complete = {"format": FORMAT, "dtype": "uint16", "count": 12, "vocab_size": 9, "num_documents": 2}
    if isinstance(header, dict):
        header = json.dumps(complete | {"tokenizer_sha256": "0" * 64} | header)
    if header is not None:
        (tmp_path / "tokens.bin.json").write_text(header, encoding="latin-1")
    if size is not None:
        path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=message):
        TokenData.open(path)


def test_batch_by_hand(tmp_path):
    # 23 tokens in windows of 5: (23 - 5) // 5 = 3 windows an epoch, at offset + 0, 5, 10 with an offset in [0, 5), so
    # the last token read is at most 4 + 10 + 5 = 19. Tokens are their own positions: each row counts up by one.
    data = _numbered(tmp_path, 23)
    assert data.num_windows(5) == 3
    rows = np.concatenate([data.batch(step, batch_size=2, length=5, seed=4) for step in range(9)])
    assert rows.dtype == np.int32
    assert (np.diff(rows, axis=1) == 1).all()
    for epoch in range(6):
        starts = sorted(rows[3 * epoch : 3 * epoch + 3, 0].tolist())
        assert starts == [starts[0], starts[0] + 5, starts[0] + 10]
        assert 0 <= starts[0] < 5


@pytest.mark.parametrize("num_windows", [1, 2, 3, 7, 64, 65, 1000], ids="windows={}".format)
def test_epoch_visits_every_window_once(tmp_path, num_windows):
    data = _numbered(tmp_path, 3 * (num_windows + 1) + 2, "uint32", 10_000)
    assert data.num_windows(3) == num_windows
    orders = []
    for epoch in (0, 1, 5):
        starts = np.array(
            [data.batch(step, batch_size=1, length=3, seed=1)[0, 0] for step in range(num_windows)]
            if epoch == 0
            else data.batch(epoch, batch_size=num_windows, length=3, seed=1)[:, 0]
        )
        assert sorted((starts // 3).tolist()) == list(range(num_windows))
        assert len(set((starts % 3).tolist())) == 1
        orders.append((starts // 3).tolist())
    if num_windows >= 7:
        assert orders[0] != orders[1] != orders[2]
        assert all(order != sorted(order) for order in orders)


def test_batch_depends_on_seed_and_step_only(tmp_path):
    data = _numbered(tmp_path, 900)
    wanted = data.batch(37, batch_size=4, length=6, seed=11)
    data.batch(5, batch_size=3, length=7, seed=2)
    np.testing.assert_array_equal(
        TokenData.open(tmp_path / "tokens.bin").batch(37, batch_size=4, length=6, seed=11), wanted
    )
    assert (data.batch(37, batch_size=4, length=6, seed=12) != wanted).any()
    assert (data.batch(38, batch_size=4, length=6, seed=11) != wanted).any()
    # The rows follow one another: two batches of 4 are one batch of 8.
    pair = [data.batch(step, batch_size=4, length=6, seed=11) for step in (6, 7)]
    np.testing.assert_array_equal(np.concatenate(pair), data.batch(3, batch_size=8, length=6, seed=11))


def test_batch_known_values(tmp_path):
    # Guards exact resume across versions. Numbers from an independent implementation in plain Python integers.
    data = _numbered(tmp_path, 1000)
    assert data.batch(0, batch_size=5, length=8, seed=0)[:, 0].tolist() == [790, 310, 6, 590, 686]
    assert data.batch(123, batch_size=5, length=8, seed=9)[:, 0].tolist() == [694, 814, 46, 342, 710]


def test_permutation_is_close_to_uniform(tmp_path):
    # First window over 4000 seeds, of 16: 250 each, standard deviation 15.3; the bounds are five deviations away.
    data = _numbered(tmp_path, 17 * 4)
    windows = [int(data.batch(0, batch_size=1, length=4, seed=seed)[0, 0]) // 4 for seed in range(4000)]
    counts = np.bincount(windows, minlength=16)
    assert counts.min() > 173 and counts.max() < 327


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"step": -1}, "expected step >= 0", id="step"),
        pytest.param({"seed": -3}, "seed=-3", id="seed"),
        pytest.param({"batch_size": 0}, "batch_size=0", id="batch size"),
        pytest.param({"length": 0}, "length must be at least 1 token", id="length"),
        pytest.param({"length": 7}, r"expected at least 2 \* length = 14 tokens for length=7, got 13", id="too long"),
    ],
)
def test_batch_refuses(tmp_path, change, message):
    data = _numbered(tmp_path, 13)
    with pytest.raises(ValueError, match=message):
        data.batch(**({"step": 0, "seed": 0, "batch_size": 2, "length": 3} | change))


def test_batch_refuses_tokens_outside_the_vocabulary(tmp_path):
    data = _numbered(tmp_path, 20, vocab_size=19)
    with pytest.raises(ValueError, match="expected tokens below vocab_size=19, got 19"):
        for step in range(40):
            data.batch(step, batch_size=3, length=4, seed=0)
