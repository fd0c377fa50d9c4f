"""Keep samples in files, so that long ones are made once.

A file holds one request: JSON lines, the first of which says what the others are and carries their digest. Its name
ends in a hash of the task, every parameter of its rule, the tokenizer, length, seed, count and :data:`VERSION`. Samples
are a function of these, so a file that is damaged or says something else is made again.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from dyninf.tasks.sample import Sample, from_record, to_record
from dyninf.tasks.suite import full_rule, make_samples
from dyninf.tasks.words import NOISE, NOUNS

VERSION = 1  # raise it whenever a generator makes other samples
_PROBE = f"{NOISE}\n{' '.join(NOUNS)}\n{''.join(map(chr, range(32, 127)))}"


def load_or_make(
    folder: str | os.PathLike, name: str, tokenizer: Any, length: int, seed: int, count: int, **rule: Any
) -> list[Sample]:
    """Return what :func:`dyninf.tasks.make_samples` returns, from a file where there is one.

    Writes go to another name first, and the finished file is renamed: several processes may share a folder.

    Args:
        folder: where to keep files; made if it does not exist.

    Raises:
        ValueError: if the folder is a file, or the samples cannot be made.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder to keep samples in, got the file {folder}; choose another place")
    header = _header(name, tokenizer, length, seed, count, rule)
    path = folder / f"{name}-{_digest(header)[:20]}.jsonl"
    samples = _read(path, header)
    if samples is None:
        samples = make_samples(name, tokenizer, length, seed, count, **rule)
        _write(path, header, samples)
    return samples


def fingerprint(tokenizer: Any) -> str:
    """Return a hash of a tokenizer: of its ``to_str()``, or of how it encodes a text if it has none."""
    whole = tokenizer.to_str() if hasattr(tokenizer, "to_str") else repr(list(tokenizer.encode(_PROBE).ids))
    return hashlib.sha256(whole.encode("utf-8")).hexdigest()


def _header(name: str, tokenizer: Any, length: int, seed: int, count: int, rule: dict[str, Any]) -> dict[str, Any]:
    header = {
        "format": "dyninf.tasks",
        "version": VERSION,
        "task": name,
        "rule": full_rule(name, rule),
        "tokenizer": fingerprint(tokenizer),
        "length": length,
        "seed": seed,
        "count": count,
    }
    return json.loads(json.dumps(header, default=_plain))


def _plain(value: Any) -> Any:
    """Return a NumPy number or array, or what else JSON does not know, as something that it does."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()


def _read(path: Path, header: dict[str, Any]) -> list[Sample] | None:
    """Return the samples of a file, ``None`` if it does not exist, is damaged or holds something else."""
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        if json.loads(first) != header | {"digest": _digest(records)}:
            return None
        return [from_record(record) for record in records]
    except (OSError, ValueError):
        return None


def _write(path: Path, header: dict[str, Any], samples: list[Sample]) -> None:
    records = json.loads(json.dumps([to_record(sample) for sample in samples]))
    lines = [json.dumps(entry) for entry in (header | {"digest": _digest(records)}, *records)]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
