"""Key-value retrieval: a JSON object of uuids, and a question for one of its values.

Source: Lost in the Middle (Liu et al. 2023), section 3, and InfiniteBench's Retrieve.KV. Differences: the sentences are
our own, and the object is as long as the length allows, not of a fixed number of pairs.
"""

from collections.abc import Sequence
from typing import Any

from dyninf.tasks.fitting import Draft, Encoder, fit_sample
from dyninf.tasks.sample import Sample, check_choice, check_depth, check_request
from dyninf.tasks.words import KINDS, Kind, Supply, sample_rng


def make(
    tokenizer: Any,
    length: int,
    seed: int,
    count: int,
    *,
    keys: Kind = "uuids",
    values: Kind = "uuids",
    depth: float | Sequence[float] | None = None,
    answer_tokens: int | None = None,
    name: str = "key_value",
) -> list[Sample]:
    """Make samples in which one value of a JSON object has to be found by its key.

    Args:
        tokenizer: anything with ``encode(text).ids``.
        length: tokens of a sample at most, room for the answer included.
        depth: where the pair lies (0 to 1 of all pairs), ``None`` for anywhere.
        answer_tokens: room for the answer (tokens); ``None`` for twice the right answer's and 8.

    Raises:
        ValueError: if a parameter is out of its range, the text does not fit, or the tokenizer loses it.
    """
    check_request(length, seed, count)
    check_choice("keys", keys, KINDS)
    check_choice("values", values, KINDS)
    depths, encode = check_depth(depth, 1), Encoder(tokenizer)
    samples = []
    for index in range(count):
        key = (name, seed, index)
        fraction = sample_rng(*key, "place").random() if depths is None else depths[0]
        supply = Supply(sample_rng(*key, "pairs"))
        asked = (supply(keys), supply(values))
        others: list[tuple[str, str]] = []

        def render(
            units: int, asked: tuple = asked, others: list = others, fraction: float = fraction, supply: Supply = supply
        ) -> Draft:
            while len(others) < units:
                others.append((supply(keys), supply(values)))
            place = round(fraction * units)
            lines = [f'"{name}": "{value}"' for name, value in [*others[:place], asked, *others[place:units]]]
            return Draft(
                intro="Below is a JSON object of keys and values. A question about one of its keys follows.",
                body="{" + ",\n".join(lines) + "}",
                starts=(1 + sum(len(line) + 2 for line in lines[:place]),),
                question=f'\nQuestion: which value does the object hold for the key "{asked[0]}"?\n'
                f'Answer: "{asked[0]}": "',
                answers=(asked[1],),
                target=asked[1],
            )

        samples.append(fit_sample(render, encode, length, name=name, key=key, answer_tokens=answer_tokens))
    return samples
