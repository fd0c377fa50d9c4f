"""Products of one layer of stacked weights as a Pallas kernel for TPUs that streams ``W[layer]`` in place.

The layer index is prefetched to scalar memory and used where blocks are addressed: a block ``[k, n]`` of ``W[layer]``
goes from the stack in HBM to VMEM, two blocks in flight, and no other copy exists. The grid runs over columns (in
parallel on chips of two cores) and, inside, over the contraction, with a float32 accumulator in VMEM. The rows of x,
few, stay in VMEM; their norm is recomputed for each block of columns, so that columns depend on nothing but x.

The norms and biases of all layers are smaller than one block of weights: eight or sixteen of them are read, the tile
that holds the layer's, and the others masked out.
"""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MAX_ROWS = 64
# One of the two buffers of weights. Larger ones hide the cost of a grid step, smaller ones the wait for the first.
MAX_BLOCK_BYTES = 2 * 2**20
MIN_BLOCK_BYTES = 2**18
FEWEST_BLOCKS = 8
# What all buffers may take; the compiler of a v5e allows a kernel 16 MiB and needs some for itself.
VMEM_BYTES = 12 * 2**20
CHUNK = 1024  # columns of x squared at a time


def refuse(
    *,
    platform: str,
    named: bool,
    dtype: Any,
    rows: int,
    contraction: int,
    columns: int,
    matrices: int,
    flat: bool,
) -> str | None:
    """Return why the kernel cannot serve, or ``None``.

    Asked for by name it serves on a CPU too, where it can be interpreted, or compiled for a described TPU.
    """
    if platform != "tpu" and not (named and platform == "cpu"):
        return f"needs a TPU, got platform {platform!r}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"needs bfloat16 or float32, got {jnp.dtype(dtype).name}"
    if not flat:
        return "needs weights with one produced axis, as a TPU tiles more than one in other ways; flatten them first"
    if not 1 <= rows <= MAX_ROWS:
        return f"needs 1 to {MAX_ROWS} rows, got {rows}"
    if contraction % LANES or columns % LANES or not contraction or not columns:
        return f"needs contracted and produced sizes that are multiples of {LANES}, got {contraction} and {columns}"
    if _blocks(rows, contraction, columns, matrices, jnp.dtype(dtype).itemsize) is None:
        return f"needs more than {VMEM_BYTES} bytes of VMEM for {rows} rows of {contraction} to {columns}"
    return None


def norm_project(x_BD, norm_LD, weights_LDF, layer, *, eps, bias_LF=None):
    """See :func:`pallas_kernels.layer_products.norm_project`."""
    return _call(x_BD, weights_LDF, layer, norm=norm_LD, eps=eps, bias=bias_LF)


def project_add(x_BF, weights_LFD, residual_BD, layer):
    """See :func:`pallas_kernels.layer_products.project_add`."""
    return _call(x_BF, weights_LFD, layer, residual=residual_BD)


def norm_gate_up(x_BD, norm_LD, weights_LCDF, layer, *, eps):
    """See :func:`pallas_kernels.layer_products.norm_gate_up`."""
    return _call(x_BD, weights_LCDF, layer, norm=norm_LD, eps=eps)


def _blocks(rows: int, contraction: int, columns: int, matrices: int, itemsize: int) -> tuple[int, int] | None:
    """Return the sizes ``k, n`` of a block of each matrix, or ``None`` where not even the smallest fits into VMEM.

    The largest within a share of the weights is taken, and among equals the one closest to 512 columns.
    """
    total = contraction * columns * matrices * itemsize
    limit = min(MAX_BLOCK_BYTES, max(MIN_BLOCK_BYTES, total // FEWEST_BLOCKS)) // (matrices * itemsize)
    tile = _sublanes(itemsize)
    rows = pl.cdiv(rows, tile) * tile

    def fits(k, n):
        resident = (rows + tile) * contraction * itemsize  # x and norms
        weights = 3 * matrices * k * n * itemsize  # two buffers, and a block that the compiler rearranges
        wide = 2 * rows * k * 4 + 2 * matrices * rows * n * 4  # x before and after its norm, sums
        narrow = (4 * rows + 2 * tile) * n * itemsize  # two buffers of residual, result and biases
        return resident + weights + wide + narrow <= VMEM_BYTES

    pairs = [(k, n) for k in _divisors(contraction) for n in _divisors(columns) if k * n <= limit and fits(k, n)]
    return max(pairs, key=lambda pair: (pair[0] * pair[1], -abs(pair[1] - 512)), default=None)


def _call(x, weights, layer, *, norm=None, eps=0.0, bias=None, residual=None):
    """Build and run the kernel; ``weights`` is ``[L, D, F]`` or ``[L, 2, D, F]``."""
    rows, contraction = x.shape
    num_layers, columns, matrices = weights.shape[0], weights.shape[-1], weights.ndim - 2
    itemsize = x.dtype.itemsize
    k, n = _blocks(rows, contraction, columns, matrices, itemsize)
    tile = min(_sublanes(itemsize), num_layers)
    per_matrix = columns // n

    inputs = [("x", x, (rows, contraction), lambda j, i, layer: (0, 0))]
    if matrices == 2:
        inputs.append(("first", weights, (None, None, k, n), lambda j, i, layer: (layer[0], 0, i, j)))
        inputs.append(("second", weights, (None, None, k, n), lambda j, i, layer: (layer[0], 1, i, j)))
    else:
        inputs.append(("first", weights, (None, k, n), lambda j, i, layer: (layer[0], i, j)))
    if norm is not None:
        inputs.append(("norm", norm, (tile, contraction), lambda j, i, layer: (lax.div(layer[0], tile), 0)))
    if bias is not None:
        inputs.append(("bias", bias, (tile, n), lambda j, i, layer: (lax.div(layer[0], tile), j)))
    if residual is not None:
        inputs.append(("residual", residual, (rows, n), lambda j, i, layer: (0, j)))
    names, arrays, shapes, index_maps = zip(*inputs, strict=True)

    return pl.pallas_call(
        functools.partial(_kernel, names=names, eps=eps, k=k, matrices=matrices),
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(per_matrix, contraction // k),
            in_specs=[
                # x and norm never change: one buffer is enough.
                pl.BlockSpec(shape, index_map, pipeline_mode=pl.Buffered(1) if name in ("x", "norm") else None)
                for name, shape, index_map in zip(names, shapes, index_maps, strict=True)
            ],
            out_specs=pl.BlockSpec((rows, n), lambda j, i, layer: (0, j)),
            scratch_shapes=[
                pltpu.VMEM((matrices, rows, n), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * contraction * columns * matrices,
            bytes_accessed=contraction * columns * matrices * itemsize + rows * (contraction + columns) * itemsize,
            transcendentals=rows * columns if matrices == 2 else 0,
        ),
        name="layer_product",
    )(layer.reshape(1), *arrays)


def _kernel(layer_ref, *refs, names, eps, k, matrices):
    """Add one block of the contraction to the accumulator ``[matrices, B, n]``; finish the columns with the last."""
    *inputs, out_ref, total_ref, scale_ref = refs
    r = SimpleNamespace(**dict(zip(names, inputs, strict=True)))
    step = pl.program_id(1)
    normed = "norm" in names

    @pl.when(step == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)
        if normed:
            scale_ref[...] = jnp.broadcast_to(_inverse_rms(r.x, eps), scale_ref.shape)

    at = pl.ds(pl.multiple_of(step * k, LANES), k)
    x = r.x[:, at]
    if normed:
        scale = _row(r.norm[:, at], layer_ref[0])
        x = (x.astype(jnp.float32) * scale_ref[:, :1] * scale).astype(x.dtype)
    weights = [r.first[...], r.second[...]] if matrices == 2 else [r.first[...]]
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    for i, matrix in enumerate(weights):
        total_ref[i] += jnp.dot(x, matrix, precision=precision, preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        # Rounded where a decoder layer rounds, wide in between: not every TPU computes in bfloat16.
        rounded = [total_ref[i].astype(out_ref.dtype).astype(jnp.float32) for i in range(matrices)]
        out = rounded[0] if matrices == 1 else jax.nn.silu(rounded[0]) * rounded[1]
        if "bias" in names:
            out = out + _row(r.bias[...], layer_ref[0])
        if "residual" in names:
            out = out + r.residual[...].astype(jnp.float32)
        out_ref[...] = out.astype(out_ref.dtype)


def _inverse_rms(x_ref, eps):
    """Return ``1 / sqrt(mean(x²) + eps)`` of every row, ``[B, 1]`` in float32, a chunk of columns at a time."""
    size = x_ref.shape[1]
    chunks = [x_ref[:, start : min(start + CHUNK, size)].astype(jnp.float32) for start in range(0, size, CHUNK)]
    return lax.rsqrt(sum(jnp.sum(jnp.square(chunk), axis=1, keepdims=True) for chunk in chunks) / size + eps)


def _row(block, layer):
    """Return the layer's row of the tile that holds it, ``[1, n]`` in float32; the other rows may hold anything."""
    mine = lax.broadcasted_iota(jnp.int32, block.shape, 0) == lax.rem(layer, block.shape[0])
    return jnp.sum(jnp.where(mine, block.astype(jnp.float32), 0.0), axis=0, keepdims=True)


def _sublanes(itemsize):
    """Return how many rows of a dtype fill a tile."""
    return 32 // itemsize


def _divisors(size):
    """Return the multiples of a tile's width that divide ``size``."""
    return [width for width in range(LANES, size + 1, LANES) if size % width == 0]
