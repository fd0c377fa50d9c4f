"""What parts of a step that evicts cost: comparing hashes (by XLA), merging what is evicted (by kernels and by XLA).

Random numbers, a few layers in turn so that nothing stays in a cache of the device. Two studies:

- ``hashes``: scores of all slots by the bits in which codes of so many words differ from those of a step's queries.
- ``merge``: one entry of every head, the first, merged into the nearest other one, in place; a pass over the keys.

Times are those of ``bench/selection.py``. Run it where the numbers shall come from:
``python bench/eviction.py --study hashes --case 16x32768x4 --jsonl FILE``.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.append(str(Path(__file__).resolve().parents[1]))

import pallas_kernels as kernels
from bench.selection import Program, time_jax, time_programs


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
    settings = {key: getattr(arguments, key) for key in ("layers", "heads", "kv_heads", "head_dim", "dtype")}
    for text in arguments.case or [DEFAULT_CASES[arguments.study]]:
        case = tuple(map(int, text.split("x")))
        programs = STUDIES[arguments.study](case, arguments)
        time_programs(programs, f"eviction_{arguments.study}", case, settings, arguments.jsonl)
    return 0


def hash_programs(case: tuple[int, ...], arguments: Any) -> list[Program]:
    """Return the comparison of the hashes of a layer, which reads codes and writes scores."""
    batch, slots, words = case
    shape = (batch, words, arguments.kv_heads, slots)
    codes = [jax.random.bits(jax.random.key(layer), shape) for layer in range(arguments.layers)]
    queries = jax.random.bits(jax.random.key(99), (batch, arguments.heads, words))
    used = jnp.full(batch, slots)

    def run(codes, queries):
        return [kernels.hamming_scores(one, queries, used, implementation="xla") for one in codes]

    num_bytes = codes[0].nbytes + 4 * batch * arguments.kv_heads * slots
    return [("xla", num_bytes, lambda: time_jax(run, codes, queries, parts=len(codes)))]


def merge_programs(case: tuple[int, ...], arguments: Any) -> list[Program]:
    """Return the merging in a layer, which reads its keys, by each implementation."""
    batch, slots = case
    shape = (batch, slots, arguments.kv_heads, arguments.head_dim)
    make = jax.jit(lambda key: jax.random.normal(key, shape, arguments.dtype))
    victims, evicted = jnp.zeros((batch, arguments.kv_heads), jnp.int32), jnp.ones(batch, bool)
    state = (victims, evicted, jnp.full(batch, slots), jnp.full(batch, -1.0))

    def program(name):
        def run(caches):
            found = [kernels.merge_victims(*cache, *state, momentum=0.5, implementation=name) for cache in caches]
            return [one[:2] for one in found], [one[2] for one in found]

        def caches():
            return [tuple(map(make, jax.random.split(jax.random.key(layer)))) for layer in range(arguments.layers)]

        return lambda: time_jax(run, parts=arguments.layers, donated=caches())

    num_bytes = batch * slots * arguments.kv_heads * arguments.head_dim * jnp.dtype(arguments.dtype).itemsize
    return [(name, num_bytes, program(name)) for name in ("mosaic_gpu", "xla")]


STUDIES = {"hashes": hash_programs, "merge": merge_programs}
DEFAULT_CASES = {"hashes": "1x4096x4", "merge": "1x512"}

if __name__ == "__main__":
    sys.exit(main())
