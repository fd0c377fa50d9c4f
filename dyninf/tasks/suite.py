"""The text tasks by name: each is a family of samples and a rule.

The names follow RULER's where the rule does; its two tasks of question answering need data sets and are missing.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dyninf.tasks import common_words, frequent_words, key_value, niah, passkey, variable_tracking
from dyninf.tasks.sample import Sample

_REQUEST = ("tokenizer", "length", "seed", "count", "name")


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """A family's ``make(tokenizer, length, seed, count, *, name, **rule)`` and the rule that makes it this task."""

    make: Callable[..., list[Sample]]
    rule: dict[str, Any] = field(default_factory=dict)


TASKS = {
    "niah_single_1": TextTask(make=niah.make, rule={"haystack": "noise"}),
    "niah_single_2": TextTask(make=niah.make, rule={"haystack": "prose"}),
    "niah_single_3": TextTask(make=niah.make, rule={"haystack": "prose", "values": "uuids"}),
    "niah_multikey_1": TextTask(make=niah.make, rule={"haystack": "prose", "num_keys": 4}),
    "niah_multikey_2": TextTask(make=niah.make, rule={"haystack": "needles"}),
    "niah_multikey_3": TextTask(make=niah.make, rule={"haystack": "needles", "keys": "uuids", "values": "uuids"}),
    "niah_multivalue": TextTask(make=niah.make, rule={"haystack": "prose", "num_values": 4}),
    "niah_multiquery": TextTask(make=niah.make, rule={"haystack": "prose", "num_queries": 4}),
    "variable_tracking": TextTask(make=variable_tracking.make),
    "common_words": TextTask(make=common_words.make),
    "frequent_words": TextTask(make=frequent_words.make),
    "passkey": TextTask(make=passkey.make),
    "key_value": TextTask(make=key_value.make),
}


def find_task(name: str) -> TextTask:
    """Return a text task by its name.

    Raises:
        ValueError: if there is none; the message lists all.
    """
    if name not in TASKS:
        raise ValueError(f"expected one of the tasks {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def full_rule(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return every parameter of a task's rule, with the caller's changes.

    Raises:
        ValueError: if the task is unknown or has no such parameter.
    """
    task = find_task(name)
    parameters = inspect.signature(task.make).parameters
    known = {key: value.default for key, value in parameters.items() if key not in _REQUEST}
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ValueError(f"expected a rule of {name} to change one of {', '.join(known)}, got {', '.join(unknown)}")
    return known | task.rule | changes


def make_samples(name: str, tokenizer: Any, length: int, seed: int, count: int, **rule: Any) -> list[Sample]:
    """Make samples of a text task.

    Sample i depends on the task, the seed and i, never on the count. Cost: about ten encodings of a sample's text.

    Args:
        name: one of :data:`TASKS`.
        tokenizer: anything with ``encode(text).ids``.
        length: tokens of a sample at most, room for the answer included; it is at least 97 % of that.
        rule: changes to the task's rule, such as ``depth=0.5``.

    Raises:
        ValueError: if the task or a parameter is unknown or out of range, the length is too short for its needles, or
            the tokenizer cannot encode its text.
    """
    return find_task(name).make(tokenizer, length, seed, count, name=name, **full_rule(name, rule))
