"""Dense products of one decoder layer, chosen by a traced index among stacked weights and read in place.

For decoding, where every sequence has one token: the weights are many times larger than the activations and each is
used once, so that the time is the time to read ``W[layer]``, and a copy of it would double or treble that. Conventions:
activations ``[B, D]``, weights ``[L, D, F]`` (L layers, D contracted). Arithmetic is that of a decoder layer: norms are
computed in float32 and rounded to the dtype of x, products are accumulated in float32 and rounded to the dtype of x,
and a bias or residual is added in that dtype. A layer index outside ``[0, L)`` is clamped into it.

Layouts on a TPU: several produced axes, such as ``[K, G+2, H]``, are tiled in ways that depend on their sizes, and are
copied before use. The kernel refuses them; flatten such weights once, when layers are stacked, and put gate and up
before the contracted axis, where each can also be split among devices. XLA alone reads flat stacks in place on some
TPUs (v5e, v5p, v6e, not tpu7x).
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, choose, explain, platform
from pallas_kernels.layer_products import mosaic_tpu, reference

NORM_PROJECT = (
    Implementation(name="mosaic_tpu", refuse=mosaic_tpu.refuse, run=mosaic_tpu.norm_project),
    Implementation(name="xla", refuse=reference.refuse, run=reference.norm_project),
)
PROJECT_ADD = (
    Implementation(name="mosaic_tpu", refuse=mosaic_tpu.refuse, run=mosaic_tpu.project_add),
    Implementation(name="xla", refuse=reference.refuse, run=reference.project_add),
)
NORM_GATE_UP = (
    Implementation(name="mosaic_tpu", refuse=mosaic_tpu.refuse, run=mosaic_tpu.norm_gate_up),
    Implementation(name="xla", refuse=reference.refuse, run=reference.norm_gate_up),
)


def norm_project(
    x_BD: jax.Array,
    norm_LD: jax.Array,
    weights_LDF: jax.Array,
    layer: jax.Array | int,
    *,
    eps: float,
    bias_LF: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply the RMS norm of x by the weights of one layer, and add its bias: queries, keys and values.

    Cost: reads ``W[layer]`` once, 2·B·D·F FLOPs. Exact.

    Args:
        norm_LD: scales of the norm.
        weights_LDF: ``[L, D, F]``; any number of axes may stand for F, one for ``"mosaic_tpu"``.
        layer: index of the layer, a traced or concrete integer; clamped into ``[0, L)``.
        eps: added to the mean square.
        bias_LF: ``[L, F]`` with the axes of the weights, or ``None``.
        implementation: ``"mosaic_tpu"`` or ``"xla"``; ``None`` takes the fastest that can serve. The kernel of that
            name can also be compiled for a TPU, or interpreted (``pltpu.force_tpu_interpret_mode``), without one.

    Returns:
        ``[B, F]`` with the axes of the weights, in x's dtype.

    Raises:
        ValueError: if shapes or dtypes do not match, or ``layer`` is not one integer.
        NotImplementedError: if the requested implementation cannot serve.
    """
    index = _index(layer, weights_LDF)
    _check_weights(x_BD, weights_LDF, weights_LDF.ndim >= 3, "[L, D, F], F of one axis or more")
    _check_shape("norm [L, D]", norm_LD, weights_LDF.shape[:2])
    _check_shape("bias [L, F]", bias_LF, (weights_LDF.shape[0], *weights_LDF.shape[2:]))
    _check_dtypes(x=x_BD, norm=norm_LD, weights=weights_LDF, bias=bias_LF)
    facts = _facts(x_BD, math.prod(weights_LDF.shape[2:]), implementation, flat=weights_LDF.ndim == 3)
    chosen = choose("norm_project", NORM_PROJECT, implementation, **facts)
    return chosen.run(x_BD, norm_LD, weights_LDF, index, eps=eps, bias_LF=bias_LF)


def project_add(
    x_BF: jax.Array,
    weights_LFD: jax.Array,
    residual_BD: jax.Array,
    layer: jax.Array | int,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply x by the weights of one layer and add the result to the residual: output and down projection.

    Cost: reads ``W[layer]`` once, 2·B·F·D FLOPs. Exact.

    Args:
        weights_LFD: ``[L, F, D]``. Heads ``[L, N, H, D]`` may be reshaped to it; if H fills tiles, nothing moves.
        layer: index of the layer, a traced or concrete integer; clamped into ``[0, L)``.
        implementation: as for :func:`norm_project`.

    Returns:
        ``[B, D]`` in x's dtype.

    Raises:
        ValueError: if shapes or dtypes do not match, or ``layer`` is not one integer.
        NotImplementedError: if the requested implementation cannot serve.
    """
    index = _index(layer, weights_LFD)
    _check_weights(x_BF, weights_LFD, weights_LFD.ndim == 3, "[L, F, D]")
    _check_shape("residual [B, D]", residual_BD, (x_BF.shape[0], weights_LFD.shape[2]))
    _check_dtypes(x=x_BF, weights=weights_LFD, residual=residual_BD)
    facts = _facts(x_BF, weights_LFD.shape[2], implementation)
    chosen = choose("project_add", PROJECT_ADD, implementation, **facts)
    return chosen.run(x_BF, weights_LFD, residual_BD, index)


def norm_gate_up(
    x_BD: jax.Array,
    norm_LD: jax.Array,
    weights_LCDF: jax.Array,
    layer: jax.Array | int,
    *,
    eps: float,
    implementation: str | None = None,
) -> jax.Array:
    """Return ``silu(gate) * up``, the hidden state of a gated MLP, from the RMS norm of x.

    Cost: reads ``W[layer]`` once, 4·B·D·F FLOPs. Exact.

    Args:
        norm_LD: scales of the norm.
        weights_LCDF: ``[L, 2, D, F]``, gate before up.
        layer: index of the layer, a traced or concrete integer; clamped into ``[0, L)``.
        eps: added to the mean square.
        implementation: as for :func:`norm_project`.

    Returns:
        ``[B, F]`` in x's dtype.

    Raises:
        ValueError: if shapes or dtypes do not match, or ``layer`` is not one integer.
        NotImplementedError: if the requested implementation cannot serve.
    """
    index = _index(layer, weights_LCDF)
    shape = weights_LCDF.shape
    _check_weights(x_BD, weights_LCDF, len(shape) == 4 and shape[1] == 2, "[L, 2, D, F]", contracted=2)
    _check_shape("norm [L, D]", norm_LD, (shape[0], shape[2]))
    _check_dtypes(x=x_BD, norm=norm_LD, weights=weights_LCDF)
    facts = _facts(x_BD, shape[3], implementation, matrices=2)
    chosen = choose("norm_gate_up", NORM_GATE_UP, implementation, **facts)
    return chosen.run(x_BD, norm_LD, weights_LCDF, index, eps=eps)


def explain_layer_products(
    *, rows: int, d_model: int, d_ff: int, dtype: str
) -> dict[str, list[tuple[str, str | None]]]:
    """Say for a layer's products which implementation could serve here, and why the others could not.

    Queries, keys and values depend on the heads; ``norm_project`` is explained for D outputs.
    """
    common = {"platform": platform(), "named": False, "dtype": jnp.dtype(dtype), "rows": rows, "flat": True}
    return {
        "norm_project": explain(NORM_PROJECT, **common, contraction=d_model, columns=d_model, matrices=1),
        "norm_gate_up": explain(NORM_GATE_UP, **common, contraction=d_model, columns=d_ff, matrices=2),
        "project_add": explain(PROJECT_ADD, **common, contraction=d_ff, columns=d_model, matrices=1),
    }


def _facts(x_BD, columns, implementation, *, matrices=1, flat=True) -> dict:
    return {
        "platform": platform(),
        "named": implementation is not None,
        "dtype": x_BD.dtype,
        "rows": x_BD.shape[0],
        "contraction": x_BD.shape[1],
        "columns": columns,
        "matrices": matrices,
        "flat": flat,
    }


def _index(layer: jax.Array | int, weights: jax.Array) -> jax.Array:
    """Return ``layer`` as an int32 inside ``[0, L)``."""
    if jnp.shape(layer) != () or not jnp.issubdtype(jnp.result_type(layer), jnp.integer):
        raise ValueError(
            f"expected layer to be one integer, got shape {jnp.shape(layer)} of {jnp.result_type(layer)}; "
            "call once for each layer"
        )
    if weights.ndim == 0 or weights.shape[0] == 0:
        raise ValueError(f"expected weights of at least one layer, got {weights.shape}; stack them")
    index = jnp.asarray(layer)
    return jnp.clip(index, 0, min(weights.shape[0] - 1, jnp.iinfo(index.dtype).max)).astype(jnp.int32)


def _check_weights(x: jax.Array, weights: jax.Array, fits: bool, shape: str, contracted: int = 1) -> None:
    if x.ndim != 2 or not fits or x.shape[1] != weights.shape[contracted]:
        raise ValueError(
            f"expected x [B, D], one token of each sequence, and weights {shape}, with one contracted size, "
            f"got x {x.shape} and weights {weights.shape}; reshape them"
        )


def _check_shape(name: str, array: jax.Array | None, shape: tuple[int, ...]) -> None:
    if array is not None and array.shape != shape:
        raise ValueError(f"expected {name} of shape {shape}, got {array.shape}; reshape or stack it to that shape")


def _check_dtypes(**arrays: jax.Array | None) -> None:
    dtypes = {name: array.dtype for name, array in arrays.items() if array is not None}
    if len(set(dtypes.values())) > 1 or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes.values()):
        found = ", ".join(f"{name} {dtype.name}" for name, dtype in dtypes.items())
        raise ValueError(f"expected one floating-point dtype everywhere, got {found}; cast them to that of the weights")
