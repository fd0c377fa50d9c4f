"""Run prompts through the layers: all tokens at once, or chunk by chunk against the growing cache.

In chunks, activations take the memory of one chunk, and one program serves prompts of all lengths up to the width of
the token array: chunks beyond the longest prompt are not run. A token sees the keys that it sees otherwise, so that the
result is that of a prompt read at once, up to rounding, where a sparsity policy chooses by positions alone. Policies
that look at queries see those of the chunk. Attention reads keys and values from the cache, in its dtype.
"""

import jax
import jax.numpy as jnp

from dyninf.attention import attend_chunk, attend_prompt
from dyninf.cache import KVCache, LayerCache
from dyninf.depth.base import require_integer
from dyninf.depth_loop import run_static
from dyninf.kv.base import KeepAll
from dyninf.kv.pages import arranges, summarize_prompt
from dyninf.layer_run import LayerRun, LayersOut
from dyninf.model import CausalLM, readout_of
from dyninf.own_cache import OwnCache
from dyninf.plan import Plan, propagates


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


def run_prompt(
    model: CausalLM, tokens_BT: jax.Array, lengths_B: jax.Array, plan: Plan, cache: KVCache, chunk: int | None
) -> tuple[jax.Array, tuple[LayerCache | OwnCache, ...]]:
    """Run prompts into an empty cache.

    Args:
        chunk: tokens that are read at a time; prompts that are no longer are read at once, as with ``None``.

    Returns:
        The final state of the last token of each prompt ``[B, 1, D]``, and the caches of all layers.

    Raises:
        ValueError: if the chunk is no multiple of the blocks of a sparsity policy, or the cache has no room for it.
    """
    check_chunk(plan, chunk)
    length, last_B11 = tokens_BT.shape[1], (lengths_B - 1)[:, None, None]
    if chunk is None or chunk >= length:
        attend = attend_prompt(lengths_B, plan.evict, plan.select, plan.sparsity)
        out = _run(model, tokens_BT, lengths_B, plan, cache.layers, attend, 0)
        return jnp.take_along_axis(out.x_BTD, last_B11, axis=1), out.caches
    padded = padded_length(length, chunk)
    if cache.capacity < padded:
        raise ValueError(f"expected a cache of at least {padded} slots for chunks of {chunk}, got {cache.capacity}")
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, padded - length)))

    def body(number: jax.Array, carry: tuple) -> tuple:
        last_BTD, caches = carry
        offset = number * chunk
        tokens_BC = jax.lax.dynamic_slice_in_dim(tokens_BT, offset, chunk, axis=1)
        attend = attend_chunk(lengths_B, offset, plan.sparsity)
        out = _run(model, tokens_BC, lengths_B, plan, caches, attend, offset)
        at_B11 = last_B11 - offset
        here_BTD = jnp.take_along_axis(out.x_BTD, jnp.clip(at_B11, 0, chunk - 1), axis=1)
        return jnp.where((at_B11 >= 0) & (at_B11 < chunk), here_BTD, last_BTD), out.caches

    like = jax.eval_shape(model.embed, tokens_BT[:, :1])
    first = (jnp.zeros(like.shape, like.dtype), cache.layers)
    last_BTD, caches = jax.lax.fori_loop(0, -(-jnp.max(lengths_B) // chunk), body, first)
    return last_BTD, tuple(summarize_prompt(layer, plan.select, length, lengths_B) for layer in caches)


def _run(model, tokens_BT, lengths_B, plan, caches, attend, offset) -> LayersOut:
    """Run tokens that begin at ``offset`` through the layers of a prompt."""
    (batch, length), num_layers = tokens_BT.shape, len(model.layers)
    positions_BT = jnp.broadcast_to(offset + jnp.arange(length), (batch, length))
    run = LayerRun(
        positions_BT=positions_BT,
        step_BT=jnp.zeros((batch, length), jnp.int32),
        live_BT=positions_BT < lengths_B[:, None],
        governed_BT=jnp.zeros((batch, length), bool),
        attend=attend,
        unembed=model.unembed,
        readout=readout_of(model),
        propagate=propagates(plan),
    )
    kept, depth = plan.depth.prefill_layers(num_layers), plan.depth.init((batch, length))
    return run_static(model.layers, model.embed(tokens_BT), caches, run, plan.depth, depth, kept)
