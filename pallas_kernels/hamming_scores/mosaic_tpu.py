"""Scores of hashes as a Pallas TPU kernel that reads the codes of the slots in use once and in place.

A step of the grid takes a tile of slots with all words and key/value heads: heads lie in sublanes and slots in lanes,
so that the bits of a slot are counted and added where they lie. Tiles beyond the slots in use are not read.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
MOST_PAIRS = 512  # words of all queries of a group, each of which is a step of a program without loops
BLOCK_BYTES = 2**20  # of codes; two blocks are in VMEM at a time
CHUNK = 512  # slots that are counted at once
F32, I32 = jnp.float32, jnp.int32


def refuse(*, platform: str, words: int, group: int, num_kv: int, **_: Any) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if platform != "tpu":
        return f"needs a TPU, got platform {platform!r}"
    if words * group > MOST_PAIRS:
        return f"compares at most {MOST_PAIRS} words of a group's queries, got {group} queries of {words} words"
    if num_kv > 128:
        return f"holds the codes of 128 key/value heads, got {num_kv}"
    return None


def hamming_scores(
    codes_LBWKS, queries_BNW, num_slots_B, layer, *, reduce, tile: int | None = None, interpret: Any = False
):
    """See :func:`pallas_kernels.hamming_scores.hamming_scores`.

    Args:
        tile: slots of a step, a multiple of 512; ``None`` for what fits.
        interpret: ``pltpu.InterpretParams(...)`` to run without a TPU.
    """
    layers, batch, words, heads, slots = codes_LBWKS.shape
    if tile is None:
        tile = max(CHUNK, BLOCK_BYTES // (4 * words * pl.cdiv(heads, SUBLANES) * SUBLANES) // CHUNK * CHUNK)
    tile = min(tile, pl.cdiv(slots, CHUNK) * CHUNK)
    queries_BGWK1 = jnp.transpose(queries_BNW.reshape(batch, heads, -1, words), (0, 2, 3, 1))[..., None]

    def block(b, step, layer_ref, live_ref):
        # Past the last slot in use the index stays, so that nothing is read again.
        at = jnp.minimum(step, jnp.maximum(lax.div(live_ref[b] + tile - 1, I32(tile)) - 1, 0))
        return (layer_ref[0], b, 0, 0, at)

    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, reduce=reduce),
        out_shape=jax.ShapeDtypeStruct((batch, heads, slots), F32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, pl.cdiv(slots, tile)),
            in_specs=[
                pl.BlockSpec((None, *queries_BGWK1.shape[1:]), lambda b, step, *_: (b, 0, 0, 0, 0)),
                pl.BlockSpec((None, None, words, heads, tile), block),
            ],
            out_specs=pl.BlockSpec((None, heads, tile), lambda b, step, *_: (b, 0, step)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="hamming_scores",
        interpret=interpret,
    )(
        jnp.clip(layer, 0, layers - 1).reshape(1).astype(I32),
        jnp.clip(num_slots_B, 0, slots).astype(I32),
        queries_BGWK1,
        codes_LBWKS,
    )


def _kernel(layer_ref, live_ref, queries_ref, codes_ref, out_ref, *, tile, reduce):
    group, words, heads, _ = queries_ref.shape
    live = live_ref[pl.program_id(0)] - pl.program_id(1) * tile
    best = jnp.minimum if reduce == "max" else jnp.add
    out_ref[...] = jnp.full(out_ref.shape, -math.inf, F32)

    def score(step, _):
        slots = pl.ds(pl.multiple_of(step * CHUNK, CHUNK), CHUNK)
        held = [codes_ref[word, :, slots] for word in range(words)]

        def bits(query):
            counts = [lax.population_count(held[word] ^ queries_ref[query, word]) for word in range(words)]
            return functools.reduce(jnp.add, counts).astype(I32)

        found = functools.reduce(best, map(bits, range(group)))
        slot = step * CHUNK + lax.broadcasted_iota(I32, (heads, CHUNK), 1)
        out_ref[:, slots] = jnp.where(slot < live, (0 - found).astype(F32), -math.inf)
        return 0

    lax.fori_loop(0, lax.div(jnp.clip(live, 0, tile) + CHUNK - 1, I32(CHUNK)), score, 0)
