"""Make a sample as long as it was asked for: encode text, and search for the size of haystack that fits.

The length counts prompt and room for the answer, in tokens of the given tokenizer. The haystack is made of units
(sentences, lines, needles); the largest number of them that fits is found by bisection, guided by interpolation. What
then is missing beyond 3 % is filled with single words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dyninf.tasks.sample import Sample
from dyninf.tasks.words import ADJECTIVES, NOUNS, sample_rng

SLACK = 0.03  # share of the length that may stay unused
ANSWER_FACTOR, ANSWER_EXTRA = 2, 8  # room for an answer: tokens for each of the right one's, and beyond them
FIRST_STEP = 8  # units


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The text of a sample with a haystack of some size.

    Attributes:
        intro, body: the context is the intro, a line of filler words if any are needed, and the body.
        starts: where each needle that holds an answer begins (characters of the body).
        target: text of a right generation.
    """

    intro: str
    body: str
    starts: tuple[int, ...]
    question: str
    answers: tuple[str, ...]
    target: str
    metric: Literal["all", "part"] = "all"


class Encoder:
    """Turns text into ids without the tokens that a tokenizer puts around a text; ``prefix`` holds those before it."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        empty, letter = list(tokenizer.encode("").ids), list(tokenizer.encode("a").ids)
        same = [a == b for a, b in zip(empty, letter, strict=False)]
        self._before = same.index(False) if False in same else len(same)
        self._after = len(empty) - self._before
        self.prefix = tuple(empty[: self._before])

    def __call__(self, text: str) -> list[int]:
        ids = list(self._tokenizer.encode(text).ids)
        return ids[self._before : len(ids) - self._after]

    def check(self, text: str) -> None:
        """Refuse text that the tokenizer loses; case and whitespace may change.

        Raises:
            ValueError: naming a word that does not survive, if the tokenizer can decode, or that gives no token.
        """
        if not self._survives(text):
            lost = next((word for word in text.split() if not self._survives(word)), text[:40])
            raise ValueError(
                f"expected a tokenizer that can encode the text of this task, but {lost!r} does not survive it; use "
                "one that falls back to bytes, or a task made of tokens (`dyninf eval --tasks tokens`, "
                "dyninf.tasks.draw)"
            )

    def _survives(self, text: str) -> bool:
        ids = self(text)
        if not hasattr(self._tokenizer, "decode"):
            return bool(ids)
        return "".join(self._tokenizer.decode(ids).split()).lower() == "".join(text.split()).lower()


def fit_sample(
    render: Callable[[int], Draft],
    encode: Encoder,
    length: int,
    *,
    name: str,
    key: tuple,
    minimum: int = 1,
    answer_tokens: int | None = None,
) -> Sample:
    """Return the largest sample of at most ``length`` tokens.

    Args:
        render: makes the text with a haystack of a number of units; a larger number must give a longer text.
        key: what the filler words depend on.
        minimum: fewest units that make sense.
        answer_tokens: room for the answer (tokens); ``None`` for twice the right answer's and 8.

    Raises:
        ValueError: if not even the smallest haystack fits, or the tokenizer cannot encode the text.
    """
    smallest = render(minimum)
    question_ids, target_ids = tuple(encode(smallest.question)), tuple(encode(smallest.target))
    encode.check(_context(smallest, ""))
    encode.check(smallest.question + smallest.target)
    room = ANSWER_FACTOR * len(target_ids) + ANSWER_EXTRA if answer_tokens is None else answer_tokens
    if room < len(target_ids):
        raise ValueError(f"expected answer_tokens of at least {len(target_ids)} for {name}, got {room}")
    rest = len(encode.prefix) + len(question_ids) + room

    def total(units: int, words: int = 0) -> int:
        return rest + len(encode(_context(render(units), _filler(key, words))))

    least = total(minimum)
    if least > length:
        raise ValueError(
            f"expected a length of at least {least} tokens for {name} with this tokenizer, got {length}; of these, "
            f"{room} are room for the answer"
        )
    units, used = _largest(total, minimum, least, length)
    words = 0
    if length - used > SLACK * length:
        words, _ = _largest(lambda count: total(units, count), 0, used, length)
    draft = render(units)
    context = _context(draft, _filler(key, words))
    context_ids = encode.prefix + tuple(encode(context))
    shift = len(context) - len(draft.body)
    before = [len(encode.prefix) + len(encode(context[: shift + start])) for start in draft.starts]
    return Sample(
        task=name,
        context=context,
        question=draft.question,
        context_ids=context_ids,
        question_ids=question_ids,
        answers=draft.answers,
        target_ids=target_ids,
        max_new_tokens=room,
        depths=tuple(count / len(context_ids) for count in before),
        metric=draft.metric,
    )


def weave(
    units: Sequence[str], needles: Sequence[str], places: Sequence[int], separator: str
) -> tuple[str, tuple[int, ...]]:
    """Return the haystack with needle i before unit ``places[i]``, and where each needle begins (characters).

    Needles of one place keep their order.
    """
    order = sorted(range(len(needles)), key=lambda index: places[index])
    parts: list[str] = []
    starts, at, used = [0] * len(needles), 0, 0
    for index in order:
        taken = units[used : places[index]]
        parts += taken
        at += sum(len(part) + len(separator) for part in taken)
        used += len(taken)
        parts.append(needles[index])
        starts[index] = at
        at += len(needles[index]) + len(separator)
    return separator.join([*parts, *units[used:]]), tuple(starts)


def _context(draft: Draft, filler: str) -> str:
    return "\n".join(part for part in (draft.intro, filler, draft.body) if part)


def _filler(key: tuple, words: int) -> str:
    if not words:
        return ""
    rng = sample_rng(*key, "filler")
    drawn = [rng.choice(rng.choice((ADJECTIVES, NOUNS))) for _ in range(words)]
    return (" ".join(drawn) + ".").capitalize()


def _largest(total: Callable[[int], int], low: int, used: int, limit: int) -> tuple[int, int]:
    """Return the largest size above ``low``, which uses ``used``, whose total is within the limit, and its total."""
    first, start, high = used, low, low + FIRST_STEP
    above = total(high)
    while above <= limit:
        if above <= used:
            raise ValueError(
                "expected more text to give more tokens, but it does not with this tokenizer; switch off its "
                "truncation and padding"
            )
        per_unit = (above - first) / (high - start)
        low, used, high = high, above, max(high + FIRST_STEP, start + int(1.02 * (limit - first) / per_unit) + 1)
        above = total(high)
    bisect = False
    while high - low > 1:
        guess = (low + high) // 2 if bisect else low + (high - low) * (limit - used) // (above - used)
        middle = min(max(guess, low + 1), high - 1)
        value = total(middle)
        if value <= limit:
            low, used = middle, value
        else:
            high, above = middle, value
        bisect = not bisect
    return low, used
