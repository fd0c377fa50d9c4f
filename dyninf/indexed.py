"""The driver ``indexed``: stacked layers that are run by traced index, without control flow between layers.

Layers that can decode by index (:class:`IndexedLayers`) take the whole schedule of a step at once where the policy
knows it before the step (static schedules, depths that depend on the step alone) or where its rule is one that the
layers can follow themselves (the cosine of two states). Other policies are asked between runs of layers in one
``while_loop``, whose body is compiled once for all of them.

Layers choose the pages that they read (``Plan(select=...)``) within such a run, where :func:`refuse_selection` lets
them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.cache import LayerCache
from dyninf.depth.base import DepthPolicy
from dyninf.kv.base import KeepAll, PageScorer, ReadAll
from dyninf.kv.top_k import TopK
from dyninf.layer_run import LayerRun, LayersOut, decide, layer_groups, observe
from dyninf.plan import Plan, catches_up, leaves_gaps
from pallas_kernels.decoder_stack import Selection


class Decoded(Protocol):
    """What :meth:`IndexedLayers.decode` returns: states, the last layer's input, the cache, entries run.

    Layers that were given summaries of pages return ``summary_LBPKX`` too.
    """

    x_BD: jax.Array
    before_BD: jax.Array
    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    ran_B: jax.Array


class IndexedLayers(Protocol):
    """Layers that one program runs at any depth; also a sequence of layers.

    Those with an attention window have it as ``window``.
    """

    def decode(
        self, x_BD: jax.Array, k_LBSKH: jax.Array, v_LBSKH: jax.Array, positions_B: jax.Array, **schedule: Any
    ) -> Decoded:
        """Run layers on one token of each sequence; see :func:`pallas_kernels.decoder_stack.decode_layers`."""


def is_indexed(layers: Any) -> bool:
    """Return whether layers can decode by index."""
    return hasattr(layers, "decode")


def refuse_indexed(plan: Plan, layers: Sequence) -> str | None:
    """Return why the driver cannot run a plan on stacked layers, or ``None``."""
    num_layers = len(layers)
    static = plan.depth.static_layers(num_layers) is not None
    if plan.depth.skips and not static:
        return "stacked layers run as leading ones, or by a static schedule, and cannot be skipped by token"
    if plan.evict != KeepAll():
        return "stacked layers keep every token in the slot of its position, which a cache that evicts does not"
    if (reason := refuse_selection(plan.select, getattr(layers, "window", None))) is not None:
        return reason
    if leaves_gaps(plan) or catches_up(plan, num_layers):
        lacking = type(plan.sparsity).__name__ if plan.sparsity.stages else f"fill={plan.fill!r}"
        return f"stacked layers store keys and values of every token in every layer, which {lacking} does not"
    return None


def refuse_selection(select: TopK | ReadAll, window: int | None = None) -> str | None:
    """Return why layers that decode by index cannot choose what they read as a plan says, or ``None``."""
    if isinstance(select, ReadAll):
        return None
    scorer, name = select.scorer, type(select.scorer).__name__
    if scorer.owns_cache:
        return f"stacked layers keep keys and values as they are, which {name} does not"
    if type(scorer).arrange is not PageScorer.arrange:
        return f"stacked layers hold prompts in the order of the text, which {name} does not"
    if scorer.reduce != "max" or type(scorer).combine is not PageScorer.combine:
        return f"stacked layers choose by the best score of the query heads of a key/value head, which {name} does not"
    if select.reuse is not None or select.share != 1:
        lacking = f"share={select.share}" if select.reuse is None else f"reuse={select.reuse}"
        return f"stacked layers score pages in every layer and at every step, which {lacking} does not"
    if not isinstance(select.budget, int):
        return f"stacked layers read by one budget, which budget={select.budget} is not"
    if window is not None:
        return f"stacked layers that select attend to the whole text, which those with a window of {window} do not"
    return None


def run_indexed(
    layers: IndexedLayers, x_BTD: jax.Array, cache: LayerCache, run: LayerRun, policy: DepthPolicy, state: Any
) -> LayersOut:
    """Run one token of each sequence through the layers that ``policy`` asks for.

    Args:
        cache: stacked keys and values ``[L, B, S, K, H]``, with summaries ``[L, B, P, K, X]`` if ``run`` selects.

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
    out, cache = _decode(layers, x_BTD, cache, run, **schedule)
    return LayersOut(
        x_BTD=out.x_BD[:, None],
        caches=cache,
        state=state,
        needed_BT=out.ran_B[:, None],
        run=jnp.max(out.ran_B),
    )


def _decode(
    layers: IndexedLayers, x_BTD: jax.Array, cache: LayerCache, run: LayerRun, **schedule: Any
) -> tuple[Decoded, LayerCache]:
    """Return what the layers of a schedule make of the tokens, and the cache with these."""
    if cache.summary is not None:
        select = run.select
        read = Selection(
            kind=select.scorer.kind,
            page_size=select.scorer.page_size,
            pages=select.budget // select.scorer.page_size,
            sinks=select.sink_pages,
            recent=select.recent_pages,
            dense_layers=select.dense_layers,
        )
        schedule |= {"summary_LBPKX": cache.summary, "select": read}
    out = layers.decode(x_BTD[:, 0], cache.k, cache.v, run.positions_BT[:, 0], **schedule)
    summary = None if cache.summary is None else out.summary_LBPKX
    return out, dataclasses.replace(cache, k=out.k_LBSKH, v=out.v_LBSKH, summary=summary)


def _run_groups(layers, x_BTD, cache, run, policy, state, top):
    """Ask between groups of layers; the loop ends when every sequence has exited."""
    num_layers = len(layers)
    live_B = run.live_BT[:, 0]
    decisions = [layer for layer in policy.decision_layers(num_layers) if layer < top]
    groups = np.array(layer_groups(decisions, top), np.int32)
    starts, sizes = jnp.array(groups[:, 0]), jnp.array(groups[:, 1] - groups[:, 0])
    longest = int(np.max(groups[:, 1] - groups[:, 0]))

    def body(carry):
        group, x_BTD, prev_BTD, cache, exited_BT, state, needed_BT, _ = carry
        obs = observe(run, num_layers, starts[group], x_BTD, prev_BTD)
        active_BT, exited_BT, state = decide(run, policy, obs, exited_BT, state)
        going = jnp.any(active_BT)
        out, cache = _decode(
            layers,
            x_BTD,
            cache,
            run,
            order_M=starts[group] + jnp.arange(longest),
            length=jnp.where(going, sizes[group], 0),
            planned_B=jnp.where(active_BT[:, 0], sizes[group], 0),
            live_B=live_B & going,
            fill=False,
        )
        needed_BT = needed_BT + out.ran_B[:, None]
        return group + going, out.x_BD[:, None], out.before_BD[:, None], cache, exited_BT, state, needed_BT, going

    zero, going = jnp.int32(0), jnp.any(run.live_BT)
    carry = (zero, x_BTD, x_BTD, cache, ~run.live_BT, state, jnp.zeros(run.live_BT.shape, jnp.int32), going)
    carry = jax.lax.while_loop(lambda carry: (carry[0] < len(groups)) & carry[-1], body, carry)
    group, x_BTD, _, cache, _, state, needed_BT, _ = carry
    ran = jnp.where(group < len(groups), jnp.take(starts, group, mode="clip"), top)
    if run.propagate:
        _, cache = _decode(
            layers,
            x_BTD,
            cache,
            run,
            order_M=ran + jnp.arange(top),
            length=top - ran,
            planned_B=jnp.zeros(live_B.shape, jnp.int32),
            live_B=live_B,
            fill=True,
        )
    return LayersOut(x_BTD=x_BTD, caches=cache, state=state, needed_BT=needed_BT, run=ran)
