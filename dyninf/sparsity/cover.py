"""The largest entries that together hold no more than a share of a sum, found without sorting."""

import jax
import jax.numpy as jnp

QUARTER = 0x10000000  # of the bits of 2.0, which is above every probability


def cover(values_XE: jax.Array, limit_X: jax.Array) -> jax.Array:
    """Return which entries of a row are among its largest ones with a sum of at most ``limit_X``, bool ``[X, E]``.

    Of equal entries all are taken or none. Numbers of at least 0 are ordered like their bits, so that 15 quarterings of
    the range of bits find the cut-off exactly: 15 passes over the row, each with three masked sums in float32, where a
    sort of a map of 1024 x 1024 blocks passes over it hundreds of times. Where sums are equal up to rounding, which of
    the last entries are taken is that of any float32 sum.

    Args:
        values_XE: float32, 0 to 1.
    """
    bits_XE = jax.lax.bitcast_convert_type(values_XE, jnp.int32)
    limit_X = jnp.broadcast_to(limit_X, values_XE.shape[:1])

    def too_much(lowest_X):
        return jnp.sum(jnp.where(bits_XE >= lowest_X[:, None], values_XE, 0.0), axis=1) > limit_X

    def quarter(turn, found_X):
        step = jnp.int32(QUARTER) >> (2 * turn)
        return found_X + step * sum(too_much(found_X + part * step).astype(jnp.int32) for part in (1, 2, 3))

    found_X = jax.lax.fori_loop(0, 15, quarter, jnp.zeros_like(limit_X, jnp.int32))  # the last one that is too much
    lowest_X = jnp.where(too_much(jnp.zeros_like(found_X)), found_X + 1, 0)
    return bits_XE >= lowest_X[:, None]


def count_cover(values_XE: jax.Array, limit_X: jax.Array) -> jax.Array:
    """Return how many of the largest entries of a row have a sum of at most ``limit_X``, int32 ``[X]``.

    Unlike in :func:`cover`, some of several equal entries may be among them.
    """
    taken_XE = cover(values_XE, limit_X)
    left_X = limit_X - jnp.sum(jnp.where(taken_XE, values_XE, 0.0), axis=1)
    next_X = jnp.max(jnp.where(taken_XE, 0.0, values_XE), axis=1)
    equal_X = jnp.where(next_X > 0, left_X / jnp.where(next_X > 0, next_X, 1.0), 0.0).astype(jnp.int32)
    return jnp.sum(taken_XE, axis=1).astype(jnp.int32) + equal_X
