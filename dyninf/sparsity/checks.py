"""Checks that sparse prefill policies share."""

from typing import Any


def require_sizes(policy: Any, *names: str, least: int = 1) -> None:
    """Raise ValueError unless these fields of a policy are whole numbers of at least ``least``."""
    for name in names:
        value = getattr(policy, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            kind = type(policy).__name__
            raise ValueError(f"expected {name} of {kind} to be a whole number of at least {least}, got {value!r}")
