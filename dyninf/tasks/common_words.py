"""Common words extraction: a few words occur often in a long numbered list, all others seldom.

Source: RULER (Hsieh et al. 2024), section 3, task cwe. Differences: the sentences are our own; the words are those of
:mod:`dyninf.tasks.words`, in long lists pairs of them; the room for the answer follows the tokenizer; the last few
tokens are filled up.
"""

import random
from typing import Any

from dyninf.tasks.fitting import Draft, Encoder, fit_sample
from dyninf.tasks.sample import Sample, check_counts, check_request
from dyninf.tasks.words import ADJECTIVES, NOUNS, VERBS, sample_rng

LONG = 4096  # tokens; shorter lists repeat their words less
EXAMPLE_WORDS, EXAMPLE_REPEATS = 10, 3  # of the worked example: other words, and how often the common ones occur


def repeats(length: int) -> tuple[int, int]:
    """Return how often common and other words occur in a sample of ``length`` tokens."""
    return (30, 3) if length >= LONG else (6, 1)


def make(
    tokenizer: Any,
    length: int,
    seed: int,
    count: int,
    *,
    num_common: int = 10,
    common_repeats: int | None = None,
    other_repeats: int | None = None,
    example: bool = True,
    answer_tokens: int | None = None,
    name: str = "common_words",
) -> list[Sample]:
    """Make samples that ask for the words that occur most often.

    Args:
        tokenizer: anything with ``encode(text).ids``.
        length: tokens of a sample at most, room for the answer included.
        common_repeats, other_repeats: how often each word occurs; ``None`` for 30 and 3, below 4096 tokens 6 and 1.
        example: put a short list with its question and answer first.
        answer_tokens: room for the answer (tokens); ``None`` for twice the right answer's and 8.

    Raises:
        ValueError: if a parameter is out of its range, the common words do not fit, or the tokenizer loses the text.
    """
    check_request(length, seed, count)
    common_repeats = repeats(length)[0] if common_repeats is None else common_repeats
    other_repeats = repeats(length)[1] if other_repeats is None else other_repeats
    check_counts(num_common=num_common, common_repeats=common_repeats, other_repeats=other_repeats)
    if common_repeats <= other_repeats:
        raise ValueError(f"expected common_repeats above other_repeats, got {common_repeats} and {other_repeats}")
    encode = Encoder(tokenizer)
    singles, pairs = sorted({*ADJECTIVES, *NOUNS, *VERBS}), len(ADJECTIVES) * len(NOUNS)
    samples = []
    for index in range(count):
        key = (name, seed, index)
        shots = num_common + EXAMPLE_WORDS if example else 0
        # Orders of all single words and of all pairs: a list that grows keeps its words as long as it uses one kind.
        order = sample_rng(*key).sample(singles, len(singles))
        pair_order = sample_rng(*key, "pairs").sample(range(pairs), pairs)

        def render(units: int, key: tuple = key, shots: int = shots, order=order, pair_order=pair_order) -> Draft:
            wanted = shots + num_common + units
            if wanted > pairs:
                raise ValueError(f"expected at most {pairs} different words, got {wanted}; shorten the task")
            words = order[:wanted] if wanted <= len(order) else [_pair(number) for number in pair_order[:wanted]]
            shown, words = words[:shots], words[shots:]
            common = words[:num_common]
            rng = sample_rng(*key, "order")
            intro = f"Below is a numbered list of words. Remember the {num_common} words that occur most often."
            if shown:
                best = shown[:num_common]
                small = _listing(rng, best, EXAMPLE_REPEATS, shown[num_common:], 1)
                intro = f"{intro}\n{small}{_question(num_common)} {', '.join(best)}\n\n{intro}"
            return Draft(
                intro=intro,
                body=_listing(rng, common, common_repeats, words[num_common:], other_repeats),
                starts=(),
                question=_question(num_common),
                answers=tuple(common),
                target=" " + ", ".join(common),
            )

        samples.append(fit_sample(render, encode, length, name=name, key=key, answer_tokens=answer_tokens))
    return samples


def _question(num_common: int) -> str:
    return (
        f"\nQuestion: which {num_common} words occur most often in the list?\n"
        f"Answer: the {num_common} most frequent words are:"
    )


def _listing(rng: random.Random, common: list[str], many: int, others: list[str], few: int) -> str:
    entries = common * many + others * few
    rng.shuffle(entries)
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, start=1))


def _pair(number: int) -> str:
    return f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"
