"""Run the layers of a model under a depth policy: the drivers, and what is stored for layers that did not run.

Drivers, which agree by law:

- ``unrolled``: static schedules. The kept layers, one after the other, no control flow.
- ``segments``: one conditional per decision (exits) or per skippable layer, over per-layer arrays. Layers that no token
  needs are not read. The default for data-dependent depth.
- ``masked``: every layer runs, tokens that do not need it keep their state. Teacher forcing and reference semantics.
- ``scan``: ``masked`` as one ``lax.scan`` over stacked layers; compiles once for all layers.

Keys and values of layers that did not run (``fill``): ``propagate`` projects them from the state the token ended
with (CALM's state propagation), ``mask`` leaves the slots empty and hides them. Policies whose schedules are nested
never read them and store nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dyninf.attention import LayerAttend, slots_of
from dyninf.cache import LayerCache, write
from dyninf.depth.base import EXIT, SKIP, DepthPolicy, LayerObs, consult
from dyninf.model import DecoderLayer
from dyninf.pytree import pytree

Driver = Literal["unrolled", "segments", "masked", "scan"]
DRIVERS: tuple[str, ...] = ("unrolled", "segments", "masked", "scan")


@dataclass(frozen=True, kw_only=True)
class LayerRun:
    """What the layers need to know about the tokens at hand.

    Attributes:
        positions_BT: position of each token in its sequence.
        step_BT: index among the generated tokens.
        live_BT: tokens that exist; the others decide nothing and keep their state.
        governed_BT: tokens the policy decides for; other live tokens run every layer.
        attend: builds the ``attend`` function of a layer.
        unembed: logits of a state.
        fill: what to store for layers that did not run.
    """

    positions_BT: jax.Array
    step_BT: jax.Array
    live_BT: jax.Array
    governed_BT: jax.Array
    attend: LayerAttend
    unembed: Callable[[jax.Array], jax.Array]
    fill: Literal["propagate", "mask"]


@pytree()
class LayersOut:
    """Result of :func:`run_layers`.

    Attributes:
        x_BTD: final states, before the final norm.
        caches: updated caches, one per layer.
        state: policy state.
        needed_BT: layers each token needed (0 for tokens that do not exist).
        run: layers the hardware ran, int32.
    """

    x_BTD: jax.Array
    caches: tuple[LayerCache | None, ...]
    state: Any
    needed_BT: jax.Array
    run: jax.Array


def default_driver(policy: DepthPolicy, num_layers: int) -> Driver:
    """Return the driver for decoding: ``unrolled`` for static schedules, ``segments`` for the rest."""
    return "segments" if policy.static_layers(num_layers) is None else "unrolled"


def run_layers(
    layers: Sequence[DecoderLayer],
    x_BTD: jax.Array,
    caches: Sequence[LayerCache | None],
    run: LayerRun,
    policy: DepthPolicy,
    state: Any,
    *,
    driver: Driver,
) -> LayersOut:
    """Run ``x_BTD`` through the layers that ``policy`` asks for.

    Raises:
        ValueError: if the driver is unknown, ``unrolled`` is asked of a policy that is not static, or ``scan`` of
            layers that differ in structure.
    """
    if driver not in DRIVERS:
        raise ValueError(f"expected driver to be one of {DRIVERS}, got {driver!r}")
    if driver == "unrolled":
        kept = policy.static_layers(len(layers))
        if kept is None:
            raise ValueError(f"expected a static schedule for driver 'unrolled', got {policy}; use 'segments'")
        return run_static(layers, x_BTD, caches, run, kept, state)
    drive = _scan if driver == "scan" else _grouped
    # Decoded tokens run no layer that the prompt did not run: what lies above is not even compiled.
    top = max(policy.prefill_layers(len(layers))) + 1
    x_BTD, used, state, needed_BT, num_run = drive(
        layers, top, x_BTD, tuple(caches[:top]), run, policy, state, conditional=driver == "segments"
    )
    return LayersOut(x_BTD=x_BTD, caches=(*used, *caches[top:]), state=state, needed_BT=needed_BT, run=num_run)


def run_static(
    layers: Sequence[DecoderLayer],
    x_BTD: jax.Array,
    caches: Sequence[LayerCache | None],
    run: LayerRun,
    kept: tuple[int, ...],
    state: Any,
) -> LayersOut:
    """Run exactly the layers ``kept``; the driver ``unrolled``."""
    caches = list(caches)
    for index in kept:
        x_BTD, caches[index] = layers[index](x_BTD, run.positions_BT, run.attend(caches[index], run.live_BT))
    return LayersOut(
        x_BTD=x_BTD,
        caches=tuple(caches),
        state=state,
        needed_BT=run.live_BT.astype(jnp.int32) * len(kept),
        run=jnp.int32(len(kept)),
    )


def _grouped(layers, top, x_BTD, caches, run, policy, state, *, conditional):
    num_layers = len(layers)
    decisions = [layer for layer in policy.decision_layers(num_layers) if layer < top]
    prev_BTD, exited_BT, active_BT = x_BTD, ~run.live_BT, run.live_BT
    needed_BT, num_run = jnp.zeros(run.live_BT.shape, jnp.int32), jnp.int32(0)
    caches = list(caches)
    groups = _groups(decisions, top, split_after=policy.skips)
    for number, (start, stop) in enumerate(groups):
        if policy.skips or number == 0:
            active_BT, exited_BT, state = _decide(run, policy, num_layers, start, x_BTD, prev_BTD, exited_BT, state)
        following = None if policy.skips or stop == top else stop

        def run_group(operands, start=start, stop=stop, following=following):
            x, prev, active, exited, state, group_caches, needed, num_run = operands
            updated = []
            for layer, cache in zip(layers[start:stop], group_caches, strict=True):
                y, cache = layer(x, run.positions_BT, run.attend(cache, active))
                prev, x = x, jnp.where(active[:, :, None], y, x)
                updated.append(cache)
            needed = needed + active * (stop - start)
            if following is not None:
                active, exited, state = _decide(run, policy, num_layers, following, x, prev, exited, state)
            return x, prev, active, exited, state, tuple(updated), needed, num_run + (stop - start)

        def fill_group(operands, start=start, stop=stop):
            x, prev, active, exited, state, group_caches, needed, num_run = operands
            filled = [
                _fill(layer, x, cache, run, policy)
                for layer, cache in zip(layers[start:stop], group_caches, strict=True)
            ]
            return x, prev, active, exited, state, tuple(filled), needed, num_run

        operands = (x_BTD, prev_BTD, active_BT, exited_BT, state, tuple(caches[start:stop]), needed_BT, num_run)
        always = not conditional or (number == 0 and start not in decisions)
        result = run_group(operands) if always else jax.lax.cond(jnp.any(active_BT), run_group, fill_group, operands)
        x_BTD, prev_BTD, active_BT, exited_BT, state, caches[start:stop], needed_BT, num_run = result
    return x_BTD, caches, state, needed_BT, num_run


def _scan(layers, top, x_BTD, caches, run, policy, state, *, conditional):
    num_layers = len(layers)
    if any(jax.tree.structure(layer) != jax.tree.structure(layers[0]) for layer in layers[:top]):
        raise ValueError("expected layers of one structure for driver 'scan' (one window for all); use 'masked'")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(layers[:top], caches, strict=True))

    def body(carry, inputs):
        x, prev, exited, state, needed = carry
        index, (layer, cache) = inputs
        active, exited, state = _decide(run, policy, num_layers, index, x, prev, exited, state)
        y, cache = layer(x, run.positions_BT, run.attend(cache, active))
        return (jnp.where(active[:, :, None], y, x), x, exited, state, needed + active), cache

    needed_BT = jnp.zeros(run.live_BT.shape, jnp.int32)
    carry = (x_BTD, x_BTD, ~run.live_BT, state, needed_BT)
    (x_BTD, _, _, state, needed_BT), stacked_caches = jax.lax.scan(body, carry, (jnp.arange(top), stacked))
    caches = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked_caches) for i in range(top)]
    return x_BTD, caches, state, needed_BT, jnp.int32(top)


def _decide(run, policy, num_layers, layer, x_BTD, prev_BTD, exited_BT, state):
    """Return which tokens run ``layer``, which have exited, and the policy's state."""
    obs = LayerObs(
        layer=layer,
        num_layers=num_layers,
        first=False,
        x_BTD=x_BTD,
        prev_BTD=prev_BTD,
        step_BT=run.step_BT,
        logits=lambda: run.unembed(x_BTD),
    )
    action_BT, state = consult(policy, state, obs)
    exited_BT = exited_BT | (run.governed_BT & (action_BT == EXIT))
    return ~exited_BT & ~(run.governed_BT & (action_BT == SKIP)), exited_BT, state


def _fill(layer, x_BTD, cache, run, policy):
    """Store what later tokens will read of a layer that no token ran."""
    if cache is None or policy.nested or run.fill == "mask":
        return cache
    k_BTKH, v_BTKH = layer.project_kv(x_BTD, run.positions_BT)
    return write(cache, k_BTKH, v_BTKH, slots_of(cache, run.positions_BT, run.live_BT))


def _groups(decisions, num_layers, *, split_after):
    """Split the layers at every decision; also behind it where the decision holds for one layer only."""
    starts = {0, *decisions}
    if split_after:
        starts |= {layer + 1 for layer in decisions if layer + 1 < num_layers}
    ordered = sorted(starts)
    return list(zip(ordered, [*ordered[1:], num_layers], strict=True))
