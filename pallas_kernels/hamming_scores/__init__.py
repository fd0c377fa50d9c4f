"""Score the keys of a cache by the bits that their hashes have in common with those of the current queries.

A code is W words of 32 bits. Codes lie with the slots last, ``[B, W, K, S]``, each word of a head's keys in one run:
words are then read whole wherever they lie, all bits of a slot meet in one lane without any exchange, and the scores
``[B, K, S]`` come out in the same order. Storing a new token's code touches W * K words. On GPUs XLA makes one kernel
of it that reads at the speed of memory (4.1 TB/s on an H200; a Mosaic kernel reached 2.9 and was dropped).
"""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, choose, kernel, platform
from pallas_kernels.hamming_scores import reference
from pallas_kernels.partition import per_device

MOST_WORDS = 8
HAMMING_SCORES = (
    kernel("hamming_scores", "mosaic_tpu", "hamming_scores"),
    Implementation(name="xla", refuse=reference.refuse, run=reference.hamming_scores),
)


@per_device("BKS", codes="BWKS")
def hamming_scores(
    codes: jax.Array,
    queries_BNW: jax.Array,
    num_slots_B: jax.Array,
    *,
    reduce: Literal["max", "sum"] = "max",
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Return minus the number of bits in which hashes differ, float32 ``[B, K, S]``, -inf for slots not in use.

    Exact. Cost: reads the codes of the slots in use once and in place, ``S * K * W`` words of 4 bytes a sequence (1/64
    of the keys' bytes for each word at 128 features of two bytes), and writes as much as one word of them.

    Args:
        codes: of the keys of a layer ``[B, W, K, S]``, or the stacked ones of all layers ``[L, B, W, K, S]`` with
            ``layer``; 1 to 8 words of uint32 or int32, unused bits alike everywhere.
        queries_BNW: codes to compare with, of the same dtype; number n asks key/value head ``n // G``.
        num_slots_B: slots in use of each sequence, 0 to S; beyond, the nearest of these.
        reduce: how the scores of the G queries of a key/value head become one: their largest, or their sum.
        layer: which layer of stacked codes, an int32 scalar, from 0 to L - 1; beyond, the nearest one.
        implementation: by name; ``None`` takes the fastest that can serve.

    Raises:
        ValueError: if shapes or dtypes do not match or ``reduce`` is unknown.
        NotImplementedError: if the requested implementation cannot serve.
    """
    if reduce not in ("max", "sum"):
        raise ValueError(f"expected reduce 'max' or 'sum', got {reduce!r}")
    _check(codes, queries_BNW, num_slots_B, layer)
    stacked, layer = (codes[None], jnp.int32(0)) if layer is None else (codes, layer)
    words, num_kv, slots = stacked.shape[2:]
    facts = {
        "platform": platform(),
        "words": words,
        "group": queries_BNW.shape[1] // num_kv,
        "num_kv": num_kv,
        "num_slots": slots,
    }
    chosen = choose("hamming_scores", HAMMING_SCORES, implementation, **facts)
    return chosen.run(stacked, queries_BNW, num_slots_B, layer, reduce=reduce)


def _check(codes: jax.Array, queries_BNW: jax.Array, num_slots_B: jax.Array, layer: jax.Array | None) -> None:
    given = f"got codes {codes.shape} of {codes.dtype} and queries {queries_BNW.shape} of {queries_BNW.dtype}"
    if (layer is not None) != (codes.ndim == 5) or (layer is not None and jnp.shape(layer) != ()):
        raise ValueError(f"expected a scalar layer for codes [L, B, W, K, S] and for no others, {given}, {layer=}")
    if codes.ndim not in (4, 5) or queries_BNW.ndim != 3:
        raise ValueError(f"expected codes [B, W, K, S], with a layer [L, B, W, K, S], and queries [B, N, W], {given}")
    if codes.dtype not in (jnp.uint32, jnp.int32) or queries_BNW.dtype != codes.dtype:
        raise ValueError(f"expected codes and queries all of uint32 or all of int32, {given}; bitcast them")
    batch, words, num_kv, _ = codes.shape[-4:]
    if not 1 <= words <= MOST_WORDS or 0 in codes.shape:
        raise ValueError(f"expected 1 to {MOST_WORDS} words and no axis of 0, {given}; put slots last")
    if queries_BNW.shape[::2] != (batch, words):
        raise ValueError(f"expected queries [B, N, W] with B={batch} and W={words}, {given}")
    if queries_BNW.shape[1] % num_kv or not queries_BNW.shape[1]:
        raise ValueError(f"expected query heads to be a multiple of K={num_kv}, {given}")
    if num_slots_B.shape != (batch,) or not jnp.issubdtype(num_slots_B.dtype, jnp.integer):
        found = f"{num_slots_B.shape} of {num_slots_B.dtype}"
        raise ValueError(f"expected num_slots [B] = {(batch,)} of whole numbers, got {found}")
