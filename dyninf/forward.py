"""Teacher forcing: the logits a plan would produce at every position of a given text, in one pass.

Every token decides for itself as it would while decoding, and attends to keys of the states at which earlier tokens
ended (with ``fill="catch_up"`` to the dense model's keys), so the result equals feeding the text through
:func:`dyninf.decode_step` token by token. Under a plan that evicts or selects, what a token reads depends on all tokens
before it: its text is fed that way, one step a token. Under a plan whose prompts are sparse, the tokens of the prompt
attend as :func:`dyninf.prefill` would let them, those behind it to everything.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dyninf.attention import attend_uncached
from dyninf.cache import CacheSpec, init_cache
from dyninf.catch_up import force_catch_up
from dyninf.decode_state import cache_layout
from dyninf.depth_loop import Driver, check_driver, run_layers, run_static
from dyninf.generate import advance_step, prefill
from dyninf.kv.base import KeepAll, ReadAll
from dyninf.layer_run import LayerRun
from dyninf.model import CausalLM
from dyninf.plan import Plan, catches_up, check, leaves_gaps, propagates
from dyninf.prompt_run import run_prompt
from dyninf.pytree import pytree
from dyninf.sparsity.base import Dense


@pytree()
class Forward:
    """Logits ``[B, T, V]``, final states ``[B, T, D]`` and layers needed ``[B, T]`` of a text under a plan."""

    logits: jax.Array
    states: jax.Array
    needed: jax.Array


def forward(
    model: CausalLM,
    tokens: jax.Array,
    plan: Plan | None = None,
    *,
    lengths: jax.Array | None = None,
    prompt_lengths: jax.Array | None = None,
    driver: Driver = "masked",
) -> Forward:
    """Return what the plan predicts after every token of ``tokens``.

    Costs every layer for every token, whatever the plan saves while decoding, and a plan that evicts, selects or
    drops tokens a decode step for every token after the prompt: this measures quality, not speed.

    Args:
        tokens: ``int32 [B, T]``, right-padded.
        lengths: tokens of each sequence ``[B]``; ``None`` for T.
        prompt_lengths: tokens of each sequence that count as prompt ``[B]`` and run what the plan's prefill runs;
            ``None`` for 1, so that all but the first token are decoded under the plan, or for the whole text where the
            plan's prompts are sparse.

    Returns:
        Entries at padding are meaningless. Where the plan drops tokens of a prompt, those before its last token are of
        a prompt that keeps all.

    Raises:
        ValueError: if the plan does not fit the model, its prompt runs other layers than ``unrolled`` would,
            another driver than ``masked`` is asked for a plan that catches up, evicts, selects or drops tokens, or
            ``scan`` for one whose prompts are sparse, or a plan that drops tokens is not told where prompts end.
    """
    plan = Plan() if plan is None else plan
    check(plan, model)
    batch, length = tokens.shape
    lengths = jnp.full(batch, length) if lengths is None else lengths
    sparse = not isinstance(plan.sparsity, Dense)
    if sparse and driver == "scan":
        raise ValueError("expected another driver than 'scan' for a sparsity policy, which asks for layers by number")
    if prompt_lengths is None and plan.sparsity.stages:
        raise ValueError(
            f"expected prompt_lengths for {type(plan.sparsity).__name__}: what it drops of a prompt depends on where "
            "that ends"
        )
    if prompt_lengths is None:
        prompt_lengths = lengths if sparse else jnp.ones(batch, jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(length), (batch, length))
    live_BT = positions_BT < lengths[:, None]
    step_BT = positions_BT - prompt_lengths[:, None]
    depth, num_layers = plan.depth, len(model.layers)
    if plan.evict != KeepAll() or plan.select != ReadAll() or plan.sparsity.stages:
        if driver != "masked":
            raise ValueError(
                f"expected driver 'masked' for a text under a plan that evicts, selects or drops tokens, got {driver!r}"
            )
        return _forward_by_steps(model, tokens, plan, lengths, prompt_lengths)
    run = LayerRun(
        positions_BT=positions_BT,
        step_BT=jnp.maximum(step_BT, 0),
        live_BT=live_BT,
        governed_BT=live_BT & (step_BT >= 0),
        attend=attend_uncached(
            lengths, keep_inactive=not leaves_gaps(plan), prompt_lengths_B=prompt_lengths, sparsity=plan.sparsity
        ),
        model=model,
        propagate=propagates(plan),
    )
    x_BTD, caches = model.embed(tokens), (None,) * num_layers
    kept = depth.static_layers(num_layers)
    state = depth.init((batch, length))
    if catches_up(plan, num_layers):
        if driver != "masked":
            raise ValueError(f"expected driver 'masked' for a text under fill='catch_up', got {driver!r}")
        out = force_catch_up(model.layers, x_BTD, run, depth, state, plan.window)
    elif kept is not None and kept == depth.prefill_layers(num_layers):
        out = run_static(model.layers, x_BTD, caches, run, depth, state, kept)
    elif driver == "unrolled":
        raise ValueError(
            f"expected another driver than 'unrolled': {depth} lets the prompt run other layers than decoded tokens, "
            "and one pass holds both; use 'masked'"
        )
    else:
        check_driver(driver, model.layers, plan, batch)
        out = run_layers(model.layers, x_BTD, caches, run, depth, state, driver=driver)
    return Forward(logits=model.unembed(out.x_BTD), states=out.x_BTD, needed=out.needed_BT)


def _forward_by_steps(model, tokens_BT, plan, lengths_B, prompt_lengths_B) -> Forward:
    """Run the prompts at once and feed every token behind them to a decode step."""
    batch, length = tokens_BT.shape
    # Nothing is evicted before a prompt has been attended to, and a prompt reads everything.
    kept = dataclasses.replace(plan, evict=KeepAll(), select=ReadAll())
    kept = dataclasses.replace(kept, sparsity=Dense()) if plan.sparsity.stages else kept
    out = forward(model, tokens_BT, kept, lengths=prompt_lengths_B, prompt_lengths=prompt_lengths_B)
    spec = CacheSpec(capacity=length, generated=length)
    logits_BV, state = prefill(model, tokens_BT, prompt_lengths_B, plan, spec, jax.random.key(0))
    rows, driver = jnp.arange(batch), None if plan.sparsity.revive else "masked"
    if plan.sparsity.stages:
        cache = init_cache(model, batch, spec, **cache_layout(plan, model, batch, length, spec))
        last_B1D, *_ = run_prompt(model, tokens_BT, prompt_lengths_B, plan, cache, None)
        at = rows, prompt_lengths_B - 1
        states = out.states.at[at].set(last_B1D[:, 0])
        logits = out.logits.at[at].set(logits_BV.astype(out.logits.dtype))
        out = dataclasses.replace(out, states=states, logits=logits)

    def body(carry, offset):
        state, out = carry
        position_B = prompt_lengths_B + offset
        token_B = jnp.take_along_axis(tokens_BT, jnp.minimum(position_B, length - 1)[:, None], axis=1)[:, 0]
        state = dataclasses.replace(state, token=token_B, done=position_B >= lengths_B, step=offset + 1)
        state, logits_BV, x_BD, stats = advance_step(model, state, plan, driver=driver)
        at_B = jnp.where(state.done, length, position_B)  # dropped
        put = lambda whole, part: whole.at[rows, at_B].set(part.astype(whole.dtype), mode="drop")  # noqa: E731
        out = Forward(
            logits=put(out.logits, logits_BV), states=put(out.states, x_BD), needed=put(out.needed, stats.needed)
        )
        return (state, out), None

    return jax.lax.scan(body, (state, out), jnp.arange(length - 1))[0][1]


def layer_states(model: CausalLM, tokens: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Return the states that enter each layer, and the last layer's output, of the dense model: ``[L+1, B, T, D]``."""
    batch, length = tokens.shape
    lengths = jnp.full(batch, length) if lengths is None else lengths
    positions_BT = jnp.broadcast_to(jnp.arange(length), (batch, length))
    attend = attend_uncached(lengths, keep_inactive=True)(None, positions_BT < lengths[:, None])
    states = [model.embed(tokens)]
    for layer in model.layers:
        states.append(layer(states[-1], positions_BT, attend)[0])
    return jnp.stack(states)
