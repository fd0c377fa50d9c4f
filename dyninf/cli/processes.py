"""Several processes that run one command together: how they find each other, and what they must have in common."""

import argparse
import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import dyninf
from dyninf.cli.common import Loaded
from dyninf.cli.task_eval import fingerprint
from dyninf.models.processes import agree, is_first
from dyninf.plan import describe
from dyninf.training import data

SHUTDOWN_SECONDS = 60  # that a process which ends waits for the others
# What may differ between processes, and what is compared by what it leads to.
OWN = ("run", "debug", "process_id", "coordinator", "distributed", "input", "output", "model", "prompt", "file")
ENVIRONMENT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--distributed`` and what says by hand where the processes are."""
    group = parser.add_argument_group("several processes, the same command in each, with --mesh over all their devices")
    group.add_argument(
        "--distributed", action="store_true", help="join the processes that JAX finds (SLURM, GKE, Cloud TPU, Open MPI)"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 (JAX_COORDINATOR_ADDRESS)")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are (JAX_NUM_PROCESSES)")
    group.add_argument("--process-id", type=int, metavar="I", help="which this is, from 0 on (JAX_PROCESS_ID)")


def join(arguments: argparse.Namespace) -> None:
    """Join the other processes if the options ask for it; must come before anything that looks for devices.

    Options that are not given are taken from the environment, then found by ``jax.distributed.initialize``.

    Raises:
        ValueError: if the options do not go together, or the processes do not find each other.
    """
    given = {name: getattr(arguments, name) for name in ENVIRONMENT}
    if not arguments.distributed and all(value is None for value in given.values()):
        return
    for name, variable in ENVIRONMENT.items():
        if given[name] is None and (text := os.environ.get(variable)):
            given[name] = text if name == "coordinator" else _whole(text, variable)
    address, count, place = given.values()
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise ValueError(f"expected --coordinator HOST:PORT, got {address!r}")
    if count is not None and place is not None and not 0 <= place < count:
        raise ValueError(f"expected --process-id from 0 to --num-processes - 1, got {place} of {count}")
    try:
        jax.distributed.initialize(address, count, place, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"expected to join the processes of this job, got: {reason}; give each of them --coordinator HOST:PORT, "
            "--num-processes N and --process-id I"
        ) from error


def agree_on_options(arguments: argparse.Namespace, **more: Any) -> None:
    """Check that all processes were started alike, before anything is loaded.

    Raises:
        ValueError: in every process, if they were not.
    """
    options = {name: value for name, value in vars(arguments).items() if name not in OWN}
    agree({"dyninf": dyninf.__version__, "jax": jax.__version__} | more | options)


def identity(loaded: Loaded, plan: dyninf.Plan) -> dict[str, Any]:
    """Return what decides which tokens a model generates under a plan, beside the prompt: of values, checksums."""
    return {
        "model": fingerprint(loaded.model),
        "tokenizer": data.fingerprint(loaded.tokenizer),
        "dtype": loaded.dtype,
        "plan": describe(plan),
        "plan_values": _digest(plan),
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
        "dyninf": dyninf.__version__,
    }


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Let process 0 alone print; errors that end a command are printed outside of this."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _digest(plan: dyninf.Plan) -> str:
    """Return a checksum of the numbers of a plan, which its description may shorten."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(plan):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def _whole(text: str, variable: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"expected a whole number in {variable}, got {text!r}")
    return int(text)
