"""Frequent words extraction: coded words whose counts follow Zipf's law, and dots that occur most often of all.

Source: RULER (Hsieh et al. 2024), section 3, task fwe: word of rank k occurs ``n k^-alpha / zeta(alpha)`` times, rank 1
is replaced by dots, ranks 2 to 4 are asked for. Differences: the sentences are our own; every word occurs at least
once and ranks 1 to 5 differ in their counts, so that the answer is never a tie; the room for the answer follows the
tokenizer; the last few tokens are filled up.
"""

from typing import Any

import numpy as np

from dyninf.tasks.fitting import Draft, Encoder, fit_sample
from dyninf.tasks.sample import Sample, check_counts, check_request
from dyninf.tasks.words import Supply, sample_rng

DOTS = "..."
TOKENS_PER_WORD = 50  # length of a sample for each different word


def zipf_counts(total: int, num_words: int, *, alpha: float, distinct: int) -> np.ndarray:
    """Return how often the words of rank 1, 2, ... occur ``[num_words]``: falling, about ``total`` in all.

    Args:
        distinct: so many first ranks are each more frequent than the next.
    """
    share = np.arange(1, num_words + 1, dtype=np.float64) ** -alpha
    counts = np.maximum(1, np.rint(total * share / share.sum())).astype(np.int64)
    for rank in range(min(distinct, num_words - 1) - 1, -1, -1):
        counts[rank] = max(counts[rank], counts[rank + 1] + 1)
    return counts


def make(
    tokenizer: Any,
    length: int,
    seed: int,
    count: int,
    *,
    alpha: float = 2.0,
    num_answers: int = 3,
    num_words: int | None = None,
    answer_tokens: int | None = None,
    name: str = "frequent_words",
) -> list[Sample]:
    """Make samples that ask for the most frequent coded words, the dots left out.

    Args:
        tokenizer: anything with ``encode(text).ids``.
        length: tokens of a sample at most, room for the answer included.
        alpha: exponent of Zipf's law (above 0); smaller is harder.
        num_words: different words, the dots included; ``None`` for one every 50 tokens.
        answer_tokens: room for the answer (tokens); ``None`` for twice the right answer's and 8.

    Raises:
        ValueError: if a parameter is out of its range, the text does not fit, or the tokenizer loses it.
    """
    check_request(length, seed, count)
    check_counts(num_answers=num_answers)
    if not alpha > 0:
        raise ValueError(f"expected alpha above 0, got {alpha}")
    least = num_answers + 2
    num_words = max(least, length // TOKENS_PER_WORD) if num_words is None else num_words
    check_counts(num_words=num_words)
    if num_words < least:
        raise ValueError(f"expected num_words of at least {least} for {num_answers} answers, got {num_words}")
    encode = Encoder(tokenizer)
    samples = []
    for index in range(count):
        key = (name, seed, index)
        supply = Supply(sample_rng(*key))
        words = [DOTS, *(supply("codes") for _ in range(num_words - 1))]

        def render(units: int, key: tuple = key, words: list = words) -> Draft:
            counts = zipf_counts(units, num_words, alpha=alpha, distinct=num_answers + 1)
            entries = [word for word, times in zip(words, counts, strict=True) for _ in range(times)]
            sample_rng(*key, "order").shuffle(entries)
            answers = tuple(words[1 : 1 + num_answers])
            return Draft(
                intro="Below is a coded text. Keep track of how often each coded word occurs; dots do not count.",
                body=" ".join(entries),
                starts=(),
                question=f"\nQuestion: which {num_answers} coded words occur most often, the dots left out?\n"
                f"Answer: the {num_answers} most frequent coded words are:",
                answers=answers,
                target=" " + ", ".join(answers),
            )

        # Fewer units than words would leave every count at its least.
        fitted = fit_sample(render, encode, length, name=name, key=key, minimum=num_words, answer_tokens=answer_tokens)
        samples.append(fitted)
    return samples
