"""Find the pattern of every head that keeps most of its attention (Jiang et al. 2024, "MInference 1.0: Accelerating
Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", algorithm 1).

A text runs dense. In every layer the exact attention of each row is added up by block of keys once, and a candidate
keeps what lies in the blocks that it lists: the first version of the paper's score, a mean over all queries but the
first ones, which any pattern serves. The best candidate of each head is written down as plain numbers.

Differences from the paper's code: all candidates list as many blocks, where its sizes are compared as they are; they
are judged on blocks, as they run; the winner stays what it is (see :mod:`dyninf.sparsity.per_head`).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.model import CausalLM, query_shape
from dyninf.sparsity.a_shape import AShape
from dyninf.sparsity.base import PromptObs, SparsityPolicy
from dyninf.sparsity.per_head import PerHead
from dyninf.sparsity.pooled_blocks import PooledBlocks
from dyninf.sparsity.vertical_slash import VerticalSlash
from pallas_kernels import BlockIndex, prefill_attention

# Columns and slashes of the paper's candidates; how they share a budget is taken from these.
VERTICAL_SLASH = ((30, 800), (100, 750), (500, 700), (3500, 100))
SKIPPED = 12  # one part of this many of a text is not judged: the paper leaves out 2500 of about 30000 tokens


def default_candidates(budget: int = 56, block_size: int = 128) -> tuple[SparsityPolicy, ...]:
    """Return the paper's candidates with ``budget`` blocks a row each: A-shape, vertical-slash by share, pooled blocks.

    Args:
        budget: blocks that a row reads at most (at least 4); 56 are what 1000 columns and 6096 slashes take if they
            lie side by side.

    Raises:
        ValueError: if the budget leaves no room for both parts of a pattern.
    """
    if budget < 4:
        raise ValueError(f"expected a budget of at least 4 blocks a row, got {budget}")
    shares = (columns / (columns + slashes) for columns, slashes in VERTICAL_SLASH)
    verticals = sorted({min(max(round(share * budget), 1), budget - 2) for share in shares})
    return (
        AShape(sinks=block_size, window=(budget - 2) * block_size + 1, block_size=block_size),
        *(VerticalSlash(vertical=v, slash=budget - 1 - v, block_size=block_size) for v in verticals),
        PooledBlocks(budget=budget, block_size=block_size),
    )


def search_patterns(
    model: CausalLM,
    tokens: jax.Array,
    candidates: Sequence[SparsityPolicy] | None = None,
    *,
    lengths: jax.Array | None = None,
    start: int | None = None,
) -> PerHead:
    """Return for every head of a model the candidate that keeps most of its attention on these texts.

    Of equal ones the first. Costs a dense pass and, in each layer, scores of all queries once more.

    Args:
        tokens: texts ``int32 [B, T]``, right-padded; long ones, or all candidates keep everything.
        candidates: policies of one block size; ``None`` for :func:`default_candidates`.
        lengths: tokens of each text ``[B]``; ``None`` for T.
        start: first position whose query is judged; ``None`` for one twelfth of T.

    Raises:
        ValueError: if candidates do not fit each other or the model, or no query is judged.
        NotImplementedError: if a layer attends within a window.
    """
    batch, length = tokens.shape
    candidates = default_candidates() if candidates is None else tuple(candidates)
    num_layers, num_heads = len(model.layers), query_shape(model).shape[2]
    PerHead(patterns=candidates, heads=((0,) * num_heads,) * num_layers).validate(num_layers, num_heads)
    lengths_B = jnp.full(batch, length, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    start = length // SKIPPED if start is None else start
    if not 0 <= start < int(jnp.max(lengths_B)):
        raise ValueError(f"expected start among the {int(jnp.max(lengths_B))} tokens of the longest text, got {start}")
    x_BTD, heads = model.embed(tokens), []
    for number, layer in enumerate(model.layers):
        x_BTD, kept_AN = _layer_kept(layer, x_BTD, lengths_B, candidates, start, number=number)
        heads.append(tuple(np.argmax(np.asarray(kept_AN), axis=0).tolist()))
    return PerHead(patterns=candidates, heads=tuple(heads))


def kept_mass(obs: PromptObs, policies: Sequence[SparsityPolicy], start: jax.Array | int) -> jax.Array:
    """Return the share of attention that lies in the blocks of each of A policies ``[A, N]``, float32.

    A mean over the texts' queries from position ``start`` on. Rows of scores exist one after another.
    """
    kept, masses_BNRC = [], {}
    for policy in policies:
        selected = policy.select(obs)
        if selected is None:
            kept.append(jnp.ones(obs.q_BTNH.shape[2], jnp.float32))
            continue
        if selected.order is not None:
            raise NotImplementedError(f"expected candidates that read blocks of the text, got {policy!r}; leave it out")
        size = selected.index.block_size
        if size not in masses_BNRC:
            masses_BNRC[size] = _row_masses(obs, size, start)
        kept.append(_listed(masses_BNRC[size], selected.index))
    return jnp.stack(kept)


@functools.partial(jax.jit, static_argnames=("number",))
def _layer_kept(layer, x_BTD, lengths_B, candidates, start, *, number):
    def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None):
        if window is not None:
            raise NotImplementedError(f"expected full attention in every layer, got a window of {window} tokens")
        obs = PromptObs(layer=number, q_BTNH=q_BTNH, k_BSKH=k_BTKH, lengths_B=lengths_B)
        return prefill_attention(q_BTNH, k_BTKH, v_BTKH, lengths_B), kept_mass(obs, candidates, start)

    return layer(x_BTD, jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2]), attend)


def _row_masses(obs: PromptObs, block_size: int, start: jax.Array | int) -> jax.Array:
    """Return what the queries of each row pay to each block on average over all judged ones ``[B, N, R, C]``."""
    (batch, length, num_heads, dim), (num_keys, num_kv) = obs.q_BTNH.shape, obs.k_BSKH.shape[1:3]
    rows, blocks = (-(-tokens // block_size) for tokens in (length, num_keys))
    pad = lambda x, count: jnp.pad(x, ((0, 0), (0, count * block_size - x.shape[1]), (0, 0), (0, 0)))  # noqa: E731
    q_RBXKGH = jnp.moveaxis(pad(obs.q_BTNH, rows).reshape(batch, rows, block_size, num_kv, -1, dim), 1, 0)
    k_BSKH, keys_S = pad(obs.k_BSKH, blocks), jnp.arange(blocks * block_size)
    lengths_B = jnp.full(batch, num_keys) if obs.lengths_B is None else obs.lengths_B
    positions_RX = obs.offset + jnp.arange(rows * block_size).reshape(rows, block_size)
    judged_RBX = (positions_RX[:, None] >= start) & (positions_RX[:, None] < lengths_B[None, :, None])
    judged_RBX &= (jnp.arange(rows * block_size) < length).reshape(rows, 1, block_size)

    def row(inputs):
        q_BXKGH, position_X, judged_BX = inputs
        seen_BXS = judged_BX[:, :, None] & (keys_S[None, None] <= position_X[None, :, None])
        scores = jnp.einsum("bxkgh,bskh->bkgxs", q_BXKGH, k_BSKH, preferred_element_type=jnp.float32) * dim**-0.5
        scores = jnp.where(seen_BXS[:, None, None], scores, -jnp.inf)
        peak = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1.0)
        return jnp.sum(weights.reshape(batch, num_heads, block_size, blocks, block_size), axis=(2, 4))

    masses_RBNC = jax.lax.map(row, (q_RBXKGH, positions_RX, judged_RBX))
    return jnp.moveaxis(masses_RBNC, 0, 2) / jnp.maximum(jnp.sum(judged_RBX), 1)


def _listed(masses_BNRC: jax.Array, index: BlockIndex) -> jax.Array:
    """Return the mass of the listed blocks ``[N]``."""
    num_blocks = masses_BNRC.shape[3]
    there_BNRM = jnp.arange(index.blocks.shape[3])[None, None, None] < index.counts[..., None]
    there_BNRM &= (index.blocks >= 0) & (index.blocks < num_blocks)
    held = jnp.take_along_axis(masses_BNRC, jnp.clip(index.blocks, 0, num_blocks - 1), axis=3)
    return jnp.sum(jnp.where(there_BNRM, held, 0.0), axis=(0, 2, 3))
