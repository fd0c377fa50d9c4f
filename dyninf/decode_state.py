"""What decoding hands from step to step, and what it returns in the end."""

from typing import Any

import jax

from dyninf.cache import CacheSpec, KVCache
from dyninf.catch_up import Pending
from dyninf.kv.choice import choice_kinds, first_choices
from dyninf.kv.pages import made_for, own_caches, own_reads, summary_sizes
from dyninf.kv.top_k import TopK, layer_slots, merges
from dyninf.model import CausalLM, kv_shape
from dyninf.plan import Plan, catches_up, leaves_gaps
from dyninf.pytree import pytree
from dyninf.revival import Dropped
from dyninf.stats import StepStats


@pytree()
class DecodeState:
    """All that one step hands to the next; its types never change.

    Attributes:
        token: last token of each sequence ``[B]``, not yet in the cache.
        cache: keys and values of everything before it.
        depth: state of the depth policy.
        key: one random key per sequence ``[B]``.
        done: sequences that hit a stop or filled their cache ``[B]``.
        step: tokens sampled so far (a scalar; the first is sampled from the prompt).
        stop: stop sequences ``[R, M]``, right-aligned, filled with -1 on the left.
        recent: the last M tokens of each sequence ``[B, M]``.
        pending: tokens that wait for their upper layers, ``None`` unless the plan catches up or brings dropped tokens
            back.
    """

    token: jax.Array
    cache: KVCache
    depth: Any
    key: jax.Array
    done: jax.Array
    step: jax.Array
    stop: jax.Array
    recent: jax.Array
    pending: Pending | Dropped | None = None


@pytree()
class Generation:
    """Generated tokens ``[B, max_new_tokens]`` (-1 after the end), their number per sequence ``[B]``, and statistics.

    A stop token, or the tokens of a stop sequence, count among the generated ones; ``stopped [B]`` says which
    sequences ended that way. ``stats`` has one entry per decode step; the first token comes from the prompt.
    """

    tokens: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    stats: StepStats


def cache_layout(plan: Plan, model: CausalLM, batch: int, length: int, spec: CacheSpec) -> dict[str, Any]:
    """Return what :func:`dyninf.cache.init_cache` has to know to make the caches of a plan.

    Args:
        length: tokens of the prompts, padding included.
    """
    num_layers, entry = len(model.layers), kv_shape(model)
    sizes = summary_sizes(plan.select, num_layers, spec.capacity, entry.shape[-1])
    return {
        "track_valid": leaves_gaps(plan),
        "evicts": isinstance(plan.evict, TopK),
        "merges": merges(plan.evict),
        "slots": layer_slots(plan.evict, num_layers, spec.capacity),
        "summaries": sizes,
        "reads": own_reads(plan.select, sizes),
        "choices": first_choices(plan.select, sizes, model, batch),
        "own": own_caches(plan.select, num_layers, entry, batch, length, spec),
    }


def check_state(state: DecodeState, plan: Plan, num_layers: int) -> None:
    """Raise before any work if a state was made for a plan that keeps other things in it.

    Raises:
        ValueError: if the policy's state, the tracking of empty slots, what is evicted, the summaries of pages or the
            tokens that wait differ.
    """
    made = jax.eval_shape(lambda: plan.depth.init((state.token.shape[0], 1)))
    same_depth = jax.tree.structure(made) == jax.tree.structure(state.depth)
    same_cache = leaves_gaps(plan) == state.cache.tracks_valid
    same_cache &= state.cache.evicts == isinstance(plan.evict, TopK) and state.cache.merges == merges(plan.evict)
    slots = layer_slots(plan.evict, num_layers, state.cache.capacity)
    same_cache &= all(held <= budget for held, budget in zip(state.cache.slots, slots, strict=True))
    same_cache &= made_for(state.cache, plan.select)
    same_cache &= state.cache.choice_kinds == choice_kinds(plan.select, state.cache.summary_sizes)
    if not (same_depth and same_cache and _same_pending(state.pending, plan, num_layers)):
        raise ValueError(
            "expected a state that was made for this plan: its depth policy keeps another state, or the cache does not "
            f"track empty slots or waiting tokens as fill={plan.fill!r} needs, or evicts or selects otherwise; call "
            "prefill with the same plan"
        )


def _same_pending(pending: Pending | Dropped | None, plan: Plan, num_layers: int) -> bool:
    """Return whether the tokens that wait are those of a plan."""
    if isinstance(pending, Dropped):
        # Stages whose budget no prompt exceeds, the first ones, keep no states.
        last = plan.sparsity.stages[len(plan.sparsity.stages) - len(pending.stages) :]
        return (pending.revive, pending.stages) == (plan.sparsity.revive, last)
    window = None if pending is None else pending.layer_BW.shape[1]
    return window == (plan.window if catches_up(plan, num_layers) else None) and not plan.sparsity.revive
