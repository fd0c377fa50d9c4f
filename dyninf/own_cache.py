"""Caches of layers that keep keys in a form of their own, as some policies do."""

from typing import Any, ClassVar, Self

import jax


class OwnCache:
    """Base of the caches of layers that keep keys in a form of their own, and read them themselves.

    ``v [B, S, K, H]`` has the values by position. ``select`` is the :class:`dyninf.kv.TopK` of the plan. Nothing of a
    plain cache's book-keeping is had.
    """

    v: jax.Array
    valid: ClassVar[None] = None
    positions: ClassVar[None] = None
    threshold: ClassVar[None] = None
    summary: ClassVar[None] = None
    choice: ClassVar[None] = None

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held."""
        return tree_bytes(self)

    @property
    def limit_B(self) -> jax.Array:
        """Tokens that each sequence may have at most, prompt and generated together ``[B]``."""
        raise NotImplementedError(f"expected {type(self).__name__} to define limit_B")

    def fits(self, select: Any) -> bool:
        """Return whether the cache was made for these settings."""
        raise NotImplementedError(f"expected {type(self).__name__} to define fits")

    def fill(self, k_BTKH: jax.Array, v_BTKH: jax.Array, lengths_B: jax.Array, select: Any) -> Self:
        """Return the empty cache with prompts of ``lengths_B`` tokens; the rest of the T is padding."""
        raise NotImplementedError(f"expected {type(self).__name__} to define fill")

    def store(self, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array, written_BT: jax.Array) -> Self:
        """Return the cache with new tokens, where ``written_BT`` says so."""
        raise NotImplementedError(f"expected {type(self).__name__} to define store")

    def attend(self, q_BTNH: jax.Array, positions_BT: jax.Array, select: Any) -> jax.Array:
        """Attend from the new token of each sequence, which is stored; meaningless for sequences that are done."""
        raise NotImplementedError(f"expected {type(self).__name__} to define attend")

    def left_out(self, select: Any) -> jax.Array:
        """Return the entries of each sequence that a step does not read ``[B]``, float32."""
        raise NotImplementedError(f"expected {type(self).__name__} to define left_out")


def tree_bytes(tree: Any) -> int:
    """Return the bytes of the arrays of a tree, or of arrays of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
