"""What sparse prefill costs in quality at every budget, on the two shipped models and on planted patterns.

A policy is a ``sparse_`` plan of ``configs/plans.py``; ``bench/sparse_budgets.py`` says how it gets a share of the
causal blocks of a prompt. ``best_blocks`` chooses as many blocks and knows the attention. Two studies:

- ``tasks``: token tasks answered by ``recall-6m``. The prompt, which ends with the question, is read sparsely, and the
  answer is decoded with all of the cache.
- ``mass``: the share of the exact attention that falls on what a policy attends to, and the error of the attention
  outputs, of all queries of a prompt, for both models and for queries and keys with planted patterns
  (``bench/prompt_inputs.py``).

``python bench/sparse_quality.py --study tasks --jsonl FILE`` prints one JSON object a policy and budget; rows that are
in the file are not measured again. ``--shard 0/4`` to ``3/4`` share the work of four processes, each with a file of its
own.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import jax

import dyninf
from bench.names import names_among
from bench.resume import parse_shard, parse_shares, read_keys, row_key
from bench.sparse_budgets import policy_names, with_budget
from bench.sparse_studies import PLANTED, prepare_mass, prepare_tasks
from dyninf.cli.bench import describe_device, describe_run, write_row
from dyninf.cli.common import DTYPES, Loaded, check_output, check_positive, load
from dyninf.cli.task_eval import fingerprint
from dyninf.sparsity import Dense, SparsityPolicy

VERSION = 1  # of the rows; raise it when what they mean changes
DENSE = "dense"
NO_MODEL = "planted"
STUDIES = {"tasks": prepare_tasks, "mass": prepare_mass}
MODELS = {"tasks": ("recall-6m",), "mass": ("recall-6m", "pycode-13m", NO_MODEL)}
# Tokens of a text and of a block: 64 blocks and more, so that an eighth of them is four a row. The context of
# pycode-13m is 2048.
SIZES = {"recall-6m": (4096, 64), "pycode-13m": (2048, 32), NO_MODEL: (8192, 64)}
KEY = ("study", "version", "model", "weights", "dtype", "policy", "plan", "denominator", "length", "samples", "seed")
KEY += ("device",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One row: a policy with 1/``denominator`` of the causal blocks (``None`` for all)."""

    model: str
    policy: str
    denominator: int | None


def main(argv: list[str] | None = None) -> int:
    """Measure the jobs of one shard and print a row for each."""
    arguments = _parse(argv)
    jobs = list_jobs(arguments)[arguments.shard[0] :: arguments.shard[1]]
    done = read_keys(arguments.jsonl, "sparse_quality", KEY)
    for name in dict.fromkeys(job.model for job in jobs):
        _measure_model(name, [job for job in jobs if job.model == name], done, arguments)
    return 0


def list_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Return all jobs of a study, whoever does them; one for dense attention."""
    names = MODELS[arguments.study] if arguments.model is None else (arguments.model,)
    return [
        Job(model=name, policy=policy, denominator=denominator)
        for name in names
        for policy in arguments.policies
        for denominator in ((None,) if policy == DENSE else arguments.budgets)
    ]


def _measure_model(name: str, jobs: list[Job], done: set[str], arguments: argparse.Namespace) -> None:
    """Measure the jobs of one model that are not done."""
    loaded = None if name == NO_MODEL else load(argparse.Namespace(model=name, dtype=arguments.dtype))
    length, block_size = SIZES.get(name, SIZES["recall-6m"])
    length, block_size = arguments.length or length, arguments.block_size or block_size
    if loaded is not None and length > loaded.model.config.max_length:
        raise ValueError(
            f"expected --length up to the context of {name}, {loaded.model.config.max_length}, got {length}"
        )
    about, measure = _about(loaded, length, block_size, arguments), None
    for job in jobs:
        try:
            policy = _policy(job, length, block_size)
        except ValueError as refusal:
            sys.stderr.write(f"{job.policy} at 1/{job.denominator}: {refusal}\n")
            continue
        plan = dyninf.describe(dyninf.Plan(sparsity=policy))
        row = about | {"policy": job.policy, "denominator": job.denominator, "plan": plan}
        if row_key(row, KEY) in done:
            continue
        if measure is None:  # makes the texts
            measure = STUDIES[arguments.study](loaded, argparse.Namespace(**vars(arguments) | {"length": length}))
        start = time.perf_counter()
        row |= measure(policy)
        write_row(row | {"seconds": round(time.perf_counter() - start, 1)}, arguments.jsonl)
        jax.clear_caches()  # no program serves another row, and a process may hold only so many


def _policy(job: Job, length: int, block_size: int) -> SparsityPolicy:
    if job.policy == DENSE:
        return Dense()
    return with_budget(job.policy, job.denominator, tokens=length, block_size=block_size)


def _about(loaded: Loaded | None, length: int, block_size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what all rows of a model hold."""
    planted = {
        "shapes": {"num_layers": 1} | {name: getattr(PLANTED, name) for name in ("heads", "kv_heads", "head_dim")}
    }
    return {
        "bench": "sparse_quality",
        "study": arguments.study,
        "version": VERSION,
        "model": NO_MODEL if loaded is None else loaded.name,
        "weights": None if loaded is None else fingerprint(loaded.model),
        "dtype": PLANTED.dtype if loaded is None else loaded.dtype,
        "length": length,
        "block_size": block_size,
        "samples": arguments.samples,
        "seed": arguments.seed,
        **(planted | describe_device() if loaded is None else describe_run(loaded.model)),
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; what cannot be measured is refused here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=tuple(MODELS), required=True)
    parser.add_argument("--policies", help="names separated by commas (default: dense and all that are sparse)")
    parser.add_argument("--budgets", default="2,4,8,16", help="shares of the causal blocks, 1/N (2,4,8,16)")
    parser.add_argument("--length", type=int, help="tokens of a text (default: by the model, 2048 to 8192)")
    parser.add_argument("--block-size", type=int, help="tokens of a block (default: by the model, 32 or 64)")
    parser.add_argument("--samples", type=int, default=4, help="of each task, or windows of text (default: 4)")
    parser.add_argument("--batch", type=int, default=4, help="prompts that are answered at once (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="do every N-th job, from the I-th (default: all)")
    parser.add_argument("--model", help=f"a model or its folder, or {NO_MODEL}, in place of the study's own")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (float32 on CPU, else bfloat16)")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file, too; go on where it ends")
    arguments = parser.parse_args(argv)
    known = [DENSE, *policy_names()]
    arguments.policies = names_among(parser, "--policies", arguments.policies, known)
    sizes = {name: getattr(arguments, name) for name in ("length", "block_size", "samples", "batch")}
    try:
        arguments.budgets, arguments.shard = parse_shares(arguments.budgets), parse_shard(arguments.shard)
        check_positive(**{name: size for name, size in sizes.items() if size is not None})
        check_output(arguments.jsonl)
    except ValueError as error:
        parser.error(str(error))
    if min(arguments.budgets) < 1:
        parser.error(f"expected --budgets of at least 1, got {arguments.budgets}")
    if arguments.study == "tasks" and arguments.model == NO_MODEL:
        parser.error(f"expected a model that answers tasks, got {NO_MODEL}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
