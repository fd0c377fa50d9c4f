"""The cache policies of ``configs/plans.py`` with another budget, by one rule for all.

- A plan that evicts keeps ``budget`` tokens; one that selects reads as many whole pages as the budget holds, of its own
  page size.
- The plan's own sinks and recent tokens stay where they fit: sinks take a quarter of the budget at most, the newest
  tokens a half, both in whole pages for a plan that selects, which always reads the last page.
- Budgets that differ by layer keep their proportions: what each layer has beyond sinks and recent tokens is scaled
  alike.
- ``dense_layers`` stay; rows say how many there are.
- A scorer that takes the rotation of keys back gets the base of the model's. Outliers, pages that are read beside the
  budget, are scaled with it.
"""

import dataclasses
from typing import Any

import dyninf
from dyninf.configs.plans import plans
from dyninf.kv import TopK
from dyninf.models import Transformer

DENSE = "dense"
FAMILIES = ("evict_", "select_")
SHALLOW = 4  # layers of the smallest model that has named plans; names do not depend on it


def policy_names() -> list[str]:
    """Return the names of the plans that evict or select."""
    return [name for name in plans(SHALLOW) if name.startswith(FAMILIES)]


def plan_with_budget(name: str, budget: int, model: Transformer) -> dyninf.Plan:
    """Return a named plan that keeps or reads ``budget`` tokens of a layer, or up to a page less.

    Raises:
        ValueError: if the policy cannot have this budget.
    """
    plan = plans(len(model.layers))[name]
    field = "evict" if isinstance(plan.evict, TopK) else "select"
    policy = getattr(plan, field)
    if not isinstance(policy, TopK):
        raise ValueError(f"expected {name} to hold a TopK, got {policy!r}; leave it out of --policies")
    page = policy.scorer.page_size if field == "select" else 1
    pages = budget // page
    if pages < 1:
        raise ValueError(f"expected a budget of at least one page of {page} tokens for {name}, got {budget}")
    sinks = min(policy.sinks, pages // 4 * page)
    # Where the newest token begins a page, as many recent ones as n pages hold take n + 1.
    recent = min(policy.recent, max(1, (pages // 2 - 1) * page + 1))
    size = _by_layer(policy, budget, sinks + recent) if isinstance(policy.budget, tuple) else pages * page
    scorer = _fitted(policy, budget, model)
    changed = dataclasses.replace(policy, scorer=scorer, budget=size, sinks=sinks, recent=recent)
    plan = dataclasses.replace(plan, **{field: changed})
    dyninf.check(plan, model)
    return plan


def settings(plan: dyninf.Plan) -> dict[str, Any]:
    """Return what a row says of a plan's cache: tokens, and first layers that read everything."""
    policy = plan.evict if isinstance(plan.evict, TopK) else plan.select
    page_size = getattr(getattr(policy, "scorer", None), "page_size", None)
    names = ("budget", "sinks", "recent", "dense_layers")
    return {"page_size": page_size} | {name: getattr(policy, name, None) for name in names}


def _by_layer(policy: TopK, mean: int, forced: int) -> tuple[int, ...]:
    """Return budgets of this mean, or a little less, in the proportions of the policy's own."""
    own = [tokens - policy.sinks - policy.recent for tokens in policy.budget]
    scale = (mean - forced) * len(own) / sum(own)
    return tuple(forced + int(tokens * scale) for tokens in own)


def _fitted(policy: TopK, budget: int, model: Transformer) -> Any:
    """Return the scorer with the model's rotary base and as many outliers as the budget has, if it has these."""
    scorer, changes = policy.scorer, {}
    if hasattr(scorer, "theta"):
        changes["theta"] = model.config.rope_theta
    if hasattr(scorer, "outliers"):
        changes["outliers"] = round(scorer.outliers * budget / policy.budget)
    return dataclasses.replace(scorer, **changes)
