"""Tokens for training: a byte-level BPE tokenizer, packed token files, and stateless batches.

Convention: a packed corpus is two files, `<path>` (little-endian unsigned integers, nothing else) and `<path>.json`
(what they are). Every document is followed by END_OF_TEXT, whose id is 0. Nothing is ever unpickled.
Source: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), with a pre-tokenizer of its own for code.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dyninf.training.corpus import Document

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
FORMAT = "dyninf-tokens-1"
ENCODE_CHUNK = 256  # documents encoded at once; bounds memory and keeps every core busy

# Tried left to right: a whitespace run with a line end in it, as one piece with the indent that follows; a word with
# at most one leading sign or space; one digit; a run of signs; other whitespace, leaving one space to the next word.
PIECES = r"\s*[\r\n]\s*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_ROUNDS = 6  # of the permutation network; four are the least that scrambles both halves twice
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def train_tokenizer(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
    """Train a byte-level BPE tokenizer that gives back any text exactly.

    Made for code: the line end and the indent after it are one piece, digits stand alone, and a word takes one
    leading sign with it (`.name`, `_name`, ` name`). Special tokens are vocabulary entries that no text encodes to:
    a document that spells out `<|endoftext|>` gets ordinary tokens and cannot forge a document boundary, also after
    saving and loading. They decode to their own spelling. Cost: about half a
    second a MB of text on two cores.

    Args:
        texts: Training texts; a sample of some tens of MB is enough for a small vocabulary.
        vocab_size: Entries in all, special tokens and the 256 bytes included; fewer where the texts have no more.
        special_tokens: Ids count up from 0 in this order; the first must be END_OF_TEXT.

    Raises:
        ValueError: The vocabulary cannot hold the bytes, END_OF_TEXT is not first, or a special token comes twice.
    """
    special_tokens = tuple(special_tokens)
    if not special_tokens or special_tokens[0] != END_OF_TEXT:
        raise ValueError(f"expected special_tokens to begin with {END_OF_TEXT!r}, got {special_tokens}; put it first")
    if len(set(special_tokens)) != len(special_tokens):
        raise ValueError(f"expected different special tokens, got {special_tokens}; name each one once")
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size must hold 256 bytes and {len(special_tokens)} special tokens, got {vocab_size=}; "
            f"use at least {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = []  # what is listed here would be recognised inside texts
    return Tokenizer.from_str(json.dumps(description))


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of a tokenizer's serialised form, in hexadecimal; equal after saving and loading."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def pack(documents: Iterable[Document], tokenizer: Tokenizer, path: str | os.PathLike) -> "TokenData":
    """Encode documents into one token file, each followed by END_OF_TEXT, and open it.

    Integers take two bytes where the vocabulary has at most 65536 entries, else four. Both files are written beside
    their final names and renamed, the header last; a crash leaves either the old pair, or no header and therefore an
    error on opening. Cost: about 1 s a MB of text on one core; memory for a few hundred documents.

    Args:
        documents: In the order they are stored; batches shuffle windows, not documents.
        tokenizer: From `train_tokenizer`; END_OF_TEXT must be its id 0.
        path: The token file; the header is written to the same name with `.json` added.

    Raises:
        ValueError: There is no document, or END_OF_TEXT is not the tokenizer's id 0.
    """
    if tokenizer.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise ValueError(
            f"expected {END_OF_TEXT!r} at id {END_OF_TEXT_ID}, got {tokenizer.token_to_id(END_OF_TEXT)}; "
            "use a tokenizer from train_tokenizer"
        )
    path = Path(path)
    vocab_size = tokenizer.get_vocab_size()
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    partial, header, header_partial = (Path(f"{path}{end}") for end in (".partial", ".json", ".json.partial"))
    count = num_documents = 0
    try:
        with partial.open("wb") as file:
            texts = (document.text for document in documents)
            while chunk := list(itertools.islice(texts, ENCODE_CHUNK)):
                for encoding in tokenizer.encode_batch(chunk, add_special_tokens=False):
                    file.write(np.asarray([*encoding.ids, END_OF_TEXT_ID], _DTYPES[dtype]).tobytes())
                    count += len(encoding.ids) + 1
                num_documents += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        if not num_documents:
            raise ValueError("expected at least one document, got none; collect some text first")
        description = {
            "format": FORMAT,
            "dtype": dtype,
            "count": count,
            "vocab_size": vocab_size,
            "num_documents": num_documents,
            "tokenizer_sha256": fingerprint(tokenizer),
        }
        header_partial.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        header.unlink(missing_ok=True)
        os.replace(partial, path)
        os.replace(header_partial, header)
    finally:
        partial.unlink(missing_ok=True)
        header_partial.unlink(missing_ok=True)
    return TokenData.open(path)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenData:
    """Read training batches from a packed token file without loading it into memory.

    Args:
        tokens: Memory map of all tokens, [count].
        vocab_size: Every token is below it; checked on each batch.
        num_documents: How many END_OF_TEXT the file holds.
        tokenizer_sha256: `fingerprint` of the tokenizer that wrote the tokens.
    """

    tokens: np.ndarray
    vocab_size: int
    num_documents: int
    tokenizer_sha256: str

    @classmethod
    def open(cls, path: str | os.PathLike) -> "TokenData":
        """Map a file that `pack` wrote.

        Raises:
            ValueError: A file is missing, the header is not one of `pack`'s, or the file's size contradicts it.
        """
        path = Path(path)
        header = _read_header(Path(f"{path}.json"))
        dtype = _DTYPES[header["dtype"]]
        expected = header["count"] * dtype.itemsize
        if not path.is_file():
            raise ValueError(f"expected a token file at {str(path)!r}, got nothing; pack the corpus again")
        if (size := path.stat().st_size) != expected:
            raise ValueError(
                f"expected {expected} bytes in {str(path)!r} ({header['count']} tokens of {header['dtype']}), "
                f"got {size}; the file is truncated or foreign, pack the corpus again"
            )
        return cls(
            tokens=np.memmap(path, dtype, mode="r", shape=(header["count"],)),
            vocab_size=header["vocab_size"],
            num_documents=header["num_documents"],
            tokenizer_sha256=header["tokenizer_sha256"],
        )

    def num_windows(self, length: int) -> int:
        """Count the windows of `length` predicted tokens in one epoch, the same for every epoch's offset.

        Raises:
            ValueError: The length is below 1, or the file has fewer than 2 * length tokens.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1 token, got {length=}; use the training context")
        if self.tokens.size < 2 * length:
            raise ValueError(
                f"expected at least 2 * length = {2 * length} tokens for {length=}, got {self.tokens.size}; "
                "shorten the windows or pack more text"
            )
        return (self.tokens.size - length) // length

    def batch(self, step: int, *, batch_size: int, length: int, seed: int) -> np.ndarray:
        """Return the batch of one training step, a pure function of (seed, step).

        Each epoch cuts the file, from an offset of its own in [0, length), into windows of `length` inputs that do
        not overlap (a window's last target is the next one's first input) and visits each once, in an order of its
        own. Order and offset come from integer hashes, so a run resumes exactly from its step number, on any machine
        and any NumPy. Cost: one read of the rows; no state and no table of the file's length.

        Args:
            step: From 0; an epoch ends after num_windows rows, which may be inside a batch.
            batch_size: Rows.
            length: Tokens to predict in each row.
            seed: Chooses the orders and offsets.

        Returns:
            int32 [batch_size, length + 1]: inputs are [:, :-1], targets [:, 1:]. Documents run on inside a row.

        Raises:
            ValueError: An argument is out of range, or the file holds a token outside the vocabulary.
        """
        if step < 0 or seed < 0 or batch_size < 1:
            raise ValueError(
                f"expected step >= 0, seed >= 0 and batch_size >= 1, got {step=}, {seed=}, {batch_size=}; correct them"
            )
        num_windows = self.num_windows(length)
        starts_B = np.empty(batch_size, np.int64)
        row, sample = 0, step * batch_size
        while row < batch_size:
            epoch, position = divmod(sample + row, num_windows)
            rows = min(batch_size - row, num_windows - position)
            key = _mix_int(_mix_int(seed) + epoch)
            windows = _permute(np.arange(position, position + rows, dtype=np.uint64), num_windows, key)
            starts_B[row : row + rows] = windows.astype(np.int64) * length + _mix_int(key ^ _GOLDEN) % length
            row += rows
        tokens_BT = np.asarray(self.tokens[starts_B[:, None] + np.arange(length + 1)]).astype(np.int32)
        if not 0 <= tokens_BT.min() <= tokens_BT.max() < self.vocab_size:
            raise ValueError(
                f"expected tokens below vocab_size={self.vocab_size}, got {int(tokens_BT.max())}; the file was "
                "changed after it was written, pack the corpus again"
            )
        return tokens_BT


def _read_header(path: Path) -> dict:
    """Read and check the description of a token file."""
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"expected a header at {str(path)!r}, got nothing; the file is foreign or half packed, pack it again"
        ) from error
    except ValueError as error:
        raise ValueError(f"expected JSON in {str(path)!r}, got something else; pack the corpus again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise ValueError(f"expected format {FORMAT!r} in {str(path)!r}, got {found!r}; pack the corpus again")
    numbers = [header.get(name) for name in ("count", "vocab_size", "num_documents")]
    whole = all(type(number) is int and number > 0 for number in numbers)
    if not (whole and header.get("dtype") in list(_DTYPES) and isinstance(header.get("tokenizer_sha256"), str)):
        raise ValueError(f"expected a complete header in {str(path)!r}, got {header}; pack the corpus again")
    return header


def _mix_int(x: int) -> int:
    """Scramble a 64-bit integer: one step of splitmix64."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _permute(x: np.ndarray, size: int, key: int) -> np.ndarray:
    """Map distinct integers in [0, size) to distinct ones, in an order chosen by the key.

    A Feistel network permutes the next larger even power of two (at most 4 * size); values that land outside are
    sent through again until they are inside, which keeps the map one-to-one. Cost: O(x.size), no table.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    round_keys = [np.uint64(_mix_int(key + number)) for number in range(_ROUNDS)]
    y = x.copy()
    outside = np.ones(x.shape, bool)
    while outside.any():
        left, right = y[outside] >> bits, y[outside] & mask
        for round_key in round_keys:
            mixed = (right ^ round_key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        y[outside] = (left << bits) | right
        outside = y >= np.uint64(size)
    return y
