"""Passkey retrieval: one number in lines of noise.

Source: Landmark Attention (Mohtashami and Jaggi 2023), section 4.2. Differences: the sentences are our own.
"""

from collections.abc import Sequence
from typing import Any

from dyninf.tasks.fitting import Draft, Encoder, fit_sample, weave
from dyninf.tasks.sample import Sample, check_counts, check_depth, check_request
from dyninf.tasks.words import NOISE, sample_rng


def make(
    tokenizer: Any,
    length: int,
    seed: int,
    count: int,
    *,
    digits: int = 5,
    depth: float | Sequence[float] | None = None,
    answer_tokens: int | None = None,
    name: str = "passkey",
) -> list[Sample]:
    """Make samples in which a number has to be found.

    Args:
        tokenizer: anything with ``encode(text).ids``.
        length: tokens of a sample at most, room for the answer included.
        depth: where the number lies (0 to 1 of the haystack), ``None`` for anywhere.
        answer_tokens: room for the answer (tokens); ``None`` for twice the right answer's and 8.

    Raises:
        ValueError: if a parameter is out of its range, the text does not fit, or the tokenizer loses it.
    """
    check_request(length, seed, count)
    check_counts(digits=digits)
    depths, encode = check_depth(depth, 1), Encoder(tokenizer)
    samples = []
    for index in range(count):
        key = (name, seed, index)
        rng = sample_rng(*key)
        number = str(rng.randrange(10 ** (digits - 1), 10**digits))
        fraction = rng.random() if depths is None else depths[0]

        def render(units: int, number: str = number, fraction: float = fraction) -> Draft:
            needle = f"The pass key is {number}. Do not forget it: {number} is the pass key."
            body, starts = weave([NOISE] * units, [needle], [round(fraction * units)], "\n")
            return Draft(
                intro="A pass key is hidden in the text below, which otherwise says little. Find it and remember it.",
                body=body,
                starts=starts,
                question="\nQuestion: what is the pass key?\nAnswer: the pass key is",
                answers=(number,),
                target=f" {number}",
            )

        samples.append(fit_sample(render, encode, length, name=name, key=key, answer_tokens=answer_tokens))
    return samples
