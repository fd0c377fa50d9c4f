"""Attention through cuDNN's fused kernels, as ``jax.nn.dot_product_attention`` reaches them.

On an H200 it decodes eight sequences of the Llama-3-8B shape 6 % faster than the plain JAX reference does. Empty
slots must hold finite numbers: cuDNN multiplies some of them by zero.
"""

from typing import Any

import jax
import jax.numpy as jnp


def refuse_prefill(*, masked: bool, chunked: bool = False, with_lse: bool = False, **facts: Any) -> str | None:
    """Return why cuDNN cannot serve a prefill, or ``None``."""
    if with_lse:
        return "returns no sums of exponentials here"
    if chunked:
        return "takes prompts from their first token on, not a chunk at an offset"
    if masked:
        return "takes lengths and a causal mask only, not a mask of tokens"
    return _refuse_always(**facts)


def refuse_decode(
    *, masked: bool, window: int | None, num_queries: int, page_size: int | None, **facts: Any
) -> str | None:
    """Return why cuDNN cannot serve a decode step, or ``None``."""
    if masked:
        return "takes lengths only, not a mask of slots"
    if page_size is not None:
        return "reads every slot, not the pages of an index"
    if window is not None:
        return "aligns a sliding window to the end of the cache, not to each sequence's length"
    if num_queries != 1:
        return f"decodes one token at a time here, got {num_queries}"
    return _refuse_always(**facts)


def prefill_attention(q_BTNH, k_BTKH, v_BTKH, lengths_B, *, window=None, keep_BT=None, offset=None, with_lse=False):
    """See :func:`pallas_kernels.attention.prefill_attention`."""
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        is_causal=True,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def decode_attention(q_BTNH, k, v, positions_BT, *, layer=None, index=None, window=None, valid_BS=None):
    """See :func:`pallas_kernels.attention.decode_attention`."""
    k_BSKH, v_BSKH = (array if layer is None else jnp.take(array, layer, axis=0, mode="clip") for array in (k, v))
    lengths_B = positions_BT[:, 0] + 1
    o_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        query_seq_lengths=jnp.ones_like(lengths_B),
        # A sequence that has filled its cache and is done asks for the slot behind the last one.
        key_value_seq_lengths=jnp.clip(lengths_B, 1, k_BSKH.shape[1]),
        implementation="cudnn",
    )
    return jnp.where((lengths_B > 0)[:, None, None, None], o_BTNH, jnp.zeros((), o_BTNH.dtype))


def _refuse_always(*, platform: str, dtype: Any, kv_dtype: Any, head_dim: int, **_: Any) -> str | None:
    if platform != "gpu":
        return f"needs an NVIDIA GPU, got platform {platform!r}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {jnp.dtype(dtype).name}"
    if kv_dtype != dtype:
        return f"needs one dtype everywhere, got {jnp.dtype(dtype).name} queries and {jnp.dtype(kv_dtype).name} keys"
    if head_dim % 8 or head_dim > 256:
        return f"needs head_dim to be a multiple of 8 up to 256, got {head_dim}"
    return None
