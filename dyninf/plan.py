"""The Plan: everything dynamic about a run, in one frozen pytree.

Every field has an identity element and ``Plan()`` is the exact dense model. Fields that decide shapes are static;
thresholds and learned weights are leaves, so a sweep over them compiles once.
"""

import dataclasses
from typing import Literal

import jax

from dyninf.depth.base import DepthPolicy, RunAll, require_integer
from dyninf.kv.base import KeepAll, ReadAll
from dyninf.kv.top_k import TopK
from dyninf.model import CausalLM, query_shape
from dyninf.pytree import pytree
from dyninf.sampling import Greedy, Sampler
from dyninf.sparsity.base import Dense, SparsityPolicy


@pytree(static=("fill", "window"))
class Plan:
    """How to run a model.

    This version accepts the identity element of ``draft`` only, which marks where self-speculation plugs in.

    Args:
        sparsity: which blocks the tokens of a prompt attend to, and which tokens run which layers.
        evict: what the cache keeps.
        select: what a decode step reads of it.
        depth: which layers a token runs.
        fill: keys and values of layers that did not run: ``propagate`` projects them from the token's last state,
            ``mask`` leaves them empty and hidden, ``catch_up`` computes them exactly by running these layers when a
            later token does (:mod:`dyninf.catch_up`; for policies that exit).
        window: tokens of a sequence that may wait to catch up (at least 1); the one after them runs every layer.
        draft: a cheap plan that proposes tokens for this one to verify.
        sampler: how the next token is chosen.
    """

    sparsity: SparsityPolicy = Dense()
    evict: TopK | KeepAll = KeepAll()
    select: TopK | ReadAll = ReadAll()
    depth: DepthPolicy = RunAll()
    fill: Literal["propagate", "mask", "catch_up"] = "propagate"
    # With the new token that makes 8, the smallest tile of the matrix units: at batch 1 waiting tokens then ride along
    # for the time of one. At least one token in 8 is a full one.
    window: int = 7
    draft: None = None
    sampler: Sampler = Greedy()


def leaves_gaps(plan: Plan) -> bool:
    """Return whether layers that do not run leave cache slots empty that later tokens would otherwise read."""
    return bool(plan.sparsity.stages) or (plan.fill == "mask" and not plan.depth.nested)


def propagates(plan: Plan) -> bool:
    """Return whether tokens store the projection of their last state for layers that they do not run."""
    return plan.fill == "propagate" and not plan.depth.nested


def catches_up(plan: Plan, num_layers: int) -> bool:
    """Return whether tokens wait to run their upper layers; never where no later token would read their keys."""
    return plan.fill == "catch_up" and not plan.depth.nested and plan.depth.static_layers(num_layers) is None


def check(plan: Plan, model: CausalLM) -> None:
    """Raise before any work if the plan does not fit the model.

    Raises:
        ValueError: if a policy names a layer that does not exist or a parameter is out of its range.
        NotImplementedError: if a field holds something this version cannot run.
    """
    if not isinstance(plan, Plan):
        raise ValueError(f"expected a Plan, got {type(plan).__name__}; put a policy in its field: Plan(depth=policy)")
    if plan.draft is not None:
        raise NotImplementedError(f"expected draft=None in this version, got {plan.draft!r}")
    for name, identity in (("evict", KeepAll), ("select", ReadAll)):
        value = getattr(plan, name)
        if not isinstance(value, TopK | identity):
            raise ValueError(
                f"expected {name} to be TopK(scorer=..., budget=...) or {identity.__name__}(), got {value!r}"
            )
    if not isinstance(plan.sparsity, SparsityPolicy):
        raise ValueError(f"expected sparsity to be a SparsityPolicy, got {plan.sparsity!r}")
    if not isinstance(plan.depth, DepthPolicy):
        raise ValueError(f"expected depth to be a DepthPolicy, got {plan.depth!r}")
    if not isinstance(plan.sampler, Sampler):
        raise ValueError(f"expected sampler to be a Sampler, got {plan.sampler!r}")
    for name in ("sparsity", "depth", "sampler"):
        value = getattr(plan, name)
        if jax.tree_util.all_leaves([value]):
            raise ValueError(f"expected {name} to be a pytree, got {value!r}; decorate its class with dyninf.pytree()")
    if plan.fill not in ("propagate", "mask", "catch_up"):
        raise ValueError(f"expected fill 'propagate', 'mask' or 'catch_up', got {plan.fill!r}")
    if plan.fill == "catch_up" and plan.depth.skips:
        raise ValueError(
            f"expected a policy that exits for fill='catch_up', got {plan.depth}, which skips layers; use 'propagate' "
            "or 'mask'"
        )
    require_integer("the window", plan.window, 1, float("inf"))
    if not hasattr(model.layers, "__len__"):
        raise ValueError(
            f"expected model.layers to be a sequence, got {type(model.layers).__name__}; unstack the layers"
        )
    if not isinstance(plan.sparsity, Dense):
        plan.sparsity.validate(len(model.layers), query_shape(model).shape[2])
    _check_stages(plan, len(model.layers))
    _check_cache(plan, len(model.layers))
    plan.depth.validate(len(model.layers))
    plan.sampler.validate()


def _check_stages(plan: Plan, num_layers: int) -> None:
    """Raise if tokens of a prompt cannot be dropped together with the rest of the plan."""
    if not plan.sparsity.stages:
        return
    dropping = f"for {type(plan.sparsity).__name__}, which drops tokens"
    if plan.evict != KeepAll() or plan.select != ReadAll():
        raise NotImplementedError(
            f"expected evict=KeepAll() and select=ReadAll() {dropping}, got {plan.evict!r} and {plan.select!r}"
        )
    if plan.fill == "catch_up":
        raise NotImplementedError(f"expected fill='propagate' or 'mask' {dropping}, got 'catch_up'")
    if plan.sparsity.revive and plan.depth != RunAll():
        raise NotImplementedError(
            f"expected depth=RunAll() for {type(plan.sparsity).__name__} with revive={plan.sparsity.revive}, got "
            f"{plan.depth!r}: tokens that return would stop where the new one does"
        )
    kept = plan.depth.prefill_layers(num_layers)
    for layer, _ in plan.sparsity.stages:
        if layer <= max(kept) and layer - 1 not in kept:
            raise ValueError(
                f"expected prompts to run layer {layer - 1}, which says what is dropped before layer {layer}, got "
                f"{plan.depth}, under which they do not; move the stage"
            )


def _check_cache(plan: Plan, num_layers: int) -> None:
    """Raise if eviction or selection is out of range, or cannot be had together with the rest of the plan."""
    filled = plan.fill == "propagate" or plan.depth.nested
    if isinstance(plan.evict, TopK):
        plan.evict.validate(num_layers)
        if not filled:
            raise NotImplementedError(
                f"expected fill='propagate' for a plan that evicts, got {plan.fill!r}, under which layers lack keys of "
                "some tokens"
            )
    if isinstance(plan.select, TopK):
        plan.select.validate_selection(num_layers)
        if isinstance(plan.evict, TopK):
            raise NotImplementedError(
                "expected evict=KeepAll() for a plan that selects: slots of a cache that evicts are in no order, so "
                "that its pages hold no neighbours"
            )
        if plan.select.scorer.owns_cache and leaves_gaps(plan):
            raise NotImplementedError(
                f"expected fill='propagate' for a plan with {type(plan.select.scorer).__name__}, got 'mask': its cache "
                "cannot hide keys of layers that did not run"
            )
        if plan.select.scorer.owns_cache and (plan.select.share != 1 or plan.select.reuse is not None):
            raise NotImplementedError(
                f"expected share=1 and reuse=None for a plan with {type(plan.select.scorer).__name__}, whose layers "
                f"hold no scores, got share={plan.select.share} and reuse={plan.select.reuse}"
            )
        _check_leaders(plan, num_layers)
        if plan.fill == "catch_up" and not filled:
            raise NotImplementedError(
                "expected fill='propagate' or 'mask' for a plan that selects, got 'catch_up', under which several "
                "tokens of a sequence would have to choose at once"
            )


def _check_leaders(plan: Plan, num_layers: int) -> None:
    """Raise ValueError if a static schedule runs a layer that takes the scores of one that it never runs."""
    kept, dense = plan.depth.static_layers(num_layers) or (), plan.select.dense_layers
    for layer in kept:
        leader = layer - max(layer - dense, 0) % plan.select.share
        if leader not in kept:
            raise ValueError(
                f"expected layers that share a choice of pages to run with the first of their {plan.select.share}, got "
                f"layer {layer} without layer {leader}; change dense_layers or share, or the layers that are skipped"
            )


def describe(plan: Plan) -> str:
    """Return the fields of a plan that differ from the dense model, ``dense`` if none does."""
    changed = [
        f"{field.name}={getattr(plan, field.name)!r}"
        for field in dataclasses.fields(plan)
        if getattr(plan, field.name) != field.default
    ]
    return ", ".join(changed) or "dense"
