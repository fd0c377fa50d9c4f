"""Catching up: tokens that exited run their upper layers later, together with a token that needs these layers.

With ``Plan(fill="catch_up")`` a token that exits leaves its state and the layer it has reached in a window of its
sequence, oldest first. When a later token of the sequence runs a layer at which tokens wait, they run it in the same
batch, ``1 + window`` tokens attending causally by their positions. Every key and value that a token reads is therefore
exactly the full model's; only the predictions made at exits differ from it.

A waiting token triggers no layers by itself: what the hardware runs is what new tokens need, as with other fills. All
waiting tokens of a sequence are done when one of its tokens runs every layer, and until then they advance as far as
its deepest token has gone.

Overflow: an exit is allowed only while the window has room. When it is full the sequence's next token runs every layer,
whatever its policy says, and empties it. At least one token in ``window + 1`` is therefore a full one.

Cost: groups of layers above the first exit point run ``1 + window`` tokens per sequence instead of one; at small
batches reading the weights takes as long for both. ``B W D`` entries of state.

Source: KV recomputation of EE-LLM (Chen et al. 2023) and synchronized parallel decoding of FREE (Bae et al. 2023).
EE-LLM recomputes waiting tokens from the first layer on, here they go on from the state at which they stopped; FREE
has one exit layer, here every token has its own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dyninf.attention import attend_cached
from dyninf.depth.base import DepthPolicy
from dyninf.layer_run import LayerRun, LayersOut, Span, decide, observe, plain_span
from dyninf.model import DecoderLayer
from dyninf.pytree import pytree


@pytree()
class Pending:
    """Tokens of each sequence that wait for their upper layers: the last ones before the next token, oldest first.

    Attributes:
        x_BWD: the states that enter the next layer.
        layer_BW: the next layer to run; entries that hold no token are at the number of layers that are run.
    """

    x_BWD: jax.Array
    layer_BW: jax.Array


def no_pending(like_BTD: jax.Array, window: int, num_layers: int) -> Pending:
    """Return an empty window for each sequence, for states such as ``like_BTD``."""
    batch = like_BTD.shape[0]
    return Pending(
        x_BWD=jnp.zeros((batch, window, like_BTD.shape[-1]), like_BTD.dtype),
        layer_BW=jnp.full((batch, window), num_layers, jnp.int32),
    )


def room(pending: Pending, top: int) -> jax.Array:
    """Return which sequences may exit ``[B]``: those whose window has a free entry."""
    return jnp.any(pending.layer_BW >= top, axis=1)


def catch_up_span(
    layers: Sequence[DecoderLayer], run: LayerRun, pending: Pending, *, first_exit: int, top: int
) -> Span:
    """Return the span that takes waiting tokens along; its carry is the :class:`Pending` that changes on the way.

    Args:
        first_exit: the lowest layer at which a token may wait.
        top: how many layers are run.
    """
    alone = plain_span(layers, run)
    window = pending.layer_BW.shape[1]
    count_B = jnp.sum(pending.layer_BW < top, axis=1)
    # A free entry stands at the place of the new token, so that it reads no slot that this one does not read.
    age_BW = jnp.maximum(count_B[:, None] - jnp.arange(window)[None], 0)
    positions_BT = jnp.concatenate([run.positions_BT - age_BW, run.positions_BT], axis=1)
    live_BT = jnp.broadcast_to(run.live_BT, positions_BT.shape)
    attend = attend_cached(positions_BT, live_BT, write_inactive=False)
    together = plain_span(layers, dataclasses.replace(run, positions_BT=positions_BT, attend=attend))

    def span(start, stop, x_BTD, active_BT, caches, pending):
        if start < first_exit:
            return alone(start, stop, x_BTD, active_BT, caches, pending)
        joining_BW = active_BT & (pending.layer_BW == start)
        both_BT = jnp.concatenate([joining_BW, active_BT], axis=1)
        both_BTD = jnp.concatenate([pending.x_BWD, x_BTD], axis=1)
        both_BTD, prev_BTD, caches, _ = together(start, stop, both_BTD, both_BT, caches, ())
        pending = Pending(x_BWD=both_BTD[:, :window], layer_BW=jnp.where(joining_BW, stop, pending.layer_BW))
        return both_BTD[:, window:], prev_BTD[:, window:], caches, pending

    return span


def leave_waiting(pending: Pending, out: LayersOut, live_BT: jax.Array, top: int) -> Pending:
    """Return the window with the new tokens that did not run all ``top`` layers added to it."""
    window = pending.layer_BW.shape[1]
    reached_B = out.needed_BT[:, 0]
    count_B = jnp.sum(pending.layer_BW < top, axis=1)
    rows_B, entry_B = jnp.arange(len(count_B)), jnp.where(live_BT[:, 0] & (reached_B < top), count_B, window)
    return Pending(
        x_BWD=pending.x_BWD.at[rows_B, entry_B].set(out.x_BTD[:, 0], mode="drop"),
        layer_BW=pending.layer_BW.at[rows_B, entry_B].set(reached_B, mode="drop"),
    )


def force_catch_up(
    layers: Sequence[DecoderLayer], x_BTD: jax.Array, run: LayerRun, policy: DepthPolicy, state: Any, window: int
) -> LayersOut:
    """Run a whole text as decoding with a window would: every token runs every layer and is read where it exits.

    A token's keys never depend on where it exited, so one pass gives what each would have exited with; the windows are
    then filled and emptied token by token to see which exits there was room for.
    """
    num_layers, top = len(layers), max(policy.prefill_layers(len(layers))) + 1
    alone = plain_span(layers, run)
    exited_BT, prev_BTD, left_BTD = ~run.live_BT, x_BTD, x_BTD
    reached_BT = jnp.zeros(run.live_BT.shape, jnp.int32)
    for layer in range(top):
        left_BTD = jnp.where(exited_BT[:, :, None], left_BTD, x_BTD)
        obs = observe(run, num_layers, layer, x_BTD, prev_BTD)
        _, exited_BT, state = decide(run, policy, obs, exited_BT, state)
        reached_BT = reached_BT + ~exited_BT
        x_BTD, prev_BTD, _, _ = alone(layer, layer + 1, x_BTD, run.live_BT, (None,), ())
    wants_BT = run.live_BT & exited_BT

    def next_token(waiting_B, wants_B):
        exits_B = wants_B & (waiting_B < window)
        return jnp.where(exits_B, waiting_B + 1, 0), exits_B

    _, exits_TB = jax.lax.scan(next_token, jnp.zeros(len(x_BTD), jnp.int32), wants_BT.T)
    exits_BT = exits_TB.T
    return LayersOut(
        x_BTD=jnp.where(exits_BT[:, :, None], left_BTD, x_BTD),
        caches=(None,) * num_layers,
        state=state,
        needed_BT=jnp.where(exits_BT, reached_BT, top * run.live_BT),
        run=jnp.int32(top),
    )
