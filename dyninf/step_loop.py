"""Loops of decode steps on the device, whose small numbers are one array.

XLA computes every small array that a step hands on in a kernel of its own, and writes every one that a loop keeps of
its steps in another. So what a step hands on beside its caches and the state of the policy, and what is known of the
step, are rows of one array, ``int32 [8, B]``.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dyninf.decode_state import DecodeState
from dyninf.prompts import PAD
from dyninf.stats import StepStats

# What XLA's command buffers (CUDA graphs) hold: what they hold by default, and loops and branches.
CAPTURED = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL",
    "xla_gpu_graph_min_graph_size": "1",
}
Packed = tuple[jax.Array, DecodeState]  # small numbers [8, B], and a state without them


def pack(state: DecodeState, stats: StepStats) -> Packed:
    """Return the numbers of a state and of the step that made it, and the rest of the state."""
    run_B = jnp.broadcast_to(stats.run, state.token.shape)
    numbers = (state.done, state.cache.length, state.token, stats.active, stats.needed, run_B)
    entries = (count.astype(jnp.float32) for count in (stats.kv_live, stats.kv_read))
    bits = (lax.bitcast_convert_type(count_B, jnp.int32) for count_B in entries)
    numbers_8B = jnp.stack([*(number.astype(jnp.int32) for number in numbers), *bits])
    rest = dataclasses.replace(state, token=None, done=None, cache=dataclasses.replace(state.cache, length=None))
    return numbers_8B, rest


def pack_first(state: DecodeState) -> Packed:
    """Return what :func:`pack` does of a state before the first step."""
    none_B = jnp.zeros(state.token.shape, jnp.int32)
    return pack(state, StepStats(active=none_B, needed=none_B, run=jnp.int32(0), kv_live=none_B, kv_read=none_B))


def unpack(packed: Packed) -> DecodeState:
    """Return the state of :func:`pack`."""
    (done_B, length_B, token_B, *_), rest = packed
    cache = dataclasses.replace(rest.cache, length=length_B)
    return dataclasses.replace(rest, token=token_B, done=done_B > 0, cache=cache)


def step_of(packed: Packed) -> jax.Array:
    """Return what a loop keeps of a step, ``int32 [6, B]``: the tokens that it made, and its counts."""
    token_B, active_B = packed[0][2:4]
    return packed[0][2:].at[0].set(jnp.where(active_B > 0, token_B, PAD))


def steps_of(kept_N6B: jax.Array) -> tuple[jax.Array, StepStats]:
    """Return the tokens that steps made ``[N, B]``, -1 where none was made, and their statistics."""
    made_NB, active_NB, needed_NB, run_NB, *entries = jnp.moveaxis(kept_N6B, 1, 0)
    live_NB, read_NB = (lax.bitcast_convert_type(bits_NB, jnp.float32) for bits_NB in entries)
    stats = StepStats(active=active_NB > 0, needed=needed_NB, run=run_NB[:, 0], kv_live=live_NB, kv_read=read_NB)
    return made_NB, stats


def run_steps(
    step: Callable[[DecodeState], tuple[DecodeState, StepStats]],
    state: DecodeState,
    unfinished: Callable[[DecodeState], jax.Array],
    count: int,
) -> tuple[jax.Array, StepStats, DecodeState]:
    """Run steps as long as a state is unfinished, which it may not be from the start.

    Args:
        count: steps that there are at most; ``state.step`` counts them from 1.

    Returns:
        The token of the first state and those that N = ``count`` steps made, ``[B, N + 1]``, -1 where none was made;
        the statistics of the steps, 0 of those that did not run; and the last state. Who donates the first state must
        return this one though nobody needs it: without an output to alias, a cache cannot be donated.
    """

    def body(carry: tuple[jax.Array, Packed]) -> tuple[jax.Array, Packed]:
        kept_N6B, packed = carry
        before = unpack(packed)
        packed = pack(*step(before))
        return lax.dynamic_update_index_in_dim(kept_N6B, step_of(packed), before.step - 1, axis=0), packed

    first_B, packed = state.token, pack_first(state)
    kept_N6B = jnp.tile(step_of(packed), (count, 1, 1))
    if count:
        going = lambda carry: unfinished(unpack(carry[1]))  # noqa: E731
        kept_N6B, packed = lax.while_loop(going, body, (kept_N6B, packed))
    made_NB, stats = steps_of(kept_N6B)
    return jnp.concatenate([first_B[None], made_NB]).T, stats, unpack(packed)


class LoopProgram:
    """``jax.jit`` of a function of a model, a state and more that ends with :func:`run_steps`.

    On one GPU the loop and the branches of its steps are one command buffer, so that the GPU sees by itself when they
    end. Else the host is asked after each step, and nothing is queued until it has answered. Inside of another program,
    which cannot be given options here, the loop is what that program makes of it.
    """

    def __init__(self, function: Callable, **options: Any):
        self.plain = jax.jit(function, **options)
        self.captured = jax.jit(function, compiler_options=CAPTURED, **options)
        functools.update_wrapper(self, function)

    def __call__(self, model: Any, state: DecodeState, *arguments: Any, **named: Any) -> Any:
        traced = isinstance(state.token, jax.core.Tracer)
        chosen = self.plain if traced or not is_on_one_gpu(state.token) else self.captured
        return chosen(model, state, *arguments, **named)


def is_on_one_gpu(x: jax.Array) -> bool:
    """Return whether an array lies on one device, which is a GPU."""
    return [device.platform for device in x.devices()] == ["gpu"]
