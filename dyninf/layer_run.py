"""What the drivers of the depth loop share: the tokens at hand, how a policy is asked, and how layers are run.

A *span* runs the layers ``[start, stop)``, between which nothing is decided. Drivers that run the same groups of
layers differ in their span only: on every row of the batch (here), on gathered rows (:mod:`dyninf.compaction`), or
with tokens that exited earlier (:mod:`dyninf.catch_up`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dyninf.attention import LayerAttend
from dyninf.cache import LayerCache
from dyninf.depth.base import EXIT, SKIP, DepthPolicy, LayerObs, consult
from dyninf.kv.base import KeepAll, ReadAll
from dyninf.kv.choice import lend
from dyninf.kv.top_k import TopK
from dyninf.model import CausalLM, DecoderLayer, readout_of, token_logits_of
from dyninf.pytree import pytree

Caches = tuple[LayerCache | None, ...]
# span(start, stop, x_BTD, active_BT, caches of these layers, carry) -> (x_BTD, state that entered the last of them,
# caches, carry). Tokens that are not active keep their state; the carry is the driver's own.
Span = Callable[[int, int, jax.Array, jax.Array, Caches, Any], tuple[jax.Array, jax.Array, Caches, Any]]


@dataclass(frozen=True, kw_only=True)
class LayerRun:
    """What the layers need to know about the tokens at hand.

    Attributes:
        positions_BT: position of each token in its sequence.
        step_BT: index among the generated tokens.
        live_BT: tokens that exist; the others decide nothing and keep their state.
        governed_BT: tokens the policy decides for; other live tokens run every layer.
        attend: builds the ``attend`` function of a layer.
        model: what reads states out.
        propagate: whether tokens store the projection of their last state for layers that they do not run.
        evict: what the caches keep.
        select: what a step reads of them.
    """

    positions_BT: jax.Array
    step_BT: jax.Array
    live_BT: jax.Array
    governed_BT: jax.Array
    attend: LayerAttend
    model: CausalLM
    propagate: bool
    evict: TopK | KeepAll = KeepAll()
    select: TopK | ReadAll = ReadAll()


@pytree()
class LayersOut:
    """What running the layers gave.

    Attributes:
        x_BTD: final states, before the final norm.
        caches: updated caches, one per layer.
        state: policy state.
        needed_BT: layers each token needed (0 for tokens that do not exist).
        run: layers the hardware ran, int32.
        pending: tokens that wait for their upper layers, ``None`` unless the plan catches up or revives.
    """

    x_BTD: jax.Array
    caches: Caches
    state: Any
    needed_BT: jax.Array
    run: jax.Array
    pending: Any = None


def plain_span(layers: Sequence[DecoderLayer], run: LayerRun) -> Span:
    """Return the span that runs its layers on every row of the batch."""

    def span(start, stop, x_BTD, active_BT, caches, carry):
        prev_BTD, updated = x_BTD, []
        for number, layer, cache in zip(range(start, stop), layers[start:stop], caches, strict=True):
            y_BTD, cache = layer(x_BTD, run.positions_BT, run.attend(lend(updated, cache), active_BT, number))
            prev_BTD, x_BTD = x_BTD, jnp.where(active_BT[:, :, None], y_BTD, x_BTD)
            updated.append(cache)
        return x_BTD, prev_BTD, tuple(updated), carry

    return span


def layer_groups(decisions: Sequence[int], num_layers: int, *, split_after: bool = False) -> list[tuple[int, int]]:
    """Split the layers at every decision; with ``split_after`` also behind it, for decisions that hold for one layer.

    Returns:
        ``[start, stop)`` of each group, ascending.
    """
    starts = {0, *decisions}
    if split_after:
        starts |= {layer + 1 for layer in decisions if layer + 1 < num_layers}
    ordered = sorted(starts)
    return list(zip(ordered, [*ordered[1:], num_layers], strict=True))


def observe(run: LayerRun, num_layers: int, layer: int | jax.Array, x_BTD: jax.Array, prev_BTD: jax.Array) -> LayerObs:
    """Return what a policy may look at before ``layer``."""
    return LayerObs(
        layer=layer,
        num_layers=num_layers,
        first=False,
        x_BTD=x_BTD,
        prev_BTD=prev_BTD,
        step_BT=run.step_BT,
        logits=lambda: run.model.unembed(x_BTD),
        readout=lambda: readout_of(run.model)(x_BTD),
        token_logits=lambda ids_BTM: token_logits_of(run.model)(x_BTD, ids_BTM),
    )


def decide(
    run: LayerRun, policy: DepthPolicy, obs: LayerObs, exited_BT: jax.Array, state: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """Return which tokens run the layer, which have exited, and the policy's state.

    A state that holds NaN never exits, whatever the policy says: no measure of it means anything.
    """
    action_BT, state = consult(policy, state, obs)
    sound_BT = ~jnp.any(jnp.isnan(obs.x_BTD), axis=-1)
    exited_BT = exited_BT | (run.governed_BT & sound_BT & (action_BT == EXIT))
    return ~exited_BT & ~(run.governed_BT & (action_BT == SKIP)), exited_BT, state


def take_skip_state(
    policy: DepthPolicy, state: Any, obs: LayerObs, skipping_BT: jax.Array, x_BTD: jax.Array
) -> jax.Array:
    """Return the states after a layer, where ``skipping_BT`` those that the policy puts in the place of its output."""
    taken_BTD = policy.skip_state(state, obs)
    return x_BTD if taken_BTD is None else jnp.where(skipping_BT[:, :, None], taken_BTD.astype(x_BTD.dtype), x_BTD)
