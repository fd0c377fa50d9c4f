"""What it costs to read a long cache, all of it or only the pages that matter, beside the other ways to do so.

Random keys and queries, attention of ``--heads`` query and ``--kv-heads`` key/value heads, a few layers in turn so that
nothing stays in a cache of the device. Three studies:

- ``decode``: one token attends to everything, by every implementation, and by PyTorch where it is installed.
- ``topk``: the best pages of rows of scores, beside ``lax.top_k`` and ``torch.topk``.
- ``step``: a whole selected step: store the new token and summarize its page, score all pages, choose, and attend to
  the chosen ones; by the kernels, of which one stores and scores, and by plain XLA operations.

Times are of the device's kernels (CUPTI), and of the wall clock for calls enqueued one behind the other. PyTorch is
timed with ``--torch``, in a process of its own: once it had used cuDNN, JAX's next call of it was seen to hang. Run it
where the numbers shall come from: ``python bench/selection.py --study step --case 1x131072 --jsonl FILE``.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as kernels
from bench.names import names_among
from dyninf.cli.bench import describe_device, write_row
from dyninf.timing import measure

REPEATS = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Time the programs and print one JSON object a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--case", action="append", help="BATCHxSLOTS, or ROWSxPAGESxK for topk; may be repeated")
    parser.add_argument("--page-size", type=int, default=64, help="slots of a page (default: 64)")
    parser.add_argument("--kind", choices=("bounds", "mean"), default="bounds", help="summaries (default: bounds)")
    parser.add_argument("--budget", type=int, default=2048, help="slots that a selected step reads (default: 2048)")
    parser.add_argument("--layers", type=int, default=4, help="layers in turn (default: 4)")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--torch", action="store_true", help="time the peers of PyTorch, and nothing else")
    parser.add_argument("--only", help="programs to run, separated by commas (default: all)")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file, too")
    arguments = parser.parse_args(argv)
    for text in arguments.case or [DEFAULT_CASES[arguments.study]]:
        case = tuple(map(int, text.split("x")))
        programs = STUDIES[arguments.study](case, arguments)
        programs = [program for program in programs if program[0].startswith("torch") == arguments.torch]
        only = names_among(parser, "--only", arguments.only, (name for name, *_ in programs))
        wanted = [program for program in programs if program[0] in only]
        time_programs(wanted, f"selection_{arguments.study}", case, _settings(arguments), arguments.jsonl)
    return 0


Program = tuple[str, int, Callable[[], dict[str, Any]]]  # name, bytes that it must read, function that times it


def time_programs(
    programs: list[Program], bench: str, case: tuple[int, ...], settings: dict[str, Any], file: Path | None
) -> None:
    """Time programs and write a row for each; one that cannot run says why on stderr."""
    for name, num_bytes, time_program in programs:
        try:
            row = time_program()
        except NotImplementedError as refusal:
            sys.stderr.write(f"{name}: {refusal}\n")
            continue
        best = row["kernels_us"] or row["wall_us"]
        row = {"bench": bench, "program": name, "case": list(case), **row}
        row |= {"bytes": num_bytes, "tb_s": round(num_bytes / best / 1e6, 3), **settings}
        write_row(row | describe_device(), file)


def decode_programs(case: tuple[int, ...], arguments: Any) -> list[Program]:
    """Return attention from one token to a full cache, by each implementation."""
    batch, slots = case
    q, caches = (
        _queries(batch, arguments),
        [_cache(batch, slots, layer, arguments) for layer in range(arguments.layers)],
    )
    positions = jnp.full((batch, 1), slots - 1)
    num_bytes = sum(array.nbytes for array in caches[0])

    def program(name):
        def run(q, caches, positions):
            return [kernels.decode_attention(q, *cache, positions, implementation=name) for cache in caches]

        return lambda: time_jax(run, q, caches, positions, parts=len(caches))

    found = [(name, num_bytes, program(name)) for name in ("mosaic_gpu", "cudnn", "xla")]
    return [*found, ("torch_cudnn", num_bytes, lambda: time_torch_attention(q, caches))]


def topk_programs(case: tuple[int, ...], arguments: Any) -> list[Program]:
    """Return the choice of the best pages, of several arrays of scores in turn."""
    rows, num_pages, k = case
    scores = [jax.random.normal(jax.random.key(i), (rows, 1, num_pages)) for i in range(arguments.layers)]
    used = jnp.full(rows, num_pages)

    def program(name):
        options = {"k": k, "page_size": arguments.page_size, "implementation": name}
        run = lambda scores, used: [kernels.topk_pages(one, used, **options) for one in scores]  # noqa: E731
        return lambda: time_jax(run, scores, used, parts=len(scores))

    plain = lambda: time_jax(lambda scores: [jax.lax.top_k(one, k) for one in scores], scores, parts=len(scores))  # noqa: E731
    found = [("mosaic_gpu", program("mosaic_gpu")), ("xla", program("xla")), ("lax_top_k", plain)]
    found += [("torch_topk", lambda: time_torch_topk(scores, k))]
    return [(name, scores[0].nbytes, run) for name, run in found]


def step_programs(case: tuple[int, ...], arguments: Any) -> list[Program]:
    """Return a selected step, by kernels and by XLA, and the dense one with the same new token."""
    batch, slots = case
    page_size, layers = arguments.page_size, range(arguments.layers)
    num_pages, k = slots // page_size, arguments.budget // page_size
    q, at = _queries(batch, arguments), jnp.full((batch, 1), slots - 2)
    used = jnp.full(batch, num_pages)

    def caches():
        lengths = jnp.full(batch, slots - 2)
        summarize = lambda k: kernels.summarize_pages(k, lengths, page_size=page_size, kind=arguments.kind)  # noqa: E731
        made = [_cache(batch, slots, layer, arguments) for layer in layers]
        return [(k, v, jax.jit(summarize)(k)) for k, v in made]

    new = [_cache(batch, 1, 100 + layer, arguments) for layer in layers]
    entry = arguments.kv_heads * arguments.head_dim * jnp.dtype(arguments.dtype).itemsize
    summary_bytes = batch * num_pages * entry * (2 if arguments.kind == "bounds" else 1)
    about = {"kind": arguments.kind, "page_size": page_size}
    choose = {"k": k, "page_size": page_size, "sinks": 1, "recent": 1}

    def selected(name):
        def run(caches, q, new, at, used):
            found, updated = [], []
            for cache, fresh in zip(caches, new, strict=True):
                if name is None:
                    *cache, scores = kernels.append_and_score(*cache, *fresh, at, q, **about)
                else:
                    cache = kernels.append_tokens(*cache, *fresh, at, **about, implementation=name)
                    scores = kernels.page_scores(q, cache[2], used, implementation=name)
                index = kernels.topk_pages(scores, used, **choose, implementation=name)
                found.append(kernels.decode_attention(q, *cache[:2], at, index=index, implementation=name))
                updated.append(tuple(cache))
            return updated, found

        return lambda: time_jax(run, q, new, at, used, parts=len(layers), donated=caches())

    def dense(name):
        def run(caches, q, new, at, used):
            found, updated = [], []
            rows = jnp.arange(batch)[:, None]
            for cache, fresh in zip(caches, new, strict=True):
                put = lambda old, one: old.at[rows, at].set(one, unique_indices=True)  # noqa: E731
                pair = tuple(put(old, one) for old, one in zip(cache[:2], fresh, strict=True))
                found.append(kernels.decode_attention(q, *pair, at, implementation=name))
                updated.append(pair)
            return updated, found

        return lambda: time_jax(run, q, new, at, used, parts=len(layers), donated=[cache[:2] for cache in caches()])

    few = summary_bytes + 2 * batch * arguments.budget * entry
    found = [(f"selected_{name or 'fastest'}", few, selected(name)) for name in (None, "xla")]
    return found + [(f"dense_{name}", 2 * batch * slots * entry, dense(name)) for name in ("mosaic_gpu", "cudnn")]


STUDIES = {"decode": decode_programs, "topk": topk_programs, "step": step_programs}
DEFAULT_CASES = {"decode": "1x4096", "topk": "8x512x16", "step": "1x4096"}


class Repeated:
    """A jitted program with its arguments, of which a donated first one becomes what the program returned for it.

    It has the methods of a jitted function: JAX's profiler would trace anything else, with all arrays as constants.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], donated: Any):
        self._jitted = jax.jit(function, donate_argnums=() if donated is None else 0)
        self._arguments, self._donated = arguments, donated
        self.trace, self.lower = self._jitted.trace, self._jitted.lower

    def __call__(self) -> Any:
        if self._donated is None:
            return self._jitted(*self._arguments)
        self._donated, out = self._jitted(self._donated, *self._arguments)
        return out


def time_jax(function: Callable[..., Any], *arguments: Any, parts: int, donated: Any = None) -> dict[str, Any]:
    """Return microseconds of one of ``parts`` equal parts of a program, the kernels' alone and by the wall clock.

    Args:
        donated: first argument of the function, which then returns its next value and something else.
    """
    program = Repeated(function, arguments, donated)
    wall = measure(lambda: [program() for _ in range(REPEATS)], warmup=2, repeats=REPEATS).per(REPEATS * parts)
    row = {"wall_us": round(wall.median * 1e6, 2), "p10_us": round(wall.p10 * 1e6, 2)}
    row |= {"p90_us": round(wall.p90 * 1e6, 2), "kernels_us": None, "kernels": None}
    if jax.default_backend() == "gpu":
        from jax.experimental.mosaic.gpu import profiler

        _, runs = profiler.measure(program, aggregate=False, iterations=REPEATS)()
        sums = sorted(sum(time for _, time in run) for run in runs)
        row["kernels_us"] = round(sums[len(sums) // 2] * 1e3 / parts, 2)
        row["kernels"] = round(len(runs[0]) / parts, 2)
        sys.stderr.write(f"{[(name[:40], round(time * 1e3, 1)) for name, time in runs[0]][:16]}\n")
    return row


def time_torch_attention(q: jax.Array, caches: list[tuple[jax.Array, jax.Array]]) -> dict[str, Any]:
    """Return the time of PyTorch's attention through cuDNN on the same numbers, in a CUDA graph."""
    torch = _torch()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def heads_first(array):
        return torch.from_dlpack(array).transpose(1, 2)

    query, pairs = heads_first(q), [tuple(map(heads_first, cache)) for cache in caches]

    def run():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for k, v in pairs:
                torch.nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=True)

    return _time_graph(torch, run, len(pairs))


def time_torch_topk(scores: list[jax.Array], k: int) -> dict[str, Any]:
    """Return the time of PyTorch's topk on the same numbers, in a CUDA graph."""
    torch = _torch()
    arrays = [torch.from_dlpack(one) for one in scores]
    return _time_graph(torch, lambda: [torch.topk(one, k) for one in arrays], len(arrays))


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise NotImplementedError("PyTorch is not installed") from None
    if not torch.cuda.is_available():
        raise NotImplementedError("PyTorch sees no GPU")
    return torch


def _time_graph(torch: Any, run: Callable[[], Any], parts: int) -> dict[str, Any]:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPEATS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / REPEATS / parts)
    p10, median, p90 = np.percentile(times[2:], [10, 50, 90])
    row = {"wall_us": median, "p10_us": p10, "p90_us": p90}
    return {name: round(float(time), 2) for name, time in row.items()} | {"kernels_us": None, "kernels": None}


def _queries(batch: int, arguments: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (batch, 1, arguments.heads, arguments.head_dim), arguments.dtype)


def _cache(batch: int, slots: int, seed: int, arguments: Any) -> tuple[jax.Array, jax.Array]:
    shape = (batch, slots, arguments.kv_heads, arguments.head_dim)
    make = jax.jit(lambda key: jax.random.normal(key, shape, arguments.dtype))
    return tuple(make(key) for key in jax.random.split(jax.random.key(seed)))


def _settings(arguments: Any) -> dict[str, Any]:
    names = ("page_size", "kind", "budget", "layers", "heads", "kv_heads", "head_dim", "dtype")
    return {name: getattr(arguments, name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
