"""The best pages without sorting, as one Mosaic GPU kernel for Hopper: one block a row of scores.

Sinks and recent pages are written at once, so that a search is left over the pages between them. A page's *code* is
its score as an ordered integer, then its page, lower pages higher: all codes differ, and the pages wanted are those of
the ``need`` highest codes.

1. Every thread finds the largest of its scores. A bisection over these maxima, one vote a step, finds a bound that
   ``need`` of them reach: all wanted pages have at least this score, and hardly any others do.
2. Pages that reach the bound are gathered in shared memory, one a thread. Where there are more than threads (many
   equal scores, say), a bisection that counts all codes raises the bound first.
3. A bisection over the gathered codes, again one vote a step, ends when just ``need`` of them are left.
4. These set bits of a map of all pages, whose running sums say where each page is written.

Steps 1 and 2 are left out where there is a thread for every page.

:func:`choose_in_warpgroup` does the same within another kernel, by one warpgroup of a block. There are so few maxima
then, and so few gathered codes, that each is compared with all others in place of the bisections.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import refuse_unless_hopper
from pallas_kernels.index import KVIndex
from pallas_kernels.topk_pages import thread as t
from pallas_kernels.topk_pages.row import PARTS, WARPGROUP, Row, WarpgroupRow

MOST_PAGES = 65536
MOST_CHOSEN = 512  # half of the threads of a block, so that enough of their maxima are above a bound
VECTORS = 4  # of four scores, that a thread loads at once


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """One call, and where things lie in shared memory, in bytes.

    ``need``, the pages to find between sinks and recent ones, must not exceed the threads. Above half of them, or where
    fewer threads than that have a finite score, the bisection that counts all codes is the rule: up to 48 passes.

    Args:
        rows: sequences times key/value heads; of no meaning where a warpgroup takes a row, nor are ``heads``.
        warpgroup: whether one warpgroup of a block takes a row, in :func:`choose_in_warpgroup`, and not a whole block.
    """

    rows: int = 1
    heads: int = 1
    num_pages: int
    k: int
    sinks: int
    recent: int
    warpgroup: bool = False

    @property
    def need(self) -> int:
        return self.k - self.sinks - self.recent

    @property
    def threads(self) -> int:
        """Threads of a row: one a page, or few enough that barriers are quick and enough that a row is read fast."""
        if self.warpgroup:
            return WARPGROUP
        if self.num_pages <= 512 or (self.num_pages <= 1024 and self.k > 128):
            return -(-self.num_pages // 128) * 128
        return 512 if self.num_pages <= 2048 and self.k <= 128 else 1024

    @property
    def few(self) -> bool:
        """Whether there is a thread for every page."""
        return self.num_pages - self.sinks - self.recent <= self.threads

    @property
    def vectors(self) -> int:
        """Vectors of a chunk, which a thread loads at once."""
        return min(VECTORS, -(-self.reach // (4 * self.threads)))

    @property
    def reach(self) -> int:
        """Scores from where the vectors of a row begin, which is aligned, to its end at most."""
        return self.num_pages + (3 if self.num_pages % 4 else 0)

    @property
    def chunk(self) -> int:
        """Scores that the threads load at once."""
        return 4 * self.threads * self.vectors

    @property
    def words(self) -> int:
        """Words of the map of pages."""
        return -(-self.num_pages // 32)

    @property
    def map_at(self) -> int:
        return 8 * self.threads  # behind the gathered codes

    @property
    def sums_at(self) -> int:
        return self.map_at + 4 * self.words

    @property
    def parts_at(self) -> int:
        return self.sums_at + 4 * self.words

    @property
    def counters_at(self) -> int:
        return self.parts_at + 4 * 4 * PARTS

    @property
    def shared_bytes(self) -> int:
        return self.counters_at + 8


def refuse(*, num_pages: int, k: int, capability: str | None, **_: Any) -> str | None:
    """Return why the kernel cannot serve on an NVIDIA GPU, or ``None``."""
    if reason := refuse_unless_hopper("gpu", capability):
        return reason
    if num_pages > MOST_PAGES:
        return f"chooses from at most {MOST_PAGES} pages, got {num_pages}; use larger pages"
    if k > MOST_CHOSEN:
        return f"chooses at most {MOST_CHOSEN} pages, got k={k}"
    return None


def topk_pages(scores_BKP, num_pages_B, *, k, page_size, sinks, recent):
    """See :func:`pallas_kernels.topk_pages.topk_pages`."""
    batch, heads, num_pages = scores_BKP.shape
    g = Geometry(rows=batch * heads, heads=heads, num_pages=num_pages, k=k, sinks=sinks, recent=recent)
    if not g.rows:
        counts_BK, pages_BKM = jnp.zeros((batch, heads), jnp.int32), jnp.zeros((batch, heads, k), jnp.int32)
        return KVIndex(counts=counts_BK, pages=pages_BKM, page_size=page_size)
    counts_BK, pages_BKM = _kernel(g)(scores_BKP, num_pages_B.astype(jnp.int32))
    return KVIndex(counts=counts_BK, pages=pages_BKM, page_size=page_size)


@functools.cache
def _kernel(g: Geometry):
    heads = (g.rows // g.heads, g.heads)
    return plgpu.kernel(
        functools.partial(_body, g),
        out_type=[jax.ShapeDtypeStruct(heads, jnp.int32), jax.ShapeDtypeStruct((*heads, g.k), jnp.int32)],
        grid=(g.rows,),
        grid_names=("row",),
        num_threads=g.threads // 128,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((g.shared_bytes // 4,), jnp.int32)],
    )


def _body(g, *refs):
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def choose(ctx, *refs):
        del ctx
        scores, num_pages, counts, pages, shared = map(t.address, refs)
        threads, row = t.Block(), t.block_index()
        live = t.load_word(num_pages + t.wide(row // g.heads) * 4)
        counts, pages = counts + t.wide(row) * 4, pages + t.wide(row) * (4 * g.k)
        Row(g, threads, row, live, scores, pages, shared).choose(counts)

    choose(*refs)


def choose_in_warpgroup(geometry: Geometry, scores, row, live, pages, shared) -> None:
    """Write the best pages of one row, as :func:`topk_pages` does; within a kernel, by all threads of one warpgroup.

    The other warpgroups of the block may do anything but this meanwhile. It begins and ends with a barrier of this one,
    so that all threads may read the pages when it returns, and call it again when they have. Scores that the kernel
    writes must be visible to one of the threads before: it has waited for them, say.

    Args:
        geometry: of ``warpgroup=True``.
        scores: float32 [rows, num_pages] of global memory, aligned to 16 bytes; those beyond ``live`` are ignored.
        row: int32, the same in all threads, as is ``live``.
        live: pages in use, the last one perhaps in part; of more than ``num_pages`` that many count.
        pages: int32 [k or more] of shared memory for ``min(k, live)`` pages in ascending order, undefined from there
            to ``k``.
        shared: int32 [``geometry.shared_bytes // 4`` or more] of shared memory to work in, aligned to 16 bytes.
    """
    g = geometry
    if not g.warpgroup or g.need > g.threads or g.num_pages > MOST_PAGES:
        raise ValueError(f"expected {WARPGROUP} pages to find at most, of {MOST_PAGES}, by a warpgroup, got {g}")
    words = g.shared_bytes // 4
    if scores.shape[-1] != g.num_pages or pages.shape[0] < g.k or shared.shape[0] < words:
        shapes = [ref.shape for ref in (scores, pages, shared)]
        raise ValueError(f"expected scores [rows, {g.num_pages}], pages [{g.k}] and shared [{words}], got {shapes}")
    scalar, ref = plgpu.Layout.WG_SPLAT(()), plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(ref, scalar, scalar, ref, ref))
    def choose(ctx, scores, row, live, pages, shared):
        del ctx
        scores, pages, shared = map(t.address, (scores, pages, shared))
        row, live = (t.Word(number.registers.item()) for number in (row, live))
        threads = t.Warpgroup()
        threads.barrier()
        WarpgroupRow(g, threads, row, live, scores, pages, shared).choose()
        threads.barrier()

    choose(scores, row, live, pages, shared)
