"""Negative log-likelihood by position: how well a plan predicts tokens near the start and far from it."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.forward import forward
from dyninf.model import CausalLM, max_length, vocab_size
from dyninf.plan import Plan, check
from dyninf.tasks.sample import check_counts


@dataclass(frozen=True, kw_only=True, eq=False)
class PositionNLL:
    """Mean negative log-likelihood (nats) of the tokens at positions ``edges[i]`` to ``edges[i+1] - 1``.

    Attributes:
        mean: ``[P]``, NaN in a bucket without tokens.
        count: tokens in each bucket ``[P]``.
    """

    edges: tuple[int, ...]
    mean: np.ndarray
    count: np.ndarray


def doubling_edges(length: int, first: int = 64) -> tuple[int, ...]:
    """Return the edges 1, ``first``, 2 ``first``, 4 ``first``, ... up to ``length``: position 0 is never predicted."""
    check_counts(length=length, first=first)
    edges = [1]
    while first < length:
        edges += [first] if first > 1 else []
        first *= 2
    return (*edges, max(length, 2))


def bucket_means(
    nll_BT: np.ndarray, positions_BT: np.ndarray, edges: Sequence[int], live_BT: np.ndarray | None = None
) -> PositionNLL:
    """Return the mean of values in each bucket of position, in float64.

    Args:
        edges: ascending; positions outside all buckets are left out.
        live_BT: which values count, ``None`` for all.

    Raises:
        ValueError: if the edges do not ascend.
    """
    edges = tuple(int(edge) for edge in edges)
    if len(edges) < 2 or any(b <= a for a, b in pairwise(edges)):
        raise ValueError(f"expected at least two ascending edges, got {edges}")
    buckets = np.searchsorted(edges, positions_BT, side="right") - 1
    use = (buckets >= 0) & (buckets < len(edges) - 1)
    use = use if live_BT is None else use & live_BT
    count = np.bincount(buckets[use], minlength=len(edges) - 1)
    sums = np.bincount(buckets[use], weights=np.asarray(nll_BT, np.float64)[use], minlength=len(edges) - 1)
    return PositionNLL(edges=edges, mean=np.where(count > 0, sums / np.maximum(count, 1), np.nan), count=count)


def position_nll(
    model: CausalLM,
    plan: Plan | None,
    tokens: Any,
    *,
    lengths: Any = None,
    edges: Sequence[int] | None = None,
    prompt_lengths: Any = None,
    batch_size: int = 1,
    chunk: int = 1024,
) -> PositionNLL:
    """Return how well the model predicts long sequences under a plan, by position of the predicted token.

    By teacher forcing in one pass. Logits are held for ``batch_size * chunk`` tokens at once.

    Args:
        tokens: ``int [B, T]`` right-padded, or ``[T]`` for one.
        lengths: tokens of each sequence ``[B]``, ``None`` for T.
        edges: of the buckets; ``None`` for :func:`doubling_edges`.
        prompt_lengths: tokens of each sequence that count as prompt ``[B]``; ``None`` for 1.
        batch_size: sequences that run at once.
        chunk: tokens of a sequence whose logits are held at once.

    Raises:
        ValueError: if a sequence does not fit the model or has fewer than 2 tokens, or the edges do not ascend.
    """
    plan = Plan() if plan is None else plan
    check(plan, model)
    check_counts(batch_size=batch_size, chunk=chunk)
    tokens, lengths = _check_texts(model, tokens, lengths)
    count, width = tokens.shape
    edges = doubling_edges(width) if edges is None else edges
    prompts = np.ones(count, np.int32) if prompt_lengths is None else np.asarray(prompt_lengths, np.int32)
    if prompts.shape != (count,) or prompts.min() < 1:
        raise ValueError(f"expected one prompt length of at least 1 for each of {count} sequences, got {prompts}")
    size, parts = min(batch_size, count), []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        nll = _nll(model, plan, tokens[rows], lengths[rows], prompts[rows], chunk=min(chunk, width - 1))
        parts.append(np.asarray(nll))
    nll = np.concatenate(parts)[:count]
    positions = np.broadcast_to(np.arange(1, width), nll.shape)
    return bucket_means(nll, positions, edges, positions < lengths[:, None])


def _check_texts(model: CausalLM, tokens: Any, lengths: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return texts ``[B, T]`` and their lengths ``[B]``; each may fill the model's context."""
    tokens = np.asarray(tokens)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"expected sequences [B, T] of at least 2 tokens, got shape {tokens.shape}")
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
    if lengths.shape != (len(tokens),) or lengths.min() < 2 or lengths.max() > tokens.shape[1]:
        raise ValueError(f"expected one length of 2 to {tokens.shape[1]} for each sequence, got {lengths.tolist()}")
    # The last token of each is only predicted.
    limit, known = max_length(model), vocab_size(model)
    if limit is not None and lengths.max() - 1 > limit:
        raise ValueError(
            f"expected texts that fit the model's context of {limit} and the token after it, got {lengths.max()} tokens"
        )
    live = np.arange(tokens.shape[1])[None] < lengths[:, None]
    bad = tokens[live & ((tokens < 0) | (tokens >= known))]
    if bad.size or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"expected integer ids between 0 and {known - 1}, got {sorted(set(bad.tolist()))[:5]} of {tokens.dtype}"
        )
    return np.where(live, tokens, 0).astype(np.int32), lengths.astype(np.int32)


@functools.partial(jax.jit, static_argnames=("chunk",))
def _nll(model, plan, tokens_BT, lengths_B, prompts_B, *, chunk):
    """Return the negative log-likelihood of tokens 1 to T-1 ``[B, T-1]``."""
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    # Only the states are used: the compiler drops the logits of the whole text.
    states_BTD = forward(model, inputs_BT, plan, lengths=lengths_B - 1, prompt_lengths=prompts_B).states
    num = targets_BT.shape[1]
    pad = -num % chunk

    def split(array):
        array = jnp.pad(array, [(0, 0), (0, pad)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(array.shape[0], -1, chunk, *array.shape[2:]), 1, 0)

    def one(pair):
        states_BCD, targets_BC = pair
        logits_BCV = model.unembed(states_BCD).astype(jnp.float32)
        picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
        return jax.nn.logsumexp(logits_BCV, axis=-1) - picked_BC

    nll_CBT = jax.lax.map(one, (split(states_BTD), split(targets_BT)))
    return jnp.moveaxis(nll_CBT, 0, 1).reshape(targets_BT.shape[0], -1)[:, :num]
