"""Held-out text for measuring quality: documents, and windows of tokens that know their bytes.

Documents are joined into one stream, each behind the token that ends a text, and cut into windows that share one token,
so that every token is predicted exactly once and the bytes of all windows are the bytes of the text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dyninf.cli.common import Loaded
from dyninf.training.corpus import Document, collect

FILE = "heldout.jsonl"
SUFFIXES = (".py", ".txt", ".md")
MAX_WINDOW = 2048
SPARE = 16  # bytes of text read for each token wanted; no tokenizer makes tokens that long


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of text to predict.

    Attributes:
        inputs, targets: token ids ``[W, T]``; padding is 0.
        lengths: tokens to predict in each window ``[W]``.
        num_bytes: bytes of the text that each target stands for ``[W, T]``; 0 at padding and separators.
    """

    inputs: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray

    @property
    def live(self) -> np.ndarray:
        """Which positions are not padding, bool ``[W, T]``."""
        return np.arange(self.inputs.shape[1])[None] < self.lengths[:, None]


def read_documents(loaded: Loaded, data: str | None, suffixes: Sequence[str] = SUFFIXES) -> list[Document]:
    """Return the held-out documents: of a folder, a text file, a ``.jsonl`` file, or those beside the model.

    Raises:
        ValueError: if there is no text.
    """
    path = loaded.folder / FILE if data is None else Path(data)
    if data is None and not path.is_file():
        raise ValueError(f"expected held-out text beside the model {loaded.name!r}, found none; give some: --data")
    if path.is_dir():
        return collect([path], suffixes=tuple(suffixes))
    if not path.exists():
        raise ValueError(f"expected a folder or a file of text, got {str(path)!r}, which does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text in {path}, got {error.reason} at byte {error.start}") from None
    documents = _read_lines(text, path) if path.suffix == ".jsonl" else [Document(name=path.name, text=text)]
    if not any(document.text.strip() for document in documents):
        raise ValueError(f"expected text in {path}, got none")
    return documents


def cut_windows(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    length: int,
    separator: int | None,
    max_tokens: int | None = None,
) -> Windows:
    """Return the documents as windows of up to ``length`` tokens to predict.

    Args:
        separator: id put before each document; ``None`` for nothing.
        max_tokens: use no more than about this many, in windows spread evenly over the text; ``None`` for all.

    Raises:
        ValueError: if there are fewer than two tokens.
    """
    total = sum(len(document.text) for document in documents)
    if max_tokens is not None and total > SPARE * max_tokens:
        documents = documents[:: -(-total // (SPARE * max_tokens))]
    stream, stream_bytes = _stream(documents, tokenizer, separator)
    if len(stream) < 2:
        raise ValueError(f"expected at least two tokens of text, got {len(stream)}; give more text")
    starts = np.arange(0, len(stream) - 1, length)
    wanted = len(starts) if max_tokens is None else max(1, max_tokens // length)
    if wanted < len(starts):
        # The last window is the only one that may be short: leave it out where there are more than enough.
        starts = starts[np.linspace(0, len(starts) - 2, wanted).round().astype(int)]
    lengths = np.minimum(length, len(stream) - 1 - starts)
    width = int(lengths.max())
    places = starts[:, None] + np.arange(width)
    live = np.arange(width)[None] < lengths[:, None]
    places = np.where(live, places, 0)
    return Windows(
        inputs=np.where(live, stream[places], 0).astype(np.int32),
        targets=np.where(live, stream[places + 1], 0).astype(np.int32),
        lengths=lengths.astype(np.int32),
        num_bytes=np.where(live, stream_bytes[places + 1], 0),
    )


def windows_of(loaded: Loaded, documents: Sequence[Document], *, length: int, max_tokens: int | None) -> Windows:
    """Return windows for a model: no longer than its context, separated by the token that ends its texts."""
    config = loaded.model.config
    separator = config.eos_ids[0] if config.eos_ids else config.bos_id
    length = min(length, config.max_length)
    return cut_windows(documents, loaded.tokenizer, length=length, separator=separator, max_tokens=max_tokens)


def _stream(
    documents: Sequence[Document], tokenizer: Tokenizer, separator: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return all tokens in one row and the bytes each stands for."""
    first = [] if separator is None else [separator]
    ids: list[int] = []
    counts: list[int] = []
    texts = [document.text for document in documents]
    for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        # Bytes up to each character; tokens that share a character leave its bytes to the first of them.
        sizes = [len(character.encode("utf-8", "surrogatepass")) for character in text]
        upto = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        ends = np.maximum.accumulate([0, *(end for _, end in encoding.offsets)])
        if len(ends) > 1:
            ends[-1] = len(text)
        ids += first + encoding.ids
        counts += [0] * len(first) + [int(upto[end] - upto[start]) for start, end in pairwise(ends)]
    return np.asarray(ids, np.int64), np.asarray(counts, np.int64)


def _read_lines(text: str, path: Path) -> list[Document]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            documents.append(Document(name=str(entry.get("name", number)), text=entry["text"]))
            if not isinstance(documents[-1].text, str):
                raise ValueError("no text")
        except (ValueError, KeyError, AttributeError):
            raise ValueError(
                f'expected {{"name": ..., "text": ...}} in line {number} of {path}, got {line!r:.60}'
            ) from None
    return documents
