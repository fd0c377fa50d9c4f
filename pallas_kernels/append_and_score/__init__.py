"""Store new tokens and score the pages that they leave as they are, which need nothing of each other: in one kernel."""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.append_and_score import apart
from pallas_kernels.append_tokens import check as check_tokens
from pallas_kernels.append_tokens import facts as facts_of_tokens
from pallas_kernels.dispatch import Implementation, choose, kernel
from pallas_kernels.page_scores import Reduce
from pallas_kernels.page_scores import check as check_scores
from pallas_kernels.page_scores import facts as facts_of_scores
from pallas_kernels.partition import per_device

APPEND_AND_SCORE = (
    kernel("append_and_score", "mosaic_gpu", "append_and_score"),
    Implementation(name="apart", refuse=apart.refuse, run=apart.append_and_score),
)


@per_device("k v summary BKP", k="BSKH", v="BSKH", summary="BPKX")
def append_and_score(
    k: jax.Array,
    v: jax.Array,
    summary: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    slots_BT: jax.Array,
    q_BTNH: jax.Array,
    *,
    kind: Literal["mean", "bounds"],
    page_size: int,
    reduce: Reduce = "max",
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return what :func:`append_tokens` does, and what :func:`page_scores` says of the pages before the new tokens'.

    The page into which the first new token of a sequence falls, and all behind it, score -inf, as do all pages where no
    token is stored: a step reads the pages of its newest tokens whatever they are worth. In place where the first three
    arguments are donated. Cost: that of the two operations less the start of a kernel, which at one sequence is most of
    what storing takes.

    Args:
        k, v, summary, k_BTKH, v_BTKH, slots_BT, kind, page_size, layer: see :func:`append_tokens`.
        q_BTNH, reduce: see :func:`page_scores`.
        implementation: by name; ``None`` takes the fastest that can serve.

    Returns:
        Keys, values, summaries, and the scores ``[B, K, P]``.

    Raises:
        ValueError: if shapes do not match.
        NotImplementedError: if the requested implementation cannot serve.
    """
    check_tokens(k, v, summary, k_BTKH, v_BTKH, slots_BT, kind, page_size, layer)
    num_pages_B = whole_pages(slots_BT, k.shape[-3], page_size)
    check_scores(q_BTNH, summary, num_pages_B, layer, reduce)
    k_BTKH, v_BTKH = k_BTKH.astype(k.dtype), v_BTKH.astype(v.dtype)
    stacked = (k, v, summary) if layer is not None else (k[None], v[None], summary[None])
    at = jnp.int32(0) if layer is None else layer
    facts = facts_of_tokens(k, summary, slots_BT, page_size)
    facts |= {"scores": facts_of_scores(q_BTNH, stacked[2], reduce)}
    chosen = choose("append_and_score", APPEND_AND_SCORE, implementation, **facts)
    *cache, scores_BKP = chosen.run(
        *stacked, k_BTKH, v_BTKH, slots_BT, q_BTNH, num_pages_B, at, kind=kind, page_size=page_size, reduce=reduce
    )
    return *(cache if layer is not None else (array[0] for array in cache)), scores_BKP


def whole_pages(slots_BT: jax.Array, num_slots: int, page_size: int) -> jax.Array:
    """Return the pages of each sequence before that of its first new token ``[B]``; 0 where none is stored."""
    inside_BT = (slots_BT >= 0) & (slots_BT < num_slots)
    first_B = jnp.min(jnp.where(inside_BT, slots_BT, num_slots), axis=1)
    return jnp.where(jnp.any(inside_BT, axis=1), first_B // page_size, 0)
