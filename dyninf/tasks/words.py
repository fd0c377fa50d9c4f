"""The material of the text tasks: words, numbers, uuids, prose made by rule, and noise.

Everything is drawn from a :class:`random.Random`, and drawing more never changes what was drawn before, so that a
longer haystack begins like a shorter one.
"""

import random
import string
import uuid
from collections.abc import Iterator
from typing import Literal

Kind = Literal["words", "numbers", "uuids"]
KINDS = ("words", "numbers", "uuids")
SINGULAR = {"words": "word", "numbers": "number", "uuids": "uuid"}
NUMBER_DIGITS = 7
ATTEMPTS = 200  # draws before a supply counts as exhausted
NOISE = "The river is wide. The hill is steep. The night is calm. On we walk. Then we turn back."

# No adjective ends like another and no noun begins like another: no adjective-noun pair then contains another pair.
ADJECTIVES = (
    "amber ancient bitter blue brave bright brisk broad calm careful cheerful clever coarse cold crimson curious damp "
    "dark deep dim distant dry dusty eager early empty faint famous fierce firm flat formal fragile fresh gentle giant "
    "golden grand gray green grim happy hasty heavy hidden hollow honest humble hungry icy idle keen large late lazy "
    "light little lively lonely loud loyal lucky mellow mild modest muddy narrow neat noble noisy orange patient plain "
    "polite proud purple quaint quick quiet rapid rare red rich robust rough round royal rusty salty scarlet shallow "
    "sharp shiny short silent silver simple sleepy slow small smooth sober soft solid sour spare stale steady stern "
    "stiff strict strong stubborn sturdy subtle sudden sweet swift tall tame tender thick thin tidy tiny tough vague "
    "vast violet vivid warm wary weak wild wise wooden young"
).split()
NOUNS = (
    "acorn anchor apple arch badger bakery barrel basin beacon bell bird blanket boat bottle branch bridge brush "
    "bucket button cabin camel candle canyon castle cellar chapel chimney circle clock cloud coin copper corner "
    "cottage cradle crane creek cricket crown curtain desert dial dinner donkey door dragon drum eagle engine "
    "envelope falcon farmer feather fence ferry field fiddle flute forest fountain fox gallery garden gate glacier "
    "glove goose grove hammer harbor hat hedge helmet heron horse hotel island ivory jacket jar jungle kettle key "
    "kitchen kite ladder lake lamp lantern leaf lemon letter library lion lizard lobster magnet maple market meadow "
    "medal melon mirror monkey moon mountain museum napkin needle nest oak ocean office olive onion orchard otter owl "
    "palace paper parrot path pebble pencil pepper piano pigeon pillow pilot planet plate plum pocket pond pony "
    "potato prairie puzzle quarry quilt rabbit raft raven ribbon ring road robin rocket roof rope saddle sailor "
    "sandal school scissors shadow shelf ship shoe shovel sparrow spider spoon stable statue stove stream street "
    "sugar table tailor teacher temple thimble tiger timber tower train tree trumpet tulip tunnel turtle umbrella "
    "valley vessel village violin wagon wall walnut well whale wheel whistle willow window winter wolf zebra"
).split()
VERBS = (
    "admires borrows carries chases circles cleans copies counts covers crosses draws faces finds follows forgets "
    "greets guards hears holds keeps leaves likes meets misses moves names needs notices offers opens paints passes "
    "pulls pushes reaches remembers repairs reports sees sells shows studies surprises touches trusts visits wants "
    "watches"
).split()
PLACES = "above across around behind below beside beyond inside near opposite outside past toward under".split()
_SENTENCES = (
    "The {a} {n} {v} the {b} {m}.",
    "Some {n} {v} every {m} {p} the {b} {o}.",
    "{P} the {n}, one {a} {m} {v} the {o}.",
    "No {n} {v} the {m}, and the {a} {o} {w} it.",
    "When the {a} {n} {v} some {m}, the {o} {w} the {b} {q}.",
    "The {n} and the {m} are {a}, but the {o} is {b}.",
    "Each {b} {n} {v} the {m} because the {o} {w} the {q}.",
    "It is this {a} {n} that {v} the {m} {p} the {o}.",
)


def sample_rng(*parts: object) -> random.Random:
    """Return a source of randomness that depends on the parts alone: the same on every machine and in any order."""
    return random.Random("/".join(str(part) for part in parts))


def sentences(rng: random.Random) -> Iterator[str]:
    """Yield grammatical sentences without end; no number, and nothing that looks like a needle."""
    while True:
        a, b = rng.sample(ADJECTIVES, 2)
        n, m, o, q = rng.sample(NOUNS, 4)
        v, w = rng.sample(VERBS, 2)
        p = rng.choice(PLACES)
        yield rng.choice(_SENTENCES).format(a=a, b=b, n=n, m=m, o=o, q=q, v=v, w=w, p=p, P=p.capitalize())


class Supply:
    """Draws keys and values that never repeat, whatever their kind."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self._seen: set[str] = set()

    def __call__(self, kind: str) -> str:
        """Return the next one: a pair of words, a number of 7 digits, a uuid, 5 capitals or 6 small letters.

        Raises:
            ValueError: if nearly everything of this kind was drawn already.
        """
        for _ in range(ATTEMPTS):
            drawn = self._draw(kind)
            if drawn not in self._seen:
                self._seen.add(drawn)
                return drawn
        raise ValueError(
            f"expected to draw another of the {kind}, but {len(self._seen)} are drawn and hardly any is left; shorten "
            "the task or use numbers or uuids"
        )

    def _draw(self, kind: str) -> str:
        rng = self._rng
        if kind == "words":
            return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        if kind == "numbers":
            return str(rng.randrange(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS))
        if kind == "uuids":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if kind == "names":
            return "".join(rng.choice(string.ascii_uppercase) for _ in range(5))
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(6))
