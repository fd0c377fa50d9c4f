"""Storing new tokens as a Pallas TPU kernel, in place: a few sequences a step, all of whose DMAs are under way at once.

A slot with all its heads is whole words of memory. Keys and values go to their slots; then the pages that they fell
into come back, and their summaries are reduced with heads in sublanes and features in lanes, a slot at a time. Both
pages of tokens that cross into the next one are brought only where they do.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import refuse_dtypes

PAGE_SIZES = (8, 16, 32, 64, 128)
MOST_TOKENS = 8
PAGES_BYTES = 4 * 2**20  # of the pages of a step
F32, I32 = jnp.float32, jnp.int32


def refuse(
    *,
    platform: str,
    dtype: Any,
    summary_dtype: Any,
    head_dim: int,
    num_kv: int,
    num_slots: int,
    page_size: int,
    num_new: int,
    **_: Any,
) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if platform != "tpu":
        return f"needs a TPU, got platform {platform!r}"
    if reason := refuse_dtypes({"keys": dtype, "summaries": summary_dtype}, ("bfloat16", "float32")):
        return reason
    if head_dim % 128:
        return f"needs head_dim to be a multiple of 128, got {head_dim}"
    if num_kv not in (2, 4) and num_kv % 8 and (num_kv > 1 or dtype == jnp.bfloat16):
        return f"needs key/value heads that fill tiles: 2, 4, a multiple of 8, or 1 in float32; got {num_kv}"
    if page_size not in PAGE_SIZES or num_slots % page_size:
        sizes = ", ".join(map(str, PAGE_SIZES))
        return f"needs whole pages of {sizes} slots, got {num_slots} slots in pages of {page_size}"
    if num_new > MOST_TOKENS:
        return f"stores up to {MOST_TOKENS} tokens at a time, got {num_new}"
    if page_bytes(page_size, num_kv, head_dim, dtype) > PAGES_BYTES // 2:
        return f"holds two pages in {PAGES_BYTES} bytes, got {page_size} slots of {num_kv} heads of {head_dim}"
    return None


def page_bytes(page_size: int, num_kv: int, head_dim: int, dtype: Any) -> int:
    """Return the bytes of a page of keys in VMEM, where heads are filled up to whole tiles."""
    rows = 32 // jnp.dtype(dtype).itemsize
    return page_size * -(-num_kv // rows) * 32 * head_dim


def append_tokens(
    k,
    v,
    summary,
    k_BTKH,
    v_BTKH,
    slots_BT,
    layer,
    *,
    kind,
    page_size,
    together: int | None = None,
    interpret: Any = False,
):
    """See :func:`pallas_kernels.append_tokens.append_tokens`; the arrays are stacked.

    Args:
        together: sequences of a step, which divide the batch; ``None`` for as many as fit.
        interpret: ``pltpu.InterpretParams(...)`` to run without a TPU.
    """
    layers, batch, _, heads, dim = k.shape
    tokens, width = slots_BT.shape[1], summary.shape[4]
    pages = 1 if tokens == 1 else 2
    if together is None:
        most = max(1, PAGES_BYTES // (pages * page_bytes(page_size, heads, dim, k.dtype)))
        together = next(count for count in range(min(batch, most), 0, -1) if batch % count == 0)
    new = pl.BlockSpec((together, tokens, heads, dim), lambda step, *_: (step, 0, 0, 0))
    whole = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        functools.partial(_kernel, kind=kind, page_size=page_size),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (k, v, summary)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch // together,),
            in_specs=[new, new, whole, whole, whole],
            out_specs=[whole, whole, whole],
            scratch_shapes=[
                pltpu.VMEM((together, pages, page_size, heads, dim), k.dtype),
                pltpu.VMEM((together, pages, heads, width), summary.dtype),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        input_output_aliases={4: 0, 5: 1, 6: 2},
        name="append_tokens",
        interpret=interpret,
    )(jnp.clip(layer, 0, layers - 1).reshape(1).astype(I32), slots_BT.astype(I32), k_BTKH, v_BTKH, k, v, summary)


def _kernel(layer_ref, slots_ref, k_new, v_new, _k, _v, _s, k, v, summary, held, made, arrived, *, kind, page_size):
    layer, num_slots = layer_ref[0], k.shape[2]
    together, tokens = k_new.shape[:2]
    writes, reads, returns, newest = [], [], [], []
    for i in range(together):
        row = pl.program_id(0) * together + i
        slots = [slots_ref[row, token] for token in range(tokens)]
        inside = [(slot >= 0) & (slot < num_slots) for slot in slots]
        for token, (slot, stored) in enumerate(zip(slots, inside, strict=True)):
            for new, cache in ((k_new, k), (v_new, v)):
                copy = pltpu.make_async_copy(
                    new.at[i, token], cache.at[layer, row, jnp.where(stored, slot, 0)], arrived
                )
                writes.append((stored, copy))
        found = list(zip(slots, inside, strict=True))
        last = functools.reduce(jnp.maximum, [jnp.where(stored, slot, -1) for slot, stored in found])
        first = functools.reduce(jnp.minimum, [jnp.where(stored, slot, num_slots) for slot, stored in found])
        pages = [jnp.maximum(lax.div(last, I32(page_size)), 0), lax.div(first, I32(page_size))]
        into = [last >= 0, (last >= 0) & (pages[1] < pages[0])]
        newest.append(last)
        for turn in range(held.shape[1]):
            page = jnp.where(into[turn], pages[turn], 0)
            keys = k.at[layer, row, pl.ds(page * page_size, page_size)]
            reads.append((into[turn], pltpu.make_async_copy(keys, held.at[i, turn], arrived)))
            place = summary.at[layer, row, page]
            returns.append((into[turn], page, pltpu.make_async_copy(made.at[i, turn], place, arrived)))

    _together(writes)
    _together(reads)
    for number, (happens, page, _) in enumerate(returns):
        i, turn = divmod(number, held.shape[1])
        live = jnp.minimum(newest[i] - page * page_size + 1, page_size)
        pl.when(happens)(functools.partial(_summarize, held.at[i, turn], made.at[i, turn], live, kind))
    _together([(happens, copy) for happens, _, copy in returns])


def _together(copies):
    """Run those copies that shall happen at the same time."""
    for happens, copy in copies:
        pl.when(happens)(copy.start)
    for happens, copy in copies:
        pl.when(happens)(copy.wait)


def _summarize(keys, made, live, kind):
    """Write the summary of the first ``live`` keys of a page."""
    shape, dim = keys.shape[1:], keys.shape[2]

    def add(slot, total):
        return total + keys[slot].astype(F32)

    def bound(slot, bounds):
        found = keys[slot].astype(F32)
        return jnp.maximum(bounds[0], found), jnp.minimum(bounds[1], found)

    if kind == "mean":
        total = lax.fori_loop(0, live, add, jnp.zeros(shape, F32))
        made[...] = (total / live.astype(F32)).astype(made.dtype)
    else:
        start = jnp.full(shape, -math.inf, F32), jnp.full(shape, math.inf, F32)
        high, low = lax.fori_loop(0, live, bound, start)
        made[:, :dim], made[:, dim:] = high.astype(made.dtype), low.astype(made.dtype)
