"""The rotation of a model's keys, for methods that take it back: halves paired as in ``dyninf.models``.

The attention functions see rotated keys only, so that whoever wants them as they were has to be told the frequencies.
"""

import jax
import jax.numpy as jnp


def frequencies(dim: int, theta: jax.Array | float) -> jax.Array:
    """Return the frequencies of a head (radians per token) for the base ``theta``, without scaling ``[H / 2]``."""
    return 1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def angles(positions: jax.Array, frequencies_H: jax.Array) -> jax.Array:
    """Return the angles of the rotations at these positions ``[..., H / 2]``, float32."""
    return positions[..., None].astype(jnp.float32) * frequencies_H.reshape((1,) * positions.ndim + (-1,))


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Return ``x [..., H]`` with its halves rotated by the angles of these cosines and sines, or by a mean of some."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
