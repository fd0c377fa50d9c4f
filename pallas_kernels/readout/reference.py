"""What a readout is, how partial ones are merged, and the readout in plain JAX.

All sums are taken relative to the largest logit m of what was seen so far: ``total = sum exp(z - m)`` and ``moment =
sum (z - m) exp(z - m)``, so that logsumexp is ``m + log(total)`` and the entropy is ``log(total) - moment / total``.
Two parts are brought to one m by scaling, which is how every implementation streams over the vocabulary.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

MAX_ROWS = 64  # of the kernels


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["top", "second", "logsumexp", "entropy", "token"],
    meta_fields=["num_tokens"],
)
@dataclass(frozen=True, kw_only=True)
class Readout:
    """What the logits of a state say, without the logits; every array has the shape of the states less D.

    Where the softmax is undefined (a NaN or +inf among the logits, or nothing but -inf) every number is NaN, which
    exceeds no threshold, and the token is -1.

    Attributes:
        top: largest logit, float32.
        second: second largest, equal to ``top`` at a tie; -inf if there is one token only.
        logsumexp: logarithm of the sum of the exponentials, never below ``top``.
        entropy: entropy of the softmax in nats, never negative.
        token: id of the largest logit, int32; the lowest of those that are equal.
        num_tokens: number of tokens that were compared.
    """

    top: jax.Array
    second: jax.Array
    logsumexp: jax.Array
    entropy: jax.Array
    token: jax.Array
    num_tokens: int

    @property
    def max_prob(self) -> jax.Array:
        """Return the largest probability."""
        return jnp.exp(self.top - self.logsumexp)

    @property
    def margin(self) -> jax.Array:
        """Return the distance between the two largest probabilities."""
        return self.max_prob - jnp.exp(self.second - self.logsumexp)


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def refuse_rows(rows: int) -> str | None:
    """Return why the kernels cannot read so many states, or ``None``."""
    return None if 1 <= rows <= MAX_ROWS else f"reads 1 to {MAX_ROWS} states at a time, got {rows}"


def exit_readout(h_BD: jax.Array, weights: jax.Array, *, transposed: bool) -> Readout:
    """See :func:`pallas_kernels.readout.exit_readout`; the states are normed already."""
    spec = "BD,DV->BV" if transposed else "BD,VD->BV"
    return read_logits(jnp.einsum(spec, h_BD, weights, preferred_element_type=jnp.float32))


def read_logits(logits: jax.Array) -> Readout:
    """Return the readout of logits ``[..., V]`` that exist already; entries of -inf count as impossible tokens."""
    z = logits.astype(jnp.float32)
    top = jnp.max(z, axis=-1, keepdims=True)
    token = jnp.argmax(z, axis=-1, keepdims=True).astype(jnp.int32)
    others = jnp.where(jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) == token, -jnp.inf, z)
    below = z - top
    weight = jnp.exp(below)
    return _finish(
        top=top[..., 0],
        second=jnp.max(others, axis=-1),
        token=token[..., 0],
        total=jnp.sum(weight, axis=-1),
        moment=jnp.sum(jnp.where(jnp.isneginf(z), 0.0, weight * below), axis=-1),
        num_tokens=z.shape[-1],
    )


def merge(
    top_CB: jax.Array,
    second_CB: jax.Array,
    token_CB: jax.Array,
    total_CB: jax.Array,
    moment_CB: jax.Array,
    num_tokens: int,
) -> Readout:
    """Merge what C parts of a vocabulary say of B states; a part that saw nothing has a top of -inf and sums of 0."""
    top_1B = jnp.max(top_CB, axis=0, keepdims=True)
    token_1B = jnp.min(jnp.where(top_CB == top_1B, token_CB, jnp.iinfo(jnp.int32).max), axis=0, keepdims=True)
    second_B = jnp.max(jnp.where((top_CB == top_1B) & (token_CB == token_1B), second_CB, top_CB), axis=0)
    below_CB = jnp.where(jnp.isneginf(top_CB), 0.0, top_CB - top_1B)
    scale_CB = jnp.exp(below_CB)
    return _finish(
        top=top_1B[0],
        second=second_B,
        token=token_1B[0],
        total=jnp.sum(scale_CB * total_CB, axis=0),
        moment=jnp.sum(scale_CB * (moment_CB + total_CB * below_CB), axis=0),
        num_tokens=num_tokens,
    )


def _finish(*, top, second, token, total, moment, num_tokens):
    defined = jnp.isfinite(top) & jnp.isfinite(total)
    # The sum contains exp(0); a kernel's approximate exponential must not bring logsumexp below the largest logit.
    log_total = jnp.log(jnp.maximum(total, 1.0))
    numbers = {
        "top": top,
        "second": second,
        "logsumexp": top + log_total,
        "entropy": jnp.maximum(log_total - moment / total, 0.0),
    }
    numbers = {name: jnp.where(defined, number, jnp.nan) for name, number in numbers.items()}
    return Readout(**numbers, token=jnp.where(defined, token, -1), num_tokens=num_tokens)
