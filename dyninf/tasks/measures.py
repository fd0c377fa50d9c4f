"""What keeping some cache slots costs one attention layer, without running a model on a task.

Given queries, keys and values of a layer and the slots that are kept: the share of the softmax mass on them, and how
far the output moves. Float32 arithmetic; memory is ``B N T S`` floats. Compare masks that keep equally many slots
(:func:`kept_per_head`); :func:`keep_most_attended` is the choice that a policy with full knowledge would make.
"""

import jax
import jax.numpy as jnp


def attention_mass_recall(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    kept: jax.Array,
    *,
    scale: float | None = None,
    positions_BT: jax.Array | None = None,
) -> jax.Array:
    """Return the share of each query's attention that falls on kept slots, ``[B, T, N]``, 0 to 1.

    Args:
        kept: bool ``[B, K, S]`` for all queries alike or ``[B, K, T, S]``. Slots after a query are never seen.
        scale: of the scores; ``None`` for ``1 / sqrt(H)``.
        positions_BT: slot of each query; ``None`` for the last T of S.

    Raises:
        ValueError: if the shapes do not fit.
    """
    weights_BKGTS = _softmax(_scores(q_BTNH, k_BSKH, scale, positions_BT))
    return _heads_last(jnp.sum(jnp.where(_mask(kept, weights_BKGTS), weights_BKGTS, 0.0), axis=-1))


def output_error(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    kept: jax.Array,
    *,
    scale: float | None = None,
    positions_BT: jax.Array | None = None,
) -> jax.Array:
    """Return ``|o_kept - o_dense| / |o_dense|`` of each query and head, ``[B, T, N]``.

    ``o_kept`` takes the softmax over the kept slots alone; without any it is zero, and the error 1. Where the dense
    output is zero the error is 0 if the other is too, else infinite.

    Args:
        kept, scale, positions_BT: as for :func:`attention_mass_recall`.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if v_BSKH.shape[:3] != k_BSKH.shape[:3]:
        raise ValueError(f"expected values [B, S, K, H] beside keys {k_BSKH.shape}, got {v_BSKH.shape}")
    scores_BKGTS = _scores(q_BTNH, k_BSKH, scale, positions_BT)
    kept_scores_BKGTS = jnp.where(_mask(kept, scores_BKGTS), scores_BKGTS, -jnp.inf)
    dense, sparse = (_attend(_softmax(scores), v_BSKH) for scores in (scores_BKGTS, kept_scores_BKGTS))
    moved, size = (jnp.linalg.norm(x, axis=-1) for x in (sparse - dense, dense))
    relative = jnp.where(size > 0, moved / jnp.where(size > 0, size, 1.0), jnp.where(moved > 0, jnp.inf, 0.0))
    return _heads_last(relative)


def keep_most_attended(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    budget: int,
    *,
    scale: float | None = None,
    positions_BT: jax.Array | None = None,
) -> jax.Array:
    """Return the slots of highest attention mass, summed over queries and the heads of a group: bool ``[B, K, S]``.

    No other choice of ``budget`` slots, the same for all queries, has a higher mean recall. Ties go to earlier slots.

    Raises:
        ValueError: if the shapes do not fit, or the budget is not between 1 and S.
    """
    slots = k_BSKH.shape[1]
    if not 1 <= budget <= slots:
        raise ValueError(f"expected a budget between 1 and {slots} slots, got {budget}")
    mass_BKS = jnp.sum(_softmax(_scores(q_BTNH, k_BSKH, scale, positions_BT)), axis=(2, 3))
    _, best_BKM = jax.lax.top_k(mass_BKS, budget)
    return jnp.any(jax.nn.one_hot(best_BKM, slots, dtype=bool), axis=-2)


def kept_per_head(kept: jax.Array) -> jax.Array:
    """Return how many slots a mask ``[..., S]`` keeps; masks are compared at equal numbers."""
    return jnp.sum(kept, axis=-1)


def _scores(q_BTNH: jax.Array, k_BSKH: jax.Array, scale: float | None, positions_BT: jax.Array | None) -> jax.Array:
    """Return the scores ``[B, K, G, T, S]``, -inf after each query."""
    batch, length, heads, size = q_BTNH.shape
    slots, kv_heads = k_BSKH.shape[1:3]
    if k_BSKH.shape != (batch, slots, kv_heads, size) or heads % kv_heads or (positions_BT is None and length > slots):
        raise ValueError(
            f"expected queries [B, T, N, H] and keys [B, S, K, H] with N a multiple of K and T <= S, got "
            f"{q_BTNH.shape} and {k_BSKH.shape}"
        )
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(slots - length + jnp.arange(length), (batch, length))
    if positions_BT.shape != (batch, length):
        raise ValueError(f"expected positions {(batch, length)}, got {positions_BT.shape}")
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, size).astype(jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH.astype(jnp.float32), precision="highest")
    scores = scores * (size**-0.5 if scale is None else scale)
    seen_BTS = jnp.arange(slots)[None, None] <= positions_BT[:, :, None]
    return jnp.where(seen_BTS[:, None, None], scores, -jnp.inf)


def _softmax(scores_BKGTS: jax.Array) -> jax.Array:
    """Return weights that add up to 1 over the slots, zeros where every score is -inf."""
    top = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    weights = jnp.exp(scores_BKGTS - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def _mask(kept: jax.Array, scores_BKGTS: jax.Array) -> jax.Array:
    """Return the mask as ``[B, K, 1, T or 1, S]``."""
    batch, kv_heads, _, length, slots = scores_BKGTS.shape
    if kept.dtype != bool or kept.shape not in ((batch, kv_heads, slots), (batch, kv_heads, length, slots)):
        raise ValueError(
            f"expected a bool mask {(batch, kv_heads, slots)} or {(batch, kv_heads, length, slots)}, got {kept.dtype} "
            f"{kept.shape}"
        )
    return kept[:, :, None, None] if kept.ndim == 3 else kept[:, :, None]


def _attend(weights_BKGTS: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    return jnp.einsum("bkgts,bskh->bkgth", weights_BKGTS, v_BSKH.astype(jnp.float32), precision="highest")


def _heads_last(x_BKGT: jax.Array) -> jax.Array:
    """Return ``[B, T, N]``."""
    batch, kv_heads, group, length = x_BKGT.shape
    return jnp.moveaxis(x_BKGT, 3, 1).reshape(batch, length, kv_heads * group)
