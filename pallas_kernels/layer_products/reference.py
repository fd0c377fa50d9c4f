"""Products of one layer of stacked weights in plain JAX: the definition, and what runs where nothing faster can."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.norms import rms_norm


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def norm_project(x_BD, norm_LD, weights_LDF, layer, *, eps, bias_LF=None):
    """See :func:`pallas_kernels.layer_products.norm_project`."""
    out_BF = _product(rms_norm(x_BD, _take(norm_LD, layer), eps), _take(weights_LDF, layer))
    return out_BF if bias_LF is None else out_BF + _take(bias_LF, layer)[None]


def project_add(x_BF, weights_LFD, residual_BD, layer):
    """See :func:`pallas_kernels.layer_products.project_add`."""
    return residual_BD + _product(x_BF, _take(weights_LFD, layer))


def norm_gate_up(x_BD, norm_LD, weights_LCDF, layer, *, eps):
    """See :func:`pallas_kernels.layer_products.norm_gate_up`."""
    normed_BD = rms_norm(x_BD, _take(norm_LD, layer), eps)
    gate_BF, up_BF = (_product(normed_BD, _take_part(weights_LCDF, layer, part)) for part in (0, 1))
    return jax.nn.silu(gate_BF) * up_BF


def _take(stacked, layer):
    return lax.dynamic_index_in_dim(stacked, layer, 0, keepdims=False)


def _take_part(stacked, layer, part):
    """Return one matrix ``[D, F]`` of a layer's two; where both were taken out first, both would be copied."""
    return lax.dynamic_slice(stacked, (layer, part, 0, 0), (1, 1, *stacked.shape[2:])).reshape(stacked.shape[2:])


def _product(x_BD, weights):
    return jnp.einsum("bd,d...->b...", x_BD, weights, preferred_element_type=jnp.float32).astype(x_BD.dtype)
