"""Variable tracking made of tokens: pointer chasing through chains of assignments.

The twin of :mod:`dyninf.tasks.variable_tracking`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dyninf.tasks.sample import check_choice, check_counts
from dyninf.tasks.vocabulary import Row, Vocabulary, place, require_ids, require_room


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

    def draw(self, vocabulary: Vocabulary, length: int, rng: np.random.Generator) -> Row:
        """Return a sequence; see :class:`dyninf.tasks.TokenTask`."""
        steps, chains = self.num_hops + 1, self.num_chains
        room = length - 4 - (1 if self.ask == "value" else steps)
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
        of_value = self.ask == "value"
        asked = (chain[-1], vocabulary.VALUE) if of_value else (value, vocabulary.ASSIGN)
        return Row(
            context=context,
            question=(vocabulary.SEP, vocabulary.QUERY, *asked),
            answers=((value,),) if of_value else tuple((name,) for name in chain),
            starts=tuple(starts[:steps].tolist()),
        )
