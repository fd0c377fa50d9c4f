"""Generate text: prefill, decode_step, and the loops built from them.

One :class:`DecodeState` drives everything: :func:`prefill` makes it, :func:`decode_step` advances it by one token,
:func:`generate` loops over steps on the device in one program with the state donated, :func:`stream` loops on the
host. Sequences of a batch may have prompts of different lengths; right-padded, each is computed as if it were alone.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dyninf.attention import attend_cached
from dyninf.cache import CacheSpec, advance, init_cache, list_caches, stack_caches
from dyninf.catch_up import no_pending
from dyninf.decode_state import DecodeState, Generation, cache_layout, check_state
from dyninf.depth_loop import Driver, check_driver, default_driver, run_layers
from dyninf.indexed import is_indexed, refuse_indexed
from dyninf.kv.base import KeepAll, ReadAll
from dyninf.kv.pages import mean_left_out, mean_read
from dyninf.kv.top_k import TopK
from dyninf.layer_run import LayerRun
from dyninf.model import CausalLM
from dyninf.plan import Plan, catches_up, check, propagates
from dyninf.prompt_run import check_chunk, padded_length, run_prompt
from dyninf.prompts import PAD, check_key, check_prompts, stop_matrix
from dyninf.stats import StepStats
from dyninf.step_loop import LoopProgram, run_steps

QUEUED = 2  # steps of a stream that a device has: one that runs, and one to go on with while the host reads its token


def prefill(
    model: CausalLM,
    tokens: jax.Array,
    lengths: jax.Array,
    plan: Plan,
    spec: CacheSpec,
    key: jax.Array,
    stop: jax.Array | None = None,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, DecodeState]:
    """Run the prompts, fill the cache and sample the first token.

    Args:
        tokens: ``int32 [B, T]``, right-padded with any valid id.
        lengths: prompt lengths ``[B]`` (1 to T tokens).
        spec: cache to allocate; capacity at least T. A plan that evicts allocates its budget where that is less.
        key: one key, split over the batch, or one per sequence ``[B]``.
        stop: stop sequences ``[R, M]`` as :func:`dyninf.prompts.stop_matrix` makes them.
        chunk: tokens of the prompts that are read at a time; ``None`` to read all at once. See
            :mod:`dyninf.prompt_run`; the capacity must have room for whole chunks.

    Returns:
        The logits after each prompt ``[B, V]``, float32, and the state that holds the first sampled token.

    Raises:
        ValueError: if the plan or the chunk does not fit the model or each other, or the cache is smaller than the
            prompts.
        NotImplementedError: if the plan holds something this version cannot run, or not in chunks.
    """
    check(plan, model)
    batch, length, num_layers = *tokens.shape, len(model.layers)
    if spec.capacity < length:
        raise ValueError(f"expected a cache of at least {length} slots for this prompt, got {spec.capacity}")
    cache = init_cache(model, batch, spec, **cache_layout(plan, model, batch, length, spec))
    last_BTD, caches, pending = run_prompt(model, tokens, lengths, plan, cache, chunk)
    logits_BV = model.unembed(last_BTD)[:, 0].astype(jnp.float32)
    stop = stop_matrix(()) if stop is None else stop
    state = DecodeState(
        token=jnp.zeros(batch, jnp.int32),
        cache=advance(cache, stack_caches(caches) if _stacks(model, plan) else caches, lengths),
        depth=plan.depth.init((batch, 1)),
        key=key if key.ndim else jax.random.split(key, batch),
        done=jnp.zeros(batch, bool),
        step=jnp.int32(0),
        stop=stop,
        recent=jnp.full((batch, stop.shape[1]), PAD, jnp.int32),
        pending=no_pending(last_BTD, plan.window, num_layers) if catches_up(plan, num_layers) else pending,
    )
    return logits_BV, _sample(state, logits_BV, plan)


def decode_step(
    model: CausalLM, state: DecodeState, plan: Plan, *, driver: Driver | None = None
) -> tuple[DecodeState, StepStats]:
    """Put the last token into the cache and sample the next one.

    Sequences that are done keep their token, write nothing and need no layers. Where the depth policy ends a text, the
    token is :data:`dyninf.prompts.PAD`.

    Args:
        driver: how layers are run; ``None`` takes the plan's default (see :mod:`dyninf.depth_loop`).

    Raises:
        ValueError: if the plan does not fit the model, the driver cannot run it for this batch, or the state was made
            for a plan that keeps other things in it.
    """
    state, logits_BV, _, stats = advance_step(model, state, plan, driver=driver)
    live_B = ~state.done
    state = _sample(state, logits_BV, plan)
    stops_BT = plan.depth.stops(state.depth)
    if stops_BT is None:
        return state, stats
    stops_B = live_B & stops_BT[:, 0]
    token = jnp.where(stops_B, PAD, state.token)
    return dataclasses.replace(state, token=token, done=state.done | stops_B), stats


def advance_step(
    model: CausalLM, state: DecodeState, plan: Plan, *, driver: Driver | None = None
) -> tuple[DecodeState, jax.Array, jax.Array, StepStats]:
    """Put the last token into the cache, and sample nothing.

    Arguments and errors are those of :func:`decode_step`.

    Returns:
        The state, the logits after the token ``[B, V]`` (float32), its final state ``[B, D]`` and what the step spent.
    """
    check(plan, model)
    num_layers = len(model.layers)
    check_state(state, plan, num_layers)
    driver = default_driver(model.layers, plan) if driver is None else driver
    check_driver(driver, model.layers, plan, state.token.shape[0])
    positions_BT = state.cache.length[:, None]
    live_BT = ~state.done[:, None]
    run = LayerRun(
        positions_BT=positions_BT,
        step_BT=jnp.broadcast_to(state.step - 1, positions_BT.shape),
        live_BT=live_BT,
        governed_BT=live_BT,
        attend=attend_cached(positions_BT, live_BT, plan.evict, plan.select, write_inactive=propagates(plan)),
        model=model,
        propagate=propagates(plan),
        evict=plan.evict,
        select=plan.select,
    )
    caches, stacked = state.cache.layers, state.cache.stacked
    out = run_layers(
        model.layers,
        model.embed(jnp.maximum(state.token, 0)[:, None]),
        list_caches(caches) if stacked and driver != "indexed" else caches,
        run,
        plan.depth,
        state.depth,
        driver=driver,
        pending=state.pending,
    )
    logits_BV = model.unembed(out.x_BTD)[:, 0].astype(jnp.float32)
    live_B = live_BT[:, 0]
    caches = stack_caches(out.caches) if stacked and driver != "indexed" else out.caches
    cache = advance(state.cache, caches, live_B.astype(jnp.int32))
    kv_read = mean_read(plan.select, cache.summary_sizes, cache.live) - mean_left_out(plan.select, cache)
    stats = StepStats(active=live_B, needed=out.needed_BT[:, 0], run=out.run, kv_live=cache.live, kv_read=kv_read)
    state = dataclasses.replace(state, cache=cache, depth=out.state, pending=out.pending)
    return state, logits_BV, out.x_BTD[:, 0], stats


def generate(
    model: CausalLM,
    tokens: Any,
    plan: Plan | None = None,
    *,
    max_new_tokens: int,
    key: jax.Array | None = None,
    lengths: Any = None,
    stop: Sequence[int | Sequence[int]] = (),
    driver: Driver | None = None,
    prefill_chunk: int | None = None,
) -> Generation:
    """Generate up to ``max_new_tokens`` tokens per sequence under a plan.

    The prompt is one program and the whole decode loop another; the loop ends when every sequence has stopped. The
    same key gives the same tokens, and no sequence's tokens depend on its neighbours in the batch.

    Args:
        tokens: prompts, ``int [B, T]`` right-padded, or ``[T]`` for one.
        plan: ``None`` is the dense model.
        key: one key, or one per sequence ``[B]``; needed when the sampler draws.
        lengths: prompt lengths ``[B]``; ``None`` when nothing is padded.
        stop: token ids or sequences of ids that end a text.
        prefill_chunk: tokens of the prompts that are read at a time, which bounds activations; ``None`` for all.

    Raises:
        ValueError: if the plan does not fit the model, the driver cannot run it for this batch, a prompt is empty or
            too long, a token is not in the vocabulary, or a sampler that draws got no key.
        NotImplementedError: if the plan holds something this version cannot run, or not in chunks.
    """
    plan = Plan() if plan is None else plan
    state = _begin(model, tokens, plan, max_new_tokens, key, lengths, stop, driver, prefill_chunk)
    generation, _ = decode_loop(model, state, plan, max_new_tokens=max_new_tokens, driver=driver)
    return generation


def stream(
    model: CausalLM,
    tokens: Any,
    plan: Plan | None = None,
    *,
    max_new_tokens: int,
    key: jax.Array | None = None,
    lengths: Any = None,
    stop: Sequence[int | Sequence[int]] = (),
    driver: Driver | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[tuple[np.ndarray, StepStats | None]]:
    """Yield tokens as they are made: ``(tokens [B], stats)``, -1 for sequences that have ended.

    Arguments and tokens are those of :func:`generate`; the statistics of the first token, which comes from the
    prompt, are ``None``. The next step is on its way while a token is read, and is lost if that ends the text.
    """
    plan = Plan() if plan is None else plan
    state = _begin(model, tokens, plan, max_new_tokens, key, lengths, stop, driver, prefill_chunk)
    return _stream(model, state, plan, max_new_tokens, driver)


def _begin(model, tokens, plan, max_new_tokens, key, lengths, stop, driver, chunk) -> DecodeState:
    """Check everything the caller gave and run the prompts."""
    check(plan, model)
    check_chunk(plan, chunk)
    tokens, lengths = check_prompts(model, tokens, lengths, max_new_tokens)
    key = check_key(key, plan.sampler, tokens.shape[0])
    if driver is not None:
        check_driver(driver, model.layers, plan, tokens.shape[0])
    capacity = max(tokens.shape[1] + max_new_tokens, padded_length(tokens.shape[1], chunk))
    if is_indexed(model.layers) or isinstance(plan.select, TopK):
        capacity = -(-capacity // 8) * 8  # what kernels read at once
    spec = CacheSpec(capacity=capacity)
    return _prefill(model, tokens, lengths, plan, spec, key, stop_matrix(stop), chunk)[1]


def _stacks(model: CausalLM, plan: Plan) -> bool:
    """Return whether the caches of all layers are kept as one, which layers by index read; never with other caches."""
    if not is_indexed(model.layers) or not isinstance(plan.evict, KeepAll):
        return False
    return isinstance(plan.select, ReadAll) or refuse_indexed(plan, model.layers) is None


def _sample(state: DecodeState, logits_BV: jax.Array, plan: Plan) -> DecodeState:
    """Draw the next token of every sequence that is not done, and see whether it ends the text."""
    key_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.key, state.step)
    token = jnp.where(state.done, state.token, plan.sampler(logits_BV, key_B))
    recent = jnp.concatenate([state.recent, token[:, None]], axis=1)[:, 1:]
    hits_BR = jnp.all((state.stop[None] == recent[:, None]) | (state.stop[None] == PAD), axis=-1)
    done = state.done | jnp.any(hits_BR, axis=-1) | state.cache.full
    return dataclasses.replace(state, token=token, recent=recent, done=done, step=state.step + 1)


@functools.partial(jax.jit, static_argnames=("spec", "chunk"))
def _prefill(model, tokens, lengths, plan, spec, key, stop, chunk):
    return prefill(model, tokens, lengths, plan, spec, key, stop, chunk=chunk)


@functools.partial(jax.jit, static_argnames=("driver",), donate_argnames=("state",))
def _decode_step(model, state, plan, driver):
    """Return the next state, and beside it what was made ``[B]``, whether that was all, and the statistics."""
    state, stats = decode_step(model, state, plan, driver=driver)
    return state, jnp.where(stats.active, state.token, PAD), jnp.all(state.done), stats


@functools.partial(LoopProgram, static_argnames=("max_new_tokens", "driver"), donate_argnames=("state",))
def decode_loop(
    model: CausalLM, state: DecodeState, plan: Plan, *, max_new_tokens: int, driver: Driver | None = None
) -> tuple[Generation, DecodeState]:
    """Run decode steps on the device until every sequence has stopped, as :func:`generate` does behind its prompts.

    The state, which :func:`prefill` returns, is donated; its token is one of the ``max_new_tokens``.
    """
    step = functools.partial(decode_step, model, plan=plan, driver=driver)
    unfinished = lambda state: (state.step < max_new_tokens) & ~jnp.all(state.done)  # noqa: E731
    tokens, stats, state = run_steps(step, state, unfinished, max_new_tokens - 1)
    lengths = jnp.sum(tokens != PAD, axis=1)
    return Generation(tokens=tokens, lengths=lengths, stopped=state.done, stats=stats), state


def _stream(model, state, plan, max_new_tokens, driver):
    yield _whole(state.token), None
    over, left, queued = state.done, max_new_tokens - 1, collections.deque()
    while not _whole(over).all() and (left or queued):
        while left and len(queued) < QUEUED:
            state, *step = _decode_step(model, state, plan, driver)
            queued.append(step)
            left -= 1
        token_B, over, stats = queued.popleft()
        yield _whole(token_B), stats


def _whole(x: jax.Array) -> np.ndarray:
    """Return an array, which may lie on devices of several processes, to each of them."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
