"""Revival: decoding brings tokens back that a prompt dropped on the way up, a few in a step.

The state in which a token was dropped before a layer (a *stage*) waits there. In every decode step each stage chooses
anew: of the prompt's tokens that the new token reads in the layer before the stage, those that it pays most attention
to, as many as the stage's budget. Chosen tokens that lack the layers above run them beside the new token, from their
state and at their own positions, up to the next stage, where their new states wait in turn. Their keys and values stay
in the cache, so that a token runs each layer once. Layers above a stage read the chosen tokens alone and those that
were generated: the others are hidden from this step, nothing of them is lost.

A token is missing above a stage where the layer before it holds its key and the layer behind it does not, which the
caches know (``LayerCache.valid``). What waits are the states alone.

Overflow: the ``revive`` missing tokens of the highest worth return. The others of the chosen are not read in this step;
a later one that chooses them can bring them back.

Cost: layers above the first stage run ``1 + revive`` tokens per sequence instead of one, whether or not so many return;
at small batches reading the weights takes as long for both. Deciding costs ``2 S N H`` FLOPs a stage and reads its keys
a second time. ``B T D`` entries of state a stage.

Source: the auxiliary cache of LazyLLM (Fu et al. 2024); :mod:`dyninf.sparsity.lazy_llm` names the differences.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dyninf.attention import attend_cached
from dyninf.cache import LayerCache
from dyninf.kv.mass import attention_mass
from dyninf.layer_run import LayerRun, LayersOut
from dyninf.model import Attend, DecoderLayer
from dyninf.pytree import pytree


@pytree(static=("stages", "revive"))
class Dropped:
    """States of the tokens of prompts, by position, that enter the layers of stages.

    Attributes:
        states: of each stage ``[B, T, D]``; zeros for tokens that have not come so far.
        lengths: tokens of the prompts ``[B]``.
        stages: layers before which tokens were dropped, ascending, and how many are chosen ``(layer, tokens)``.
        revive: tokens of a sequence that return in a step at most, at each stage.
    """

    states: tuple[jax.Array, ...]
    lengths: jax.Array
    stages: tuple[tuple[int, int], ...]
    revive: int


def put_states(states_BTD: jax.Array, x_BMD: jax.Array, positions_BM: jax.Array, there_BM: jax.Array) -> jax.Array:
    """Return the states with those of M tokens at their positions, where ``there_BM`` says so."""

    @jax.vmap  # as in dyninf.cache.write
    def put(states_TD: jax.Array, at_M: jax.Array, x_MD: jax.Array) -> jax.Array:
        return states_TD.at[at_M].set(x_MD, mode="drop", unique_indices=True)

    beyond_M = states_BTD.shape[1] + jnp.arange(positions_BM.shape[1])
    return put(states_BTD, jnp.where(there_BM, positions_BM, beyond_M[None]), x_BMD)


def run_reviving(
    layers: Sequence[DecoderLayer],
    x_BTD: jax.Array,
    caches: Sequence[LayerCache],
    run: LayerRun,
    state: Any,
    dropped: Dropped,
) -> LayersOut:
    """Run every layer on one token of each sequence, and beside it on tokens that return.

    Args:
        x_BTD: states of the new tokens, T = 1.
        caches: of all layers; they know which of their slots hold a key.
        state: that of the depth policy, which has no say.
    """
    stages = {layer: (stage, budget) for stage, (layer, budget) in enumerate(dropped.stages)}
    caches, states = list(caches), list(dropped.states)
    # The new token is the last of the rows.
    rows_BTD, positions_BT, live_BT = x_BTD, run.positions_BT, run.live_BT
    read_BS, worth_BS = jnp.ones((1, 1), bool), None
    for number, layer in enumerate(layers):
        if number in stages:
            stage, budget = stages[number]
            returned = rows_BTD[:, :-1], positions_BT[:, :-1], live_BT[:, :-1]
            states[stage] = put_states(states[stage], *returned)
            prompt_BS = jnp.arange(worth_BS.shape[1])[None] < dropped.lengths[:, None]
            worth_BS = jnp.where(prompt_BS, worth_BS, -jnp.inf)
            chosen_BS = _largest(worth_BS, budget)
            read_BS = chosen_BS | ~prompt_BS
            missing_BS = chosen_BS & ~caches[number].valid & run.live_BT
            worth_BR, at_BR = jax.lax.top_k(jnp.where(missing_BS, worth_BS, -jnp.inf), min(dropped.revive, budget))
            back_BRD = jnp.take_along_axis(states[stage], at_BR[:, :, None], axis=1, mode="clip")
            rows_BTD = jnp.concatenate([back_BRD, rows_BTD[:, -1:]], axis=1)
            positions_BT = jnp.concatenate([at_BR, run.positions_BT], axis=1)
            live_BT = jnp.concatenate([worth_BR > -jnp.inf, run.live_BT], axis=1)
        shown = dataclasses.replace(caches[number], valid=caches[number].valid & read_BS)
        attend = attend_cached(positions_BT, live_BT, write_inactive=False)(shown, live_BT, number)
        judges = number + 1 in stages
        rows_BTD, updated = layer(rows_BTD, positions_BT, _judging(attend) if judges else attend)
        if judges:
            updated, worth_BS = updated
        caches[number] = dataclasses.replace(updated, valid=updated.valid | caches[number].valid)
    return LayersOut(
        x_BTD=rows_BTD[:, -1:],
        caches=tuple(caches),
        state=state,
        needed_BT=run.live_BT.astype(jnp.int32) * len(layers),
        run=jnp.int32(len(layers)),
        pending=dataclasses.replace(dropped, states=tuple(states)),
    )


def _judging(attend: Attend) -> Attend:
    """Return ``attend``, which then says beside the cache what the last row pays to each slot ``[B, S]``.

    A mean over the heads, float32; -inf for slots that it does not read.
    """

    def judge(q_BTNH, k_BTKH, v_BTKH, *, window=None):
        o_BTNH, updated = attend(q_BTNH, k_BTKH, v_BTKH, window=window)
        paid_BSK = attention_mass(q_BTNH[:, -1:], updated.k, updated.valid[:, None, :, None])
        return o_BTNH, (updated, jnp.where(updated.valid, jnp.mean(paid_BSK, axis=-1), -jnp.inf))

    return judge


def _largest(worth_BS: jax.Array, count: int) -> jax.Array:
    """Mark the ``count`` slots of the highest worth ``[B, S]``, of equal ones the first; none that is worth -inf."""
    worth_BM, at_BM = jax.lax.top_k(worth_BS, count)
    put = jax.vmap(lambda marks_S, at_M, marks_M: marks_S.at[at_M].set(marks_M, unique_indices=True))
    return put(jnp.zeros(worth_BS.shape, bool), at_BM, worth_BM > -jnp.inf)
