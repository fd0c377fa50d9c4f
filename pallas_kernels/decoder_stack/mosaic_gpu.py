"""The decoder stack as one persistent Mosaic GPU kernel for Hopper: no launch, branch or copy between layers.

Every multiprocessor holds one block of three warpgroups. The *streamer* reads weights and cached keys and values by TMA
into a ring of buffers; nothing it reads depends on the token, chosen pages excepted, so it runs ahead through the
phases of a layer. It has no more in flight than keeps memory busy, as every other trip through memory waits behind it:
one unit at a time, the first beside the last of the phase before, as long as the phase of those units may not have
begun, since the end of the phase before is such trips. The *feeder* does the same with activations, phase by phase, and
makes those of layers that did not run from the final states. The *worker* multiplies, with the weights as the 64-row
left side of the tensor cores' products and the few rows of activations as the right side, so that one row costs what
eight cost. A phase ends at a barrier over all blocks, whose wait the ring hides in part.

Where layers choose their pages, another phase scores them before attention, whose summaries of keys come through the
ring as weights do. The streamer then chooses itself, in each block the pages that this block attends to, and reads them
as if they lay one behind the other, so that the worker does what it does with all slots
(:mod:`pallas_kernels.decoder_stack.pages`).

Activations live in global memory, features along the last axis for the tensor cores and, for the residual stream, along
the first: an accumulator holds 64 features by all rows. RMS norms are applied after the product, which commutes with
scaling rows. Partial sums are added in the order of their blocks, so that results do not depend on timing.

Devices that share a layer, each with its heads and its part of the MLP, run the same kernel on the same states. What a
device's output and down projection give is sent to the others tile by tile and added in the order of the devices
(:meth:`Worker.add_devices`), so that all go on with the same numbers: nothing else is ever sent.
"""

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decoder_stack.geometry import UNIT, Geometry, Selection, refuse_geometry, refuse_parts
from pallas_kernels.decoder_stack.grid import Grid
from pallas_kernels.decoder_stack.readers import feed, stream
from pallas_kernels.decoder_stack.worker import Worker
from pallas_kernels.dispatch import refuse_peers, refuse_unless_hopper
from pallas_kernels.exchange import EMPTY_BITS, ranks
from pallas_kernels.partition import num_parts, sharing
from pallas_kernels.topk_pages import mosaic_gpu as topk_pages

OUTPUTS = (
    "stream",
    "layer_input",
    "norm_input",
    "heads",
    "attended",
    "hidden",
    "partial",
    "split",
    "sums",
    "scores",
    "ended",
)


def refuse(
    *,
    platform: str,
    dtypes: set,
    sizes: dict,
    parts: dict,
    devices: list[int],
    select: Selection | None = None,
    num_pages: int | None = None,
    **facts: Any,
) -> str | None:
    """Return why the kernel cannot serve, or ``None``."""
    device, peers = jax.local_devices()[0], parts["heads"]
    if reason := refuse_unless_hopper(platform, getattr(device, "compute_capability", None)):
        return reason
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        return f"needs weights, states and cache in bfloat16, got {', '.join(sorted(map(str, dtypes)))}"
    if reason := refuse_parts(parts, sizes):
        return reason
    if peers > 1 and (reason := refuse_peers(devices)):
        return reason
    sizes = sizes | {"kv_heads": sizes["kv_heads"] // peers, "d_ff": sizes["d_ff"] // peers, "peers": peers}
    if sizes["batch"] % parts["batch"] == 0:
        sizes["batch"] //= parts["batch"]
    return refuse_geometry(Geometry(**sizes, blocks=device.core_count, select=select, num_pages=num_pages or 0))


def decode_layers(
    x_BD,
    weights,
    k_LBSKH,
    v_LBSKH,
    positions_B,
    *,
    order_M,
    length,
    planned_B,
    live_B,
    frequencies,
    eps,
    threshold,
    asked_M,
    fill,
    window,
    summary_LBPKX=None,
    select: Selection | None = None,
    blocks: int | None = None,
):
    """See :func:`pallas_kernels.decoder_stack.decode_layers`; ``blocks`` is one for each multiprocessor by default."""
    layers, batch, capacity, kv_heads, head_dim = k_LBSKH.shape
    mesh, axes = sharing() or (None, ())
    g = Geometry(
        layers=layers,
        d_model=x_BD.shape[1],
        d_ff=weights.w_down.shape[1],
        kv_heads=kv_heads,
        group=weights.wo.shape[1] // (kv_heads * head_dim),
        head_dim=head_dim,
        batch=batch,
        capacity=capacity,
        blocks=jax.local_devices()[0].core_count if blocks is None else blocks,
        peers=num_parts(mesh, axes) if axes else 1,
        select=select,
        num_pages=0 if select is None else summary_LBPKX.shape[2],
    )
    pad_rows = lambda x: jnp.pad(x.astype(jnp.int32), (0, g.rows - batch))  # noqa: E731
    numbers = {
        "position": pad_rows(jnp.clip(positions_B, 0, capacity)),
        "writes": pad_rows(live_B & (positions_B >= 0) & (positions_B < capacity)),
        "planned": pad_rows(planned_B),
        "count": jnp.stack([jnp.max(planned_B), length]).astype(jnp.int32),
        "order": order_M,
        "asked": asked_M.astype(jnp.int32),
    }
    angles = frequencies[:, None] * numbers["position"][None].astype(jnp.float32)
    x_DR = jnp.pad(x_BD.astype(jnp.float32).T, ((0, 0), (0, g.rows - batch)))
    columns = {"x": x_DR, "cos": jnp.cos(angles), "sin": jnp.sin(angles)}
    values = {
        "numbers": _together(_numbers(g, order_M.shape[0]), numbers),
        "columns": _together(_columns(g), columns),
        "threshold": jnp.reshape(jnp.float32(0) if threshold is None else threshold, (1,)).astype(jnp.float32),
        "k_cache": jax.new_ref(k_LBSKH),
        "v_cache": jax.new_ref(v_LBSKH),
        "summary": None if select is None else jax.new_ref(summary_LBPKX),
        "inbox": jax.new_ref(jnp.full(g.inbox, EMPTY_BITS, jnp.int32)) if g.peers > 1 else None,
        **vars(weights),
    }
    inputs = tuple(name for name in INPUTS if values[name] is not None)
    kernel = build(
        g,
        entries=order_M.shape[0],
        eps=eps,
        rule=threshold is not None,
        fill=fill,
        window=window,
        inputs=inputs,
        mesh=mesh,
        axes=axes,
    )
    results = dict(zip(OUTPUTS, kernel(*[values[name] for name in inputs]), strict=True))
    ran_B = planned_B if threshold is None else jnp.minimum(results["ended"][:batch], planned_B)
    states = (results[name].T[:batch].astype(x_BD.dtype) for name in ("stream", "layer_input"))
    cache = (None if values[name] is None else jax.freeze(values[name]) for name in ("k_cache", "v_cache", "summary"))
    return *states, *cache, ran_B


def build(g: Geometry, *, entries: int, **static: Any):
    """Return the kernel for one geometry.

    Args:
        entries: length of the order.
        static: ``eps``; ``rule``, whether rows leave when the cosine of the states before and after a layer exceeds a
            threshold; ``fill``, whether entries after the last one that ran store keys and values of the final states;
            ``window``; ``inputs``, which of ``INPUTS`` the kernel is given, in their order; ``mesh`` and
            ``axes``, whose devices share a layer.
    """
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    dtype, f32 = jnp.bfloat16, jnp.float32
    shape = jax.ShapeDtypeStruct
    outputs = {
        "stream": shape((g.d_model, g.rows), f32),
        "layer_input": shape((g.d_model, g.rows), f32),
        "norm_input": shape((g.rows, g.d_model), dtype),
        "heads": shape((2, g.batch, g.kv_heads, g.head_rows, g.head_dim), dtype),  # queries and new key; new value
        "attended": shape((g.rows, g.kv_heads * g.group, g.head_dim), dtype),
        "hidden": shape((g.rows, g.d_ff), dtype),
        "partial": shape((g.blocks, 2 * g.mlp_features // 64, 64, g.rows), f32),
        # of both halves of the features, by splits: mixed values, and the logarithm of their mass for the same readers
        "split": shape((g.batch * g.kv_heads, 2, 2 * g.split_places, 64, g.head_rows), f32),
        "sums": shape((3, g.padded_tiles, g.rows), f32),
        "scores": shape((g.batch * g.kv_heads, max(1, g.score_chunks * UNIT)), f32),
        "ended": shape((g.rows,), jnp.int32),
    }
    scratch = {
        "ring": plgpu.SMEM((g.stages, 2, UNIT, 64), dtype, transforms=tiled),
        "feed": plgpu.SMEM((g.feeds, g.rows, UNIT), dtype, transforms=tiled),
        "new_k": plgpu.SMEM((2, g.head_rows, 64), dtype, transforms=tiled),
        "new_v": plgpu.SMEM((2, g.head_rows, 64), dtype, transforms=tiled),
        "probs": plgpu.SMEM((UNIT // 64, g.head_rows, 64), dtype, transforms=tiled),
        "staged": plgpu.SMEM((2, g.rows, 64), dtype),
        "staged_o": plgpu.SMEM((2 if g.splits == 1 else 1, g.head_rows, g.shared_features), dtype),
        "flags": plgpu.SMEM((g.rows,), jnp.int32),
        "go": plgpu.SMEM((1,), jnp.int32),
        "ring_full": plgpu.Barrier(num_arrivals=2, num_barriers=g.stages),
        "ring_free": plgpu.Barrier(num_barriers=g.stages),
        "feed_full": plgpu.Barrier(num_barriers=g.feeds),
        "feed_free": plgpu.Barrier(num_barriers=g.feeds),
        "head_full": plgpu.Barrier(num_arrivals=4),
        "head_free": plgpu.Barrier(),
        "decided": plgpu.Barrier(),
        "taken": plgpu.Barrier(num_arrivals=2),
    }
    if g.blocks == 1:
        scratch["phase"] = plgpu.Barrier()
    static = SimpleNamespace(**static)
    if (select := g.select) is not None:
        static.choice = topk_pages.Geometry(
            num_pages=g.score_chunks * UNIT,
            k=select.pages,
            sinks=select.sinks,
            recent=select.recent,
            warpgroup=True,
        )
        scratch |= {
            "pages_full": plgpu.Barrier(num_arrivals=g.page_parts, num_barriers=g.stages),
            "chosen": plgpu.SMEM((select.pages,), jnp.int32),
            "choosing": plgpu.SMEM((static.choice.shared_bytes // 4,), jnp.int32),
        }
        if g.blocks == 1:
            scratch["scored"] = plgpu.Barrier()
    return plgpu.kernel(
        functools.partial(_body, g, static, entries),
        out_type=list(outputs.values()),
        grid=(g.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=4096),
    )


INPUTS = (
    "numbers",  # int32, the parts of _numbers one after the other
    "columns",  # float32 [D + H, rows], the parts of _columns one below the other
    "threshold",  # float32 [1]
    "k_cache",
    "v_cache",  # [L, B, S, K, H], changed in place
    "summary",  # [L, B, P, K, X], changed in place
    "inbox",  # int32 [out or down, sender, tile, half, 64, rows], bits of float32, from the devices that share a layer
    "norm_attn",
    "wqkv",  # [L, D, K(G+2)H]
    "bqkv",  # [L, K(G+2)H]
    "norm_q",
    "norm_k",  # [L, H]
    "wo",  # [L, KGH, D]
    "norm_mlp",
    "w_gate_up",  # [L, 2, D, F]
    "w_down",  # [L, F, D]
)


def _numbers(g: Geometry, entries: int) -> dict[str, int]:
    """Return the sizes of the small arrays of integers that the kernel is given as one."""
    return {
        "position": g.rows,  # slot of the new token, and how many slots hold older ones
        "writes": g.rows,  # 1 where the new token's keys and values are stored
        "planned": g.rows,  # entry of order before which the row stops; 0 for rows that do not exist
        "count": 2,  # entries of order that run at most, and entries that exist
        "order": entries,  # layers, in the order they run
        "asked": entries,  # 1 where the rule is asked before that entry
    }


def _columns(g: Geometry) -> dict[str, int]:
    """Return the heights of the arrays with a column for each row that the kernel is given as one."""
    return {"x": g.d_model, "cos": g.head_dim // 2, "sin": g.head_dim // 2}


def _together(sizes: dict[str, int], parts: dict[str, jax.Array]) -> jax.Array:
    """Return parts of these sizes as one array: XLA makes a kernel of each array it computes, however small."""
    return jnp.concatenate([parts[name] for name in sizes])


def _apart(sizes: dict[str, int], ref) -> dict[str, Any]:
    """Return the parts of what :func:`_together` has made."""
    starts = itertools.accumulate(sizes.values(), initial=0)
    return {name: ref.at[pl.ds(start, size)] for (name, size), start in zip(sizes.items(), starts, strict=False)}


def _body(g: Geometry, static: SimpleNamespace, entries: int, *refs, **scratch):
    r = SimpleNamespace(**dict(zip((*static.inputs, *OUTPUTS), refs, strict=True)), **scratch)
    vars(r).update(_apart(_numbers(g, entries), r.numbers) | _apart(_columns(g), r.columns))
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    if g.peers > 1:
        static = SimpleNamespace(**vars(static), devices=ranks(static.mesh, static.axes))
    grid = Grid(g, r, static, block)
    pl.when(warpgroup == 1)(lambda: stream(g, r, static, grid))
    pl.when(warpgroup == 2)(lambda: feed(g, r, static, grid))
    pl.when(warpgroup == 0)(lambda: Worker(g, r, static, grid, block).run())
