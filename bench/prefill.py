"""What it costs to read a prompt: dense attention, blocks of an index, and whole policies, beside other ways to do so.

One layer's attention of ``--heads`` query and ``--kv-heads`` key/value heads. Four studies:

- ``dense``: causal attention by each implementation, and by PyTorch where it is installed; from 512K tokens on that of
  the last 8192 queries only, by cuDNN without a mask.
- ``blocks``: lists of random blocks of 128 keys, each with its first and its own block; a case is TOKENSxPERCENT of the
  causal blocks.
- ``a_shape``: 128 sinks and a window of 4096 tokens.
- ``policies``: what each policy of sparse prefill takes to choose blocks, and attention to them; on queries and keys
  that attend to their neighbours, the first tokens and some stripes (``planted``), as random ones attend to everything.
  ``error`` is the distance of the output to that of dense attention by its norm.

FLOPs are those of the blocks that are attended to, and of half the square for dense attention. All programs of a run
are compiled at the same time, then timed one after the other. The peers of PyTorch (cuDNN, and FlexAttention with full
and partial blocks apart) are timed with ``--torch``, in a process of their own:
``python bench/prefill.py --study blocks --case 32768x10 --jsonl FILE``.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from bench.names import names_among
from bench.prompt_inputs import BLOCK, planted_inputs, random_index, random_inputs
from dyninf import sparsity
from dyninf.cli.bench import describe_device, write_row
from dyninf.sparsity import PromptObs
from dyninf.timing import measure
from pallas_kernels import BlockIndex, block_sparse_attention, prefill_attention

LONG, SLICE = 2**19, 8192  # tokens from which dense attention is timed on a slice of so many queries
SECONDS = 0.1  # that repeated calls take together
REPEATS = 7
POLICIES = {
    "a_shape": lambda blocks: sparsity.AShape(),
    "power": lambda blocks: sparsity.PowerAttention(dense_layers=0),
    "vertical_slash": lambda blocks: sparsity.VerticalSlash(),
    "pooled_blocks": lambda blocks: sparsity.PooledBlocks(budget=64),
    "zip_vl": lambda blocks: sparsity.ZipVL(budget=128),
    "flex_prefill": lambda blocks: sparsity.FlexPrefill(budget=min(blocks, 256)),
    "x_attention": lambda blocks: sparsity.XAttention(budget=min(blocks, 256)),
}
NAMES = {  # of the programs of each study
    "dense": ("mosaic_gpu", "cudnn"),
    **dict.fromkeys(("blocks", "a_shape"), ("mosaic_gpu",)),
    "policies": tuple(f"{name}_{part}" for name in POLICIES for part in ("select", "attend")),
}


@dataclass(frozen=True, kw_only=True)
class Program:
    """One function to time, with its arguments.

    Args:
        flops: of the attention that it computes; 0 for one that only chooses.
        facts: what else its row holds.
        dense: the output of dense attention, for its row to say how far its own is from that.
    """

    name: str
    case: tuple[int, ...]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float
    facts: dict[str, Any]
    dense: jax.Array | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Time the programs and print one JSON object a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--case", action="append", help="TOKENS, or TOKENSxPERCENT for blocks; may be repeated")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--only", help="programs to run, separated by commas (default: all)")
    parser.add_argument("--torch", action="store_true", help="time the peers of PyTorch, and nothing else")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file, too")
    arguments = parser.parse_args(argv)
    cases = [tuple(map(int, text.split("x"))) for text in arguments.case or [DEFAULT_CASES[arguments.study]]]
    settings = {name: getattr(arguments, name) for name in ("heads", "kv_heads", "head_dim", "dtype")}
    if arguments.torch:
        return _time_torch(arguments, cases, settings)
    only = arguments.only = names_among(parser, "--only", arguments.only, NAMES[arguments.study])
    programs = [one for case in cases for one in STUDIES[arguments.study](case, arguments) if one.name in only]
    with ThreadPoolExecutor(8) as pool:
        compiled = list(pool.map(_compile, programs))
    for program, run in zip(programs, compiled, strict=True):
        if run is not None:
            near = {} if program.dense is None else {"error": round(float(_distance(run(), program.dense)), 4)}
            facts = program.facts | near | settings
            _write(arguments, program.name, program.case, time_calls(run), program.flops, facts)
    return 0


def _compile(program: Program) -> Callable[[], Any] | None:
    try:
        run = jax.jit(program.function).lower(*program.arguments).compile()
    except NotImplementedError as refusal:
        sys.stderr.write(f"{program.name}: {refusal}\n")
        return None
    return functools.partial(run, *program.arguments)


def time_calls(run: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> dict[str, Any]:
    """Return milliseconds of a call, of several that are enqueued one behind the other."""
    once = measure(lambda: wait(run()), warmup=2, repeats=1).median
    number = max(1, min(200, round(SECONDS / once)))
    timing = measure(lambda: wait([run() for _ in range(number)][-1]), repeats=REPEATS).per(number)
    return {name: round(getattr(timing, part) * 1e3, 4) for name, part in PARTS.items()}


PARTS = {"ms": "median", "p10_ms": "p10", "p90_ms": "p90"}


def _write(arguments, name, case, row, flops, facts) -> None:
    rate = {"tflop_s": round(flops / row["ms"] / 1e9, 1)} if flops else {}
    row = {"bench": f"prefill_{arguments.study}", "program": name, "case": list(case)} | row | rate | facts
    write_row(row | describe_device(), arguments.jsonl)


def dense_programs(case: tuple[int, ...], arguments: Any) -> list[Program]:
    """Return causal attention by each implementation."""
    q, k, v = random_inputs(case[0], arguments)
    flops, facts = dense_flops(case[0], arguments), {}
    ways = {
        name: lambda q, k, v, name=name: prefill_attention(q, k, v, None, implementation=name)
        for name in NAMES["dense"]
    }
    if case[0] >= LONG:
        first = case[0] - SLICE
        q, facts = q[:, first:], {"slice": SLICE}
        flops *= 1 - (first / case[0]) ** 2
        ways = {
            "mosaic_gpu": lambda q, k, v: prefill_attention(q, k, v, None, offset=first, implementation="mosaic_gpu"),
            "cudnn": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn"),
        }
    return [
        Program(name=name, case=case, function=way, arguments=(q, k, v), flops=flops, facts=facts)
        for name, way in ways.items()
    ]


def block_programs(case: tuple[int, ...], arguments: Any) -> list[Program]:
    """Return attention to random blocks."""
    return [_sparse(case, arguments, random_index(*case, arguments))]


def a_shape_programs(case: tuple[int, ...], arguments: Any) -> list[Program]:
    """Return attention to sinks and a window."""
    obs = observe(*random_inputs(case[0], arguments)[:2])
    selected = sparsity.AShape(sinks=BLOCK, window=4096).select(obs)
    return [_sparse(case, arguments, selected.index, window=selected.window, sinks=selected.sinks)]


def _sparse(case, arguments, index, **options) -> Program:
    pairs = int(jnp.sum(index.counts))
    return Program(
        name="mosaic_gpu",
        case=case,
        function=lambda q, k, v, index: block_sparse_attention(q, k, v, index, **options, implementation="mosaic_gpu"),
        arguments=(*random_inputs(case[0], arguments), index),
        flops=4 * pairs * BLOCK**2 * arguments.head_dim,
        facts={"blocks": pairs},
    )


def policy_programs(case: tuple[int, ...], arguments: Any) -> list[Program]:
    """Return for each policy the choice of blocks, and attention to them."""
    q, k, v = planted_inputs(case[0], arguments)
    blocks = -(-case[0] // BLOCK)
    causal = arguments.heads * blocks * (blocks + 1) / 2
    programs = []
    dense = jax.jit(prefill_attention)(q, k, v, None) if case[0] < LONG else None
    for name, make in POLICIES.items():
        if not {f"{name}_select", f"{name}_attend"} & set(arguments.only):
            continue
        policy = make(blocks)
        select = lambda q, k, policy=policy: policy.select(observe(q, k))  # noqa: E731
        selected = jax.jit(select)(q, k)
        if selected is None:
            sys.stderr.write(f"{name}: its budget covers all {blocks} blocks\n")
            continue
        index = selected.index
        pairs = int(jnp.sum(index.counts))
        short = 0.0 if selected.wanted is None else float(jnp.mean(selected.wanted > index.counts))
        facts = {"density": round(pairs / causal, 4), "cut_short": round(short, 4), "policy": repr(policy)}
        options = {"window": selected.window, "sinks": selected.sinks}
        attend = functools.partial(block_sparse_attention, **options)
        flops = 4 * pairs * BLOCK**2 * arguments.head_dim
        choose = Program(name=f"{name}_select", case=case, function=select, arguments=(q, k), flops=0, facts=facts)
        run = Program(
            name=f"{name}_attend",
            case=case,
            function=attend,
            arguments=(q, k, v, index),
            flops=flops,
            facts=facts,
            dense=dense,
        )
        programs += [choose, run]
    return programs


@jax.jit
def _distance(output: jax.Array, wanted: jax.Array) -> jax.Array:
    output, wanted = output.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.linalg.norm((output - wanted).ravel()) / jnp.linalg.norm(wanted.ravel())


def observe(q_BTNH: jax.Array, k_BTKH: jax.Array) -> PromptObs:
    """Return what a policy sees of a whole prompt."""
    return PromptObs(layer=0, q_BTNH=q_BTNH, k_BSKH=k_BTKH, lengths_B=None, offset=0)


def dense_flops(tokens: int, arguments: Any) -> float:
    """Return the FLOPs of causal attention."""
    return 2.0 * tokens**2 * arguments.heads * arguments.head_dim


STUDIES = {
    "dense": dense_programs,
    "blocks": block_programs,
    "a_shape": a_shape_programs,
    "policies": policy_programs,
}
DEFAULT_CASES = {"dense": "4096", "blocks": "4096x25", "a_shape": "16384", "policies": "8192"}


def _time_torch(arguments: Any, cases: list[tuple[int, ...]], settings: dict[str, Any]) -> int:
    """Time PyTorch's attention on the same numbers and lists."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def causal(b, h, i, j):
        return i >= j

    def in_a_shape(b, h, i, j):
        return (i >= j) & ((i - j < 4096) | (j < BLOCK))

    attend = torch.compile(functools.partial(flex_attention, enable_gqa=True), dynamic=False)

    def done(_):
        torch.cuda.synchronize()

    for case in cases:
        q, k, v = (torch.from_dlpack(x).transpose(1, 2) for x in random_inputs(case[0], arguments))
        name, flops, facts = "torch_flex", dense_flops(case[0], arguments), {}
        if arguments.study == "dense":
            name = "torch_cudnn"

            def run(q=q, k=k, v=v):
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            program = STUDIES[arguments.study](case, arguments)[0]
            index, flops, facts = program.arguments[3], program.flops, program.facts
            a_shape = arguments.study == "a_shape"
            lists = _full_and_partial(index, case[0], 4096 if a_shape else None)
            parts = [torch.from_dlpack(x) for x in lists]
            mask = BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=BLOCK, mask_mod=in_a_shape if a_shape else causal)
            run = functools.partial(attend, q, k, v, block_mask=mask)
        _write(arguments, name, case, time_calls(run, done), flops, facts | settings | {"torch": torch.__version__})
    return 0


def _full_and_partial(index: BlockIndex, tokens: int, window: int | None) -> tuple[jax.Array, ...]:
    """Return counts and lists of the blocks that need a mask, and of those that need none, for FlexAttention."""
    blocks = -(-tokens // BLOCK)
    row = jnp.arange(blocks)[None, None, :, None]
    listed = jnp.arange(index.blocks.shape[3])[None, None, None] < index.counts[..., None]
    partial = index.blocks >= row
    if window is not None:
        partial |= (index.blocks <= row - window // BLOCK) & (index.blocks > 0)

    def pack(chosen):
        order = jnp.argsort(~chosen, axis=3, stable=True)
        ids = jnp.take_along_axis(index.blocks, order, axis=3)
        ids = jnp.pad(ids, ((0, 0), (0, 0), (0, 0), (0, max(blocks - ids.shape[3], 0))))[..., :blocks]
        return jnp.sum(chosen, axis=3, dtype=jnp.int32), jnp.clip(ids, 0, blocks - 1).astype(jnp.int32)

    return *pack(listed & partial), *pack(listed & ~partial)


if __name__ == "__main__":
    sys.exit(main())
