"""What dynamic depth costs and saves while decoding, against the same thing written the obvious way.

Every program decodes the same random tokens from the same kind of random state, in one of three studies:

- ``depth``: dense; a depth that is data, decided at every layer, for all, a half and a quarter of the layers; the loop
  of ``generate``, which ends when all texts have; and the naive programs over stacked weights.
- ``decisions``: each rule, asked at a few layers and never leaving, beside a rule that only compares two integers.
- ``batch``: sequences that leave at the recorded depths of real tokens (``--depths``, made by ``bench/record.py``),
  under every way to run such a batch.

Run it where the numbers shall come from:
``python bench/depth.py --shape llama3-8b --dtype bfloat16 --study depth --batch 1,8 --jsonl FILE``.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import dyninf
from bench.names import names_among
from dyninf import Plan, depth, models
from dyninf.attention import attend_cached
from dyninf.cache import LayerCache
from dyninf.cli.bench import describe_run, write_row
from dyninf.cli.decoding import bytes_per_step, decode_steps, random_state
from dyninf.configs.models import shapes
from dyninf.generate import decode_loop
from dyninf.timing import measure

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
SHARES = {"all": 1, "half": 2, "quarter": 4}


def main(argv: Sequence[str] | None = None) -> int:
    """Time the programs and print one JSON object a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=shapes())
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--study", default="depth", choices=STUDIES)
    parser.add_argument("--depths", type=Path, help="recorded depths, for --study batch")
    parser.add_argument("--batch", default="1", help="batch sizes, separated by commas")
    parser.add_argument("--context", type=int, default=256, help="cache slots")
    parser.add_argument("--filled", type=int, help="slots filled before the first step (default: half of them)")
    parser.add_argument("--steps", type=int, default=128, help="steps of a program (default: 128)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="names to run, separated by commas (default: all)")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file, too")
    arguments = parser.parse_args(argv)
    arguments.filled = arguments.filled or arguments.context // 2
    if arguments.filled + arguments.steps > arguments.context:
        parser.error(f"expected --filled + --steps up to --context={arguments.context}")
    if (arguments.study == "batch") != (arguments.depths is not None):
        parser.error("expected --depths FILE with --study batch, and only there; make it with bench/record.py")
    config, batches = shapes()[arguments.shape], [int(batch) for batch in arguments.batch.split(",")]
    study = functools.partial(STUDIES[arguments.study], config.num_layers, arguments)
    try:
        programs = {stacked: [(n, *one) for n in batches for one in study(stacked, n)] for stacked in (False, True)}
    except (OSError, ValueError) as fault:
        parser.error(str(fault))
    known = dict.fromkeys(name for found in programs.values() for _, name, *_ in found)
    only = names_among(parser, "--only", arguments.only, known)
    dense = {}
    for stacked, found in programs.items():
        wanted = [program for program in found if program[1] in only]
        if not wanted:
            continue
        model = models.Transformer(config, jax.random.key(0), DTYPES[arguments.dtype])
        model = models.stack_for_decoding(model) if stacked else model
        for batch, name, plan, decode in wanted:
            row = time_program(model, plan, decode, batch, arguments)
            if name == "dense_list":
                dense[batch] = row["median_ms"]
            speedup = dense[batch] / row["median_ms"] if batch in dense else None
            row = {"bench": arguments.study, "program": name, "speedup": speedup, **row, **describe_run(model)}
            write_row(row, arguments.jsonl)
    return 0


Program = tuple[str, Plan, Callable]  # name, plan, function that decodes the given tokens


def depth_programs(num_layers: int, arguments: Any, stacked: bool, batch: int) -> list[Program]:
    """Return dense, data-dependent and naive programs over a list of layers, or over stacked ones."""
    kept = {share: max(1, num_layers // parts) for share, parts in SHARES.items()}
    recorded = {share: Plan(depth=depth.Recorded(depths=jnp.array([count]))) for share, count in kept.items()}
    if not stacked:
        found = [("dense_list", Plan(), decode_steps)]
        found += [(f"segments_{share}", plan, decode_steps) for share, plan in recorded.items()]
        grouped = depth.every(recorded["all"].depth, step=max(1, num_layers // 8))
        found += [("segments_grouped_all", Plan(depth=grouped), decode_steps)]
        return [*found, ("generate_list", Plan(), generate_steps)]
    found = [("dense_indexed", Plan(), decode_steps)]
    found += [(f"indexed_{share}", plan, decode_steps) for share, plan in recorded.items()]
    # A rule that the layers follow themselves; no cosine exceeds 1, so that every layer is asked and kept.
    found += [("indexed_cosine_all", Plan(depth=depth.Saturation(threshold=1.0)), decode_steps)]
    found += [(f"generate_indexed_{share}", recorded[share], generate_steps) for share in ("all", "half")]
    found += [("naive_scan_all", Plan(), jax.jit(naive_scan, donate_argnums=1))]
    for share, count in kept.items():
        for kind, function in (("while", naive_while), ("cond", naive_cond)):
            decode = functools.partial(jax.jit(function, donate_argnums=1), count=jnp.int32(count))
            found.append((f"naive_{kind}_{share}", Plan(), decode))
    return found


def decision_programs(num_layers: int, arguments: Any, stacked: bool, batch: int) -> list[Program]:
    """Return every rule, asked at seven layers and never leaving, beside none; ``none`` compares integers only."""
    rules = {
        "none": depth.Recorded(depths=jnp.array([num_layers])),
        "saturation": depth.Saturation(threshold=1.0),
        "max_prob": depth.Confidence(threshold=1.0),
        "margin": depth.Confidence(threshold=1.0, measure="margin"),
        "entropy": depth.Confidence(threshold=1.0, measure="entropy"),
        "patience": depth.Patience(patience=num_layers),
        "candidates": depth.CandidateExit.create(jax.random.key(0), num_layers, threshold=1.0),
    }
    driver = "indexed" if stacked else "segments"
    asked = max(1, num_layers // 8)
    return [
        ("dense_indexed" if stacked else "dense_list", Plan(), decode_steps),
        *(
            (f"{driver}_{name}", Plan(depth=depth.every(rule, step=asked)), decode_steps)
            for name, rule in rules.items()
        ),
    ]


def batch_programs(num_layers: int, arguments: Any, stacked: bool, batch: int) -> list[Program]:
    """Return every way to run sequences that leave at depths of their own.

    Recorded depths are shares of their model's layers; the plans ask at every eighth of the depth.
    """
    rule = recorded_depths(arguments.depths, num_layers, batch)
    plan = Plan(depth=rule)
    if stacked:
        return [("dense_indexed", Plan(), decode_steps), ("indexed", plan, decode_steps)]
    run = lambda driver: functools.partial(decode_steps, driver=driver)  # noqa: E731
    return [
        ("dense_list", Plan(), decode_steps),
        ("masked", plan, run("masked")),
        ("segments", plan, decode_steps),
        *((f"compact_{c}", plan, run(dyninf.Compact(capacity=c))) for c in (batch // 2, batch // 4) if c),
        ("catch_up", Plan(depth=rule, fill="catch_up"), decode_steps),
    ]


def recorded_depths(file: Path, num_layers: int, batch: int) -> depth.DepthPolicy:
    """Return a rule by which sequences leave where those of a recording left, in shares of the layers."""
    recorded = json.loads(file.read_text(encoding="utf-8"))
    table_SB = np.array(recorded["depths"]).T
    if table_SB.shape[1] < batch:
        raise ValueError(f"expected recorded depths of at least {batch} sequences, got {table_SB.shape[1]}")
    table_SB = np.ceil(table_SB[:, :batch] * num_layers / recorded["num_layers"]).astype(np.int32)
    return depth.every(depth.Recorded(depths=jnp.asarray(table_SB)), step=max(1, num_layers // 8))


STUDIES = {"depth": depth_programs, "decisions": decision_programs, "batch": batch_programs}


def time_program(
    model: models.Transformer, plan: Plan, decode: Callable, batch: int, arguments: argparse.Namespace
) -> dict:
    """Return the times of one decode step, and what it must read."""
    key = jax.random.key(0)
    sizes = {"batch": batch, "length": arguments.filled, "capacity": arguments.context}
    start = random_state(model, plan, **sizes, key=key)
    tokens_NB = jax.random.randint(jax.random.fold_in(key, 1), (arguments.steps, batch), 0, model.config.vocab_size)
    spent = []

    def run(state: dyninf.DecodeState) -> Any:
        spent[:] = [decode(model, state, plan, tokens_NB)[1]]
        return spent

    timing = measure(run, warmup=1, repeats=arguments.repeats, setup=lambda: jax.tree.map(jnp.copy, start))
    timing, means = timing.per(arguments.steps), dyninf.summarize(spent[0])
    num_bytes = bytes_per_step(model, means, batch)
    return {
        "batch": batch,
        "context": arguments.context,
        "filled": arguments.filled,
        "dtype": arguments.dtype,
        "steps": arguments.steps,
        "median_ms": 1000 * timing.median,
        "p10_ms": 1000 * timing.p10,
        "p90_ms": 1000 * timing.p90,
        "tokens_per_s": batch / timing.median,
        "layers_run": means["layers_run"],
        "layers_needed": means["layers_needed"],
        "bytes_per_step": num_bytes,
        "achieved_gb_s": num_bytes / timing.median / 1e9,
    }


def generate_steps(model, state, plan, tokens_NB):
    """Make as many tokens in the loop of ``generate``, which are its own."""
    generation, state = decode_loop(model, state, plan, max_new_tokens=len(tokens_NB) + 1)
    return state, generation.stats


def naive_while(model, state, plan, tokens_NB, count):
    """Decode with ``lax.while_loop`` over dynamically indexed layers, as early exit is usually written."""

    def layers(x_BTD, k, v, step):
        def body(carry):
            index, x_BTD, k, v = carry
            return index + 1, *step(index, x_BTD, k, v)

        return lax.while_loop(lambda carry: carry[0] < count, body, (jnp.int32(0), x_BTD, k, v))[1:]

    return _naive(model, state, tokens_NB, layers, count)


def naive_scan(model, state, plan, tokens_NB):
    """Decode with ``lax.scan`` over the stacked layers and caches."""
    num_layers = len(model.layers)

    def layers(x_BTD, k, v, step):
        def body(x_BTD, inputs):
            layer, k_BSKH, v_BSKH = inputs
            return step.run(layer, x_BTD, k_BSKH, v_BSKH)

        x_BTD, (k, v) = lax.scan(body, x_BTD, (model.layers.stack, k, v))
        return x_BTD, k, v

    return _naive(model, state, tokens_NB, layers, jnp.int32(num_layers))


def naive_cond(model, state, plan, tokens_NB, count):
    """Decode with one ``lax.cond`` a layer over static slices of the stacked weights."""

    def layers(x_BTD, k, v, step):
        for index in range(len(model.layers)):
            run = functools.partial(step, index)
            x_BTD, k, v = lax.cond(index < count, run, lambda *operands: operands, x_BTD, k, v)
        return x_BTD, k, v

    return _naive(model, state, tokens_NB, layers, count)


class _Step:
    """One layer of a stacked model on one token of each sequence."""

    def __init__(self, layers: models.StackedLayers, positions_BT: jax.Array):
        self.layers, self.positions_BT = layers, positions_BT

    def __call__(self, index, x_BTD, k, v):
        take = lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False)  # noqa: E731
        x_BTD, new = self.run(jax.tree.map(take, self.layers.stack), x_BTD, take(k), take(v))
        return x_BTD, *(
            lax.dynamic_update_index_in_dim(old, part, index, 0) for old, part in zip((k, v), new, strict=True)
        )

    def run(self, layer, x_BTD, k_BSKH, v_BSKH):
        layer = jax.tree.map(lambda leaf: leaf, layer)  # a copy whose weights may be replaced
        for name, shape in (("wqkv", "qkv_shape"), ("wo", "out_shape")):
            setattr(layer, name, nnx.Param(getattr(layer, name)[...].reshape(getattr(self.layers, shape))))
        layer.w_gate_up = nnx.Param(jnp.moveaxis(layer.w_gate_up[...], 0, 1))
        live_BT = jnp.ones(self.positions_BT.shape, bool)
        attend = attend_cached(self.positions_BT, live_BT, write_inactive=True)(LayerCache(k=k_BSKH, v=v_BSKH), live_BT)
        x_BTD, cache = layer(x_BTD, self.positions_BT, attend)
        return x_BTD, (cache.k, cache.v)


def _naive(model, state, tokens_NB, layers, count):
    def body(carry, token_B):
        k, v, length = carry
        x_BTD, k, v = layers(model.embed(token_B[:, None]), k, v, _Step(model.layers, length[:, None]))
        chosen_B = jnp.argmax(model.unembed(x_BTD)[:, 0], axis=-1)
        live_B = jnp.ones(token_B.shape, bool)
        stats = dyninf.StepStats(
            active=live_B, needed=jnp.full(token_B.shape, count), run=count, kv_live=length + 1, kv_read=length + 1
        )
        return (k, v, length + 1), (stats, chosen_B)

    cache = state.cache
    carry, (stats, chosen_NB) = lax.scan(body, (cache.layers.k, cache.layers.v, cache.length), tokens_NB)
    return (carry, chosen_NB), stats


if __name__ == "__main__":
    sys.exit(main())
