"""Token tasks as training data: stateless batches whose answers alone are to be predicted."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from dyninf.tasks import Vocabulary, mixture
from dyninf.tasks.tokens import find_token_task

HELD_OUT = 1 << 33  # added to the seed; seeds of recipes are below 2**32
KEYS = 2048  # enough for a context of 8192 tokens that is nothing but needles
MARKERS = ("[PAD]", "[BOS]", "[KEY]", "[VALUE]", "[ASSIGN]", "[SEP]", "[QUERY]", "[UNUSED]")


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Rows of several token tasks, drawn by weight.

    Args:
        tasks: name and weight of each.
        questions: the most that are asked about one context; see :func:`dyninf.tasks.mixture`.
        offset: added to every seed; what is held out has another.
    """

    tasks: tuple[tuple[str, float], ...]
    questions: int = 1
    vocabulary: Vocabulary = Vocabulary(num_keys=KEYS)
    offset: int = 0

    def held_out(self) -> "TaskData":
        """Return the same tasks with rows that training never draws."""
        return dataclasses.replace(self, offset=HELD_OUT)

    def check(self, length: int) -> None:
        """Refuse tasks that cannot be drawn at the lengths of :meth:`batch`.

        Raises:
            ValueError: if a task is unknown, or the length too short or too long for it.
        """
        names, weights = zip(*self.tasks, strict=True)
        rest = {"vocabulary": self.vocabulary, "questions": self.questions}
        low, high = _lengths(length)
        for task in map(find_token_task, names):
            for extreme in (low, high):
                try:
                    mixture([task], [1.0], extreme, 0, 1, vocabulary=self.vocabulary)
                except ValueError as error:
                    raise ValueError(f"{error}; with recipe.length={length} rows have {low} to {high} tokens") from None
        mixture(names, weights, (low, high), 0, 1, **rest)

    def batch(self, step: int, *, batch_size: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens ``int32 [B, length + 1]`` of a step and which of the last ``length`` are answers."""
        names, weights = zip(*self.tasks, strict=True)
        numbers = (_lengths(length), seed + self.offset, batch_size)
        rows = mixture(
            names,
            weights,
            *numbers,
            start=step * batch_size,
            vocabulary=self.vocabulary,
            questions=self.questions,
        )
        return rows.tokens, rows.loss_mask[:, 1:]

    def tokenizer(self) -> Tokenizer:
        """Return a tokenizer that reads and writes ids by name: ``[BOS] [KEY] k12 [VALUE] v7``."""
        names = list(MARKERS)
        for letter, ids in (("k", self.vocabulary.keys), ("v", self.vocabulary.values), ("n", self.vocabulary.noise)):
            names += [f"{letter}{number}" for number in range(len(ids))]
        tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNUSED]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return tokenizer


def _lengths(length: int) -> tuple[int, int]:
    """Return the least and the most tokens of a row, so that a long stage also shows short ones."""
    return max(2, (length + 1) // 4), length + 1
