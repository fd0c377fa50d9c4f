"""Check what a caller hands to generation, before any work: prompts, stop sequences and random keys."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.model import CausalLM, max_length, vocab_size
from dyninf.sampling import Greedy, Sampler

PAD = -1


def check_prompts(model: CausalLM, tokens: Any, lengths: Any, max_new_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Return prompts as ``int32 [B, T]``, 0 at padding, and their lengths ``[B]`` after refusing what cannot run.

    Raises:
        ValueError: if a prompt is empty, too long for the model, not made of its tokens, or lengths do not fit.
    """
    if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
        raise ValueError(f"expected max_new_tokens to be an integer of at least 1, got {max_new_tokens!r}")
    tokens = _rectangle(tokens)
    batch, width = tokens.shape
    lengths = np.full(batch, width) if lengths is None else np.asarray(lengths)
    if lengths.shape != (batch,) or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"expected one integer length per prompt [{batch}], got {lengths.dtype} {lengths.shape}")
    if lengths.min() < 1 or lengths.max() > width:
        raise ValueError(f"expected prompt lengths between 1 and {width}, got {lengths.tolist()}; no prompt is empty")
    real = np.arange(width)[None] < lengths[:, None]
    vocab = vocab_size(model)
    bad = tokens[real & ((tokens < 0) | (tokens >= vocab))]
    if bad.size:
        raise ValueError(
            f"expected token ids between 0 and {vocab - 1} of this model, got {sorted(set(bad.tolist()))[:5]}"
        )
    limit = max_length(model)
    if limit is not None and lengths.max() + max_new_tokens > limit:
        raise ValueError(
            f"expected prompt and generated tokens to fit the model's context of {limit}, got {lengths.max()} + "
            f"{max_new_tokens}; shorten the prompt or lower max_new_tokens"
        )
    return jnp.asarray(np.where(real, tokens, 0), jnp.int32), jnp.asarray(lengths, jnp.int32)


def check_key(key: jax.Array | None, sampler: Sampler, batch: int) -> jax.Array:
    """Return the key to sample with: one, or one per sequence ``[B]``.

    Raises:
        ValueError: if it is missing and the sampler draws, if it is not a typed key, or if its shape is another one.
    """
    if key is None:
        if not isinstance(sampler, Greedy):
            raise ValueError(f"expected a key for {sampler!r}, which draws, got None; pass key=jax.random.key(seed)")
        return jax.random.key(0)
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"expected a typed random key, got {key!r}; pass key=jax.random.key(seed)")
    if key.shape not in ((), (batch,)):
        raise ValueError(f"expected one key or one per sequence [{batch}], got shape {key.shape}")
    return key


def stop_matrix(stop: Sequence[int | Sequence[int]]) -> jax.Array:
    """Return stop tokens and stop sequences as one right-aligned ``int32 [R, M]`` array filled with -1.

    Raises:
        ValueError: if a stop sequence is empty or holds anything but ids of at least 0.
    """
    refused = ValueError(f"expected a list of stop tokens (ids >= 0) and stop sequences (not empty), got {stop!r}")
    if not isinstance(stop, Sequence | np.ndarray | jax.Array) or isinstance(stop, str):
        raise refused
    rows = [[entry] if np.ndim(entry) == 0 else list(entry) for entry in stop]
    if any(not row or any(not _is_id(entry) for entry in row) for row in rows):
        raise refused
    width = max((len(row) for row in rows), default=0)
    filled = [[PAD] * (width - len(row)) + [int(entry) for entry in row] for row in rows]
    return jnp.asarray(filled, jnp.int32).reshape(len(rows), width)


def _rectangle(tokens: Any) -> np.ndarray:
    if isinstance(tokens, list | tuple) and len({np.shape(row) for row in tokens}) > 1:
        raise ValueError(
            "expected prompts of one length [B, T], got "
            f"{[np.shape(row) for row in tokens]}; pad on the right and pass lengths="
        )
    tokens = np.asarray(tokens)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or 0 in tokens.shape:
        raise ValueError(
            f"expected prompts as integers [B, T] with at least one token each, got shape {tokens.shape} and dtype "
            f"{tokens.dtype}"
        )
    return tokens


def _is_id(entry: Any) -> bool:
    return np.ndim(entry) == 0 and np.issubdtype(np.asarray(entry).dtype, np.integer) and int(entry) >= 0
