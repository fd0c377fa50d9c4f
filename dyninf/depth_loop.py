"""Run the layers of a model under a depth policy: the drivers, and what is stored for layers that did not run.

Drivers, which agree by law:

- ``unrolled``: static schedules. The kept layers, one after the other, no control flow.
- ``segments``: one conditional per decision (exits) or per skippable layer, over per-layer arrays. Layers that no token
  needs are not read. The default for data-dependent depth.
- ``indexed``: stacked layers, run by a traced index; see :mod:`dyninf.indexed`. The default for layers that can.
- ``Compact(capacity=C)``: ``segments`` on C gathered rows where no more of them need the layers; see
  :mod:`dyninf.compaction`.
- ``masked``: every layer runs, tokens that do not need it keep their state. Teacher forcing and reference semantics.
- ``scan``: ``masked`` as one ``lax.scan`` over stacked layers; compiles once for all layers.

Keys and values of layers that did not run (``fill``): ``propagate`` projects them from the state the token ended
with (CALM's state propagation), ``mask`` leaves the slots empty and hides them, ``catch_up`` lets tokens run their
upper layers later (:mod:`dyninf.catch_up`; only ``segments``). Policies whose schedules are nested never read them and
store nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from dyninf.attention import store
from dyninf.cache import LayerCache
from dyninf.catch_up import Pending, catch_up_span, leave_waiting, room
from dyninf.compaction import Compact, compact_span
from dyninf.depth.base import DepthPolicy
from dyninf.indexed import is_indexed, refuse_indexed, run_indexed
from dyninf.kv.choice import lend
from dyninf.layer_run import LayerRun, LayersOut, decide, layer_groups, observe, plain_span, take_skip_state
from dyninf.model import DecoderLayer
from dyninf.plan import Plan, catches_up
from dyninf.revival import Dropped, run_reviving

Named = Literal["unrolled", "segments", "indexed", "masked", "scan"]
Driver = Named | Compact
DRIVERS: tuple[str, ...] = get_args(Named)


def default_driver(layers: Sequence[DecoderLayer], plan: Plan) -> Driver:
    """Return the driver for decoding.

    ``indexed`` for stacked layers wherever it can run the plan, else ``unrolled`` for static schedules and
    ``segments`` for the rest.
    """
    if is_indexed(layers) and refuse_indexed(plan, layers) is None:
        return "indexed"
    return "segments" if plan.depth.static_layers(len(layers)) is None else "unrolled"


def check_driver(driver: Any, layers: Sequence[DecoderLayer], plan: Plan, batch: int) -> None:
    """Raise before any work if a driver cannot decode a batch of this size under this plan.

    Raises:
        ValueError: if the driver is unknown, ``unrolled`` is asked of a policy that is not static, ``Compact`` would
            gather the whole batch, another driver than ``segments`` is asked to catch up or another than ``unrolled``
            to bring dropped tokens back, ``scan`` is asked to share choices of pages, or ``indexed`` is asked of layers
            that are not stacked or of a plan that it cannot run.
    """
    num_layers = len(layers)
    if not isinstance(driver, Compact) and driver not in DRIVERS:
        raise ValueError(f"expected driver to be one of {DRIVERS} or Compact(capacity=...), got {driver!r}")
    if driver == "indexed" and not is_indexed(layers):
        raise ValueError("expected stacked layers for driver 'indexed'; use dyninf.models.stack_for_decoding")
    if driver == "indexed" and (reason := refuse_indexed(plan, layers)) is not None:
        raise ValueError(f"expected another driver than 'indexed' for {plan.depth}: {reason}; use 'segments'")
    if driver == "scan" and getattr(plan.select, "share", 1) > 1:
        raise ValueError(
            f"expected another driver than 'scan' for layers that share a choice of pages, got share="
            f"{plan.select.share}; use 'masked'"
        )
    if driver == "unrolled" and plan.depth.static_layers(num_layers) is None:
        raise ValueError(f"expected a static schedule for driver 'unrolled', got {plan.depth}; use 'segments'")
    if isinstance(driver, Compact) and driver.capacity >= batch:
        raise ValueError(
            f"expected a capacity below the batch of {batch}, got {driver}; gathering all rows saves nothing, "
            "use 'segments'"
        )
    if catches_up(plan, num_layers) and driver != "segments":
        raise ValueError(f"expected driver 'segments' for fill='catch_up', got {driver!r}; leave the driver out")
    if plan.sparsity.revive and driver != "unrolled":
        raise ValueError(
            f"expected driver 'unrolled' for {type(plan.sparsity).__name__} with revive={plan.sparsity.revive}, got "
            f"{driver!r}; leave the driver out"
        )


def run_layers(
    layers: Sequence[DecoderLayer],
    x_BTD: jax.Array,
    caches: Sequence[LayerCache | None] | LayerCache,
    run: LayerRun,
    policy: DepthPolicy,
    state: Any,
    *,
    driver: Driver,
    pending: Pending | Dropped | None = None,
) -> LayersOut:
    """Run ``x_BTD`` through the layers that ``policy`` asks for; :func:`check_driver` says whether a driver can.

    Args:
        caches: one a layer; for ``indexed`` the stacked cache of all.
        pending: tokens that wait for their upper layers, of a plan that catches up or brings dropped tokens back.

    Raises:
        ValueError: if ``scan`` is asked of layers that differ in structure.
    """
    num_layers = len(layers)
    if driver == "indexed":
        return run_indexed(layers, x_BTD, caches, run, policy, state)
    if isinstance(pending, Dropped):
        return run_reviving(layers, x_BTD, caches, run, state, pending)
    if driver == "unrolled":
        return run_static(layers, x_BTD, caches, run, policy, state, policy.static_layers(num_layers))
    # Decoded tokens run no layer that the prompt did not run: what lies above is not even compiled.
    top = max(policy.prefill_layers(num_layers)) + 1
    decisions = [layer for layer in policy.decision_layers(num_layers) if layer < top]
    if driver == "scan":
        return _scan(layers, top, x_BTD, caches, run, policy, state)
    if pending is not None:
        run = dataclasses.replace(run, governed_BT=run.governed_BT & room(pending, top)[:, None])
        span = catch_up_span(layers, run, pending, first_exit=min(decisions, default=top), top=top)
    elif isinstance(driver, Compact):
        span = compact_span(layers, run, driver.capacity)
    else:
        span = plain_span(layers, run)
    out = _grouped(
        layers, decisions, top, x_BTD, caches, run, policy, state, pending, span=span, conditional=driver != "masked"
    )
    if pending is None:
        return out
    return dataclasses.replace(out, pending=leave_waiting(out.pending, out, run.live_BT, top))


def run_static(
    layers: Sequence[DecoderLayer],
    x_BTD: jax.Array,
    caches: Sequence[LayerCache | None],
    run: LayerRun,
    policy: DepthPolicy,
    state: Any,
    kept: tuple[int, ...],
    *,
    span: tuple[int, int] | None = None,
) -> LayersOut:
    """Run exactly the layers ``kept``; the driver ``unrolled``.

    Args:
        span: ``[start, stop)`` of the layers that are looked at; ``None`` for all that prompts run.
    """
    caches, prev_BTD = list(caches), x_BTD
    span = (0, max(policy.prefill_layers(len(layers))) + 1) if span is None else span
    for index in range(*span):
        entered_BTD, caches[index] = x_BTD, lend(caches[:index], caches[index])
        if index in kept:
            attend = run.attend(caches[index], run.live_BT, index)
            x_BTD, caches[index] = layers[index](x_BTD, run.positions_BT, attend)
        else:
            obs = observe(run, len(layers), index, x_BTD, prev_BTD)
            x_BTD = take_skip_state(policy, state, obs, run.live_BT, x_BTD)
        prev_BTD = entered_BTD
    num_run = sum(index in kept for index in range(*span))
    return LayersOut(
        x_BTD=x_BTD,
        caches=tuple(caches),
        state=state,
        needed_BT=run.live_BT.astype(jnp.int32) * num_run,
        run=jnp.int32(num_run),
    )


def _grouped(layers, decisions, top, x_BTD, caches, run, policy, state, carry, *, span, conditional):
    """Run the layers between decisions as one: always, or only where some token needs them."""
    num_layers, caches = len(layers), list(caches)
    prev_BTD, exited_BT, active_BT = x_BTD, ~run.live_BT, run.live_BT
    needed_BT, num_run = jnp.zeros(run.live_BT.shape, jnp.int32), jnp.int32(0)
    for number, (start, stop) in enumerate(layer_groups(decisions, top, split_after=policy.skips)):
        if policy.skips or number == 0:
            obs = observe(run, num_layers, start, x_BTD, prev_BTD)
            active_BT, exited_BT, state = decide(run, policy, obs, exited_BT, state)
            skipping_BT = ~active_BT & ~exited_BT
        caches[start] = lend(caches[:start], caches[start])
        following = None if policy.skips or stop == top else stop

        def run_group(operands, start=start, stop=stop, following=following):
            x, _, active, exited, state, group_caches, needed, num_run, carry = operands
            x, prev, group_caches, carry = span(start, stop, x, active, group_caches, carry)
            needed = needed + active * (stop - start)
            if following is not None:
                obs = observe(run, num_layers, following, x, prev)
                active, exited, state = decide(run, policy, obs, exited, state)
            return x, prev, active, exited, state, group_caches, needed, num_run + (stop - start), carry

        def fill_group(operands, start=start, stop=stop):
            x, _, active, exited, state, group_caches, needed, num_run, carry = operands
            filled = tuple(
                _fill(layer, x, cache, run) for layer, cache in zip(layers[start:stop], group_caches, strict=True)
            )
            return x, x, active, exited, state, filled, needed, num_run, carry

        operands = (x_BTD, prev_BTD, active_BT, exited_BT, state, tuple(caches[start:stop]), needed_BT, num_run, carry)
        always = not conditional or (number == 0 and start not in decisions)
        result = run_group(operands) if always else jax.lax.cond(jnp.any(active_BT), run_group, fill_group, operands)
        x_BTD, prev_BTD, active_BT, exited_BT, state, caches[start:stop], needed_BT, num_run, carry = result
        if policy.skips and start in decisions:
            x_BTD = take_skip_state(policy, state, obs, skipping_BT, x_BTD)
    return LayersOut(x_BTD=x_BTD, caches=tuple(caches), state=state, needed_BT=needed_BT, run=num_run, pending=carry)


def _scan(layers, top, x_BTD, caches, run, policy, state):
    num_layers = len(layers)
    if any(_kind(pair) != _kind((layers[0], caches[0])) for pair in zip(layers[:top], caches[:top], strict=True)):
        raise ValueError(
            "expected layers of one structure for driver 'scan' (one window and one kind of cache for all); "
            "use 'masked'"
        )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(layers[:top], caches[:top], strict=True))

    def body(carry, inputs):
        x, prev, exited, state, needed = carry
        index, (layer, cache) = inputs
        obs = observe(run, num_layers, index, x, prev)
        active, exited, state = decide(run, policy, obs, exited, state)
        y, cache = layer(x, run.positions_BT, run.attend(cache, active))
        y = take_skip_state(policy, state, obs, ~active & ~exited, jnp.where(active[:, :, None], y, x))
        return (y, x, exited, state, needed + active), cache

    needed_BT = jnp.zeros(run.live_BT.shape, jnp.int32)
    carry = (x_BTD, x_BTD, ~run.live_BT, state, needed_BT)
    (x_BTD, _, _, state, needed_BT), stacked_caches = jax.lax.scan(body, carry, (jnp.arange(top), stacked))
    used = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked_caches) for i in range(top)]
    return LayersOut(x_BTD=x_BTD, caches=(*used, *caches[top:]), state=state, needed_BT=needed_BT, run=jnp.int32(top))


def _kind(layer_and_cache):
    leaves, structure = jax.tree.flatten(layer_and_cache)
    return structure, [jnp.shape(leaf) for leaf in leaves]


def _fill(layer, x_BTD, cache, run):
    """Store what later tokens will read of a layer that no token ran."""
    if cache is None or not run.propagate:
        return cache
    k_BTKH, v_BTKH = layer.project_kv(x_BTD, run.positions_BT)
    return store(cache, k_BTKH, v_BTKH, run.positions_BT, run.live_BT, run.evict, run.select)
