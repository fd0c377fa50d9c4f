"""Needles made of tokens: values among noise and distractors, to be found by their keys.

The twin of :mod:`dyninf.tasks.niah`; with nothing but needles it is multi-query associative recall (Arora et al. 2023,
"Zoology") and the twin of :mod:`dyninf.tasks.key_value`.
"""

from dataclasses import dataclass

import numpy as np

from dyninf.tasks.sample import check_counts, check_depth
from dyninf.tasks.vocabulary import Row, Vocabulary, draw_number, place, require_ids, require_room


@dataclass(frozen=True, kw_only=True)
class Needles:
    """``KEY k VALUE v...`` among noise, then ``SEP QUERY k... VALUE`` and the values of the keys asked for.

    Values come in the order of the queries, several of one key in the order of the text. Keys are distinct, and so
    are the first tokens of one key's values; values of different keys may be equal.

    Args:
        num_keys: keys in the text; those beyond ``num_queries`` are distractors. ``None`` for as many as fit, or as
            the vocabulary has: up to there the text is nothing but needles and a few tokens more.
        num_values: statements of each key.
        value_tokens: tokens of a value.
        depth: where the statements asked for lie (0 to 1): one fraction, one for each, ``None`` for anywhere.

    Raises:
        ValueError: if a parameter is out of its range.
    """

    name: str = "needle"
    num_keys: int | None = 1
    num_values: int = 1
    num_queries: int = 1
    value_tokens: int = 1
    depth: float | tuple[float, ...] | None = None

    def __post_init__(self):
        counts = {"num_values": self.num_values, "num_queries": self.num_queries, "value_tokens": self.value_tokens}
        check_counts(**counts, **({} if self.num_keys is None else {"num_keys": self.num_keys}))
        check_depth(self.depth, self.num_queries * self.num_values)

    def draw(self, vocabulary: Vocabulary, length: int, rng: np.random.Generator, questions: int = 1) -> Row:
        """Return a sequence; see :class:`dyninf.tasks.TokenTask`.

        No key is asked for twice; where there are fewer keys than questions ask for, there are more keys.
        """
        asked, size = self.num_queries * self.num_values, 3 + self.value_tokens
        tail = 3 + self.num_queries + asked * self.value_tokens
        number = 1
        if questions > 1:
            number = draw_number(min(questions, self._most_questions(vocabulary, length, tail)), rng)
        room = length - number * tail
        fit = min((room - 1) // (size * self.num_values), vocabulary.num_keys)
        count = max(number * self.num_queries, fit if self.num_keys is None else self.num_keys)
        require_room(self.name, length - room + 1 + count * self.num_values * size, length)
        require_ids(self.name, "keys", count, vocabulary.num_keys)
        require_ids(self.name, "values", self.num_values, vocabulary.num_values)
        keys = vocabulary.keys.start + rng.permutation(vocabulary.num_keys)[:count]
        values = self._values(vocabulary, count, rng)
        statements = np.empty((count * self.num_values, size), np.int32)
        statements[:, 0], statements[:, 2] = vocabulary.KEY, vocabulary.VALUE
        statements[:, 1] = np.repeat(keys, self.num_values)
        statements[:, 3:] = values
        fractions = rng.random(len(statements))
        depths = check_depth(self.depth, asked)
        if depths is not None:
            fractions[:asked] = depths
        context, starts = place(statements, fractions, room, vocabulary, rng)
        groups = np.arange(number * asked).reshape(number * self.num_queries, self.num_values)
        order = np.take_along_axis(groups, np.argsort(starts[groups], axis=1, kind="stable"), axis=1).ravel()
        first = order[:asked]
        return Row(
            context=context,
            question=(vocabulary.SEP, vocabulary.QUERY, *keys[: self.num_queries].tolist(), vocabulary.VALUE),
            answers=tuple(tuple(value) for value in values[first].tolist()),
            starts=tuple(starts[first].tolist()),
            more=self._more(vocabulary, keys[self.num_queries : number * self.num_queries], values[order[asked:]]),
        )

    def _most_questions(self, vocabulary: Vocabulary, length: int, tail: int) -> int:
        """Return how many questions of ``tail`` tokens fit behind a context with the keys that they need."""
        stated = (3 + self.value_tokens) * self.num_values
        least = self.num_queries if self.num_keys is None else max(self.num_queries, self.num_keys)
        fit = min((length - 1 - least * stated) // tail, (length - 1) // (self.num_queries * stated + tail))
        return max(1, min(fit, vocabulary.num_keys // self.num_queries))

    def _more(self, vocabulary: Vocabulary, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the questions about further keys, ``num_queries`` each, with the values behind them."""
        number = len(keys) // self.num_queries
        ends = np.array([vocabulary.SEP, vocabulary.QUERY, vocabulary.VALUE], np.int32)
        parts = (
            np.broadcast_to(ends[:2], (number, 2)),
            keys.reshape(number, self.num_queries),
            np.broadcast_to(ends[2:], (number, 1)),
            values.reshape(number, self.num_queries * self.num_values * self.value_tokens),
        )
        return np.concatenate(parts, axis=1)

    def _values(self, vocabulary: Vocabulary, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return the values of all statements ``[count * num_values, value_tokens]``."""
        ids = vocabulary.values
        values = rng.integers(ids.start, ids.stop, (count * self.num_values, self.value_tokens))
        if self.num_values > 1:
            orders = rng.permuted(np.tile(np.arange(ids.start, ids.stop), (count, 1)), axis=1)
            values[:, 0] = orders[:, : self.num_values].ravel()
        return values
