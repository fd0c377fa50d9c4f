"""What a state predicts, summed up in five numbers: the product with the vocabulary matrix without its logits.

An exit policy asks for the largest probability, its distance to the second, the entropy or the most probable token.
All of them are reductions over the vocabulary, so the kernels read the matrix once and write five numbers a row.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Implementation, capability, choose, kernel, platform
from pallas_kernels.norms import rms_norm
from pallas_kernels.readout import reference
from pallas_kernels.readout.reference import Readout as Readout
from pallas_kernels.readout.reference import read_logits as read_logits

READOUT = (
    kernel("readout", "mosaic_gpu", "exit_readout"),
    kernel("readout", "mosaic_tpu", "exit_readout"),
    Implementation(name="xla", refuse=reference.refuse, run=reference.exit_readout),
)


def exit_readout(
    x_BD: jax.Array,
    norm_D: jax.Array,
    weights: jax.Array,
    *,
    eps: float,
    transposed: bool,
    tokens: Any = None,
    implementation: str | None = None,
) -> Readout:
    """Norm states, multiply them by the vocabulary matrix and return what the logits say.

    RMS norm in float32, rounded to x's dtype; products summed in float32. Cost: reads the matrix once, ``2·B·V·D``
    FLOPs; the kernels never write the logits. A list of tokens is gathered from the matrix first, which reads and
    writes its R·D entries once more. Exact. Not differentiable where a kernel serves.

    Args:
        x_BD: states of any layer, before the final norm.
        norm_D: scale of the final norm.
        weights: vocabulary matrix, ``[V, D]`` (as a tied embedding is stored), or ``[D, V]`` if ``transposed``.
        eps: added to the mean square.
        tokens: distinct token ids to compare, ``int [R]``; ``None`` for the whole vocabulary. Ids that are only known
            at run time are not checked: one outside the vocabulary makes the readout undefined.
        implementation: ``"mosaic_gpu"``, ``"mosaic_tpu"`` or ``"xla"``; ``None`` takes the fastest that can serve.

    Returns:
        A readout of shape ``[B]``; NaN and the token -1 for rows whose softmax is undefined.

    Raises:
        ValueError: if shapes do not match, or ``tokens`` is empty, repeats an id or leaves the vocabulary.
        NotImplementedError: if the requested implementation cannot serve.
    """
    _check(x_BD, norm_D, weights, transposed)
    if tokens is not None:
        tokens = _ascending(tokens, weights.shape[1 if transposed else 0])
        weights = jnp.take(weights, tokens, axis=1 if transposed else 0, mode="fill", fill_value=jnp.nan)
    facts = {
        "platform": platform(),
        "capability": capability(),
        "rows": x_BD.shape[0],
        "d_model": x_BD.shape[1],
        "num_tokens": weights.shape[1 if transposed else 0],
        "dtype": x_BD.dtype,
        "weights_dtype": weights.dtype,
        "transposed": transposed,
    }
    chosen = choose("exit_readout", READOUT, implementation, **facts)
    out = chosen.run(rms_norm(x_BD, norm_D, eps), weights, transposed=transposed)
    if tokens is None:
        return out
    token_B = jnp.where(out.token < 0, -1, jnp.take(tokens, out.token, mode="clip"))
    return dataclasses.replace(out, token=token_B)


def _check(x_BD: jax.Array, norm_D: jax.Array, weights: jax.Array, transposed: bool) -> None:
    shapes = f"got x {x_BD.shape}, norm {norm_D.shape}, weights {weights.shape} with {transposed=}"
    if x_BD.ndim != 2 or norm_D.shape != x_BD.shape[1:]:
        raise ValueError(f"expected x [B, D] and norm [D], {shapes}")
    if weights.ndim != 2 or weights.shape[0 if transposed else 1] != x_BD.shape[1] or 0 in weights.shape:
        raise ValueError(f"expected weights [V, D], or [D, V] with transposed=True, {shapes}")


def _ascending(tokens: Any, vocab_size: int) -> jax.Array:
    """Return the ids in ascending order, so that the first of equal logits belongs to the lowest id."""
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"expected tokens to be at least one integer id [R], got {tokens.dtype} {tokens.shape}")
    if isinstance(tokens, jax.core.Tracer):
        # Negative ids would be counted from the end; moved behind it they find NaN as all ids outside do.
        return jnp.sort(jnp.where(tokens < 0, vocab_size, tokens)).astype(jnp.int32)
    tokens = np.sort(np.asarray(tokens))
    if tokens[0] < 0 or tokens[-1] >= vocab_size:
        raise ValueError(
            f"expected token ids between 0 and {vocab_size - 1}, got {tokens[0]} to {tokens[-1]}; leave the others out"
        )
    if np.any(tokens[1:] == tokens[:-1]):
        repeated = tokens[1:][tokens[1:] == tokens[:-1]][0]
        raise ValueError(f"expected distinct token ids, got {repeated} more than once; use np.unique")
    return jnp.asarray(tokens, jnp.int32)
