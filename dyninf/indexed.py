"""The driver ``indexed``: stacked layers that are run by traced index, without control flow between layers.

Layers that can decode by index (:class:`IndexedLayers`) take the whole schedule of a step at once where the policy
knows it before the step (static schedules, depths that depend on the step alone) or where its rule is one that the
layers can follow themselves (the cosine of two states). Other policies are asked between runs of layers in one
``while_loop``, whose body is compiled once for all of them.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.cache import LayerCache
from dyninf.depth.base import DepthPolicy
from dyninf.kv.base import KeepAll, ReadAll
from dyninf.layer_run import LayerRun, LayersOut, decide, layer_groups, observe
from dyninf.plan import Plan, catches_up, leaves_gaps


class Decoded(Protocol):
    """What :meth:`IndexedLayers.decode` returns: states, the last layer's input, the cache, entries run."""

    x_BD: jax.Array
    before_BD: jax.Array
    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    ran_B: jax.Array


class IndexedLayers(Protocol):
    """Layers that one program runs at any depth; also a sequence of layers."""

    def decode(
        self, x_BD: jax.Array, k_LBSKH: jax.Array, v_LBSKH: jax.Array, positions_B: jax.Array, **schedule: Any
    ) -> Decoded:
        """Run layers on one token of each sequence; see :func:`pallas_kernels.decoder_stack.decode_layers`."""


def is_indexed(layers: Any) -> bool:
    """Return whether layers can decode by index."""
    return hasattr(layers, "decode")


def refuse_indexed(plan: Plan, num_layers: int) -> str | None:
    """Return why the driver cannot run a plan, or ``None``."""
    static = plan.depth.static_layers(num_layers) is not None
    if plan.depth.skips and not static:
        return "stacked layers run as leading ones, or by a static schedule, and cannot be skipped by token"
    if plan.evict != KeepAll():
        return "stacked layers keep every token in the slot of its position, which a cache that evicts does not"
    if plan.select != ReadAll():
        return "stacked layers read every slot and keep no summaries of pages"
    if leaves_gaps(plan) or catches_up(plan, num_layers):
        lacking = type(plan.sparsity).__name__ if plan.sparsity.stages else f"fill={plan.fill!r}"
        return f"stacked layers store keys and values of every token in every layer, which {lacking} does not"
    return None


def run_indexed(
    layers: IndexedLayers, x_BTD: jax.Array, cache: LayerCache, run: LayerRun, policy: DepthPolicy, state: Any
) -> LayersOut:
    """Run one token of each sequence through the layers that ``policy`` asks for.

    Args:
        cache: stacked keys and values ``[L, B, S, K, H]``.

    Raises:
        ValueError: for more than one token of a sequence.
    """
    if x_BTD.shape[1] != 1:
        raise ValueError(f"expected one token of each sequence for driver 'indexed', got {x_BTD.shape[1]}")
    num_layers = len(layers)
    live_B = run.live_BT[:, 0]
    top = max(policy.prefill_layers(num_layers)) + 1
    static = policy.static_layers(num_layers)
    planned_BT = policy.planned_layers(run.step_BT, num_layers)
    rule = policy.cosine_rule(num_layers)
    schedule = {"order_M": jnp.arange(top), "planned_B": jnp.full(live_B.shape, top), "live_B": live_B}
    if static is not None:
        schedule |= {"order_M": jnp.array(static, jnp.int32), "planned_B": jnp.full(live_B.shape, len(static))}
        schedule |= {"fill": False}
    elif planned_BT is not None:
        schedule |= {"planned_B": jnp.minimum(planned_BT[:, 0], top), "fill": run.propagate}
    elif rule is not None:
        threshold, asked = rule
        asked_M = jnp.array(np.isin(np.arange(top), asked))
        schedule |= {"threshold": threshold, "asked_M": asked_M, "fill": run.propagate}
    else:
        return _run_groups(layers, x_BTD, cache, run, policy, state, top)
    out = layers.decode(x_BTD[:, 0], cache.k, cache.v, run.positions_BT[:, 0], **schedule)
    return LayersOut(
        x_BTD=out.x_BD[:, None],
        caches=LayerCache(k=out.k_LBSKH, v=out.v_LBSKH),
        state=state,
        needed_BT=out.ran_B[:, None],
        run=jnp.max(out.ran_B),
    )


def _run_groups(layers, x_BTD, cache, run, policy, state, top):
    """Ask between groups of layers; the loop ends when every sequence has exited."""
    num_layers = len(layers)
    live_B, positions_B = run.live_BT[:, 0], run.positions_BT[:, 0]
    decisions = [layer for layer in policy.decision_layers(num_layers) if layer < top]
    groups = np.array(layer_groups(decisions, top), np.int32)
    starts, sizes = jnp.array(groups[:, 0]), jnp.array(groups[:, 1] - groups[:, 0])
    longest = int(np.max(groups[:, 1] - groups[:, 0]))

    def body(carry):
        group, x_BTD, prev_BTD, cache, exited_BT, state, needed_BT, _ = carry
        obs = observe(run, num_layers, starts[group], x_BTD, prev_BTD)
        active_BT, exited_BT, state = decide(run, policy, obs, exited_BT, state)
        going = jnp.any(active_BT)
        out = layers.decode(
            x_BTD[:, 0],
            cache.k,
            cache.v,
            positions_B,
            order_M=starts[group] + jnp.arange(longest),
            length=jnp.where(going, sizes[group], 0),
            planned_B=jnp.where(active_BT[:, 0], sizes[group], 0),
            live_B=live_B & going,
            fill=False,
        )
        cache = LayerCache(k=out.k_LBSKH, v=out.v_LBSKH)
        needed_BT = needed_BT + out.ran_B[:, None]
        return group + going, out.x_BD[:, None], out.before_BD[:, None], cache, exited_BT, state, needed_BT, going

    zero, going = jnp.int32(0), jnp.any(run.live_BT)
    carry = (zero, x_BTD, x_BTD, cache, ~run.live_BT, state, jnp.zeros(run.live_BT.shape, jnp.int32), going)
    carry = jax.lax.while_loop(lambda carry: (carry[0] < len(groups)) & carry[-1], body, carry)
    group, x_BTD, _, cache, _, state, needed_BT, _ = carry
    ran = jnp.where(group < len(groups), jnp.take(starts, group, mode="clip"), top)
    if run.propagate:
        out = layers.decode(
            x_BTD[:, 0],
            cache.k,
            cache.v,
            positions_B,
            order_M=ran + jnp.arange(top),
            length=top - ran,
            planned_B=jnp.zeros_like(positions_B),
            live_B=live_B,
            fill=True,
        )
        cache = LayerCache(k=out.k_LBSKH, v=out.v_LBSKH)
    return LayersOut(x_BTD=x_BTD, caches=cache, state=state, needed_BT=needed_BT, run=ran)
