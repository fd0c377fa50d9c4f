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

:func:`choose_in_warpgroup` does the same within another kernel, by one warpgroup of a block.
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

MOST_PAGES = 65536
MOST_CHOSEN = 512  # half of the threads of a block, so that enough of their maxima are above a bound
WARPGROUP = 128  # threads
PAGE_BITS, LAST_PAGE = 16, 0xFFFF
VECTORS = 4  # of four scores, that a thread loads at once
SIGN = 0x80000000
LOWEST, HIGHEST = 0x00800000, 0xFF7FFFFF  # keys of the finite float32; infinities and NaN count as these
PARTS = 32  # warps of a block at most


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
        _Row(g, threads, row, live, scores, pages, shared).choose(counts)

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
        shared: int32 [``geometry.shared_bytes // 4`` or more] of shared memory to work in, aligned to 8 bytes.
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
        _Row(g, threads, row, live, scores, pages, shared).choose()
        threads.barrier()

    choose(scores, row, live, pages, shared)


class _Row:
    """What one thread does for a row; ``pages`` is where they go, in shared memory if a warpgroup does this."""

    def __init__(self, g: Geometry, threads: t.Block, row, live, scores, pages, shared):
        self.g, self.threads, self.pages, self.shared = g, threads, pages, shared
        self.thread = threads.index
        self.lane, self.warp = self.thread & 31, self.thread >> 5
        first = t.wide(row) * g.num_pages
        self.shift = t.narrow(first) & 3  # scores before the row in its first aligned vector
        self.scores = scores + first * 4
        self.aligned = scores + (first - t.wide(self.shift)) * 4
        live = t.where(live >= SIGN, 0, live)
        self.live = t.where(live < g.num_pages, live, g.num_pages)

    def choose(self, counts=None):
        """Write the pages, and how many there are to ``counts``."""
        g, live = self.g, self.live
        self.early = self._load_early()
        few = live <= g.k
        if counts is not None:
            t.store_word(counts, t.where(few, live, g.k), self.thread < 1)
        t.branch(few, self._take_all, self._take_best)

    def _load_early(self):
        """Load what a thread can keep of the row, before it is known how many pages are in use."""
        g = self.g
        if g.few:
            page = self.thread + g.sinks
            return self._load_score(page, page < g.num_pages)
        return self._load(t.word(0)) if g.chunk >= g.reach else None

    def _take_all(self):
        for place in self._strided(self.g.k):
            self._write(place, t.where(place < self.live, place, 0), place < self.g.k)
        return []

    def _take_best(self):
        g = self.g
        for place in self._strided(g.sinks):
            self._write(place, place, place < g.sinks)
        for place in self._strided(g.recent):
            self._write(place + (g.k - g.recent), place + (self.live - g.recent), place < g.recent)
        if not g.need:
            return []
        for place in self._strided(g.words):
            t.store_shared(self.shared + g.map_at + place * 4, [t.word(0)], place < g.words)
        t.store_shared(self.shared + g.counters_at + self.thread * 4, [t.word(0)], self.thread < 2)
        self.end = self.live - g.recent
        self.size = self.end - g.sinks
        if g.few:
            found = self._gather_few()
        else:
            found = t.branch(self.size <= g.threads, self._gather_few, self._gather_many, (64, 64, 64))
        self._emit(*self._bisect(*found))
        return []

    def _gather_few(self):
        """Return a code for every page, one a thread, and bounds of the search."""
        mine = self.thread < self.size
        page = self.thread + self.g.sinks
        key = _key(self.early if self.g.few else self._load_score(page, mine))
        low, high = self._range(t.where(mine, key, 0), t.where(mine, key, HIGHEST))
        return t.where(mine, _code(key, page), t.wide(t.word(0))), _code_bound(low), _code_bound(high + 1)

    def _gather_many(self):
        """Return the codes of the best pages, one a thread, and bounds of the search."""
        g = self.g
        cached = None if self.early is None else self._mask(self.early)

        def update(chunk, best):
            for _, bits in self._chunk(chunk, cached):
                best = t.float_max(best, bits)
            return [best]

        best = self._each_chunk(update, [t.word(t.NAN_BITS)], cached)[0]
        key = _key(best)  # of NaN, also where there are no scores, the lowest
        known = key > LOWEST
        low, high = self._range(key, t.where(known, key, HIGHEST))
        low, high = t.where(low > LOWEST, low, LOWEST + 1), high + 1
        start = self.threads.vote(key >= low)
        enough = max(g.need + g.need // 8, g.threads // 4)

        def halve(low, high, count):
            middle = low + ((high - low) >> 1)
            reached = self.threads.vote(key >= middle)
            ok = reached >= g.need
            return [t.where(ok, middle, low), t.where(ok, high, middle), t.where(ok, reached, count)]

        going = lambda low, high, count: (count > enough) & (high > low + 1)  # noqa: E731
        low, _, _ = t.loop(going, halve, [low, high, start])
        reliable = start >= g.need

        def gather():
            bound = low ^ t.where(low >= SIGN, SIGN, 0xFFFFFFFF)
            return [self._gather(lambda bits, page: t.float_at_least(bits, bound), g.counters_at, cached)]

        (count,) = t.branch(reliable, gather, lambda: [t.word(g.num_pages)], (32,))
        low, high = _code_bound(t.where(reliable, low, LOWEST)), _code_bound(high)

        def raise_bound():
            bound = self._raise_bound(low, high, cached)
            count = self._gather(
                lambda bits, page: self._between(page) & (_code(_key(bits), page) >= bound), g.counters_at + 4, cached
            )
            return [count, bound]

        count, low = t.branch(count > g.threads, raise_bound, lambda: [count, low], (32, 64))
        page, bits = (t.load_shared(self.shared + self.thread * 8 + at) for at in (0, 4))
        return t.where(self.thread < count, _code(_key(bits), page), t.wide(t.word(0))), low, high

    def _raise_bound(self, low, high, cached):
        """Raise the lower bound until few enough codes reach it to give each a thread."""
        g = self.g

        def halve(low, high, count):
            middle = low + ((high - low) >> 1)

            def update(chunk, found):
                for page, bits in self._chunk(chunk, cached):
                    found = found + t.one_if(self._between(page) & (_code(_key(bits), page) >= middle))
                return [found]

            reached = self._sum(self._each_chunk(update, [t.word(0)], cached)[0])
            ok = reached >= g.need
            return [t.where(ok, middle, low), t.where(ok, high, middle), t.where(ok, reached, count)]

        # Codes differ: before the bounds meet, not more than need reach the lower one.
        return t.loop(lambda low, high, count: count > g.threads, halve, [low, high, t.word(g.num_pages)])[0]

    def _gather(self, chosen, counter, cached):
        """Put the chosen pages and their scores into shared memory, in any order; return how many there are."""
        g, counter = self.g, self.shared + counter

        def update(chunk):
            found = [(page, bits, chosen(bits, page)) for page, bits in self._chunk(chunk, cached)]
            mine = functools.reduce(lambda total, each: total + t.one_if(each[2]), found, t.word(0))
            sums = t.warp_sums(mine, self.lane)
            place = t.from_lane(t.add_shared(counter, sums, self.lane >= 31), 31) + sums - mine
            for page, bits, is_chosen in found:
                fits = is_chosen & (place < g.threads)
                t.store_shared(self.shared + place * 8, [page, bits], fits)
                place = place + t.one_if(is_chosen)
            return []

        self._each_chunk(update, [], cached)
        self.threads.barrier()
        return t.load_shared(counter)

    def _bisect(self, code, low, high):
        """Return this thread's code and the bound that just ``need`` codes reach."""
        need = self.g.need

        def halve(low, high, count):
            middle = low + ((high - low) >> 1)
            reached = self.threads.vote(code >= middle)
            ok = reached >= need
            return [t.where(ok, middle, low), t.where(ok, high, middle), t.where(ok, reached, count)]

        # The count at the lower bound is not known, so that one step is taken at least.
        low, _, _ = t.loop(lambda low, high, count: count > need, halve, [low, high, t.word(need + 1)])
        return code, low

    def _emit(self, code, bound):
        """Write the pages of the codes that reach the bound."""
        g, shared = self.g, self.shared
        chosen = code >= bound
        page = t.where(chosen, (t.narrow(code) & LAST_PAGE) ^ LAST_PAGE, 0)
        word, bit = page >> 5, t.word(1) << (page & 31)
        t.set_bits_shared(shared + g.map_at + word * 4, bit, chosen)
        self.threads.barrier()
        each = -(-g.words // g.threads)
        places = [self.thread * each + i for i in range(each)]
        ones = []
        for place in places:
            inside = t.where(place < g.words, place, 0)
            found = t.count_ones(t.load_shared(shared + g.map_at + inside * 4))
            ones.append(t.where(place < g.words, found, 0))
        mine = functools.reduce(lambda a, b: a + b, ones)
        sums = t.warp_sums(mine, self.lane)
        t.store_shared(self._part(3, self.warp), [sums], self.lane >= 31)
        self.threads.barrier()
        before = t.where(self.lane < self.warp, t.load_shared(self._part(3, self.lane)), 0)
        running = t.warp_reduce("add", before) + sums - mine
        for place, found in zip(places, ones, strict=True):
            t.store_shared(shared + g.sums_at + place * 4, [running], place < g.words)
            running = running + found
        self.threads.barrier()
        rank = t.load_shared(shared + g.sums_at + word * 4)
        rank = rank + t.count_ones(t.load_shared(shared + g.map_at + word * 4) & (bit - 1))
        self._write(rank + g.sinks, page, chosen)

    def _load_score(self, page, condition):
        return t.load_word(self.scores + t.wide(page) * 4, condition, written=self.g.warpgroup)

    def _load(self, chunk):
        """Return this thread's vectors of a chunk, each with the page of its first score."""
        g = self.g
        found = []
        for i in range(g.vectors):
            at = chunk * g.chunk + (self.thread + i * g.threads) * 4
            # The last vector may reach up to 12 bytes beyond the row, within the 16 that hold its last score.
            bits = t.load_four(self.aligned + t.wide(at) * 4, at < self.shift + g.num_pages, written=g.warpgroup)
            found.append((at - self.shift, bits))
        return found

    def _mask(self, vectors):
        """Return pages and scores; those that are not between sinks and recent ones are NaN."""
        found = []
        for page, bits in vectors:
            pages = [page + i for i in range(4)]
            masked = lambda pages=pages, bits=bits: [  # noqa: E731
                t.where(self._between(page), each, t.NAN_BITS) for page, each in zip(pages, bits, strict=True)
            ]
            whole = (page - self.g.sinks) < self.size - 3
            found += zip(pages, t.branch(whole, lambda bits=bits: bits, masked, (32,) * 4), strict=True)
        return found

    def _chunk(self, chunk, cached):
        """Return the masked pages and scores of a chunk."""
        return self._mask(self._load(chunk)) if cached is None else cached

    def _each_chunk(self, update, start, cached):
        """Run ``update`` on the number of every chunk in use and the words so far."""
        if cached is not None:
            return update(t.word(0), *start)
        chunks = (self.end + self.shift + (self.g.chunk - 1)) // self.g.chunk
        going = lambda chunk, *words: chunk < chunks  # noqa: E731
        return t.loop(going, lambda chunk, *words: [chunk + 1, *update(chunk, *words)], [t.word(0), *start])[1:]

    def _between(self, page):
        return (page - self.g.sinks) < self.size

    def _range(self, high, low):
        """Return the smallest ``low`` and the largest ``high`` of all threads."""
        warps = self.lane < self.g.threads // 32
        for kind, number, part in (("max", high, 0), ("min", low, 1)):
            t.store_shared(self._part(part, self.warp), [t.warp_reduce(kind, number)], self.lane < 1)
        self.threads.barrier()
        high, low = (t.load_shared(self._part(part, self.lane)) for part in (0, 1))
        return t.warp_reduce("min", t.where(warps, low, HIGHEST)), t.warp_reduce("max", t.where(warps, high, 0))

    def _sum(self, number):
        """Return the sum of all threads' numbers."""
        self.threads.barrier()
        t.store_shared(self._part(2, self.warp), [t.warp_reduce("add", number)], self.lane < 1)
        self.threads.barrier()
        found = t.load_shared(self._part(2, self.lane))
        return t.warp_reduce("add", t.where(self.lane < self.g.threads // 32, found, 0))

    def _part(self, part, index):
        return self.shared + self.g.parts_at + (index + part * PARTS) * 4

    def _strided(self, count):
        return [self.thread + i * self.g.threads for i in range(-(-count // self.g.threads))]

    def _write(self, place, page, condition):
        if self.g.warpgroup:
            t.store_shared(self.pages + place * 4, [page], condition)
        else:
            t.store_word(self.pages + t.wide(place) * 4, page, condition)


def _key(bits):
    """Return an integer that orders float32 by value, those that are not finite as the nearest that is, NaN lowest."""
    key = bits ^ t.where(bits >= SIGN, 0xFFFFFFFF, SIGN)
    key = t.where((bits & 0x7FFFFFFF) > 0x7F800000, LOWEST, key)
    key = t.where(key < LOWEST, LOWEST, key)
    return t.where(key > HIGHEST, HIGHEST, key)


def _code(key, page):
    return _code_bound(key) | t.wide((page & LAST_PAGE) ^ LAST_PAGE)


def _code_bound(key):
    """Return the lowest code of a key."""
    return t.wide(key) << PAGE_BITS
