"""What every cache policy costs in quality at every budget, on the two shipped models.

A policy is a plan of ``configs/plans.py`` that evicts or selects; ``bench/budget_plans.py`` says how it gets another
budget, a share of the text's length. Three studies:

- ``tasks``: token tasks answered by ``recall-6m``, the question being part of the prompt (``with``), or fed after the
  context was read and compressed (``after``).
- ``nll``: held-out text predicted by ``pycode-13m``: the first half of each window is the prompt that is compressed,
  and the tokens of the second half are fed one by one; what is predicted after each of them counts.
- ``mass``: the share of the exact attention of a text's last token that falls on what a policy keeps or reads, and the
  error of the attention outputs, for both models (``bench/attention_mass.py``). ``most_attended`` is the choice of as
  many tokens that knows the attention.

``python bench/budgets.py --study tasks --jsonl FILE`` prints one JSON object a policy, budget and way to ask; rows that
are in the file are not measured again. ``--shard 0/4`` to ``3/4`` share the work of four processes, each with a file of
its own.
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
from bench import budget_studies
from bench.budget_plans import DENSE, plan_with_budget, policy_names, settings
from bench.names import names_among
from bench.resume import parse_shard, parse_shares, read_keys, row_key
from dyninf.cli.bench import describe_run, write_row
from dyninf.cli.common import DTYPES, Loaded, check_output, check_positive, load
from dyninf.cli.task_eval import fingerprint

VERSION = 1  # of the rows; raise it when what they mean changes
BEST = "most_attended"
MODELS = {"tasks": ("recall-6m",), "nll": ("pycode-13m",), "mass": ("recall-6m", "pycode-13m")}
QUERIES = {"tasks": ("with", "after"), "nll": (None,), "mass": (None,)}
KEY = ("study", "version", "model", "weights", "dtype", "policy", "plan", "denominator", "query")
KEY += ("length", "samples", "seed", "device")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One row: a policy with ``length / denominator`` tokens (``None`` for all), asked in one way."""

    model: str
    policy: str
    denominator: int | None
    query: str | None


def main(argv: list[str] | None = None) -> int:
    """Measure the jobs of one shard and print a row for each."""
    arguments = _parse(argv)
    jobs = list_jobs(arguments)[arguments.shard[0] :: arguments.shard[1]]
    done = read_keys(arguments.jsonl, "budgets", KEY)
    for name in dict.fromkeys(job.model for job in jobs):
        _measure_model(name, [job for job in jobs if job.model == name], done, arguments)
    return 0


def list_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Return all jobs of a study, whoever does them; one for a plan that is exact."""
    names = MODELS[arguments.study] if arguments.model is None else (arguments.model,)
    return [
        Job(model=name, policy=policy, denominator=denominator, query=query)
        for name in names
        for policy in arguments.policies
        for denominator in ((None,) if policy == DENSE else arguments.budgets)
        for query in QUERIES[arguments.study]
    ]


def _measure_model(name: str, jobs: list[Job], done: set[str], arguments: argparse.Namespace) -> None:
    """Measure the jobs of one model that are not done."""
    loaded = load(argparse.Namespace(model=name, dtype=arguments.dtype))
    if arguments.length > loaded.model.config.max_length:
        raise ValueError(
            f"expected --length up to the context of {name}, {loaded.model.config.max_length}, got {arguments.length}"
        )
    origin, weights = describe_run(loaded.model), fingerprint(loaded.model)
    measure = None
    for job in jobs:
        budget = None if job.denominator is None else arguments.length // job.denominator
        try:
            plan = dyninf.Plan() if job.policy in (DENSE, BEST) else plan_with_budget(job.policy, budget, loaded.model)
        except (ValueError, NotImplementedError) as refusal:
            sys.stderr.write(f"{job.policy} at 1/{job.denominator}: {refusal}\n")
            continue
        row = _about(job, plan, loaded, weights, arguments) | origin
        if row_key(row, KEY) in done:
            continue
        if measure is None:  # makes the texts
            measure = STUDIES[arguments.study](loaded, arguments)
        start = time.perf_counter()
        try:
            row |= measure(plan, query=job.query, best=budget if job.policy == BEST else None)
        except NotImplementedError as refusal:
            sys.stderr.write(f"{job.policy} at 1/{job.denominator}: {refusal}\n")
            continue
        write_row(row | {"seconds": round(time.perf_counter() - start, 1)}, arguments.jsonl)
        jax.clear_caches()  # no program serves another row, and a process may hold only so many


def _about(job: Job, plan: dyninf.Plan, loaded: Loaded, weights: str, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "bench": "budgets",
        "study": arguments.study,
        "version": VERSION,
        "model": loaded.name,
        "weights": weights,
        "dtype": loaded.dtype,
        "policy": job.policy,
        "denominator": job.denominator,
        "query": job.query,
        "length": arguments.length,
        "samples": arguments.samples,
        "seed": arguments.seed,
        "plan": dyninf.describe(plan),
        **settings(plan),
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; what cannot be measured is refused here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=tuple(MODELS), required=True)
    parser.add_argument("--policies", help="names separated by commas (default: dense and all that evict or select)")
    parser.add_argument("--budgets", default="2,4,8,16,32,64", help="shares of the length, 1/N (2,4,8,16,32,64)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a text (default: 1024)")
    parser.add_argument("--samples", type=int, default=64, help="of each task, or windows of text (default: 64)")
    parser.add_argument("--batch", type=int, default=16, help="texts at once (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="do every N-th job, from the I-th (default: all)")
    parser.add_argument("--model", help="a model or its folder in place of the study's own")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (float32 on CPU, else bfloat16)")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file, too; go on where it ends")
    arguments = parser.parse_args(argv)
    known = [DENSE, *policy_names(), *([BEST] if arguments.study == "mass" else [])]
    arguments.policies = names_among(parser, "--policies", arguments.policies, known)
    try:
        arguments.budgets, arguments.shard = parse_shares(arguments.budgets), parse_shard(arguments.shard)
        check_positive(length=arguments.length, samples=arguments.samples, batch=arguments.batch)
        check_output(arguments.jsonl)
    except ValueError as error:
        parser.error(str(error))
    if not all(1 <= denominator <= arguments.length for denominator in arguments.budgets):
        parser.error(f"expected --budgets between 1 and --length={arguments.length}, got {arguments.budgets}")
    return arguments


STUDIES = {
    "tasks": budget_studies.prepare_tasks,
    "nll": budget_studies.prepare_nll,
    "mass": budget_studies.prepare_mass,
}

if __name__ == "__main__":
    sys.exit(main())
