"""Layouts, constants and small helpers that the warpgroups of the decoder stack's kernel share."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decoder_stack.geometry import UNIT
from pallas_kernels.exchange import TILE

DTYPE, F32 = jnp.bfloat16, jnp.float32
ROWS = TILE.reduce(0)  # [rows]
FEATURES = TILE.reduce(1)  # [64]
# [32 features, rows]
PART = plgpu.Layout.TILED(Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
INPUT, MIDDLE, DOT = range(3)  # per-tile sums: squares entering a layer and its MLP; products with the input


def divide(number, divisor):
    """Return quotient and remainder of a traced non-negative number."""
    return lax.div(number, jnp.int32(divisor)), lax.rem(number, jnp.int32(divisor))


def fill_units(g, r, ran):
    """Return the units of the keys and values of the layers that did not run."""
    return (r.count[1] - ran) * (2 * g.kv_heads * (g.d_model // UNIT))


def fill_tile(g, tile):
    """Return the entry behind those that ran, the key/value head, and 0 for its keys or 1 for its values."""
    entry, rest = divide(tile, 2 * g.kv_heads)
    return entry, *divide(rest, 2)


def load(ref, index=(), layout=TILE):
    """Load from global memory in an accumulator's layout."""
    return plgpu.load(ref.at[index] if index else ref, layout=layout, optimized=False)


def over_features(vector, rows):
    """Return a vector of 64 features as a tile, the same in each of its rows."""
    return lax.broadcast_in_dim(vector.astype(F32), (64, rows), [0])


def keep_if(flag, tile, otherwise):
    """Return a tile if a scalar is true, else ``otherwise`` throughout, whatever the tile holds."""
    return jnp.where(plgpu.layout_cast(jnp.full(tile.shape, flag.astype(F32)), TILE) > 0, tile, otherwise)
