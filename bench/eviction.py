"""What parts of a step that evicts cost, by the kernels and by XLA: comparing hashes, and merging what is evicted.

Random numbers, a few layers in turn so that nothing stays in a cache of the device. Two studies:

- ``hashes``: scores of all slots by the bits in which codes of so many words differ from those of a step's queries.
- ``merge``: one entry of every head, the first, merged into the nearest other one, in place; a pass over the keys.

Times are those of ``bench/selection.py``. Run it where the numbers shall come from:
``python bench/eviction.py --study hashes --case 16x32768x4 --jsonl FILE``.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pallas_kernels as kernels
from bench.selection import time_jax
from dyninf.cli.bench import describe_device, write_row

Program = Callable[[], dict[str, Any]]


def main() -> int:
    """Time the programs and print one JSON object a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--case", action="append", help="BATCHxSLOTS, for hashes BATCHxSLOTSxWORDS; may be repeated")
    parser.add_argument("--layers", type=int, default=4, help="layers in turn (default: 4)")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file, too")
    arguments = parser.parse_args()
    for text in arguments.case or [DEFAULT_CASES[arguments.study]]:
        case = tuple(map(int, text.split("x")))
        for name in ("mosaic_gpu", "xla"):
            num_bytes, time_program = STUDIES[arguments.study](case, arguments, name)
            try:
                row = time_program()
            except NotImplementedError as refusal:
                sys.stderr.write(f"{name}: {refusal}\n")
                continue
            best = row["kernels_us"] or row["wall_us"]
            row = {"bench": f"eviction_{arguments.study}", "program": name, "case": list(case), **row}
            row |= {"bytes": num_bytes, "tb_s": round(num_bytes / best / 1e6, 3)}
            row |= {key: getattr(arguments, key) for key in ("layers", "heads", "kv_heads", "head_dim", "dtype")}
            write_row(row | describe_device(), arguments.jsonl)
    return 0


def hash_program(case: tuple[int, ...], arguments: Any, name: str) -> tuple[int, Program]:
    """Return the bytes of codes and scores of a layer, and what times the comparison."""
    batch, slots, words = case
    shape = (batch, words, arguments.kv_heads, slots)
    codes = [jax.random.bits(jax.random.key(layer), shape) for layer in range(arguments.layers)]
    queries = jax.random.bits(jax.random.key(99), (batch, arguments.heads, words))
    used = jnp.full(batch, slots)

    def run(codes, queries):
        return [kernels.hamming_scores(one, queries, used, implementation=name) for one in codes]

    num_bytes = codes[0].nbytes + 4 * batch * arguments.kv_heads * slots
    return num_bytes, lambda: time_jax(run, codes, queries, parts=len(codes))


def merge_program(case: tuple[int, ...], arguments: Any, name: str) -> tuple[int, Program]:
    """Return the bytes of the keys of a layer, and what times the merging."""
    batch, slots = case
    shape = (batch, slots, arguments.kv_heads, arguments.head_dim)
    make = jax.jit(lambda key: jax.random.normal(key, shape, arguments.dtype))
    caches = [tuple(map(make, jax.random.split(jax.random.key(layer)))) for layer in range(arguments.layers)]
    victims, evicted = jnp.zeros((batch, arguments.kv_heads), jnp.int32), jnp.ones(batch, bool)
    state = (victims, evicted, jnp.full(batch, slots), jnp.full(batch, -1.0))

    def run(caches):
        found = [kernels.merge_victims(*cache, *state, momentum=0.5, implementation=name) for cache in caches]
        return [one[:2] for one in found], [one[2] for one in found]

    num_bytes = caches[0][0].nbytes
    return num_bytes, lambda: time_jax(run, parts=len(caches), donated=caches)


STUDIES = {"hashes": hash_program, "merge": merge_program}
DEFAULT_CASES = {"hashes": "1x4096x4", "merge": "1x512"}

if __name__ == "__main__":
    sys.exit(main())
