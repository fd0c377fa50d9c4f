"""Counting made of tokens: the words that occur most often, after Zipf's law or a few against all others.

The twins of :mod:`dyninf.tasks.frequent_words` and :mod:`dyninf.tasks.common_words`. Words are ids of values.
"""

from dataclasses import dataclass

import numpy as np

from dyninf.tasks.common_words import repeats
from dyninf.tasks.frequent_words import TOKENS_PER_WORD, zipf_counts
from dyninf.tasks.sample import check_counts
from dyninf.tasks.vocabulary import Row, Vocabulary, require_ids, require_room


@dataclass(frozen=True, kw_only=True)
class Frequent:
    """Words in random order whose counts follow Zipf's law, then ``SEP QUERY VALUE`` and the most frequent ones.

    The answers come in falling order of their counts, which differ. Unlike the text task the first rank is asked for
    too, as no token needs to be worth less than others.

    Args:
        num_answers: how many words are asked for.
        alpha: exponent of the law (above 0); smaller is harder.
        num_words: different words; ``None`` for one every 50 tokens, at least two more than answers and at most what
            the vocabulary has.

    Raises:
        ValueError: if a parameter is out of its range.
    """

    name: str = "frequent"
    num_answers: int = 3
    alpha: float = 2.0
    num_words: int | None = None

    def __post_init__(self):
        check_counts(num_answers=self.num_answers)
        if not self.alpha > 0:
            raise ValueError(f"expected alpha above 0, got {self.alpha}")
        if self.num_words is not None:
            check_counts(num_words=self.num_words)
            if self.num_words <= self.num_answers:
                raise ValueError(f"expected num_words above num_answers={self.num_answers}, got {self.num_words}")

    def draw(self, vocabulary: Vocabulary, length: int, rng: np.random.Generator, questions: int = 1) -> Row:
        """Return a sequence; see :class:`dyninf.tasks.TokenTask`. There is one question to ask."""
        room = length - 3 - self.num_answers - 1
        usual = max(self.num_answers + 2, min(length // TOKENS_PER_WORD, vocabulary.num_values))
        words = usual if self.num_words is None else self.num_words
        require_ids(self.name, "values", words, vocabulary.num_values)
        # Falling counts down to 1: no text of these words is shorter.
        least = int(zipf_counts(1, words, alpha=self.alpha, distinct=self.num_answers).sum())
        require_room(self.name, length - room + least, length)
        counts = _exact(room, words, self.alpha, self.num_answers)
        ids = vocabulary.values.start + rng.permutation(vocabulary.num_values)[:words]
        text = np.repeat(ids, counts)
        rng.shuffle(text)
        return Row(
            context=np.concatenate([[vocabulary.BOS], text]).astype(np.int32),
            question=(vocabulary.SEP, vocabulary.QUERY, vocabulary.VALUE),
            answers=tuple((int(word),) for word in ids[: self.num_answers]),
            starts=(),
        )


@dataclass(frozen=True, kw_only=True)
class Common:
    """A few words that occur often among many that occur seldom, then ``SEP QUERY KEY`` and the frequent ones.

    The answers come in the order of their ids. What the vocabulary's values leave of the length is noise, which does
    not count.

    Args:
        num_answers: how many words are common.
        common_repeats, other_repeats: how often each occurs; ``None`` for 30 and 3, below 4096 tokens 6 and 1.

    Raises:
        ValueError: if a parameter is out of its range.
    """

    name: str = "common"
    num_answers: int = 10
    common_repeats: int | None = None
    other_repeats: int | None = None

    def __post_init__(self):
        check_counts(num_answers=self.num_answers)
        given = {"common_repeats": self.common_repeats, "other_repeats": self.other_repeats}
        check_counts(**{name: value for name, value in given.items() if value is not None})

    def draw(self, vocabulary: Vocabulary, length: int, rng: np.random.Generator, questions: int = 1) -> Row:
        """Return a sequence; see :class:`dyninf.tasks.TokenTask`. There is one question to ask."""
        many, few = repeats(length)
        many = many if self.common_repeats is None else self.common_repeats
        few = few if self.other_repeats is None else self.other_repeats
        if many <= few:
            raise ValueError(f"expected common_repeats above other_repeats, got {many} and {few}")
        room = length - 3 - self.num_answers - 1
        require_ids(self.name, "values", self.num_answers + 1, vocabulary.num_values)
        require_room(self.name, length - room + self.num_answers * many + few, length)
        others = min(vocabulary.num_values - self.num_answers, (room - self.num_answers * many) // few)
        ids = vocabulary.values.start + rng.permutation(vocabulary.num_values)[: self.num_answers + others]
        words = np.repeat(ids, np.where(np.arange(len(ids)) < self.num_answers, many, few))
        noise = rng.integers(vocabulary.noise.start, vocabulary.noise.stop, room - len(words))
        text = np.concatenate([words, noise])
        rng.shuffle(text)
        return Row(
            context=np.concatenate([[vocabulary.BOS], text]).astype(np.int32),
            question=(vocabulary.SEP, vocabulary.QUERY, vocabulary.KEY),
            answers=tuple((int(word),) for word in np.sort(ids[: self.num_answers])),
            starts=(),
        )


def _exact(total: int, num_words: int, alpha: float, distinct: int) -> np.ndarray:
    """Return Zipf counts that add up to ``total``: the first rank takes what rounding leaves or lacks."""
    aim = total
    while True:
        counts = zipf_counts(aim, num_words, alpha=alpha, distinct=distinct)
        rest = total - int(counts.sum())
        if counts[0] + rest > counts[1]:
            counts[0] += rest
            return counts
        aim -= 1
