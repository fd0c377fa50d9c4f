"""Run the prompts of ``dyninf batch``, those of like length together, and say what came of each.

Prompts and what is generated behind them are padded to powers of two, so that few programs are compiled: one for each
pair of lengths. Which prompts run together depends on the input and the batch alone, never on what is done already.
Every sequence has its own limit and its own random key; a batch that is not full is filled up with sequences that end
at once.
"""

import dataclasses
import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dyninf
from dyninf.cli.batch_input import Entry, Fault, Request
from dyninf.cli.common import Loaded, bucket
from dyninf.cli.text import TextStream
from dyninf.model import CausalLM
from dyninf.models import MeshModel
from dyninf.models.processes import replicate
from dyninf.prompt_run import check_chunk, padded_length
from dyninf.prompts import PAD, stop_matrix
from dyninf.step_loop import LoopProgram, run_steps

MAX_FAULTS = 256  # that wait to be written together
Shape = tuple[int, int]  # padded tokens of the prompts, and of what is generated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How requests are run: under which plan, how many at once, how prompts are read, from which seed."""

    plan: dyninf.Plan
    batch: int
    chunk: int | None
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Made:
    """What the device makes of a batch: tokens ``[B, N]``, and statistics of the ``N - 1`` steps."""

    requests: Sequence[Request]
    tokens: jax.Array
    stats: dyninf.StepStats


def check_settings(loaded: Loaded, settings: Settings) -> None:
    """Raise before any work if prompts cannot be read in chunks of so many tokens, or decoded, under the plan.

    Raises:
        ValueError: if the chunk is no multiple of the blocks of a sparsity policy, or the batch does not divide by the
            axes of the mesh that split it.
        NotImplementedError: if what the cache holds depends on the whole prompt.
    """
    check_chunk(settings.plan, settings.chunk)
    parts = parts_of(loaded)
    if settings.batch % parts:
        raise ValueError(
            f"expected --batch to divide by the {parts} parts in which the mesh splits it (data x fsdp), got "
            f"{settings.batch}; use {-(-settings.batch // parts) * parts}"
        )
    if settings.chunk is not None:
        shape = loaded.model.config.max_length, 2
        jax.eval_shape(lambda: _start(loaded, [], shape, settings).tokens)


def parts_of(loaded: Loaded) -> int:
    """Return in how many parts the mesh splits a batch."""
    return loaded.model.where.parts("batch") if isinstance(loaded.model, MeshModel) else 1


def answer(
    loaded: Loaded, entries: Iterable[Request | Fault], settings: Settings, done: Container[int]
) -> Iterator[list[dict[str, Any]]]:
    """Yield the results of all lines but those that are done, a batch at a time.

    The order is a function of the entries and the batch; what is yielded is what is missing, in that order. While the
    device works on a batch, the caller has the results of the one before.
    """
    running, faults = None, []
    for item in _batches(entries, settings.batch, loaded.model.config.max_length):
        if isinstance(item, Fault):
            if item.line not in done:
                faults.append(_about(item) | {"error": item.error})
            if len(faults) == MAX_FAULTS:
                yield faults
                faults = []
            continue
        shape, requests = item
        if all(request.line in done for request in requests):
            continue
        ended = running
        if ended is not None:  # together the caches of two batches could be more than the memory holds
            jax.block_until_ready(ended.tokens)
        started = _start(loaded, requests, shape, settings)
        tokens, stats = replicate((started.tokens, started.stats))
        running = dataclasses.replace(started, tokens=tokens, stats=stats)
        yield faults + ([] if ended is None else _rows(loaded, ended, done))
        faults = []
    yield faults + ([] if running is None else _rows(loaded, running, done))


def _batches(
    entries: Iterable[Request | Fault], size: int, limit: int
) -> Iterator[Fault | tuple[Shape, Sequence[Request]]]:
    """Yield faults as they come, requests as soon as there are ``size`` of one shape, and the rest at the end."""
    waiting: dict[Shape, list[Request]] = defaultdict(list)
    for entry in entries:
        if isinstance(entry, Fault):
            yield entry
            continue
        shape = bucket(len(entry.tokens), limit), bucket(entry.max_new_tokens, limit)
        waiting[shape].append(entry)
        if len(waiting[shape]) == size:
            yield shape, waiting.pop(shape)
    yield from sorted(waiting.items(), key=lambda item: item[0])


def _start(loaded: Loaded, requests: Sequence[Request], shape: Shape, settings: Settings) -> _Made:
    """Hand a batch to the device."""
    width, count = shape
    tokens, lengths, limits = np.zeros((settings.batch, width), np.int32), *np.ones((2, settings.batch), np.int32)
    for row, request in enumerate(requests):
        lengths[row], limits[row] = len(request.tokens), request.max_new_tokens
        tokens[row, : lengths[row]] = request.tokens
    keys = [_key(request, settings.seed) for request in requests]
    keys += [jax.random.key(settings.seed)] * (settings.batch - len(requests))
    capacity = max(width + count, padded_length(width, settings.chunk))
    state = _prefill(
        loaded.model,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        settings.plan,
        jnp.stack(keys),
        stop_matrix(loaded.model.config.eos_ids),
        capacity=-(-capacity // 8) * 8,  # what kernels read at once
        chunk=settings.chunk,
    )
    made, stats, _ = _decode(loaded.model, state, settings.plan, jnp.asarray(limits), count=count)
    return _Made(requests=requests, tokens=made, stats=stats)


def _key(request: Request, seed: int) -> jax.Array:
    """Return the random key of a line: that of ``dyninf generate --seed`` for its own seed, else one of its id."""
    if request.seed is not None:
        return jax.random.split(jax.random.key(request.seed), 1)[0]
    digest = hashlib.sha256(json.dumps(request.id).encode("ascii")).digest()
    key = jax.random.key(seed)
    for word in np.frombuffer(digest[:8], "<u4"):
        key = jax.random.fold_in(key, word)
    return key


@functools.partial(jax.jit, static_argnames=("capacity", "chunk"))
def _prefill(model, tokens, lengths, plan, keys, stop, *, capacity, chunk):
    return dyninf.prefill(model, tokens, lengths, plan, dyninf.CacheSpec(capacity=capacity), keys, stop, chunk=chunk)[1]


@functools.partial(LoopProgram, static_argnames=("count",), donate_argnames=("state",))
def _decode(model: CausalLM, state: dyninf.DecodeState, plan: dyninf.Plan, limits_B: jax.Array, *, count: int):
    """Generate until every sequence has stopped or reached its limit, at most ``count`` tokens."""

    def limited(state):
        return dataclasses.replace(state, done=state.done | (state.step >= limits_B))

    def step(state):
        state, stats = dyninf.decode_step(model, state, plan)
        return limited(state), stats

    return run_steps(step, limited(state), lambda state: ~jnp.all(state.done), count - 1)


def _rows(loaded: Loaded, made: _Made, done: Container[int]) -> list[dict[str, Any]]:
    """Return the results of a batch that are missing."""
    tokens_BN, stats = np.asarray(made.tokens), jax.tree.map(np.asarray, made.stats)
    return [
        _row(loaded, request, tokens_BN[place], stats, place)
        for place, request in enumerate(made.requests)
        if request.line not in done
    ]


def _row(loaded: Loaded, request: Request, tokens_N: np.ndarray, stats: dyninf.StepStats, place: int) -> dict[str, Any]:
    eos = loaded.model.config.eos_ids
    tokens = tokens_N[tokens_N != PAD].tolist()
    text = TextStream(loaded.tokenizer, request.tokens.tolist())
    if tokens and tokens[-1] in eos:
        reason = "stop"
    else:  # a policy that ends a text leaves tokens out
        reason = "length" if len(tokens) == request.max_new_tokens else "plan"
    active = stats.active[:, place]
    means = {
        name: round(float(np.mean(values[:, place][active], dtype=np.float64)), 4) if active.any() else None
        for name, values in (
            ("layers_needed", stats.needed),
            ("kv_live", stats.kv_live),
            ("kv_read", stats.kv_read),
        )
    }
    return _about(request) | {
        "text": "".join(text.add(token) for token in tokens if token not in eos),
        "tokens": tokens,
        "num_tokens": len(tokens),
        "prompt_tokens": len(request.tokens),
        "finish_reason": reason,
        "stats": means,
    }


def _about(entry: Entry) -> dict[str, Any]:
    about = {"id": entry.id, "line": entry.line}
    return about if entry.metadata is None else about | {"metadata": entry.metadata}
