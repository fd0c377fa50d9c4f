"""The readout as a Pallas TPU kernel that streams blocks of the vocabulary matrix through VMEM.

The states stay in VMEM; each step of the grid multiplies them by one block of tokens and folds the logits into five
running columns. The vocabulary is split in two halves that a chip with two cores works on side by side; what both found
is merged in plain JAX.
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
from pallas_kernels.readout.reference import Readout, merge, refuse_rows

BLOCK_BYTES = 4 * 2**20  # of weights; two blocks are in VMEM at a time, of 16 MiB that a kernel gets by default
LANES = 128
HALVES = 2


def refuse(
    *, rows: int, d_model: int, num_tokens: int, dtype: Any, weights_dtype: Any, transposed: bool, **_: Any
) -> str | None:
    """Return why the kernel cannot serve on a TPU, or ``None``."""
    if reason := refuse_rows(rows):
        return reason
    if reason := refuse_dtypes({"states": dtype, "weights": weights_dtype}, ("bfloat16", "float32")):
        return reason
    most = BLOCK_BYTES // (LANES * jnp.dtype(dtype).itemsize)
    if d_model % LANES or d_model > most:
        return f"needs d_model to be a multiple of {LANES} up to {most}, got {d_model}"
    if num_tokens < LANES:
        return f"needs at least {LANES} tokens, got {num_tokens}"
    if transposed and num_tokens % LANES:
        # XLA stores such a matrix the other way round and would copy it for every call.
        return f"needs a multiple of {LANES} tokens when they are the last axis, got {num_tokens}"
    return None


def exit_readout(
    h_BD: jax.Array, weights: jax.Array, *, transposed: bool, block: int | None = None, interpret: Any = False
) -> Readout:
    """See :func:`pallas_kernels.readout.exit_readout`; the states are normed already.

    Args:
        block: tokens of a step, a multiple of 128; ``None`` for what fits.
        interpret: ``pltpu.InterpretParams(...)`` to run without a TPU.
    """
    batch, d_model = h_BD.shape
    num_tokens = weights.shape[1 if transposed else 0]
    if block is None:
        block = BLOCK_BYTES // (d_model * h_BD.dtype.itemsize) // LANES * LANES
        block = min(block, 1024, num_tokens // LANES * LANES)
    num_blocks = pl.cdiv(num_tokens, block)
    steps = pl.cdiv(num_blocks, HALVES)
    tile = 8 * 4 // h_BD.dtype.itemsize
    rows = -(-batch // tile) * tile
    h_RD = jnp.pad(h_BD, ((0, rows - batch), (0, 0)))

    def block_of(half, step):
        # Past the last block the index stays, so that nothing is read again; its tokens are left out by their numbers.
        index = jnp.minimum(half * steps + step, num_blocks - 1)
        return (0, index) if transposed else (index, 0)

    column = jax.ShapeDtypeStruct((HALVES, rows, 1), jnp.float32)
    *numbers_CR1, token_CR1 = pl.pallas_call(
        functools.partial(_kernel, num_tokens=num_tokens, block=block, transposed=transposed),
        grid=(HALVES, steps),
        in_specs=[
            pl.BlockSpec((rows, d_model), lambda half, step: (0, 0)),
            pl.BlockSpec((d_model, block) if transposed else (block, d_model), block_of),
        ],
        out_specs=[pl.BlockSpec((1, rows, 1), lambda half, step: (half, 0, 0))] * 5,
        out_shape=[column] * 4 + [jax.ShapeDtypeStruct(column.shape, jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(h_RD, weights)
    top_CB, second_CB, total_CB, moment_CB = (found[:, :batch, 0] for found in numbers_CR1)
    return merge(top_CB, second_CB, token_CR1[:, :batch, 0], total_CB, moment_CB, num_tokens)


def _kernel(h_ref, weights_ref, *found, num_tokens, block, transposed):
    half, step = pl.program_id(0), pl.program_id(1)
    *numbers, token_ref = found
    top_ref, second_ref, total_ref, moment_ref = numbers

    @pl.when(step == 0)
    def _begin():
        for ref, value in zip(numbers, (-math.inf, -math.inf, 0.0, 0.0), strict=True):
            ref[...] = jnp.full(ref.shape, value, ref.dtype)
        token_ref[...] = jnp.zeros(token_ref.shape, jnp.int32)

    precise = lax.Precision.HIGHEST if h_ref.dtype == jnp.float32 else lax.Precision.DEFAULT
    contract = (((1,), (0 if transposed else 1,)), ((), ()))
    z_RV = lax.dot_general(
        h_ref[...], weights_ref[...], contract, precision=precise, preferred_element_type=jnp.float32
    )
    first = (half * pl.num_programs(1) + step) * block
    token_RV = first + lax.broadcasted_iota(jnp.int32, z_RV.shape, 1)
    z_RV = jnp.where(token_RV < num_tokens, z_RV, -math.inf)

    top, second, total, moment = (ref[0] for ref in numbers)
    block_top = jnp.max(z_RV, axis=1, keepdims=True)
    hits_RV = jnp.where(z_RV == block_top, token_RV, jnp.iinfo(jnp.int32).max)
    block_token = jnp.min(hits_RV, axis=1, keepdims=True)
    block_second = jnp.max(jnp.where(token_RV == block_token, -math.inf, z_RV), axis=1, keepdims=True)

    new_top = jnp.maximum(top, block_top)
    peak = jnp.where(new_top == -math.inf, 0.0, new_top)
    below_RV = z_RV - peak
    weight_RV = jnp.exp(below_RV)
    # An impossible token has weight 0 and distance -inf, whose product would be NaN.
    moment_RV = jnp.where(z_RV == -math.inf, 0.0, weight_RV * below_RV)
    sunk = jnp.where(top == -math.inf, 0.0, top - peak)
    scale = jnp.exp(sunk)
    higher = block_top > top
    top_ref[0] = new_top
    second_ref[0] = jnp.where(higher, jnp.maximum(top, block_second), jnp.maximum(second, block_top))
    total_ref[0] = scale * total + jnp.sum(weight_RV, axis=1, keepdims=True)
    moment_ref[0] = scale * (moment + total * sunk) + jnp.sum(moment_RV, axis=1, keepdims=True)
    token_ref[0] = jnp.where(higher, block_token, token_ref[0])
