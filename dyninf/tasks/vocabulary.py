"""The vocabulary of tasks that are made of tokens, and what every such task gives: a :class:`Row`."""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from dyninf.tasks.sample import check_counts


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Four disjoint ranges of ids: markers from 0, then keys, values and noise.

    Markers: ``PAD`` fills up, ``BOS`` begins every sequence, ``KEY k VALUE v...`` states values of a key,
    ``ASSIGN x y`` gives x the value of y, ``SEP QUERY`` begins the question.

    Raises:
        ValueError: if a range is empty.
    """

    PAD: ClassVar[int] = 0
    BOS: ClassVar[int] = 1
    KEY: ClassVar[int] = 2
    VALUE: ClassVar[int] = 3
    ASSIGN: ClassVar[int] = 4
    SEP: ClassVar[int] = 5
    QUERY: ClassVar[int] = 6
    NUM_MARKERS: ClassVar[int] = 8  # one is spare

    # Enough keys for a context of 2048 tokens that is nothing but needles, and 1024 ids in all.
    num_keys: int = 600
    num_values: int = 288
    num_noise: int = 128

    def __post_init__(self):
        check_counts(num_keys=self.num_keys, num_values=self.num_values, num_noise=self.num_noise)

    @property
    def keys(self) -> range:
        """Ids of keys and of names of variables."""
        return range(self.NUM_MARKERS, self.NUM_MARKERS + self.num_keys)

    @property
    def values(self) -> range:
        """Ids of values and of words to count."""
        return range(self.keys.stop, self.keys.stop + self.num_values)

    @property
    def noise(self) -> range:
        """Ids that mean nothing."""
        return range(self.values.stop, self.values.stop + self.num_noise)

    @property
    def size(self) -> int:
        """Number of ids; what a model's vocabulary has to hold."""
        return self.noise.stop


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One sequence: context (``BOS`` first), question and the answers, which follow the question in this order.

    ``starts`` says where in the context each statement begins that the answers follow from. ``more`` holds further
    questions about the same context ``[n, s]``, each in the form of the first and with its answers behind it.
    """

    context: np.ndarray
    question: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    more: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int32))


class TokenTask(Protocol):
    """A task made of tokens: a frozen value with a name."""

    name: str

    def draw(self, vocabulary: Vocabulary, length: int, rng: np.random.Generator, questions: int = 1) -> Row:
        """Return a sequence of exactly ``length`` tokens, answers included.

        Args:
            questions: the most that may be asked about one context, where the task has several and they fit; the
                context then holds what they ask for. One is the task as it is evaluated.

        Raises:
            ValueError: if the vocabulary is too small or the length too short.
        """


def require_ids(task: str, name: str, needed: int, available: int) -> None:
    """Refuse a vocabulary that is too small for a task.

    Raises:
        ValueError: naming the range and the size that would do.
    """
    if needed > available:
        raise ValueError(
            f"expected a vocabulary of at least {needed} {name} for the task {task!r}, got {available}; use "
            f"Vocabulary(num_{name}={needed}) or a shorter length"
        )


def require_room(task: str, needed: int, length: int) -> None:
    """Refuse a length that is too short for a task.

    Raises:
        ValueError: naming the length that would do.
    """
    if needed > length:
        raise ValueError(f"expected a length of at least {needed} tokens for the task {task!r}, got {length}")


def draw_number(most: int, rng: np.random.Generator) -> int:
    """Return a number from 1 to ``most``, about as often 1 as 2 to 3 or 4 to 7; nothing is drawn where 1 is all."""
    return min(most, int((most + 1) ** rng.random())) if most > 1 else 1


def place(
    statements: np.ndarray, fractions: np.ndarray, room: int, vocabulary: Vocabulary, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return a context of ``BOS``, noise and statements ``[n, s]``, and where each statement begins ``[n]``.

    Statement i begins after about the fraction ``fractions[i]`` (0 to 1) of the noise; equal fractions keep their
    order. ``room`` counts ``BOS``.
    """
    count, size = statements.shape
    noise = vocabulary.noise
    context = rng.integers(noise.start, noise.stop, room, dtype=np.int32)
    context[0] = vocabulary.BOS
    free = room - 1 - count * size
    order = np.argsort(fractions, kind="stable")
    starts = np.empty(count, np.int64)
    starts[order] = 1 + np.rint(fractions[order] * free).astype(np.int64) + np.arange(count) * size
    context[starts[:, None] + np.arange(size)] = statements
    return context, starts
