"""A layer's cache whose prompt keys are rank-R factors, but for the few pages that such factors, or means, miss most.

Before their rotation, the keys of all key/value heads of a text lie near a space of a few directions (ShadowKV, Sun et
al. 2024): ``keys [T, K * H]`` are held as ``u [T, R]`` and ``sv [R, K * H]``, and the keys of a page are made from them
when it is read. Exactly held are the outlier pages of each head, the last pages of a prompt and all generated tokens.
Values are held by position, all of them, so that an outlier page costs its keys only.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from dyninf.kv.rotary import angles, turn
from dyninf.own_cache import OwnCache
from dyninf.pytree import pytree
from pallas_kernels import decode_attention

EXACT = jax.lax.Precision.HIGHEST
TINY = 1e-8  # below it a product of two norms is no divisor


@pytree()
class LowRankCache(OwnCache):
    """Prompt pages 0 to ``start / X - 1`` of X tokens as factors, whatever comes after them as keys.

    Attributes:
        k: exact keys, rotated ``[B, O * X + E, K, H]``: the O outlier pages of each head, then the tokens from
            ``start`` on.
        v: values by position ``[B, S, K, H]``.
        u: coefficients of the tokens of P pages, shared by all heads ``[B, P, X, R]``.
        sv: what they are multiplied with ``[B, K, R, H]``; the directions are orthonormal over all heads.
        landmarks: means of rotated keys ``[B, P, K, H]``.
        choosable: pages that a step may choose, those which exist and are no outliers ``[B, K, P]``.
        outliers: the outlier pages, the worst first, P where there are fewer ``[B, K, O]``.
        start: position from which on every key is exact ``[B]``, a multiple of X.
    """

    k: jax.Array
    v: jax.Array
    u: jax.Array
    sv: jax.Array
    landmarks: jax.Array
    choosable: jax.Array
    outliers: jax.Array
    start: jax.Array

    @property
    def limit_B(self) -> jax.Array:
        """Tokens that each sequence may have: those before ``start`` and one for each slot of a generated one."""
        return self.start + self.k.shape[1] - self._num_outliers

    def fits(self, select: Any) -> bool:
        """Return whether rank, page size and outliers are those of the scorer."""
        scorer, (pages, size, rank) = select.scorer, self.u.shape[1:]
        made = (size, rank, self.outliers.shape[2])
        return made == (scorer.page_size, min(scorer.rank, self._width), min(scorer.outliers, pages))

    def fill(self, k_BTKH: jax.Array, v_BTKH: jax.Array, lengths_B: jax.Array, select: Any) -> Self:
        """Return the cache with the factors, landmarks, outliers and last tokens of prompts."""
        batch, length, num_kv, dim = k_BTKH.shape
        pages, size = self.u.shape[1:3]
        num_B = jnp.maximum(lengths_B // size - (select.recent_pages - 1), 0)
        real_BT = jnp.arange(length)[None] < lengths_B[:, None]
        real_BP = jnp.arange(pages)[None] < num_B[:, None]
        wide_BTKH = jnp.where(real_BT[:, :, None, None], k_BTKH, 0).astype(jnp.float32)

        def paged(x):
            fitted = jnp.pad(
                x[:, : pages * size], ((0, 0), (0, max(0, pages * size - length)), *[(0, 0)] * (x.ndim - 2))
            )
            return fitted.reshape(batch, pages, size, *x.shape[2:])

        k_BPXKH = paged(wide_BTKH)
        mean_BPKH = jnp.mean(k_BPXKH, axis=2)
        match_BPXK = jnp.sum(mean_BPKH[:, :, None] * k_BPXKH, axis=-1)
        norms_BPXK = jnp.linalg.norm(mean_BPKH, axis=-1)[:, :, None] * jnp.linalg.norm(k_BPXKH, axis=-1)
        worst_BPK = jnp.min(match_BPXK / jnp.maximum(norms_BPXK, TINY), axis=2)
        worst_BKP = jnp.where(real_BP[:, None], jnp.moveaxis(worst_BPK, 1, 2), jnp.inf)
        _, outliers_BKO = jax.lax.top_k(-worst_BKP, self.outliers.shape[2])
        exists_BO = jnp.arange(self.outliers.shape[2])[None] < num_B[:, None]
        outliers_BKO = jnp.where(exists_BO[:, None], outliers_BKO, pages)
        rows, heads = jnp.arange(batch)[:, None, None], jnp.arange(num_kv)[None, :, None]
        choosable_BKP = jnp.broadcast_to(real_BP[:, None], self.choosable.shape)
        choosable_BKP = choosable_BKP.at[rows, heads, outliers_BKO].set(False, mode="drop")
        rates_H = select.scorer.rates(dim)
        angle_TH = angles(jnp.arange(length), rates_H)[None, :, None]
        u_BTR, sv_BKRH = factors(turn(wide_BTKH, jnp.cos(angle_TH), -jnp.sin(angle_TH)), self.u.shape[3])
        placed = dataclasses.replace(self, outliers=outliers_BKO.astype(jnp.int32), start=num_B * size)
        held_BEK = placed._exact_positions()
        held_BE = placed._held(lengths_B - 1)
        k_BEKH = _take(k_BTKH, held_BEK)
        return dataclasses.replace(
            placed,
            k=jnp.where(held_BE[:, :, None, None], k_BEKH, 0).astype(self.k.dtype),
            v=jax.lax.dynamic_update_slice(
                self.v, jnp.where(real_BT[:, :, None, None], v_BTKH, 0).astype(self.v.dtype), (0, 0, 0, 0)
            ),
            u=paged(u_BTR).astype(self.u.dtype),
            sv=sv_BKRH.astype(self.sv.dtype),
            landmarks=jnp.where(real_BP[:, :, None, None], mean_BPKH, 0).astype(self.landmarks.dtype),
            choosable=choosable_BKP,
        )

    def store(self, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array, written_BT: jax.Array) -> Self:
        """Return the cache with new tokens; what comes before ``start`` or after the last slot is dropped."""
        rows, late = jnp.arange(len(positions_BT))[:, None], jnp.arange(positions_BT.shape[1])[None]
        written_BT = written_BT & (positions_BT >= self.start[:, None])
        slots_BT = self._num_outliers + positions_BT - self.start[:, None]

        def put(array, values, at_BT):
            at_BT = jnp.where(written_BT, at_BT, array.shape[1] + late)
            return array.at[rows, at_BT].set(values.astype(array.dtype), mode="drop", unique_indices=True)

        return dataclasses.replace(self, k=put(self.k, k_BTKH, slots_BT), v=put(self.v, v_BTKH, positions_BT))

    def attend(self, q_BTNH: jax.Array, positions_BT: jax.Array, select: Any) -> jax.Array:
        """Attend to all exact keys and to the keys of the best pages, which are made from the factors.

        Raises:
            ValueError: for more than one token of a sequence.
        """
        if q_BTNH.shape[1] != 1:
            raise ValueError(f"expected one new token of each sequence for a plan that selects, got {q_BTNH.shape[1]}")
        batch, _, num_kv, dim = self.v.shape
        size, rank = self.u.shape[2:]
        num_B = self.start // size
        chosen_BKM = self._choose(q_BTNH, num_B, select)
        exists_BM = jnp.arange(chosen_BKM.shape[2])[None] < (num_B - self.outliers.shape[2])[:, None]
        at_BJK = jnp.moveaxis(_slots(chosen_BKM, size), 1, 2)
        u_BKJR = self.u[jnp.arange(batch)[:, None, None], chosen_BKM].reshape(batch, num_kv, -1, rank)
        k_BJKH = jnp.einsum("bkjr,bkrh->bjkh", u_BKJR, self.sv, preferred_element_type=jnp.float32)
        angle_BJKH = angles(at_BJK, select.scorer.rates(dim))
        k_BJKH = turn(k_BJKH, jnp.cos(angle_BJKH), jnp.sin(angle_BJKH)).astype(self.k.dtype)
        k_BSKH = jnp.concatenate([self.k, k_BJKH], axis=1)
        v_BSKH = _take(self.v, jnp.concatenate([self._exact_positions(), at_BJK], axis=1))
        valid_BS = jnp.concatenate([self._held(positions_BT[:, 0]), jnp.repeat(exists_BM, size, axis=1)], axis=1)
        last_BT = jnp.full((batch, 1), k_BSKH.shape[1] - 1)
        return decode_attention(q_BTNH, k_BSKH, v_BSKH, last_BT, valid_BS=valid_BS)

    def left_out(self, select: Any) -> jax.Array:
        """Return the tokens of the pages that are neither outliers nor chosen ``[B]``, float32."""
        size = self.u.shape[2]
        read = self.outliers.shape[2] + select.budget // size
        return jnp.maximum(self.start - read * size, 0).astype(jnp.float32)

    def _choose(self, q_BTNH: jax.Array, num_B: jax.Array, select: Any) -> jax.Array:
        """Return the pages of the highest scores ``[B, K, M]``, sinks first, those that are not choosable last."""
        pages = self.landmarks.shape[1]
        scores_BKP = select.scorer.score(q_BTNH, self.landmarks, num_B, self.choosable)
        scores_BKP = jnp.where(jnp.arange(pages)[None, None] < select.sink_pages, jnp.inf, scores_BKP)
        scores_BKP = jnp.where(self.choosable, scores_BKP, -jnp.inf)
        return jax.lax.top_k(scores_BKP, min(select.budget // self.u.shape[2], pages))[1]

    def _exact_positions(self) -> jax.Array:
        """Return the position of the key in each exact slot ``[B, O * X + E, K]``, beyond the pages where is none."""
        outlier_BSK = jnp.moveaxis(_slots(self.outliers, self.u.shape[2]), 1, 2)
        later_BE = self.start[:, None] + jnp.arange(self.k.shape[1] - self._num_outliers)[None]
        later_BEK = jnp.broadcast_to(later_BE[:, :, None], (*later_BE.shape, outlier_BSK.shape[2]))
        return jnp.concatenate([outlier_BSK, later_BEK], axis=1)

    def _held(self, last_B: jax.Array) -> jax.Array:
        """Return which exact slots hold a key of a token up to the position ``last_B``, of every head ``[B, S]``."""
        outlier_S = jnp.arange(self._num_outliers)[None] < self.start[:, None]
        later_E = jnp.arange(self.k.shape[1] - self._num_outliers)[None] <= (last_B - self.start)[:, None]
        return jnp.concatenate([outlier_S, later_E], axis=1)

    @property
    def _num_outliers(self) -> int:
        return self.outliers.shape[2] * self.u.shape[2]

    @property
    def _width(self) -> int:
        return self.v.shape[2] * self.v.shape[3]


def empty_low_rank(
    shape: tuple[int, int, int, int],
    dtype: Any,
    *,
    length: int,
    generated: int,
    rank: int,
    outliers: int,
    page_size: int,
    last_pages: int,
) -> LowRankCache:
    """Return an empty cache for prompts of at most ``length`` tokens and at most ``generated`` behind each of them.

    Args:
        shape: of the values ``[B, S, K, H]``.
        rank: directions kept; those of the heads together where that is less.
        outliers: pages of each head that are kept exactly; all pages where that is less.
        last_pages: whole pages at the end of a prompt that are kept exactly, beside the page that is not whole.
    """
    batch, slots, num_kv, dim = shape
    pages = max(1, length // page_size - last_pages)
    rank, outliers = min(rank, num_kv * dim), min(outliers, pages)
    exact = min(slots, (last_pages + 1) * page_size - 1 + generated)
    return LowRankCache(
        k=jnp.zeros((batch, outliers * page_size + exact, num_kv, dim), dtype),
        v=jnp.zeros(shape, dtype),
        u=jnp.zeros((batch, pages, page_size, rank), dtype),
        sv=jnp.zeros((batch, num_kv, rank, dim), dtype),
        landmarks=jnp.zeros((batch, pages, num_kv, dim), dtype),
        choosable=jnp.zeros((batch, num_kv, pages), bool),
        outliers=jnp.full((batch, num_kv, outliers), pages, jnp.int32),
        start=jnp.zeros(batch, jnp.int32),
    )


def factors(x_BTKH: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Return ``u [B, T, R]`` and ``sv [B, K, R, H]``, whose product is the best approximation of ``x`` of this rank.

    The directions are the eigenvectors of the largest eigenvalues of the Gram matrix ``[K * H, K * H]``, and ``u`` is
    what the rows of ``x`` have along them: the truncated singular value decomposition, with the singular values on the
    side of ``u``, so that nothing is divided by a small one. One pass over ``x`` and one ``eigh`` in float32. Rows of
    zeros, which padding must be, change nothing.
    """
    batch, length, num_kv, dim = x_BTKH.shape
    x_BTE = x_BTKH.reshape(batch, length, num_kv * dim).astype(jnp.float32)
    gram_BEE = jnp.einsum("bte,btf->bef", x_BTE, x_BTE, precision=EXACT)
    _, vectors_BEE = jnp.linalg.eigh(gram_BEE)
    vectors_BER = vectors_BEE[:, :, ::-1][:, :, :rank]
    u_BTR = jnp.einsum("bte,ber->btr", x_BTE, vectors_BER, precision=EXACT)
    return u_BTR, jnp.moveaxis(vectors_BER.reshape(batch, num_kv, dim, -1), 2, 3)


def _slots(pages: jax.Array, size: int) -> jax.Array:
    """Return the positions of the tokens of pages ``[..., M]``, page by page ``[..., M * X]``."""
    at = pages[..., None] * size + jnp.arange(size).reshape((1,) * pages.ndim + (size,))
    return at.reshape(*pages.shape[:-1], -1)


def _take(x_BTKH: jax.Array, at_BSK: jax.Array) -> jax.Array:
    """Return the entries at positions of each head ``[B, S, K, H]``; the last one where a position is beyond it."""
    return jnp.take_along_axis(x_BTKH, at_BSK[..., None], axis=1, mode="clip")
