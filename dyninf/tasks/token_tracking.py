"""Variable tracking made of tokens: pointer chasing through chains of assignments.

The twin of :mod:`dyninf.tasks.variable_tracking`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dyninf.tasks.sample import check_choice, check_counts
from dyninf.tasks.vocabulary import Row, Vocabulary, draw_number, place, require_ids, require_room


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """``ASSIGN x0 v``, ``ASSIGN x1 x0``, ... among noise and other chains, in the order of each chain.

    ``ask="value"`` asks ``SEP QUERY x_last VALUE`` for v, which takes ``num_hops`` steps back; ``ask="names"`` asks
    ``SEP QUERY v ASSIGN`` for x0, x1, ... as RULER does. Names are keys, and all distinct, as are the chains' values.

    Args:
        num_chains: chains in the text; all but one are distractors.
        num_hops: assignments of a chain after its first.

    Raises:
        ValueError: if a parameter is out of its range.
    """

    name: str = "tracking"
    num_chains: int = 2
    num_hops: int = 4
    ask: Literal["value", "names"] = "value"

    def __post_init__(self):
        check_counts(num_chains=self.num_chains, num_hops=self.num_hops)
        check_choice("ask", self.ask, ("value", "names"))

    def draw(self, vocabulary: Vocabulary, length: int, rng: np.random.Generator, questions: int = 1) -> Row:
        """Return a sequence; see :class:`dyninf.tasks.TokenTask`.

        Questions beyond the first ask for the value of any name, fewer steps back, or for the names of other chains.
        Where there are fewer chains than questions ask for, there are more chains.
        """
        steps, of_value = self.num_hops + 1, self.ask == "value"
        tail, each = (5, steps) if of_value else (4 + steps, 1)  # questions that one chain allows
        number = 1
        if questions > 1:
            number = draw_number(min(questions, self._most_questions(vocabulary, length, tail, each)), rng)
        chains = max(self.num_chains, -(-number // each))
        room = length - number * tail
        require_room(self.name, length - room + 1 + 3 * chains * steps, length)
        require_ids(self.name, "keys", chains * steps, vocabulary.num_keys)
        require_ids(self.name, "values", chains, vocabulary.num_values)
        names = vocabulary.keys.start + rng.permutation(vocabulary.num_keys)[: chains * steps].reshape(chains, steps)
        values = vocabulary.values.start + rng.permutation(vocabulary.num_values)[:chains]
        statements = np.empty((chains, steps, 3), np.int32)
        statements[:, :, 0], statements[:, :, 1] = vocabulary.ASSIGN, names
        statements[:, 0, 2], statements[:, 1:, 2] = values, names[:, :-1]
        fractions = np.sort(rng.random((chains, steps)), axis=1)
        context, starts = place(statements.reshape(-1, 3), fractions.ravel(), room, vocabulary, rng)
        value, chain = int(values[0]), names[0].tolist()
        asked = (chain[-1], vocabulary.VALUE) if of_value else (value, vocabulary.ASSIGN)
        more = np.empty((number - 1, tail), np.int32)
        more[:, 0], more[:, 1], more[:, 3] = vocabulary.SEP, vocabulary.QUERY, asked[-1]
        if of_value and number > 1:
            others = rng.permutation(chains * steps - 1)[: number - 1]
            others += others >= steps - 1  # all names but the first question's
            more[:, 2], more[:, 4] = names.ravel()[others], values[others // steps]
        elif number > 1:
            more[:, 2], more[:, 4:] = values[1:number], names[1:number]
        return Row(
            context=context,
            question=(vocabulary.SEP, vocabulary.QUERY, *asked),
            answers=((value,),) if of_value else tuple((name,) for name in chain),
            starts=tuple(starts[:steps].tolist()),
            more=more,
        )

    def _most_questions(self, vocabulary: Vocabulary, length: int, tail: int, each: int) -> int:
        """Return how many questions of ``tail`` tokens fit behind a context with the chains that they need."""
        stated = 3 * (self.num_hops + 1)
        chains = min((length - 1) // (each * tail + stated), vocabulary.num_keys // (self.num_hops + 1))
        chains = max(self.num_chains, min(chains, vocabulary.num_values))
        return max(1, min((length - 1 - self.num_chains * stated) // tail, each * chains))
