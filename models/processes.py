"""What the processes of one job (``jax.distributed``) tell each other; with one process all of this does nothing.

Every process runs the same program, so that every function here must be called by all of them, in the same order. They
exchange JSON by collectives over all devices: small things, before and between the real work.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec


def is_first() -> bool:
    """Return whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Return the value of every process, in their order; anything that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode("ascii"), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.pad(text, (0, int(sizes.max()) - text.size))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast(value: Any) -> Any:
    """Return the value of process 0, anything that JSON can hold; that of the others is not read."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode("ascii"), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.resize(text, size) if is_first() else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Run a block that may fail in some processes: when it does, all of them raise.

    The block itself must hold nothing that waits for other processes.

    Raises:
        ValueError: if the block failed elsewhere; says where and why. Where it failed, its own exception is raised.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    reasons = gather(None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    for process, reason in enumerate(reasons):
        if reason is not None:
            raise ValueError(f"process {process} of {len(reasons)}: {reason}")


def agree(values: dict[str, Any]) -> None:
    """Check that all processes have the same values.

    Raises:
        ValueError: in every process, naming the first one that differs from process 0, and in what.
    """
    first, *others = gather(values)
    for process, other in enumerate(others, start=1):
        names = [name for name in dict.fromkeys((*first, *other)) if first.get(name) != other.get(name)]
        if names:
            differ = "; ".join(f"{name}: {first.get(name)!r:.80} -> {other.get(name)!r:.80}" for name in names)
            raise ValueError(
                f"expected the same of every process, got {differ} (process 0 -> process {process}); give all of them "
                "the same command, files and versions"
            )


def replicate(tree: Any) -> Any:
    """Return the tree with arrays that every process can read whole (``np.asarray``); does not wait for them."""

    leaves, structure = jax.tree.flatten(tree)
    split = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and not _is_readable(x)]
    if split:
        whole = [NamedSharding(leaves[i].sharding.mesh, PartitionSpec()) for i in split]
        for i, x in zip(split, jax.jit(_same, out_shardings=whole)([leaves[i] for i in split]), strict=True):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def _is_readable(x: jax.Array) -> bool:
    return x.is_fully_addressable or x.is_fully_replicated


def _same(xs: list[jax.Array]) -> list[jax.Array]:
    return xs
