"""Scores and agreement of every exit on a text, for :mod:`dyninf.training.calibrate`.

Samples are tokens, in order of text and position. Each text's first is left out: it counts as prompt under teacher
forcing. Tokens see the dense model's keys, whatever exits before them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.depth.base import DepthPolicy
from dyninf.depth.exits import Confidence, Saturation, confidence, cosine
from dyninf.forward import layer_states
from dyninf.model import CausalLM, readout_of
from dyninf.plan import Plan, check
from dyninf.training.states import exit_predictions, in_chunks

ROWS = 8  # texts read at once
CHUNK = 1024  # tokens whose logits are held at once


def collect_scores(
    model: CausalLM, tokens: Any, lengths: Any, rule: DepthPolicy, layers: Sequence[int], *, chunk: int = CHUNK
) -> np.ndarray:
    """Return what an exit rule measures after each number of layers, float32 ``[samples, exits]``.

    Costs the dense model, and for :class:`Confidence` a pass over the vocabulary an exit. Only ``chunk`` tokens' logits
    exist at a time.

    Args:
        tokens: ``int [B, T]``, right-padded.
        lengths: tokens of each text ``[B]``; ``None`` for T.
        rule: a :class:`Confidence` or :class:`Saturation`; the threshold is not used.
        layers: layers run at each exit (1 to L).

    Raises:
        ValueError: if texts, lengths or exits do not fit the model.
        NotImplementedError: if the rule is another one.
    """
    if not isinstance(rule, Confidence | Saturation):
        raise NotImplementedError(f"expected Confidence or Saturation, without combinators, got {rule}")
    check(Plan(depth=rule), model)
    return _collect(model, tokens, lengths, layers, functools.partial(_scores, rule=rule, chunk=chunk))


def collect_agreement(
    model: CausalLM, tokens: Any, lengths: Any, layers: Sequence[int], *, chunk: int = CHUNK
) -> np.ndarray:
    """Return whether each exit predicts the token that the dense model predicts, bool ``[samples, exits]``.

    Arguments, cost, samples and errors are those of :func:`collect_scores`.
    """
    check(Plan(), model)
    return _collect(model, tokens, lengths, layers, functools.partial(_agreement, chunk=chunk))


def _collect(model: CausalLM, tokens: Any, lengths: Any, layers: Sequence[int], read: Callable) -> np.ndarray:
    tokens = np.asarray(tokens)
    num_layers, layers = len(model.layers), tuple(int(layer) for layer in layers)
    if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"expected token ids [B, T], got {tokens.dtype} of shape {tokens.shape}; pad to one length")
    if not layers or min(layers) < 1 or max(layers) > num_layers:
        raise ValueError(f"expected exits after 1 to {num_layers} layers, got {layers}; leave the others out")
    batch, length = tokens.shape
    lengths = np.full(batch, length) if lengths is None else np.asarray(lengths)
    if lengths.shape != (batch,) or lengths.min() < 0 or lengths.max() > length:
        raise ValueError(f"expected {batch} lengths from 0 to {length}, got {lengths}; give one a text")
    places_T, parts = np.arange(length), []
    for start in range(0, batch, ROWS):
        # The last rows are repeated so that all batches share a compilation.
        rows = np.minimum(np.arange(start, start + min(ROWS, batch)), batch - 1)
        read_EBT = np.asarray(read(model, tokens[rows], lengths[rows], layers=layers))[:, : batch - start]
        used_BT = (places_T > 0) & (places_T < lengths[rows, None])
        parts.append(read_EBT[:, used_BT[: batch - start]].T)
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("layers", "chunk"))
def _scores(model, tokens_BT, lengths_B, *, rule, layers, chunk):
    states_LBTD, readout = layer_states(model, tokens_BT, lengths_B), readout_of(model)
    if isinstance(rule, Confidence):
        exits_EBTD = states_LBTD[jnp.asarray(layers)]
        return in_chunks(lambda x_BTD: confidence(readout(x_BTD), rule.measure), exits_EBTD, chunk)
    return jnp.stack([cosine(states_LBTD[layer], states_LBTD[layer - 1]) for layer in layers])


@functools.partial(jax.jit, static_argnames=("layers", "chunk"))
def _agreement(model, tokens_BT, lengths_B, *, layers, chunk):
    exits_EBTD = layer_states(model, tokens_BT, lengths_B)[jnp.asarray((*layers, len(model.layers)))]
    tokens_EBT = exit_predictions(model, exits_EBTD, chunk=chunk)
    return (tokens_EBT[:-1] == tokens_EBT[-1:]) & (tokens_EBT[:-1] >= 0)
