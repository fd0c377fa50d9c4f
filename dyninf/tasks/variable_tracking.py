"""Variable tracking: which variables hold a value, directly or through chains of assignments.

Source: RULER (Hsieh et al. 2024), section 3, task vt. Differences: the sentences are our own; no worked example comes
first; the room for the answer follows the tokenizer; the last few tokens are filled up.
"""

from typing import Any

from dyninf.tasks.fitting import Draft, Encoder, fit_sample, weave
from dyninf.tasks.sample import Sample, check_counts, check_request
from dyninf.tasks.words import NOISE, Supply, sample_rng


def make(
    tokenizer: Any,
    length: int,
    seed: int,
    count: int,
    *,
    num_chains: int = 1,
    num_hops: int = 4,
    answer_tokens: int | None = None,
    name: str = "variable_tracking",
) -> list[Sample]:
    """Make samples that ask for all variables of a chain; their names are 5 capitals, the haystack is noise.

    Args:
        tokenizer: anything with ``encode(text).ids``.
        length: tokens of a sample at most, room for the answer included.
        num_chains: chains in the text; all but one are distractors.
        num_hops: assignments of a chain after its first, which names the value.
        answer_tokens: room for the answer (tokens); ``None`` for twice the right answer's and 8.

    Raises:
        ValueError: if a parameter is out of its range, the chains do not fit, or the tokenizer loses the text.
    """
    check_request(length, seed, count)
    check_counts(num_chains=num_chains, num_hops=num_hops)
    encode = Encoder(tokenizer)
    samples = []
    for index in range(count):
        key = (name, seed, index)
        rng = sample_rng(*key)
        values = rng.sample(range(10_000, 100_000), num_chains)
        supply = Supply(rng)
        names = [[supply("names") for _ in range(num_hops + 1)] for _ in range(num_chains)]
        lines = [line for value, chain in zip(values, names, strict=True) for line in _assignments(value, chain)]
        # A chain is stated in its order, whatever lies between.
        fractions = [part for _ in names for part in sorted(rng.random() for _ in range(num_hops + 1))]

        def render(
            units: int,
            value: int = values[0],
            chain: list = names[0],
            lines: list = lines,
            fractions: list = fractions,
        ) -> Draft:
            places = [round(fraction * units) for fraction in fractions]
            body, starts = weave([NOISE] * units, lines, places, "\n")
            return Draft(
                intro="Follow the assignments to variables that are hidden in the text below.",
                body=body,
                starts=starts[: len(chain)],
                question=f"\nQuestion: which variables hold the value {value}, directly or through another variable?\n"
                f"Answer: the {len(chain)} variables that hold {value} are:",
                answers=tuple(chain),
                target=" " + ", ".join(chain),
            )

        samples.append(fit_sample(render, encode, length, name=name, key=key, answer_tokens=answer_tokens))
    return samples


def _assignments(value: int, chain: list[str]) -> list[str]:
    sources = [str(value), *(f"VAR {name}" for name in chain)]
    return [f"VAR {name} = {source}" for name, source in zip(chain, sources, strict=False)]
