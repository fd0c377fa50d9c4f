"""What a cache policy leaves of attention, layer by layer, on the exact states of a model.

A text runs dense. Its prompt, all tokens but the last one, is put into caches under the plan, and in each layer the
last token attends to them as a decode step does: evicting policies are judged right after they compressed the prompt,
not knowing the query, selecting ones by what they choose for it. No error of a layer reaches the next one.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

import dyninf
from dyninf.attention import attend_cached
from dyninf.cache import LayerCache
from dyninf.kv.choice import lend
from dyninf.kv.pages import choose_pages, slots_read
from dyninf.models import Transformer
from dyninf.own_cache import OwnCache
from dyninf.pytree import pytree
from dyninf.tasks import attention_mass_recall, keep_most_attended, kept_per_head, output_error
from pallas_kernels import prefill_attention

SLOT_MULTIPLE = 8  # what kernels that read pages take at once


def run_layers(model: Transformer, tokens_BT: jax.Array, attend: Callable) -> list:
    """Run a text and return what each layer's ``attend(number, q, k, v)`` gives beside its output.

    Raises:
        NotImplementedError: if a layer attends within a window.
    """
    x_BTD, found = model.embed(tokens_BT), []
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    for number, layer in enumerate(model.layers):

        def attend_layer(q_BTNH, k_BTKH, v_BTKH, *, window=None, number=number):
            if window is not None:
                raise NotImplementedError(f"expected full attention in every layer, got a window of {window} tokens")
            return attend(number, q_BTNH, k_BTKH, v_BTKH)

        x_BTD, numbers = layer(x_BTD, positions_BT, attend_layer)
        found.append(numbers)
    return found


@pytree()
class Attended:
    """What the last token of each text reads of the exact attention in each layer.

    Attributes:
        recall: share of the exact probability on what is read ``[L, B]``, a mean over the heads. Tokens that were
            merged into others count as not read; NaN for caches of a policy's own, which do not tell.
        error: ``|o - o_exact| / |o_exact|`` of the attention outputs ``[L, B]``, a mean over the heads.
        tokens: read ``[L, B]``, a mean over the key/value heads.
    """

    recall: jax.Array
    error: jax.Array
    tokens: jax.Array


@jax.jit
def attended(model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array, plan: dyninf.Plan) -> Attended:
    """Return what a plan leaves of the attention of the last of ``lengths_B`` tokens (at least 2)."""
    batch, length = tokens_BT.shape
    last_B1, one_B1 = lengths_B[:, None] - 1, jnp.ones((batch, 1), bool)
    spec = dyninf.CacheSpec(capacity=-(-length // SLOT_MULTIPLE) * SLOT_MULTIPLE, generated=1)
    # Prompts attend in full whatever the plan, so that its caches come from exact states.
    _, state = dyninf.prefill(model, tokens_BT, lengths_B - 1, plan, spec, jax.random.key(0))
    step = attend_cached(last_B1, one_B1, plan.evict, plan.select, write_inactive=True)
    after: list[LayerCache | OwnCache] = []  # the step, the layers so far

    def judge(layer, q_BTNH, k_BTKH, v_BTKH, exact_BTNH):
        q_B1NH, k_B1KH, v_B1KH, exact_B1NH = (_at(last_B1, x) for x in (q_BTNH, k_BTKH, v_BTKH, exact_BTNH))
        o_B1NH, cache = step(lend(after, state.cache.layers[layer]), one_B1)(q_B1NH, k_B1KH, v_B1KH)
        after.append(cache)
        moved_B1N, size_B1N = (
            jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in (o_B1NH - exact_B1NH, exact_B1NH)
        )
        error_B1N = moved_B1N / size_B1N
        if isinstance(cache, OwnCache):
            return jnp.full_like(error_B1N, jnp.nan), error_B1N, lengths_B - cache.left_out(plan.select)
        kept_BKT, held_BTKH = _read(cache, plan, q_B1NH, last_B1, k_BTKH)
        recall_B1N = attention_mass_recall(q_B1NH, held_BTKH, kept_BKT, positions_BT=last_B1)
        return recall_B1N, error_B1N, kept_per_head(kept_BKT)

    return _judged(model, tokens_BT, lengths_B, judge)


@functools.partial(jax.jit, static_argnames=("budget",))
def most_attended(model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array, budget: int) -> Attended:
    """Return what the ``budget`` tokens of each key/value head leave that get most of the last token's attention."""
    last_B1 = lengths_B[:, None] - 1

    def judge(layer, q_BTNH, k_BTKH, v_BTKH, exact_BTNH):
        q_B1NH = _at(last_B1, q_BTNH)
        kept_BKT = keep_most_attended(q_B1NH, k_BTKH, budget, positions_BT=last_B1)
        recall_B1N = attention_mass_recall(q_B1NH, k_BTKH, kept_BKT, positions_BT=last_B1)
        error_B1N = output_error(q_B1NH, k_BTKH, v_BTKH, kept_BKT, positions_BT=last_B1)
        return recall_B1N, error_B1N, kept_per_head(kept_BKT)

    return _judged(model, tokens_BT, lengths_B, judge)


def _judged(model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array, judge: Callable) -> Attended:
    """Run a text dense and judge every layer by its queries, keys, values and exact attention."""

    def attend(number, q_BTNH, k_BTKH, v_BTKH):
        exact_BTNH = prefill_attention(q_BTNH, k_BTKH, v_BTKH, lengths_B)
        numbers = judge(number, q_BTNH, k_BTKH, v_BTKH, exact_BTNH)
        return exact_BTNH, [jnp.mean(x.reshape(x.shape[0], -1).astype(jnp.float32), axis=1) for x in numbers]

    judged = run_layers(model, tokens_BT, attend)
    recall, error, tokens = (jnp.stack(parts) for parts in zip(*judged, strict=True))
    return Attended(recall=recall, error=error, tokens=tokens)


def _read(
    cache: LayerCache, plan: dyninf.Plan, q_B1NH: jax.Array, last_B1: jax.Array, k_BTKH: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return what a step reads of a layer, from the cache after it: a mask ``[B, K, T]``, and the keys it is about.

    These are in the order of the text for a policy that evicts, in that of the slots for one that selects.
    """
    batch, length, num_kv, _ = k_BTKH.shape
    rows, heads = jnp.arange(batch)[:, None, None], jnp.arange(num_kv)[None, :, None]
    if cache.positions is not None:
        positions_BKS = jnp.moveaxis(cache.positions, 1, 2)
        at_BKS = jnp.where(positions_BKS < 0, length, positions_BKS)  # dropped
        return jnp.zeros((batch, num_kv, length), bool).at[rows, heads, at_BKS].set(True, mode="drop"), k_BTKH
    held_BTKH = cache.k[:, :length]
    seen_BKT = jnp.broadcast_to((jnp.arange(length)[None] <= last_B1)[:, None], (batch, num_kv, length))
    index = choose_pages(cache, plan.select, q_B1NH, last_B1)
    if index is None:
        return seen_BKT, held_BTKH
    return seen_BKT & slots_read(index, length), held_BTKH


def _at(last_B1: jax.Array, x_BTNH: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BTNH, last_B1[:, :, None, None], axis=1)
