"""Decode on the device for a fixed number of steps, or read a prompt: what ``compare`` and ``bench`` time.

The steps are those of ``dyninf.generate``, in one program with the state donated. Given tokens replace the sampled
ones, so that every plan decodes the same text.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import dyninf
from dyninf.cache import LayerCache
from dyninf.catch_up import Pending, no_pending
from dyninf.depth_loop import Driver
from dyninf.kv import ReadAll, TopK
from dyninf.model import CausalLM, kv_shape, vocab_size
from dyninf.models import MeshModel, cache_shardings
from dyninf.own_cache import OwnCache, tree_bytes
from dyninf.prompt_run import padded_length
from dyninf.revival import Dropped
from dyninf.step_loop import Packed, pack, pack_first, step_of, steps_of, unpack
from dyninf.timing import Timing, measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Excerpt:
    """A piece of text to decode: the prompt ``[P]`` and the tokens ``[N]`` that follow it."""

    prompt: np.ndarray
    following: np.ndarray


@functools.partial(jax.jit, static_argnames=("driver",), donate_argnames=("state",))
def decode_steps(
    model: CausalLM,
    state: dyninf.DecodeState,
    plan: dyninf.Plan,
    tokens_NB: jax.Array,
    driver: Driver | None = None,
) -> tuple[dyninf.DecodeState, dyninf.StepStats]:
    """Run N decode steps that are fed the given tokens; return the state and the statistics of every step."""

    def body(packed: Packed, token_B: jax.Array) -> tuple[Packed, jax.Array]:
        state = dataclasses.replace(unpack(packed), token=token_B)
        packed = pack(*dyninf.decode_step(model, state, plan, driver=driver))
        return packed, step_of(packed)

    packed, kept_N6B = jax.lax.scan(body, pack_first(state), tokens_NB)
    return unpack(packed), steps_of(kept_N6B)[1]


def time_excerpt(
    model: CausalLM, plan: dyninf.Plan, excerpt: Excerpt, *, warmup: int, repeats: int
) -> tuple[Timing, dict[str, float]]:
    """Decode one excerpt at batch 1; return seconds per token and the summary of ``dyninf.summarize``.

    The summary has two numbers more: how many layers hold keys in another form (``own_layers``), and all bytes that
    their caches take (``own_bytes``).
    """
    count = len(excerpt.following)
    spec = dyninf.CacheSpec(capacity=len(excerpt.prompt) + count + 1)
    tokens = jnp.asarray(excerpt.prompt[None], jnp.int32)
    lengths = jnp.asarray([len(excerpt.prompt)], jnp.int32)
    following_NB = jnp.asarray(excerpt.following[:, None], jnp.int32)
    spent = []

    def run(state: dyninf.DecodeState) -> dyninf.StepStats:
        _, stats = decode_steps(model, state, plan, following_NB)
        spent.append(stats)
        return stats

    def setup() -> dyninf.DecodeState:
        return _prefill(model, tokens, lengths, plan, spec, jax.random.key(0))

    timing = measure(run, warmup=warmup, repeats=repeats, setup=setup)
    own = jax.eval_shape(setup).cache.own
    held = {"own_layers": len(own), "own_bytes": sum(cache.nbytes for cache in own)}
    return timing.per(count), dyninf.summarize(spent[-1]) | held


def time_prompt(
    model: CausalLM, plan: dyninf.Plan, *, batch: int, length: int, chunk: int | None, repeats: int
) -> Timing:
    """Return the seconds until prompts of random tokens are in the cache and have given their first token."""
    capacity = padded_length(length, chunk) + 1
    spec = dyninf.CacheSpec(capacity=-(-capacity // 8) * 8)  # what kernels read at once
    tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, vocab_size(model))
    lengths = jnp.full(batch, length)
    return measure(
        lambda: _prefill(model, tokens, lengths, plan, spec, jax.random.key(0), chunk=chunk), repeats=repeats
    )


@functools.partial(jax.jit, static_argnames=("spec", "chunk"))
def _prefill(model, tokens, lengths, plan, spec, key, chunk=None):
    return dyninf.prefill(model, tokens, lengths, plan, spec, key, chunk=chunk)[1]


def random_state(
    model: CausalLM, plan: dyninf.Plan, *, batch: int, length: int, capacity: int, key: jax.Array
) -> dyninf.DecodeState:
    """Return a state as a prefill of ``length`` tokens would leave it, with random keys, values and tokens.

    On a mesh its cache is laid out as that of a prefill, and made where it lies.
    """
    spec = dyninf.CacheSpec(capacity=capacity)
    tokens, lengths = jnp.zeros((batch, length), jnp.int32), jnp.full(batch, length, jnp.int32)
    like = jax.eval_shape(lambda m, p: dyninf.prefill(m, tokens, lengths, p, spec, key)[1], model, plan)

    mesh = model.where.mesh if isinstance(model, MeshModel) else None

    def draw(like: Any, key: jax.Array) -> Any:
        leaves, structure = jax.tree.flatten(like)
        return _drawing(structure, tuple(leaves), length, mesh)(lengths, plan.select, key)

    if like.cache.stacked:
        layers = draw(like.cache.layers, key)
    else:
        keys = jax.random.split(key, len(like.cache.layers))
        layers = tuple(draw(cache, layer_key) for cache, layer_key in zip(like.cache.layers, keys, strict=True))
    cache = dyninf.KVCache(layers=layers, length=lengths)
    return dyninf.DecodeState(
        token=jax.random.randint(key, (batch,), 0, vocab_size(model)),
        cache=cache,
        depth=plan.depth.init((batch, 1)),
        key=jax.random.split(key, batch),
        done=jnp.zeros(batch, bool),
        step=jnp.int32(1),
        stop=jnp.zeros(like.stop.shape, jnp.int32),
        recent=jnp.zeros(like.recent.shape, jnp.int32),
        pending=_pending(like.pending, plan, len(model.layers)),
    )


def _pending(like: Pending | Dropped | None, plan: dyninf.Plan, num_layers: int) -> Pending | Dropped | None:
    """Return an empty window, or states of zeros of prompts without a token."""
    if isinstance(like, Pending):
        return no_pending(like.x_BWD, plan.window, num_layers)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


@functools.lru_cache(maxsize=64)
def _drawing(structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...], length: int, mesh: Mesh | None) -> Any:
    """Return the program that draws a cache of shapes, once for all layers alike, and where it lies on a mesh."""
    like = jax.tree.unflatten(structure, leaves)

    def make(lengths: jax.Array, select: TopK | ReadAll, key: jax.Array) -> Any:
        if isinstance(like, OwnCache):
            return _read(like, lengths, length, select, key)
        return _random_cache(like, length, key)

    return jax.jit(make, out_shardings=None if mesh is None else cache_shardings(like, mesh))


def _random_cache(like: LayerCache, length: int, key: jax.Array) -> LayerCache:
    """Return a cache, or the stacked caches of all layers, with random numbers in all slots."""
    leaves, structure = jax.tree.flatten(like)
    filled = []
    for leaf, leaf_key in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            filled.append(jax.random.normal(leaf_key, leaf.shape, leaf.dtype))
            continue
        slots = jnp.arange(leaf.shape[1])
        if leaf.dtype == bool:  # which slots hold a key [B, S]
            filled.append(jnp.broadcast_to(slots < length, leaf.shape))
        else:  # positions of the tokens in the slots [B, S, K]
            positions = jnp.where(slots < length, slots + max(0, length - len(slots)), -1)
            filled.append(jnp.broadcast_to(positions[:, None], leaf.shape).astype(leaf.dtype))
    return jax.tree.unflatten(structure, filled)


def _read(like: OwnCache, lengths: jax.Array, length: int, select: TopK | ReadAll, key: jax.Array) -> OwnCache:
    """Return a cache that has read random keys and values."""
    batch, _, *entry = like.v.shape
    k_BTKH, v_BTKH = (jax.random.normal(half, (batch, length, *entry), like.v.dtype) for half in jax.random.split(key))
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return type(like).fill(empty, k_BTKH, v_BTKH, lengths, select)


def bytes_per_step(model: CausalLM, means: dict[str, float], batch: int) -> float:
    """Return the bytes that a decode step cannot do without: layers run, one readout, and the keys and values read.

    Args:
        means: of the steps, by ``dyninf.summarize``.
    """
    layers = _size(model.layers) / len(model.layers)
    model = model.model if isinstance(model, MeshModel) else model
    tied = getattr(model, "unembedding", None) is None
    readout = _size(model.embedding if tied else model.unembedding)
    entry = kv_shape(model)
    cache = 2 * batch * means["kv_read"] * entry.size * entry.dtype.itemsize
    return means["layers_run"] * (layers + cache) + readout


def summary_bytes(cache: dyninf.KVCache) -> int:
    """Return the bytes of the summaries of pages, of the layers that score them at each step; of shapes, too."""
    if cache.stacked:
        num_layers = len(cache.slots)
        return tree_bytes(cache.layers.summary) * (num_layers - cache.layers.dense_layers) // num_layers
    scoring = (layer for layer in cache.layers if layer.choice is None or layer.choice.leads)
    return tree_bytes([layer.summary for layer in scoring])


def _size(tree: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
