"""Attention mass: how much attention a set of queries pays to each key, the raw material of most scorers."""

import jax
import jax.numpy as jnp

CHUNK = 128  # queries whose probabilities exist at once


def attention_mass(q_BTNH: jax.Array, k_BSKH: jax.Array, readable_BTSK: jax.Array) -> jax.Array:
    """Return the attention that each key receives ``[B, S, K]``, float32: summed over queries, averaged over a group.

    Args:
        q_BTNH: queries; query head n asks key/value head ``n // G``.
        readable_BTSK: which keys a query may read, of any shape that broadcasts; a query that reads none pays nothing.
    """
    return jnp.sum(jnp.mean(_probabilities(q_BTNH, k_BSKH, readable_BTSK), axis=-1), axis=1)


def prompt_mass(q_BTNH: jax.Array, k_BTKH: jax.Array, lengths_B: jax.Array, *, last: int | None = None) -> jax.Array:
    """Return the attention that each token of a prompt receives from its tokens ``[B, T, K]``.

    Args:
        last: count the last ``last`` queries of each prompt only; ``None`` for all, which takes time quadratic in T.
    """
    batch, length = k_BTKH.shape[:2]
    slot_T = jnp.arange(length)

    def mass(asking_BW: jax.Array) -> jax.Array:
        """Return the mass of the queries at these positions; others than a prompt's own ask nothing."""
        q_BWNH = jnp.take_along_axis(q_BTNH, jnp.clip(asking_BW, 0, length - 1)[:, :, None, None], axis=1)
        real_BW = (asking_BW >= 0) & (asking_BW < lengths_B[:, None])
        readable_BWT = real_BW[:, :, None] & (slot_T[None, None] <= asking_BW[:, :, None])
        return attention_mass(q_BWNH, k_BTKH, readable_BWT[..., None])

    if last is not None:
        return mass(lengths_B[:, None] - min(last, length) + jnp.arange(min(last, length))[None])
    chunks = jnp.arange(0, length, CHUNK)[:, None] + jnp.arange(min(CHUNK, length))[None]
    chunk = lambda asking_W: mass(jnp.broadcast_to(asking_W[None], (batch, len(asking_W))))  # noqa: E731
    return jax.lax.scan(
        lambda total, asking_W: (total + chunk(asking_W), None), jnp.zeros(k_BTKH.shape[:3], jnp.float32), chunks
    )[0]


def prompt_peak(
    q_BTNH: jax.Array, k_BTKH: jax.Array, lengths_B: jax.Array, last_B: jax.Array, *, most: int
) -> jax.Array:
    """Return the largest attention that one of the last queries of a prompt pays to each token ``[B, T, K]``.

    Weights are averaged over a group first.

    Args:
        last_B: queries of each prompt that count, ``most`` at most.
    """
    length = k_BTKH.shape[1]
    slot_T = jnp.arange(length)

    def peak(best_BTK: jax.Array, turn_W: jax.Array) -> tuple[jax.Array, None]:
        asking_BW = (lengths_B - last_B)[:, None] + turn_W[None]
        real_BW = (turn_W[None] < last_B[:, None]) & (asking_BW >= 0)
        q_BWNH = jnp.take_along_axis(q_BTNH, jnp.clip(asking_BW, 0, length - 1)[:, :, None, None], axis=1)
        readable_BWT = real_BW[:, :, None] & (slot_T[None, None] <= asking_BW[:, :, None])
        weights_BWTK = jnp.mean(_probabilities(q_BWNH, k_BTKH, readable_BWT[..., None]), axis=-1)
        return jnp.maximum(best_BTK, jnp.max(weights_BWTK, axis=1)), None

    turns = jnp.arange(0, most, CHUNK)[:, None] + jnp.arange(min(CHUNK, most))[None]
    return jax.lax.scan(peak, jnp.zeros(k_BTKH.shape[:3], jnp.float32), turns)[0]


def prompt_entropy(q_BTNH: jax.Array, k_BTKH: jax.Array) -> jax.Array:
    """Return the entropy (nats) of what each token of a prompt attends to, a mean over all heads ``[B, T]``.

    Takes time quadratic in T.
    """
    batch, length = k_BTKH.shape[:2]
    slot_T = jnp.arange(length)

    def chunk(asking_W: jax.Array) -> jax.Array:
        readable_WT = slot_T[None] <= asking_W[:, None]
        q_BWNH = jnp.take(q_BTNH, jnp.minimum(asking_W, length - 1), axis=1)
        probabilities_BWTKG = _probabilities(q_BWNH, k_BTKH, readable_WT[None, :, :, None])
        return jnp.mean(jnp.sum(jax.scipy.special.entr(probabilities_BWTKG), axis=2), axis=(2, 3))

    chunks = jnp.arange(0, length, CHUNK)[:, None] + jnp.arange(min(CHUNK, length))[None]
    return jnp.moveaxis(jax.lax.map(chunk, chunks), 0, 1).reshape(batch, -1)[:, :length]


def _probabilities(q_BTNH: jax.Array, k_BSKH: jax.Array, readable_BTSK: jax.Array) -> jax.Array:
    """Return what each query pays to each key ``[B, T, S, K, G]``; nothing where it reads none."""
    batch, length, _, head_dim = q_BTNH.shape
    groups = q_BTNH.reshape(batch, length, k_BSKH.shape[2], -1, head_dim)
    scores = jnp.einsum("btkgh,bskh->btskg", groups, k_BSKH, preferred_element_type=jnp.float32) * head_dim**-0.5
    readable = readable_BTSK[..., None]
    scores = jnp.where(readable, scores, -jnp.inf)
    top = jnp.max(scores, axis=2, keepdims=True)
    weights = jnp.where(readable, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    total = jnp.sum(weights, axis=2, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)
