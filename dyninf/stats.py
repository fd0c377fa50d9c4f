"""What a run spent: layers needed and run, cache entries live and read.

*Needed* counts the layers a token had to pass through; *run* counts those the hardware executed for the whole batch.
Only *run* saves time.
"""

import jax
import jax.numpy as jnp

from dyninf.pytree import pytree


@pytree()
class StepStats:
    """Counts of one decode step; with a leading axis of steps after :func:`dyninf.generate`.

    Attributes:
        active: sequences that still generated, bool ``[B]``.
        needed: layers each sequence needed ``[B]``; 0 where not active.
        run: layers the hardware ran, a scalar.
        kv_live: cache entries of each sequence in a layer ``[B]``, a mean over all layers.
        kv_read: cache entries that a layer reads for each sequence where it runs ``[B]``, a mean over all layers.
            Windows of layers are not counted.
    """

    active: jax.Array
    needed: jax.Array
    run: jax.Array
    kv_live: jax.Array
    kv_read: jax.Array


def summarize(stats: StepStats) -> dict[str, float]:
    """Return means over active steps: ``layers_needed``, ``layers_run``, ``kv_live``, ``kv_read``, and ``tokens``.

    ``layers_run`` weighs every step that had an active sequence once. All means are 0 when nothing was decoded.
    """
    active = jnp.atleast_2d(stats.active)
    steps = jnp.any(active, axis=-1)
    count, num_steps = jnp.sum(active), jnp.sum(steps)

    def mean(values: jax.Array) -> float:
        return float(jnp.sum(jnp.where(active, jnp.atleast_2d(values), 0)) / jnp.maximum(count, 1))

    return {
        "tokens": int(count),
        "layers_needed": mean(stats.needed),
        "layers_run": float(jnp.sum(jnp.where(steps, jnp.atleast_1d(stats.run), 0)) / jnp.maximum(num_steps, 1)),
        "kv_live": mean(stats.kv_live),
        "kv_read": mean(stats.kv_read),
    }
