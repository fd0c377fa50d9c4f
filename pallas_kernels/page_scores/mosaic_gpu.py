"""Scores of pages as one Mosaic GPU kernel for Hopper that reads the summaries once and in place.

The pages of every key/value head are split among blocks. A *loader* warpgroup streams tiles of 64 summaries by TMA into
a ring of buffers; a *reader* warpgroup multiplies them with the head's queries, as the left side of the tensor cores'
product, and reduces over the queries in registers, so that scores of single queries are never written. A soft vote
takes two passes: the first finds each query's normalizer, the second adds the votes up.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import refuse_dtypes, refuse_unless_hopper

WIDTHS = (64, 128, 256, 512)
PAGES = 64  # of a tile
MAX_ROWS = 64
SHARED_BYTES = 216 * 1024  # of the 227 KiB that a multiprocessor can give, less barriers and the scratch of reductions
REDUCTION_BYTES = 2048
LOG2E = math.log2(math.e)
F32, I32 = jnp.float32, jnp.int32
TILE = plgpu.Layout.WGMMA  # [64 pages or features, rows]
ROWS = TILE.reduce(0)  # [rows]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How one call is divided.

    Args:
        pages: summaries of a sequence.
        width: numbers of a summary: ``head_dim``, or twice that for bounds.
        reduce: ``max``, ``sum``; or the passes of a vote: ``normalize``, then ``vote``.
        cores: multiprocessors of the device.
    """

    layers: int
    batch: int
    tokens: int
    kv_heads: int
    group: int
    head_dim: int
    pages: int
    width: int
    dtype: Any
    scale: float
    reduce: Literal["max", "sum", "normalize", "vote"]
    cores: int

    @property
    def token_rows(self) -> int:
        """Rows of a token: its queries to one head, and those of the next heads up to a multiple of 8."""
        return -(-self.group // 8) * 8

    @property
    def rows(self) -> int:
        """Rows that meet a head's summaries."""
        return self.tokens * self.token_rows

    @property
    def blocks_per_core(self) -> int:
        """Blocks that share a multiprocessor, where their memory allows it."""
        return 2 if self._stages(2) >= 2 else 1

    @property
    def stages(self) -> int:
        """Stages of the ring, a tile each."""
        return min(self._stages(self.blocks_per_core), -(-self.tiles // self.splits))

    @property
    def tiles(self) -> int:
        """Tiles of a head; what the last one has beyond its end is read as zeros and left out."""
        return -(-self.pages // PAGES)

    @property
    def splits(self) -> int:
        """Blocks of a key/value head: as many as run at once, but no more than it takes to give each as many tiles."""
        most = max(1, min(self.tiles, self.cores * self.blocks_per_core // (self.batch * self.kv_heads)))
        return -(-self.tiles // -(-self.tiles // most))

    def _stages(self, blocks: int) -> int:
        rows = 2 * self.rows * (self.head_dim + self.width)
        return (SHARED_BYTES // blocks - rows) // (2 * PAGES * self.width)


def refuse(
    *,
    platform: str,
    capability: str | None,
    dtype: Any,
    summary_dtype: Any,
    num_queries: int,
    group: int,
    head_dim: int,
    width: int,
    num_pages: int,
    **_: Any,
) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    if reason := refuse_unless_hopper(platform, capability):
        return reason
    if reason := refuse_dtypes({"queries": dtype, "summaries": summary_dtype}, ("bfloat16", "float16")):
        return reason
    if head_dim % 64 or width not in WIDTHS:
        return f"needs summaries of {', '.join(map(str, WIDTHS))} numbers and head_dim a multiple of 64, got {width}"
    if num_pages % 8:
        return f"needs a multiple of 8 pages, got {num_pages}"
    rows = num_queries * -(-group // 8) * 8
    if rows > MAX_ROWS:
        return f"needs at most {MAX_ROWS} rows (tokens times the group's queries, rounded up to 8), got {rows}"
    return None


def page_scores(q_BTNH, summary_LBPKX, num_pages_B, layer, *, reduce, scale, cores: int | None = None):
    """See :func:`pallas_kernels.page_scores.page_scores`.

    Args:
        cores: multiprocessors to divide the work for; ``None`` for those of the device.
    """
    g = geometry(q_BTNH, summary_LBPKX, reduce=reduce, scale=scale, cores=cores)
    inputs = (layer.reshape(1).astype(I32), num_pages_B.astype(I32), q_BTNH, summary_LBPKX)
    found = _kernel(g)(*inputs)
    return votes(g, found, *inputs) if reduce == "vote" else found[:, :, : g.pages]


def geometry(q_BTNH, summary_LBPKX, *, reduce: str, scale: float, cores: int | None) -> Geometry:
    """Return how a call is divided; a vote begins with the pass that finds normalizers."""
    layers, batch, pages, kv_heads, width = summary_LBPKX.shape
    return Geometry(
        layers=layers,
        batch=batch,
        tokens=q_BTNH.shape[1],
        kv_heads=kv_heads,
        group=q_BTNH.shape[2] // kv_heads,
        head_dim=q_BTNH.shape[3],
        pages=pages,
        width=width,
        dtype=q_BTNH.dtype,
        scale=scale,
        reduce="normalize" if reduce == "vote" else reduce,
        cores=jax.local_devices()[0].core_count if cores is None else cores,
    )


def votes(g: Geometry, found, layer, num_pages_B, q_BTNH, summary_LBPKX):
    """Return the votes from what the first pass found: the second pass."""
    top_CSR, total_CSR = (part[:, :, 0] for part in jnp.split(found, 2, axis=2))
    peak_CR = jnp.max(top_CSR, axis=1)
    total_CR = jnp.sum(total_CSR * jnp.exp2(top_CSR - peak_CR[:, None]), axis=1)
    normalizer_CR = peak_CR + jnp.log2(total_CR)
    second = _kernel(dataclasses.replace(g, reduce="vote"))
    return second(layer, num_pages_B, q_BTNH, summary_LBPKX, normalizer_CR)[:, :, : g.pages]


@functools.cache
def _kernel(g: Geometry):
    return plgpu.kernel(
        functools.partial(_body, g),
        out_type=out_type(g),
        grid=(g.batch * g.kv_heads * g.splits,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=scratch_types(g),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=REDUCTION_BYTES),
    )


def out_type(g: Geometry) -> jax.ShapeDtypeStruct:
    """Return what a pass writes."""
    if g.reduce == "normalize":
        return jax.ShapeDtypeStruct((g.batch * g.kv_heads, g.splits, 2, g.rows), F32)
    return jax.ShapeDtypeStruct((g.batch, g.kv_heads, g.tiles * PAGES), F32)


def scratch_types(g: Geometry) -> dict[str, Any]:
    """Return what :func:`score` needs of a block."""
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return {
        "ring": plgpu.SMEM((g.stages, PAGES, g.width), g.dtype, transforms=tiled),
        "queries": plgpu.SMEM((g.rows, g.width), g.dtype, transforms=tiled),
        "staged": plgpu.SMEM((g.rows, g.head_dim), g.dtype),
        "full": plgpu.Barrier(num_barriers=g.stages),
        "free": plgpu.Barrier(num_barriers=g.stages),
        "asked": plgpu.Barrier(num_arrivals=g.tokens),
    }


def _body(g: Geometry, *refs, **scratch):
    names = ["layer", "num_pages", "q", "summary", *(["normalizer"] if g.reduce == "vote" else []), "out"]
    score(g, SimpleNamespace(**dict(zip(names, refs, strict=True)), **scratch), lax.axis_index("block"))


def score(g: Geometry, r: SimpleNamespace, block: jax.Array) -> None:
    """Score the pages of the ``block``-th split; two warpgroups do it."""
    warpgroup = lax.axis_index("warpgroup")
    head, split = lax.div(block, I32(g.splits)), lax.rem(block, I32(g.splits))
    at = SimpleNamespace(
        head=head, split=split, batch=lax.div(head, I32(g.kv_heads)), kv_head=lax.rem(head, I32(g.kv_heads)),
        start=lax.div(split * g.tiles, I32(g.splits)), stop=lax.div((split + 1) * g.tiles, I32(g.splits)),
    )  # fmt: skip
    at.live = jnp.clip(r.num_pages[at.batch], 0, g.pages)
    at.read = jnp.minimum(at.stop, lax.div(at.live + PAGES - 1, I32(PAGES)))
    pl.when(warpgroup == 1)(lambda: _load(g, r, at))
    pl.when(warpgroup == 0)(lambda: _read(g, r, at))


def _load(g, r, at):
    """Read tiles of summaries into the ring."""
    layer = jnp.clip(r.layer[0], 0, g.layers - 1)

    def tile(tile, count):
        stage = lax.rem(count, I32(g.stages))
        plgpu.barrier_wait(r.free.at[stage])
        source = r.summary.at[layer, at.batch, pl.ds(tile * PAGES, PAGES), at.kv_head]
        plgpu.copy_gmem_to_smem(source, r.ring.at[stage], r.full.at[stage])
        return count + 1

    count = lax.fori_loop(at.start, at.read, tile, I32(0))
    for i in range(g.stages):  # a block may not end before its reader is done with the ring
        plgpu.barrier_wait(r.free.at[lax.rem(count + i, I32(g.stages))])


def _read(g, r, at):
    """Score the pages of this split."""
    for i in range(g.stages):
        plgpu.barrier_arrive(r.free.at[i])
    _take_queries(g, r, at)
    row = plgpu.broadcasted_iota(I32, (PAGES, g.rows), 1, layout=TILE)
    asks = lax.rem(row, I32(g.token_rows)) < g.group
    over = lambda vector: lax.broadcast_in_dim(vector, (PAGES, g.rows), [1])  # noqa: E731
    rows = lambda value: plgpu.layout_cast(jnp.full((g.rows,), value, F32), ROWS)  # noqa: E731
    normalizer = plgpu.load(r.normalizer.at[at.head], layout=ROWS, optimized=False) if g.reduce == "vote" else None

    def tile(tile, carry):
        count, top, total = carry
        stage = lax.rem(count, I32(g.stages))
        plgpu.barrier_wait(r.full.at[stage])

        def multiply(acc):
            plgpu.wgmma(acc, r.ring.at[stage], r.queries.T)
            plgpu.wgmma_wait(0)
            return acc[...]

        scores = pl.run_scoped(multiply, plgpu.ACC((PAGES, g.rows), F32))
        plgpu.barrier_arrive(r.free.at[stage])
        page = plgpu.broadcasted_iota(I32, (PAGES, g.rows), 0, layout=TILE) + tile * PAGES
        live = page < at.live
        if g.reduce == "normalize":
            scores = jnp.where(live, scores * (g.scale * LOG2E), -math.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=0))
            peak = jnp.where(new_top == -math.inf, 0.0, new_top)
            total = total * jnp.exp2(top - peak) + jnp.sum(jnp.exp2(scores - over(peak)), axis=0)
            return count + 1, new_top, total
        if g.reduce == "vote":
            votes = jnp.exp2(scores * (g.scale * LOG2E) - over(normalizer))
            found = jnp.sum(jnp.where(live & asks, votes, 0.0), axis=1)
        elif g.reduce == "sum":
            found = jnp.sum(jnp.where(live & asks, scores * g.scale, 0.0), axis=1)
        else:
            found = jnp.max(jnp.where(live & asks, scores * g.scale, -math.inf), axis=1)
        dead = jnp.max(jnp.where(live, 0.0, -math.inf), axis=1)
        r.out[at.batch, at.kv_head, pl.ds(tile * PAGES, PAGES)] = found + dead
        return count + 1, top, total

    _, top, total = lax.fori_loop(at.start, at.read, tile, (I32(0), rows(-math.inf), rows(0.0)))
    if g.reduce == "normalize":
        r.out[at.head, at.split, 0] = top
        r.out[at.head, at.split, 1] = total
        return

    def nothing(tile, _):
        page = plgpu.broadcasted_iota(I32, (PAGES, 8), 0, layout=TILE)
        r.out[at.batch, at.kv_head, pl.ds(tile * PAGES, PAGES)] = jnp.max(jnp.where(page < 0, 0.0, -math.inf), axis=1)

    lax.fori_loop(jnp.maximum(at.start, at.read), at.stop, nothing, None)


def _take_queries(g, r, at):
    """Bring the head's queries to shared memory, for bounds their positive parts and then their negative ones."""
    for token in range(g.tokens):
        source = r.q.at[at.batch, token, pl.ds(at.kv_head * g.group, g.token_rows)]
        plgpu.copy_gmem_to_smem(source, r.staged.at[pl.ds(token * g.token_rows, g.token_rows)], r.asked)
    plgpu.barrier_wait(r.asked)
    for i in range(g.head_dim // 64):
        part = plgpu.load(r.staged.at[:, pl.ds(i * 64, 64)].T, layout=TILE, optimized=False)
        if g.width == g.head_dim:
            r.queries.at[:, pl.ds(i * 64, 64)].T[...] = part
        else:
            part = part.astype(F32)
            r.queries.at[:, pl.ds(i * 64, 64)].T[...] = jnp.maximum(part, 0.0).astype(g.dtype)
            r.queries.at[:, pl.ds(g.head_dim + i * 64, 64)].T[...] = jnp.minimum(part, 0.0).astype(g.dtype)
    plgpu.commit_smem()
