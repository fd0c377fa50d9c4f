"""Text corpora from folders of source files: collect, remove near-duplicates, hold some out.

Convention: a document is one file. Its name is the folder's last part followed by the path inside it, with forward
slashes, so that the same tree gives the same names on every machine. Every function is deterministic and keeps order.
Source: MinHash (Broder 1997, "On the resemblance and containment of documents") with banded signatures.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_BYTES = 1_000_000  # a larger source file is almost always data or generated
MAX_MEAN_LINE = 100  # characters a line; written code averages 30 to 45
MAX_LINE = 1_000  # characters; longer lines are minified code or embedded data
MIN_LETTERS = 0.4  # letters among the visible bytes; written code has about 0.8, dense formulas 0.5, number tables 0.2
MIN_SPACE = 0.03  # whitespace among all bytes; written code has 0.2 to 0.4, encoded blobs about 0.02
HEADER_BYTES = 2_000  # where generators announce themselves
SHINGLE_TOKENS = 5
NUM_HASHES = 120  # signature length; many divisors, so that any threshold finds a good banding
MIN_RECALL = 0.99  # chance that a pair exactly at the threshold shares at least one band
HASH_CHUNK = 8_192  # shingles hashed at once; bounds the scratch memory to 8 MB

_GENERATED = re.compile(
    rb"(?i)\b(?:do not|don't) (?:manually )?edit\b|@generated\b|\bauto(?:matically |-)?generated\b"
    rb"|(?m:^)[ \t]*#[^\n]*\bgenerated (?:by|from)\b"
)
_LETTERS = bytes(b for b in range(256) if chr(b).isascii() and chr(b).isalpha()) + bytes(range(128, 256))
_SPACE = b" \t\n\r\f\v"


@dataclass(frozen=True, kw_only=True)
class Document:
    """Hold one file's name and text.

    Args:
        name: Path with forward slashes, beginning with the collected folder's last part; the identity in `split`.
        text: The decoded file, with line ends as a single newline character.
    """

    name: str
    text: str


def collect(folders: Iterable[str | os.PathLike], *, suffixes: Sequence[str] = (".py",)) -> list[Document]:
    """Read the text files under some folders, leaving out what a language model should not learn.

    Left out without a word: symbolic links, hidden folders, unreadable files, files that are not UTF-8 or hold a NUL,
    blank files, files over 1 MB, and files that look generated (mean line above 100 characters, a line above 1000,
    a generator's notice at the top) or are mostly data (few letters, or hardly any whitespace). Cost: one read a file.

    Args:
        folders: Roots to walk; their last parts must differ, because names begin with them.
        suffixes: File name endings to read, with the dot.

    Returns:
        Documents, root by root in the order given and sorted by name within each.

    Raises:
        ValueError: A folder is missing, holds no usable text, or shares its last part with another one.
    """
    roots = [Path(folder).resolve() for folder in folders]
    if not roots:
        raise ValueError("expected at least one folder, got none; name the folders to read")
    documents: list[Document] = []
    seen: dict[str, Path] = {}
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"expected an existing folder, got {str(root)!r}; correct the path")
        if root.name in seen:
            raise ValueError(
                f"expected folders with different last parts, got {str(seen[root.name])!r} and {str(root)!r}; "
                "rename one or collect their common parent"
            )
        seen[root.name] = root
        found = [document for path in _walk(root, tuple(suffixes)) if (document := _read(path, root)) is not None]
        if not found:
            raise ValueError(
                f"expected text files ending in {tuple(suffixes)} under {str(root)!r}, got none that is usable; "
                "check the folder and the suffixes"
            )
        documents += sorted(found, key=lambda document: document.name)
    return documents


def deduplicate(documents: Sequence[Document], threshold: float = 0.8) -> list[Document]:
    """Keep the first of every group of equal or nearly equal documents.

    Two documents are near-duplicates when the Jaccard similarity of their sets of token 5-grams is at least
    `threshold`; a token is a run of word characters or one other visible character, so whitespace does not count.
    Candidates come from banded MinHash signatures (a pair at the threshold is found with probability 0.99 or more)
    and are decided by the exact similarity with a document already kept. Hash functions are fixed: same input, same
    output. Cost: about 120 multiplications a token, vectorised; memory: 4 bytes a distinct 5-gram.

    Args:
        documents: In order of preference: of two duplicates the earlier one stays.
        threshold: Similarity in (0, 1]; 1 removes only what has the same set of 5-grams.

    Returns:
        The kept documents in their order; empty for empty input.

    Raises:
        ValueError: The threshold is outside (0, 1].
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold must be in (0, 1], got {threshold=}; 0.8 is usual")
    rows = _band_rows(threshold)
    kept: list[Document] = []
    kept_shingles: list[np.ndarray] = []
    buckets: dict[bytes, list[int]] = {}
    texts: set[bytes] = set()
    for document in documents:
        raw = document.text.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        if digest in texts:
            continue
        texts.add(digest)
        shingles = _shingles(raw)
        bands = _signature(shingles).reshape(-1, rows)
        keys = [bytes([band]) + values.tobytes() for band, values in enumerate(bands)]
        candidates = sorted({index for key in keys for index in buckets.get(key, ())})
        if any(_similar(shingles, kept_shingles[index], threshold) for index in candidates):
            continue
        for key in keys:
            buckets.setdefault(key, []).append(len(kept))
        kept.append(document)
        kept_shingles.append(shingles)
    return kept


def split(
    documents: Iterable[Document], held_out: float = 0.01, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Divide documents into training and held-out ones, whole files at a time.

    A document is held out when a hash of the seed and its name, read as a number in [0, 1), is below `held_out`.
    Nothing else decides, so adding or removing files never moves another one.

    Args:
        documents: Any order.
        held_out: Expected fraction of documents held out, in [0, 1].
        seed: Chooses among independent splits.

    Returns:
        (training, held_out), each in the order given; either may be empty.

    Raises:
        ValueError: The fraction is outside [0, 1].
    """
    if not 0.0 <= held_out <= 1.0:
        raise ValueError(f"held_out must be a fraction in [0, 1], got {held_out=}; 0.01 is usual")
    parts: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        digest = hashlib.blake2b(f"{seed}\0{document.name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        parts[int.from_bytes(digest, "little") < held_out * 2.0**64].append(document)
    return parts


def _walk(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """List the regular files under `root` with one of the suffixes, outside hidden folders."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths += [Path(folder, name) for name in names if name.endswith(suffixes)]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def _read(path: Path, root: Path) -> Document | None:
    """Return the file as a document, or None where it is not text worth keeping."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    if b"\0" in raw or not text.strip():
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _looks_generated(text, raw):
        return None
    return Document(name=f"{root.name}/{path.relative_to(root).as_posix()}", text=text)


def _looks_generated(text: str, raw: bytes) -> bool:
    lines = text.splitlines()
    if max(map(len, lines)) > MAX_LINE or len(text) > MAX_MEAN_LINE * len(lines):
        return True
    visible = raw.translate(None, delete=_SPACE)
    letters = len(visible) - len(visible.translate(None, delete=_LETTERS))
    if letters < MIN_LETTERS * len(visible) or len(raw) - len(visible) < MIN_SPACE * len(raw):
        return True
    return _GENERATED.search(raw[:HEADER_BYTES]) is not None


def _byte_classes() -> np.ndarray:
    """Map each byte to 0 (whitespace), 1 (part of a word; all non-ASCII bytes are) or 2 (a token by itself)."""
    classes = np.full(256, 2, np.uint8)
    classes[[b for b in range(256) if b >= 128 or chr(b).isalnum() or chr(b) == "_"]] = 1
    classes[list(_SPACE)] = 0
    return classes


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers: the splitmix64 finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _powers(base: int, count: int) -> np.ndarray:
    """Return base**0 to base**(count - 1) modulo 2**64."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)


_CLASSES = _byte_classes()
_WORD, _PUNCTUATION = 1, 2
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 1 << 64)
_BYTE_HASH = np.where(_CLASSES == 0, np.uint64(0), _mix(np.arange(1, 257, dtype=np.uint64)))
_SCALES = _mix(np.arange(1, NUM_HASHES + 1, dtype=np.uint64)) | np.uint64(1)
_SHIFTS = _mix(np.arange(NUM_HASHES + 1, 2 * NUM_HASHES + 1, dtype=np.uint64))


def _shingles(raw: bytes) -> np.ndarray:
    """Hash every run of five tokens to 32 bits; sorted, distinct. A shorter document is padded to one run.

    Token hashes are differences of prefix sums of byte_hash * base**position, shifted back by base**-start, so that
    no step loops over tokens.
    """
    data = np.frombuffer(raw, np.uint8)
    kinds = _CLASSES[data]
    before = np.append(np.uint8(0), kinds)[:-1]
    starts = np.flatnonzero((kinds == _PUNCTUATION) | ((kinds == _WORD) & (before != _WORD)))
    prefix = np.zeros(data.size + 1, np.uint64)
    np.cumsum(_BYTE_HASH[data] * _powers(_BASE, data.size), out=prefix[1:])
    bounds = np.append(starts, data.size)
    tokens = _mix((prefix[bounds[1:]] - prefix[starts]) * _powers(_INVERSE, data.size)[starts])
    tokens = np.pad(tokens, (0, max(0, SHINGLE_TOKENS - tokens.size)))
    runs = np.lib.stride_tricks.sliding_window_view(tokens, SHINGLE_TOKENS)
    hashes = _mix((runs * _powers(_INVERSE, SHINGLE_TOKENS)).sum(axis=1, dtype=np.uint64))
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def _signature(shingles: np.ndarray) -> np.ndarray:
    """Return the minimum of each hash function (multiply, add, keep the high half) over a document's shingles."""
    smallest = np.full(NUM_HASHES, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, shingles.size, HASH_CHUNK):
        part = shingles[start : start + HASH_CHUNK].astype(np.uint64)
        hashes = (_SCALES[:, None] * part + _SHIFTS[:, None]) >> np.uint64(32)
        smallest = np.minimum(smallest, hashes.min(axis=1).astype(np.uint32))
    return smallest


def _band_rows(threshold: float) -> int:
    """Pick the longest band that still finds a pair at the threshold with probability MIN_RECALL."""
    divisors = [rows for rows in range(1, NUM_HASHES + 1) if NUM_HASHES % rows == 0 and NUM_HASHES // rows <= 256]
    good = [rows for rows in divisors if 1.0 - (1.0 - threshold**rows) ** (NUM_HASHES // rows) >= MIN_RECALL]
    return max(good, default=1)


def _similar(a: np.ndarray, b: np.ndarray, threshold: float) -> bool:
    """Decide whether two sorted sets have Jaccard similarity of at least `threshold`."""
    if min(a.size, b.size) < threshold * max(a.size, b.size):
        return False
    common = np.intersect1d(a, b, assume_unique=True).size
    return common >= threshold * (a.size + b.size - common)
