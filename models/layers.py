"""The parts of the transformer: rotary positions, RMS norm and the decoder layer.

Weights are stored in the order they are contracted and keep their axes: ``wqkv [D, K, G+2, H]`` holds, for every
key/value head, its G query heads, its key and its value, so that one product makes all three and the K axis can be
sharded; ``w_gate_up [D, 2, F]`` holds gate and up. Norms and rotations are computed in float32; activations keep the
dtype of the weights. A layer never sees a cache or a policy: it calls the ``attend`` function it is handed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dyninf.models.config import ModelConfig, RopeScaling
from pallas_kernels.add_devices import add_product
from pallas_kernels.few_rows import norm_einsum_rows
from pallas_kernels.norms import rms_norm

INIT_STD = 0.02


class DecoderLayer(nnx.Module):
    """One pre-norm block: grouped-query attention with rotary positions, then a gated MLP.

    Args:
        config: sizes and switches.
        layer: index of the layer; decides its attention window.
        key: random key of the initial weights.
        dtype: dtype of the weights.
    """

    def __init__(self, config: ModelConfig, layer: int, key: jax.Array, dtype: Any = jnp.float32):
        d, f, n, k, h = config.d_model, config.d_ff, config.num_heads, config.num_kv_heads, config.head_dim
        keys = jax.random.split(key, 4)
        out_std = INIT_STD / (2 * config.num_layers) ** 0.5
        self.norm_attn = nnx.Param(jnp.ones(d, dtype))
        self.wqkv = _normal(keys[0], (d, k, config.group_size + 2, h), INIT_STD, dtype)
        self.bqkv = nnx.Param(jnp.zeros((k, config.group_size + 2, h), dtype)) if config.qkv_bias else None
        self.norm_q = nnx.Param(jnp.ones(h, dtype)) if config.qk_norm else None
        self.norm_k = nnx.Param(jnp.ones(h, dtype)) if config.qk_norm else None
        self.wo = _normal(keys[1], (n, h, d), out_std, dtype)
        self.norm_mlp = nnx.Param(jnp.ones(d, dtype))
        self.w_gate_up = _normal(keys[2], (d, 2, f), INIT_STD, dtype)
        self.w_down = _normal(keys[3], (f, d), out_std, dtype)
        self.eps = config.norm_eps
        self.rope_theta = config.rope_theta
        self.rope_scaling = config.rope_scaling
        self.window = config.window(layer)

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, attend: Callable) -> tuple[jax.Array, Any]:
        """Return the layer's output ``[B, T, D]`` and whatever ``attend`` carries along (the updated cache)."""
        weights, bias = self.wqkv[...], None if self.bqkv is None else self.bqkv[...]
        qkv_BTKMH = self._project(x_BTD, weights, bias)
        q_BTKGH, k_BTKH, v_BTKH = qkv_BTKMH[..., :-2, :], qkv_BTKMH[..., -2, :], qkv_BTKMH[..., -1, :]
        batch, length, num_kv, group, dim = q_BTKGH.shape
        q_BTNH = self._rotate(q_BTKGH.reshape(batch, length, num_kv * group, dim), positions_BT, self.norm_q)
        k_BTKH = self._rotate(k_BTKH, positions_BT, self.norm_k)
        o_BTNH, carry = attend(q_BTNH, k_BTKH, v_BTKH, window=self.window)
        x_BTD = add_product(x_BTD, o_BTNH, self.wo[...])
        hidden_BTCF = norm_einsum_rows("BTD,DCF->BTCF", x_BTD, self.norm_mlp[...], self.eps, self.w_gate_up[...])
        hidden_BTF = jax.nn.silu(hidden_BTCF[:, :, 0]) * hidden_BTCF[:, :, 1]
        return add_product(x_BTD, hidden_BTF, self.w_down[...]), carry

    def project_kv(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return only the keys and values ``[B, T, K, H]`` this layer would write for the state ``x_BTD``."""
        bias = None if self.bqkv is None else self.bqkv[:, -2:]
        kv_BTKMH = self._project(x_BTD, self.wqkv[:, :, -2:], bias)
        return self._rotate(kv_BTKMH[..., 0, :], positions_BT, self.norm_k), kv_BTKMH[..., 1, :]

    def _project(self, x_BTD, weights_DKMH, bias_KMH):
        x_BTKMH = norm_einsum_rows("BTD,DKMH->BTKMH", x_BTD, self.norm_attn[...], self.eps, weights_DKMH)
        return x_BTKMH if bias_KMH is None else x_BTKMH + bias_KMH[None, None]

    def _rotate(self, x_BTNH, positions_BT, norm):
        x_BTNH = x_BTNH if norm is None else rms_norm(x_BTNH, norm[...], self.eps)
        return rotate(x_BTNH, positions_BT, self.rope_theta, self.rope_scaling)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Rotate the halves of each head by its position (the Hugging Face pairing: i with i + H/2).

    Source: Su et al., RoFormer (2021); frequencies as in :func:`rope_frequencies`.
    """
    frequencies = jnp.asarray(rope_frequencies(x_BTNH.shape[-1], theta, scaling))
    angles_BTH = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
    cos, sin = jnp.cos(angles_BTH)[:, :, None], jnp.sin(angles_BTH)[:, :, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Return the H/2 rotary frequencies (radians per token) as float32.

    Source: RoFormer for the base; ``llama3`` follows the Llama 3.1 reference: wavelengths above
    ``original_length / low_freq_factor`` are divided by ``factor``, those below ``original_length /
    high_freq_factor`` are kept, and those between are blended linearly in inverse wavelength.
    """
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    turns = scaling.original_length * frequencies / (2 * np.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * frequencies / scaling.factor + blend * frequencies).astype(np.float32)


def _normal(key: jax.Array, shape: tuple[int, ...], std: float, dtype: Any) -> nnx.Param:
    return nnx.Param((jax.random.normal(key, shape, jnp.float32) * std).astype(dtype))
