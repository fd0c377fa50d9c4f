"""Needles in a haystack: single, multi-key, multi-value and multi-query retrieval.

A needle states a magic number (word, uuid) for a key; the question names one or several keys. Distractor needles have
other keys.
Source: RULER (Hsieh et al. 2024), section 3 and its rules for the tasks niah_*. Differences: the sentences are our own;
the haystack of essays is replaced by prose made by rule from a word list (``haystack="prose"``), as nothing is
downloaded; keys and values of one sample never repeat; the room for the answer follows the tokenizer; the last few
tokens are filled up (:mod:`dyninf.tasks.fitting`).
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

from dyninf.tasks.fitting import Draft, Encoder, fit_sample, weave
from dyninf.tasks.sample import Sample, check_choice, check_counts, check_depth, check_request
from dyninf.tasks.words import KINDS, NOISE, SINGULAR, Kind, Supply, sample_rng, sentences

HAYSTACKS = ("noise", "prose", "needles")
DEPTH_STEPS = 40  # prose: needles begin at one of so many depths, evenly spaced from 0 to 1


def make(
    tokenizer: Any,
    length: int,
    seed: int,
    count: int,
    *,
    haystack: Literal["noise", "prose", "needles"] = "prose",
    keys: Kind = "words",
    values: Kind = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
    depth: float | Sequence[float] | None = None,
    answer_tokens: int | None = None,
    name: str = "niah",
) -> list[Sample]:
    """Make samples in which values have to be found by their keys.

    Args:
        tokenizer: anything with ``encode(text).ids``.
        length: tokens of a sample at most, room for the answer included.
        haystack: lines of noise, prose, or distractor needles and nothing else.
        num_keys: keys in the haystack; those beyond ``num_queries`` are distractors.
        num_values: needles of each key.
        depth: where the needles with the answers lie (0 to 1 of the haystack): one fraction, one for each, or ``None``
            for random places; distractors always lie anywhere.
        answer_tokens: room for the answer (tokens); ``None`` for twice the right answer's and 8.

    Raises:
        ValueError: if a parameter is out of its range, the needles do not fit, or the tokenizer loses the text.
    """
    check_request(length, seed, count)
    check_choice("haystack", haystack, HAYSTACKS)
    check_choice("keys", keys, KINDS)
    check_choice("values", values, KINDS)
    check_counts(num_keys=num_keys, num_values=num_values, num_queries=num_queries)
    depths = check_depth(depth, num_queries * num_values)
    encode = Encoder(tokenizer)
    samples = []
    for index in range(count):
        key = (name, seed, index)
        plot = _Plot(key, haystack, keys, values, max(num_keys, num_queries), num_values, num_queries, depths)
        samples.append(fit_sample(plot.render, encode, length, name=name, key=key, answer_tokens=answer_tokens))
    return samples


class _Plot:
    """The needles of one sample, and its text for any number of haystack units."""

    def __init__(self, key, haystack, keys, values, num_keys, num_values, num_queries, depths):
        self._key, self._haystack, self._kinds, self._depths = key, haystack, (keys, values), depths
        supply = Supply(sample_rng(*key, "needles"))
        self._keys = [supply(keys) for _ in range(num_keys)]
        self._values = [[supply(values) for _ in range(num_values)] for _ in self._keys]
        self._queried = self._keys[:num_queries]
        self._supply = supply
        self._distractors: list[str] = []
        self._prose = sentences(sample_rng(*key, "prose"))
        self._sentences: list[str] = []

    def render(self, units: int) -> Draft:
        answers = tuple(value for values in self._values[: len(self._queried)] for value in values)
        pairs = [(key, value) for key, values in zip(self._keys, self._values, strict=True) for value in values]
        needles = [self._needle(key, value) for key, value in pairs]
        separator = " " if self._haystack == "prose" else "\n"
        body, starts = weave(self._units(units), needles, self._places(units, len(needles)), separator)
        kind = SINGULAR[self._kinds[1]]
        names, many = _join(self._queried), len(answers) > 1
        plural = f"{kind}s" if many else kind
        return Draft(
            intro=f"Special magic {kind}s are hidden in the text below. Keep them in mind for a question at the end.",
            body=body,
            starts=starts[: len(answers)],
            question=f"\nQuestion: which special magic {plural} does the text give for {names}?\n"
            f"Answer: the special magic {plural} for {names} {'are' if many else 'is'}:",
            answers=answers,
            target=" " + ", ".join(answers),
        )

    def _needle(self, key: str, value: str) -> str:
        return f"One special magic {SINGULAR[self._kinds[1]]} for {key} is: {value}."

    def _units(self, count: int) -> list[str]:
        if self._haystack == "noise":
            return [NOISE] * count
        if self._haystack == "prose":
            self._sentences += islice(self._prose, max(0, count - len(self._sentences)))
            return self._sentences[:count]
        while len(self._distractors) < count:
            self._distractors.append(self._needle(self._supply(self._kinds[0]), self._supply(self._kinds[1])))
        return self._distractors[:count]

    def _places(self, units: int, count: int) -> list[int]:
        rng = sample_rng(*self._key, "places")
        if self._haystack == "prose":
            fractions = [rng.randrange(DEPTH_STEPS) / (DEPTH_STEPS - 1) for _ in range(count)]
        else:
            fractions = [rng.random() for _ in range(count)]
        if self._depths is not None:
            fractions[: len(self._depths)] = self._depths
        return [round(fraction * units) for fraction in fractions]


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
