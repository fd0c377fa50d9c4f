"""Run decoder layers on one new token of each sequence, with weights and cache read in place from stacked arrays.

Which layers run is decided by arrays, not by the program: the order of the layers, how many of them each sequence runs,
and a rule that ends a sequence early. One program serves every depth. Layers are those of the Llama family: RMS norm,
grouped-query attention with rotary positions (biases and norms of queries and keys optional), gated MLP.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.decoder_stack import loop, mosaic_gpu
from pallas_kernels.decoder_stack.geometry import MAX_ROWS, Selection
from pallas_kernels.dispatch import Implementation, choose, explain, platform
from pallas_kernels.partition import device_numbers, parts, per_device

WEIGHTS = {"norm_attn": "D", "wqkv": "DK", "bqkv": "K", "norm_q": "H", "norm_k": "H", "wo": "KD", "norm_mlp": "D"}
WEIGHTS |= {"w_gate_up": "CDK", "w_down": "KD"}  # on a mesh the MLP is split as heads (K) are
_on_each = per_device("BD BD LBSKH LBSKH select:LBPKX B", weights=WEIGHTS)
DECODE = (
    Implementation(name="mosaic_gpu", refuse=mosaic_gpu.refuse, run=_on_each(mosaic_gpu.decode_layers), splits=True),
    Implementation(name="loop_per_device", refuse=loop.refuse_per_device, run=_on_each(loop.decode_layers)),
    Implementation(name="loop", refuse=loop.refuse, run=loop.decode_layers),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """Weights of all layers, each array with a leading layer axis, in the order they are contracted.

    Attributes:
        norm_attn, norm_mlp: ``[L, D]``.
        wqkv: ``[L, D, K*(G+2)*H]``: of each key/value head its G queries, its key and its value, H features each.
            One axis, as several would be padded on a TPU.
        wo: ``[L, K*G*H, D]``.
        w_gate_up: ``[L, 2, D, F]``, the gate first.
        w_down: ``[L, F, D]``.
        bqkv: ``[L, K*(G+2)*H]`` or ``None``.
        norm_q, norm_k: ``[L, H]``, norms of each head before rotation, or ``None``.
    """

    norm_attn: jax.Array
    wqkv: jax.Array
    wo: jax.Array
    norm_mlp: jax.Array
    w_gate_up: jax.Array
    w_down: jax.Array
    bqkv: jax.Array | None = None
    norm_q: jax.Array | None = None
    norm_k: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """What a decode step leaves behind.

    Attributes:
        x_BD: states after the last layer that each sequence ran.
        before_BD: states that entered the last layer that any sequence (of one device, on a mesh) ran.
        k_LBSKH, v_LBSKH: the cache, with the new tokens.
        summary_LBPKX: with a selection, the summaries of its pages: right for pages whose last slot holds a token,
            unspecified for the others, which nothing reads.
        ran_B: entries of the order that each sequence ran.
    """

    x_BD: jax.Array
    before_BD: jax.Array
    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    summary_LBPKX: jax.Array | None = None
    ran_B: jax.Array


def decode_layers(
    x_BD: jax.Array,
    weights: DecoderWeights,
    k_LBSKH: jax.Array,
    v_LBSKH: jax.Array,
    positions_B: jax.Array,
    *,
    order_M: jax.Array,
    length: jax.Array | None = None,
    planned_B: jax.Array,
    live_B: jax.Array,
    frequencies: jax.Array,
    eps: float,
    threshold: jax.Array | None = None,
    asked_M: jax.Array | None = None,
    fill: bool = True,
    window: int | None = None,
    summary_LBPKX: jax.Array | None = None,
    select: Selection | None = None,
    implementation: str | None = None,
) -> Decoded:
    """Run the layers ``order_M`` on one token of each sequence, until every sequence has ended.

    A sequence ends before entry ``planned_B`` or, with a threshold, where the cosine of the states before and after
    the layer that ran last exceeds it; it keeps its state from then on. Keys and values of entries that others still
    run are projected from that state (CALM's propagation), and with ``fill`` also those of the entries that nobody
    runs. Reads every weight and every live cache slot of the entries that run once. Exact when no sequence ends early.

    With a selection, a layer reads of the cache the pages of the highest scores, and the new token's up to it: those
    before it are scored by :func:`pallas_kernels.page_scores`, with the largest score of the queries that share a
    key/value head, and chosen by :func:`pallas_kernels.topk_pages`. Summaries are kept in every layer whose keys are
    stored, those that read everything included, and made from the keys of the whole page: that of a page is right once
    its last slot is written, and not read before.

    On a mesh (:mod:`pallas_kernels.partition`) each device runs the layers with its heads and its part of the MLP, and
    those that share a layer add up what its two projections to the states give, twice a layer. Where the mesh splits
    the batch, a device does not know what others run, and stores what ``fill`` does in any case.

    Args:
        positions_B: position of each token, the slot its keys and values go to; slots below it are read. Of a full
            cache (position S) all slots are read, and the token itself is not.
        order_M: layers in the order they run, each in [0, L); others are clamped.
        length: entries of the order that exist, the rest is padding; ``None`` for all.
        planned_B: entries that each sequence runs at most.
        live_B: sequences that exist; the others run nothing and store nothing.
        frequencies: rotary frequencies ``[H/2]`` in radians per position.
        threshold: cosine above which a sequence ends; ``None`` asks nothing. NaN states never end.
        asked_M: bool, entries before which the rule is asked; ``None`` for all but the first.
        fill: store keys and values of the entries that nobody runs.
        window: attend to the last ``window`` positions only (the token's own included).
        summary_LBPKX: of the pages of the cache, in its dtype, see :func:`pallas_kernels.summarize_pages`; P may be
            more than there are pages. What is selected from; ``None`` without a selection.
        select: which pages are read; ``None`` for all. Not with a window that is shorter than the cache.
        implementation: ``"mosaic_gpu"``, ``"loop_per_device"`` (on a mesh) or ``"loop"``; ``None`` takes the fastest
            that can serve.

    Raises:
        ValueError: if shapes or dtypes do not fit together.
        NotImplementedError: if the requested implementation cannot serve.
    """
    _check(x_BD, weights, k_LBSKH, v_LBSKH, order_M, window)
    _check_selection(k_LBSKH, summary_LBPKX, select, window)
    for name, array, like in (
        ("positions [B]", positions_B, x_BD[:, 0]),
        ("planned [B]", planned_B, x_BD[:, 0]),
        ("live [B]", live_B, x_BD[:, 0]),
        ("asked [M]", asked_M, order_M),
        ("frequencies [H/2]", frequencies, k_LBSKH[0, 0, 0, 0, ::2]),
    ):
        if array is not None and array.shape != like.shape:
            raise ValueError(f"expected {name} of shape {like.shape}, got {array.shape}")
    if asked_M is None:
        asked_M = jnp.ones(order_M.shape, bool)
    order_M = jnp.clip(order_M, 0, k_LBSKH.shape[0] - 1).astype(jnp.int32)
    length = jnp.int32(order_M.shape[0]) if length is None else jnp.clip(length, 0, order_M.shape[0]).astype(jnp.int32)
    planned_B = jnp.where(live_B, jnp.clip(planned_B, 0, length), 0).astype(jnp.int32)
    if window is not None and window >= k_LBSKH.shape[2]:
        window = None
    fill = fill or parts()["batch"] > 1
    chosen = choose("decode_layers", DECODE, implementation, **_facts(x_BD, weights, k_LBSKH, summary_LBPKX, select))
    x_BD, before_BD, k_LBSKH, v_LBSKH, summary_LBPKX, ran_B = chosen.run(
        x_BD,
        weights,
        k_LBSKH,
        v_LBSKH,
        positions_B,
        order_M=order_M,
        length=length,
        planned_B=planned_B,
        live_B=live_B,
        frequencies=frequencies,
        eps=eps,
        threshold=threshold,
        asked_M=asked_M,
        fill=fill,
        window=window,
        summary_LBPKX=summary_LBPKX,
        select=select,
    )
    cache = {"k_LBSKH": k_LBSKH, "v_LBSKH": v_LBSKH, "summary_LBPKX": summary_LBPKX}
    return Decoded(x_BD=x_BD, before_BD=before_BD, **cache, ran_B=ran_B)


def explain_decode(
    *, d_model: int, d_ff: int, kv_heads: int, group: int, head_dim: int, batch: int, capacity: int, dtype: str
) -> list[tuple[str, str | None]]:
    """Say which implementation could serve :func:`decode_layers` here, and why the others could not."""
    shape = jax.ShapeDtypeStruct
    dtype = jnp.dtype(dtype)
    weights = DecoderWeights(
        norm_attn=shape((1, d_model), dtype),
        wqkv=shape((1, d_model, kv_heads * (group + 2) * head_dim), dtype),
        wo=shape((1, kv_heads * group * head_dim, d_model), dtype),
        norm_mlp=shape((1, d_model), dtype),
        w_gate_up=shape((1, 2, d_model, d_ff), dtype),
        w_down=shape((1, d_ff, d_model), dtype),
    )
    cache = shape((1, batch, capacity, kv_heads, head_dim), dtype)
    return explain(DECODE, **_facts(shape((batch, d_model), dtype), weights, cache))


def _facts(x_BD, weights, k_LBSKH, summary_LBPKX=None, select=None) -> dict:
    layers, batch, capacity, kv_heads, head_dim = k_LBSKH.shape
    return {
        "platform": platform(),
        "dtypes": {jnp.dtype(leaf.dtype) for leaf in (x_BD, k_LBSKH, *jax.tree.leaves(weights))},
        "parts": parts(),
        "devices": device_numbers(),
        "select": select,
        "num_pages": None if summary_LBPKX is None else summary_LBPKX.shape[2],
        "sizes": {
            "layers": layers,
            "d_model": x_BD.shape[1],
            "d_ff": weights.w_down.shape[1],
            "kv_heads": kv_heads,
            "group": weights.wo.shape[1] // (kv_heads * head_dim),
            "head_dim": head_dim,
            "batch": batch,
            "capacity": capacity,
        },
    }


def _check(x_BD, weights, k_LBSKH, v_LBSKH, order_M, window) -> None:
    if window is not None and window < 1:
        raise ValueError(f"expected a window of at least 1 token, got {window}; use None for full attention")
    if x_BD.ndim != 2 or not 1 <= x_BD.shape[0] <= MAX_ROWS:
        raise ValueError(f"expected states [B, D] of 1 to {MAX_ROWS} sequences, got {x_BD.shape}; split the batch")
    if k_LBSKH.ndim != 5 or k_LBSKH.shape != v_LBSKH.shape or k_LBSKH.shape[1] != x_BD.shape[0]:
        raise ValueError(
            f"expected a cache of k, v [L, B, S, K, H] with B={x_BD.shape[0]}, got {k_LBSKH.shape}, {v_LBSKH.shape}"
        )
    if order_M.ndim != 1 or not order_M.shape[0]:
        raise ValueError(f"expected an order [M] of at least one layer, got shape {order_M.shape}")
    layers, _, _, kv_heads, head_dim = k_LBSKH.shape
    d_model, d_ff = x_BD.shape[1], weights.w_down.shape[1]
    queries, keys = max(1, weights.wo.shape[1] // (kv_heads * head_dim)) * kv_heads * head_dim, kv_heads * head_dim
    expected = {
        "norm_attn": (layers, d_model),
        "wqkv": (layers, d_model, queries + 2 * keys),
        "wo": (layers, queries, d_model),
        "norm_mlp": (layers, d_model),
        "w_gate_up": (layers, 2, d_model, d_ff),
        "w_down": (layers, d_ff, d_model),
        "bqkv": (layers, queries + 2 * keys),
        "norm_q": (layers, head_dim),
        "norm_k": (layers, head_dim),
    }
    for name, shape in expected.items():
        leaf = getattr(weights, name)
        if leaf is not None and leaf.shape != shape:
            raise ValueError(f"expected {name} of shape {shape} for this cache and these states, got {leaf.shape}")
    if (weights.norm_q is None) != (weights.norm_k is None):
        raise ValueError("expected norm_q and norm_k together; give both or neither")


def _check_selection(k_LBSKH, summary_LBPKX, select, window) -> None:
    if (summary_LBPKX is None) != (select is None):
        given = "a selection alone" if summary_LBPKX is None else "summaries alone"
        raise ValueError(f"expected summaries and a selection together, got {given}; give both or neither")
    if select is None:
        return
    layers, batch, capacity, kv_heads, head_dim = k_LBSKH.shape
    if window is not None and window < capacity:
        raise ValueError(f"expected no window with a selection, got a window of {window} tokens; use one of them")
    width = {"mean": head_dim, "bounds": 2 * head_dim}.get(select.kind)
    if width is None:
        raise ValueError(f"expected kind 'mean' or 'bounds', got {select.kind!r}")
    if select.page_size < 1:
        raise ValueError(f"expected pages of at least 1 slot, got page_size={select.page_size}")
    if select.sinks < 0 or select.recent < 1 or select.dense_layers < 0:
        raise ValueError(
            "expected sinks and dense_layers of at least 0 and recent of at least 1, the page of the new token, got "
            f"{select.sinks}, {select.dense_layers} and {select.recent}"
        )
    if select.sinks + select.recent > select.pages:
        raise ValueError(
            f"expected sinks + recent of at most {select.pages} pages, got {select.sinks} + {select.recent}; raise "
            "pages"
        )
    pages = -(-capacity // select.page_size)
    shape = summary_LBPKX.shape
    if len(shape) != 5 or shape[2] < pages or shape != (layers, batch, shape[2], kv_heads, width):
        raise ValueError(
            f"expected summaries [L, B, P, K, X] of shape {(layers, batch, pages, kv_heads, width)} or of more pages, "
            f"got {shape}; make them with summarize_pages"
        )
    if summary_LBPKX.dtype != k_LBSKH.dtype:
        raise ValueError(
            f"expected summaries of the cache's dtype {k_LBSKH.dtype}, got {summary_LBPKX.dtype}; cast them"
        )
