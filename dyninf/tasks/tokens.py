"""Batches of tasks made of tokens, for training and testing tiny models: no text, no tokenizer.

Row i of a task is a function of the task, the vocabulary, the length, the seed and i alone, so that any rows can be
drawn in any order, and training resumes by counting. NumPy on the host; thousands of rows of 2048 tokens a second.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dyninf.tasks.sample import Sample, check_counts, check_request
from dyninf.tasks.token_counting import Common, Frequent
from dyninf.tasks.token_needles import Needles
from dyninf.tasks.token_tracking import Tracking
from dyninf.tasks.vocabulary import Row, TokenTask, Vocabulary

TOKEN_TASKS: dict[str, TokenTask] = {
    task.name: task
    for task in (
        Needles(name="needle"),
        Needles(name="multikey_4", num_keys=4),
        Needles(name="multikey_all", num_keys=None),
        Needles(name="multivalue", num_values=4),
        Needles(name="multiquery", num_keys=8, num_queries=4),
        Tracking(name="tracking"),
        Tracking(name="tracking_names", ask="names"),
        Frequent(name="frequent"),
        Common(name="common"),
    )
}


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """Rows of token tasks.

    Attributes:
        tokens: ``int32 [B, T]``, ``PAD`` beyond each length: context, question and answers; further questions.
        lengths: tokens of each row ``[B]``.
        loss_mask: which tokens are answers ``bool [B, T]``; a model predicts them from the tokens before.
        questions: where each first question begins ``[B]``; its context ends there.
        tasks: the name of each row's task.
        answers: the answers of each row's first question, in the order in which they follow it.
        depths: for each row, where the statements that its answers follow from begin, as fractions of its context.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    loss_mask: np.ndarray
    questions: np.ndarray
    tasks: tuple[str, ...]
    answers: tuple[tuple[tuple[int, ...], ...], ...]
    depths: tuple[tuple[float, ...], ...]


def find_token_task(name: str) -> TokenTask:
    """Return a token task by its name.

    Raises:
        ValueError: if there is none; the message lists all.
    """
    if name not in TOKEN_TASKS:
        raise ValueError(f"expected one of the token tasks {', '.join(TOKEN_TASKS)}, got {name!r}")
    return TOKEN_TASKS[name]


def draw(
    task: str | TokenTask,
    length: int | tuple[int, int],
    seed: int,
    count: int,
    *,
    start: int = 0,
    vocabulary: Vocabulary | None = None,
) -> TokenBatch:
    """Return rows ``start`` to ``start + count - 1`` of a task.

    Args:
        task: a name in :data:`TOKEN_TASKS`, or a task with parameters of one's own.
        length: tokens of every row, or the least and the most for lengths that differ.
        vocabulary: ``None`` for the default of 1024 ids.

    Raises:
        ValueError: if the task is unknown, the vocabulary too small, or the length too short.
    """
    return mixture([task], [1.0], length, seed, count, start=start, vocabulary=vocabulary)


def mixture(
    tasks: Sequence[str | TokenTask],
    weights: Sequence[float],
    length: int | tuple[int, int],
    seed: int,
    count: int,
    *,
    start: int = 0,
    vocabulary: Vocabulary | None = None,
    questions: int = 1,
) -> TokenBatch:
    """Return rows ``start`` to ``start + count - 1`` of a mixture: each row is of a task drawn by its weight.

    A training loop asks for ``start=step * count``. Row i of a task is the same whatever it is mixed with.

    Args:
        weights: one for each task, at least 0; they need not add up to 1.
        length, vocabulary: as for :func:`draw`.
        questions: the most that are asked about one context. A row has as many as fit or fewer, often one, and as many
            keys as they need: a model learns from each what a single question teaches, all from one context.

    Raises:
        ValueError: as for :func:`draw`, and if the weights do not fit the tasks.
    """
    low, high = (length, length) if np.ndim(length) == 0 else length
    check_request(low, seed, count)
    check_request(high, seed, count)
    check_counts(questions=questions)
    if low > high or start < 0:
        raise ValueError(f"expected the least length first and a start of at least 0, got {length=} and {start=}")
    chosen = [find_token_task(task) if isinstance(task, str) else task for task in tasks]
    share = np.asarray(weights, np.float64)
    if not chosen or share.shape != (len(chosen),) or not (np.isfinite(share).all() and share.min() >= 0 < share.sum()):
        raise ValueError(
            f"expected a weight of at least 0 for each of {len(chosen)} tasks, one of them above 0, got {weights!r}"
        )
    edges = np.cumsum(share) / share.sum()
    vocabulary = Vocabulary() if vocabulary is None else vocabulary
    rows, names = [], []
    for index in range(start, start + count):
        pick = _rng("mixture", seed, index).random() if len(chosen) > 1 else 0.0
        task = chosen[int(np.searchsorted(edges, pick, side="right"))]
        rng = _rng(task.name, seed, index)
        rows.append(task.draw(vocabulary, int(rng.integers(low, high + 1)), rng, questions))
        names.append(task.name)
    return _stack(rows, names, high)


def to_samples(batch: TokenBatch) -> list[Sample]:
    """Return the first question of every row of a batch as a sample, whose answers are runs of ids."""
    samples = []
    for row, name in enumerate(batch.tasks):
        question, answer = int(batch.questions[row]), int(batch.loss_mask[row].argmax())
        ids = batch.tokens[row, : answer + sum(map(len, batch.answers[row]))].tolist()
        samples.append(
            Sample(
                task=name,
                context_ids=tuple(ids[:question]),
                question_ids=tuple(ids[question:answer]),
                answers=batch.answers[row],
                target_ids=tuple(ids[answer:]),
                max_new_tokens=len(ids) - answer,
                depths=batch.depths[row],
            )
        )
    return samples


def _stack(rows: list[Row], names: list[str], width: int) -> TokenBatch:
    tokens = np.full((len(rows), width), Vocabulary.PAD, np.int32)
    loss_mask = np.zeros((len(rows), width), bool)
    lengths, questions = np.empty((2, len(rows)), np.int32)
    for index, row in enumerate(rows):
        tail = [*row.question, *(token for answer in row.answers for token in answer)]
        begin, end = len(row.context), len(row.context) + len(tail) + row.more.size
        questions[index], lengths[index] = begin, end
        tokens[index, :end] = np.concatenate([row.context, tail, row.more.ravel()])
        loss_mask[index, begin:end].reshape(-1, len(tail))[:, len(row.question) :] = True
    return TokenBatch(
        tokens=tokens,
        lengths=lengths,
        loss_mask=loss_mask,
        questions=questions,
        tasks=tuple(names),
        answers=tuple(row.answers for row in rows),
        depths=tuple(tuple(start / len(row.context) for start in row.starts) for row in rows),
    )


def _rng(*parts: Any) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, parts)).encode("utf-8")).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, "<u8", 2)))
