"""One sample of a long-context task, and the checks that every generator makes of what it is asked for.

Context and question are kept apart, so that a cache can be compressed before the question is seen; the prompt is the
ids of both, one after the other.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

Answer = str | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A context, a question about it and the answers.

    Attributes:
        task: name of the task.
        context, question: their text; empty for tasks that are made of tokens.
        context_ids, question_ids: their tokens; those that the tokenizer puts before a text are in the context.
        answers: what a right generation contains: text, or runs of token ids.
        target_ids: tokens of a right generation, every answer in it.
        max_new_tokens: room for the answer that the sample was made with (tokens).
        depths: where each needle that holds an answer begins, as a fraction (0 to 1) of the context's tokens; empty
            where the whole context holds the answer.
        metric: ``all`` scores the share of the answers that a generation contains, ``part`` whether it has any.
    """

    task: str
    context: str = ""
    question: str = ""
    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    answers: tuple[Answer, ...]
    target_ids: tuple[int, ...]
    max_new_tokens: int
    depths: tuple[float, ...] = ()
    metric: Literal["all", "part"] = "all"

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Context and question."""
        return self.context_ids + self.question_ids

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.context_ids) + len(self.question_ids) + self.max_new_tokens


def to_record(sample: Sample) -> dict[str, Any]:
    """Return a sample as values that JSON knows."""
    return asdict(sample)


def from_record(record: Any) -> Sample:
    """Return the sample of a record that was read from JSON.

    Raises:
        ValueError: if the record is not one that :func:`to_record` made.
    """
    names = {field.name for field in fields(Sample)}
    if not isinstance(record, dict) or set(record) != names:
        raise ValueError(f"expected a sample with the fields {sorted(names)}, got {record!r:.80}")
    lists = [record[name] for name in ("context_ids", "question_ids", "answers", "target_ids", "depths")]
    if not all(isinstance(value, list) for value in lists):
        raise ValueError(f"expected lists of ids, answers and depths, got {record!r:.80}")
    return Sample(**{name: _tuples(value) for name, value in record.items()})


def check_request(length: Any, seed: Any, count: Any) -> None:
    """Refuse numbers that no generator can work with.

    Raises:
        ValueError: if the length or the count is not a positive integer, or the seed not an integer.
    """
    for name, value in (("length", length), ("count", count)):
        if not _is_integer(value) or value < 1:
            raise ValueError(f"expected {name} to be an integer of at least 1, got {value!r}")
    if not _is_integer(seed):
        raise ValueError(f"expected seed to be an integer, got {seed!r}")


def check_counts(**counts: Any) -> None:
    """Refuse parameters of a rule that are not positive integers.

    Raises:
        ValueError: naming the parameter.
    """
    for name, value in counts.items():
        if not _is_integer(value) or value < 1:
            raise ValueError(f"expected {name} to be an integer of at least 1, got {value!r}")


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a parameter of a rule that is none of the known values.

    Raises:
        ValueError: listing the known values.
    """
    if value not in known:
        raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {value!r}")


def check_depth(depth: Any, count: int) -> tuple[float, ...] | None:
    """Return one depth for each of ``count`` needles, ``None`` where they are placed at random.

    Args:
        depth: ``None``, one fraction for all, or one for each.

    Raises:
        ValueError: if a depth is not a fraction between 0 and 1, or their number differs.
    """
    if depth is None:
        return None
    depths = tuple(depth) if isinstance(depth, Sequence | np.ndarray) else (depth,) * count
    fractions = all(isinstance(value, int | float | np.number) and 0 <= value <= 1 for value in depths)
    if not fractions or len(depths) != count:
        raise ValueError(f"expected a depth between 0 and 1, or {count} of them, one for each needle, got {depth!r}")
    return tuple(float(value) for value in depths)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value
