"""Run prompts through the layers: all tokens at once, or chunk by chunk against the growing cache.

In chunks, activations take the memory of one chunk, and one program serves prompts of all lengths up to the width of
the token array: chunks beyond the longest prompt are not run. A token sees the keys that it sees otherwise, so that the
result is that of a prompt read at once, up to rounding, where a sparsity policy chooses by positions alone. Policies
that look at queries see those of the chunk. Attention reads keys and values from the cache, in its dtype.

Where a sparsity policy drops tokens, the others are gathered in their order, and the layers above run on arrays of the
budget's width. Each token writes to the slot of its position; slots of tokens that were dropped stay empty and hidden.
"""

import jax
import jax.numpy as jnp

from dyninf.attention import LayerAttend, attend_chunk, attend_prompt
from dyninf.cache import KVCache, LayerCache
from dyninf.depth.base import require_integer
from dyninf.depth_loop import run_static
from dyninf.kv.base import KeepAll
from dyninf.kv.pages import arranges, summarize_prompt
from dyninf.layer_run import LayerRun, LayersOut
from dyninf.model import Attend, CausalLM
from dyninf.own_cache import OwnCache
from dyninf.plan import Plan, propagates
from dyninf.revival import Dropped, put_states
from dyninf.sparsity.base import PromptObs, SparsityPolicy


def padded_length(length: int, chunk: int | None) -> int:
    """Return the slots that prompts of ``length`` tokens, padding included, need while they are read in chunks."""
    return length if chunk is None or chunk >= length else -(-length // chunk) * chunk


def check_chunk(plan: Plan, chunk: int | None) -> None:
    """Raise before any work if prompts cannot be read in chunks of so many tokens under a plan.

    Raises:
        ValueError: if ``chunk`` is not a whole number of at least 1.
        NotImplementedError: if what the cache holds depends on the whole prompt.
    """
    if chunk is None:
        return
    require_integer("the chunk of a prompt", chunk, 1, float("inf"))
    if plan.evict != KeepAll():
        raise NotImplementedError(
            f"expected evict=KeepAll() for prompts read in chunks, got {plan.evict!r}, which scores whole prompts; "
            "leave the chunk out"
        )
    if arranges(plan.select):
        raise NotImplementedError(
            f"expected a cache in the order of the text for prompts read in chunks, got {plan.select.scorer!r}, which "
            "makes its own of whole prompts; leave the chunk out"
        )
    if plan.sparsity.stages:
        raise NotImplementedError(
            f"expected a sparsity policy that drops no token for prompts read in chunks, got {plan.sparsity!r}; leave "
            "the chunk out"
        )


def run_prompt(
    model: CausalLM, tokens_BT: jax.Array, lengths_B: jax.Array, plan: Plan, cache: KVCache, chunk: int | None
) -> tuple[jax.Array, tuple[LayerCache | OwnCache, ...], Dropped | None]:
    """Run prompts into an empty cache.

    Args:
        chunk: tokens that are read at a time; prompts that are no longer are read at once, as with ``None``.

    Returns:
        The final state of the last token of each prompt ``[B, 1, D]``, the caches of all layers, and the states of
        dropped tokens that may return, ``None`` for plans under which none does.

    Raises:
        ValueError: if the chunk is no multiple of the blocks of a sparsity policy, or the cache has no room for it.
    """
    check_chunk(plan, chunk)
    length = tokens_BT.shape[1]
    if chunk is None or chunk >= length:
        return _run_whole(model, tokens_BT, lengths_B, plan, cache)
    last_B11 = (lengths_B - 1)[:, None, None]
    padded = padded_length(length, chunk)
    if cache.capacity < padded:
        raise ValueError(f"expected a cache of at least {padded} slots for chunks of {chunk}, got {cache.capacity}")
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, padded - length)))

    def body(number: jax.Array, carry: tuple) -> tuple:
        last_BTD, caches = carry
        offset = number * chunk
        tokens_BC = jax.lax.dynamic_slice_in_dim(tokens_BT, offset, chunk, axis=1)
        attend = attend_chunk(lengths_B, offset, plan.sparsity)
        positions_BT = jnp.broadcast_to(offset + jnp.arange(chunk), tokens_BC.shape)
        live_BT = positions_BT < lengths_B[:, None]
        out = _run(model, model.embed(tokens_BC), positions_BT, live_BT, plan, caches, attend)
        at_B11 = last_B11 - offset
        here_BTD = jnp.take_along_axis(out.x_BTD, jnp.clip(at_B11, 0, chunk - 1), axis=1)
        return jnp.where((at_B11 >= 0) & (at_B11 < chunk), here_BTD, last_BTD), out.caches

    like = jax.eval_shape(model.embed, tokens_BT[:, :1])
    first = (jnp.zeros(like.shape, like.dtype), cache.layers)
    last_BTD, caches = jax.lax.fori_loop(0, -(-jnp.max(lengths_B) // chunk), body, first)
    return last_BTD, tuple(summarize_prompt(layer, plan.select, length, lengths_B) for layer in caches), None


def _run_whole(
    model, tokens_BT, lengths_B, plan, cache
) -> tuple[jax.Array, tuple[LayerCache | OwnCache, ...], Dropped | None]:
    """Run prompts at once, on fewer of their tokens from stage to stage where the sparsity policy drops some."""
    x_BTD, caches = model.embed(tokens_BT), cache.layers
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    top = max(plan.depth.prefill_layers(len(model.layers))) + 1
    stages = [(layer, budget) for layer, budget in plan.sparsity.stages if layer < top and budget < tokens_BT.shape[1]]
    start, dropped, whole_B, states = 0, False, lengths_B, []
    for stop, budget in [*stages, (top, None)]:
        attend = attend_prompt(lengths_B, plan.evict, plan.select, plan.sparsity, positions_BT if dropped else None)
        if budget is not None:
            attend = _judging(attend, plan.sparsity, lengths_B, stop - 1)
        live_BT = jnp.arange(x_BTD.shape[1])[None] < lengths_B[:, None]
        out = _run(model, x_BTD, positions_BT, live_BT, plan, caches, attend, (start, stop))
        x_BTD, caches = out.x_BTD, out.caches
        if budget is not None:
            if plan.sparsity.revive:
                none_BTD = jnp.zeros((*tokens_BT.shape, x_BTD.shape[-1]), x_BTD.dtype)
                states.append(put_states(none_BTD, x_BTD, positions_BT, live_BT))
            judged, worth_BT = caches[stop - 1]
            caches = (*caches[: stop - 1], judged, *caches[stop:])
            at_BM = _most_worth(worth_BT, lengths_B, budget)
            x_BTD = jnp.take_along_axis(x_BTD, at_BM[:, :, None], axis=1)
            positions_BT = jnp.take_along_axis(positions_BT, at_BM, axis=1)
            lengths_B, start, dropped = jnp.minimum(lengths_B, budget), stop, True
    last_BTD, revive = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1), plan.sparsity.revive
    if not revive:
        return last_BTD, caches, None
    return last_BTD, caches, Dropped(states=tuple(states), lengths=whole_B, stages=tuple(stages), revive=revive)


def _judging(attend: LayerAttend, sparsity: SparsityPolicy, lengths_B: jax.Array, judging: int) -> LayerAttend:
    """Return ``attend``, with which the layer ``judging`` says what its tokens are worth beside its cache."""

    def for_layer(cache: LayerCache, active_BT: jax.Array, layer: int | None = None) -> Attend:
        plain = attend(cache, active_BT, layer)

        def judge(q_BTNH, k_BTKH, v_BTKH, *, window=None):
            o_BTNH, updated = plain(q_BTNH, k_BTKH, v_BTKH, window=window)
            obs = PromptObs(layer=layer, q_BTNH=q_BTNH, k_BSKH=k_BTKH, lengths_B=lengths_B)
            return o_BTNH, (updated, sparsity.worth(obs))

        return judge if layer == judging else plain

    return for_layer


def _most_worth(worth_BT: jax.Array, lengths_B: jax.Array, budget: int) -> jax.Array:
    """Return the places of the tokens that stay ``[B, budget]``, ascending; padding fills up what is not needed."""
    at_1T, last_B1 = jnp.arange(worth_BT.shape[1])[None], lengths_B[:, None] - 1
    worth_BT = jnp.where(at_1T < last_B1, worth_BT, jnp.where(at_1T == last_B1, jnp.inf, -jnp.inf))
    return jnp.sort(jax.lax.top_k(worth_BT, budget)[1], axis=1)


def _run(model, x_BTD, positions_BT, live_BT, plan, caches, attend, span=None) -> LayersOut:
    """Run tokens of prompts through the layers of a span, ``None`` for all that prompts run."""
    num_layers, shape = len(model.layers), positions_BT.shape
    run = LayerRun(
        positions_BT=positions_BT,
        step_BT=jnp.zeros(shape, jnp.int32),
        live_BT=live_BT,
        governed_BT=jnp.zeros(shape, bool),
        attend=attend,
        model=model,
        propagate=propagates(plan),
    )
    kept, depth = plan.depth.prefill_layers(num_layers), plan.depth.init(shape)
    return run_static(model.layers, x_BTD, caches, run, plan.depth, depth, kept, span=span)
