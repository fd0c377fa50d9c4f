"""The identity elements of eviction and selection."""

from dyninf.pytree import pytree


@pytree()
class KeepAll:
    """Evict nothing: exact."""


@pytree()
class ReadAll:
    """Read every live cache entry at every step: exact."""
