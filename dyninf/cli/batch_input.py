"""The prompts of ``dyninf batch``: a file of JSON lines, read one at a time, each checked before it is run."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dyninf.cli.common import Loaded
from dyninf.cli.generate import DEFAULT_NEW_TOKENS

KEYS = ("id", "prompt", "tokens", "max_new_tokens", "seed", "metadata")
MAX_SEED = 2**32 - 1  # what a random key takes without losing bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the input: its number from 1 on, its id (the number if it has none) and what it hands through."""

    line: int
    id: int | str
    metadata: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(Entry):
    """A prompt that can be run: its tokens ``int32 [T]``, how many to generate, and a seed if it has its own."""

    tokens: np.ndarray
    max_new_tokens: int
    seed: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault(Entry):
    """A line that cannot be run, and why."""

    error: str


class Prompts:
    """A file of prompts, open for reading.

    Attributes:
        num_lines: lines of the file.
        sha256: of its bytes.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no regular file, or holds no line.
    """

    def __init__(self, path: Path):
        if path.exists() and not path.is_file():
            raise ValueError(f"expected a file of JSON lines, got {str(path)!r}, which cannot be read twice")
        self._file = path.open("rb")
        digest, self.num_lines = hashlib.sha256(), 0
        for raw in self._file:
            digest.update(raw)
            self.num_lines += 1
        self.sha256 = digest.hexdigest()
        if not self.num_lines:
            self._file.close()
            raise ValueError(f"expected at least one line in {str(path)!r}, got an empty file")

    def __enter__(self) -> "Prompts":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def read(self, loaded: Loaded, max_new_tokens: int | None, shard: tuple[int, int]) -> Iterator[Request | Fault]:
        """Yield the lines of shard ``(i, n)``: every n-th one, from line i + 1 on.

        Args:
            max_new_tokens: of lines that do not say; ``None`` for as many as the context has room for, at most
                :data:`dyninf.cli.generate.DEFAULT_NEW_TOKENS`.
        """
        self._file.seek(0)
        seen: dict[int | str, int] = {}
        for number, raw in enumerate(self._file, start=1):
            fields, error = _fields(raw)
            identity = number if error else fields.get("id", number)
            error = error or _refuse_fields(fields)
            if not _is_id(identity):
                identity = number
            first = seen.setdefault(identity, number)
            if (number - 1) % shard[1] != shard[0]:
                continue
            if first != number:
                error = error or f"expected an id of its own, got {identity!r:.60}, which is that of line {first}"
            about = {"line": number, "id": identity, "metadata": fields.get("metadata")}
            if not error:
                try:
                    tokens = _tokens(fields, loaded)
                    count = _room(len(tokens), fields.get("max_new_tokens", max_new_tokens), loaded)
                except ValueError as found:
                    error = " ".join(str(found).split())
            if error:
                yield Fault(**about, error=error)
            else:
                yield Request(**about, tokens=tokens, max_new_tokens=count, seed=fields.get("seed"))


def is_whole(value: Any, low: int, high: int) -> bool:
    """Return whether a value of JSON is a whole number between two others; true and false are none."""
    return type(value) is int and low <= value <= high


def _fields(raw: bytes) -> tuple[dict[str, Any], str | None]:
    """Return what a line says, ``null`` left out, and what is wrong with it as JSON."""
    if not raw.strip():
        return {}, "expected a JSON object, got an empty line"
    try:
        fields = json.loads(raw.decode("utf-8-sig"))
        json.dumps(fields, allow_nan=False)  # it may be handed through
    except UnicodeDecodeError as error:
        return {}, f"expected UTF-8 text, got {error.reason} at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return {}, f"expected a JSON object, got {error}"
    if not isinstance(fields, dict):
        return {}, f"expected a JSON object, got {type(fields).__name__}"
    return {key: value for key, value in fields.items() if value is not None}, None


def _refuse_fields(fields: dict[str, Any]) -> str | None:
    """Return what is wrong with the fields of a line, whatever the model."""
    if unknown := sorted(set(fields) - set(KEYS)):
        return f"expected keys among {', '.join(KEYS)}, got {', '.join(map(repr, unknown))}; put others into metadata"
    if "id" in fields and not _is_id(fields["id"]):
        return f"expected id to be a text or a whole number, got {fields['id']!r:.60}"
    if "max_new_tokens" in fields and not is_whole(fields["max_new_tokens"], 1, 2**63):
        return f"expected max_new_tokens to be a whole number of at least 1, got {fields['max_new_tokens']!r:.60}"
    if "seed" in fields and not is_whole(fields["seed"], 0, MAX_SEED):
        return f"expected seed to be a whole number between 0 and {MAX_SEED}, got {fields['seed']!r:.60}"
    if ("prompt" in fields) == ("tokens" in fields):
        return f"expected either prompt or tokens, got {'both' if 'prompt' in fields else 'neither'}"
    return None


def _tokens(fields: dict[str, Any], loaded: Loaded) -> np.ndarray:
    """Return the tokens of a prompt.

    Raises:
        ValueError: if it has none, or some that the model does not know.
    """
    if "tokens" in fields:
        ids = fields["tokens"]
        if not isinstance(ids, list):
            raise ValueError(f"expected tokens to be a list of token ids, got {type(ids).__name__}")
    else:
        ids = _encode(fields["prompt"], loaded)
    if not ids:
        raise ValueError("expected a prompt of at least one token, got an empty one")
    last = loaded.model.config.vocab_size - 1
    if bad := [token for token in ids if not is_whole(token, 0, last)]:
        raise ValueError(f"expected token ids between 0 and {last}, got {bad[0]!r:.60}")
    return np.asarray(ids, np.int32)


def _encode(prompt: Any, loaded: Loaded) -> list[int]:
    if not isinstance(prompt, str):
        raise ValueError(f"expected prompt to be a text, got {type(prompt).__name__}; give token ids as tokens")
    try:
        prompt.encode("utf-8")
        return loaded.tokenizer.encode(prompt).ids
    except UnicodeEncodeError as error:
        raise ValueError(f"expected a text of whole characters, got half of one at {error.start}") from None
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise ValueError(f"expected a text that the tokenizer knows, got {error}") from None


def _room(length: int, count: int | None, loaded: Loaded) -> int:
    """Return how many tokens to generate behind a prompt of ``length`` tokens.

    Raises:
        ValueError: if they do not fit the model's context.
    """
    limit = loaded.model.config.max_length
    asked = count or max(1, min(DEFAULT_NEW_TOKENS, limit - length))
    if length + asked > limit:
        raise ValueError(
            f"expected prompt and generated tokens to fit the model's context of {limit}, got {length} + {asked}; "
            "shorten the prompt or lower max_new_tokens"
        )
    return asked


def _is_id(value: Any) -> bool:
    return type(value) is int or isinstance(value, str)
