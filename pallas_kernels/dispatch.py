"""Choose the implementation of an operation, and keep the reasons why the others could not serve.

An operation lists its implementations from fastest to most general. Each has a ``refuse`` function that returns a
reason, or ``None`` when it can serve. The first that can serve is taken; an implementation that was asked for by name
is never replaced by another.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import partition

MOSAIC_GPU_JAX = (0, 11, 2)  # oldest version that runs our Mosaic GPU kernels
MANY = "is a kernel for one device"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to run an operation.

    Args:
        name: what ``implementation=`` accepts.
        refuse: called with the facts of the call; returns why it cannot serve, or ``None``.
        run: the function itself.
        splits: whether a kernel divides its work among the devices of a mesh by itself.
    """

    name: str
    refuse: Callable[..., str | None]
    run: Callable[..., Any]
    splits: bool = False


def kernel(package: str, name: str, operation: str) -> Implementation:
    """Return a Mosaic kernel whose module is imported when its platform asks for it: that takes half a second.

    Args:
        package: of this one, in which ``mosaic_gpu`` or ``mosaic_tpu`` has ``refuse`` and the operation.
        name: which of them.
        operation: name of the function.
    """
    needed, device = {"mosaic_gpu": ("gpu", "an NVIDIA GPU"), "mosaic_tpu": ("tpu", "a TPU")}[name]

    def module() -> Any:
        return importlib.import_module(f"pallas_kernels.{package}.{name}")

    def refuse(*, platform: str, **facts: Any) -> str | None:
        if platform != needed:
            return f"needs {device}, got platform {platform!r}"
        return module().refuse(platform=platform, **facts)

    def run(*arrays: Any, **options: Any) -> Any:
        return getattr(module(), operation)(*arrays, **options)

    return Implementation(name=name, refuse=refuse, run=run)


def choose(
    operation: str, implementations: Sequence[Implementation], requested: str | None, **facts: Any
) -> Implementation:
    """Return the first implementation that can serve, or the requested one.

    On a GPU the reasons are logged once when the fastest implementation could not serve, elsewhere when a kernel could
    on one device.

    Raises:
        ValueError: if ``requested`` names no implementation.
        NotImplementedError: if the requested implementation, or every implementation, refuses; with all reasons.
    """
    names = [implementation.name for implementation in implementations]
    if requested is not None and requested not in names:
        raise ValueError(f"expected implementation of {operation} to be one of {names}, got {requested!r}")
    reasons = []
    for implementation in implementations:
        if requested not in (None, implementation.name):
            continue
        reason = implementation.refuse(**facts) or _refuse_many(implementation)
        if reason is None:
            if reasons and (facts.get("platform") == "gpu" or any(MANY in reason for reason in reasons)):
                _log_once(f"{operation} runs as {implementation.name!r}: " + "; ".join(reasons))
            return implementation
        reasons.append(f"{implementation.name}: {reason}")
    raise NotImplementedError(f"no implementation of {operation} can serve: " + "; ".join(reasons))


def explain(implementations: Sequence[Implementation], **facts: Any) -> list[tuple[str, str | None]]:
    """Return ``(name, reason)`` of every implementation for a call; the reason is ``None`` where it could serve."""
    return [(implementation.name, implementation.refuse(**facts)) for implementation in implementations]


def platform() -> str:
    """Return the platform that is traced for: of the mesh at hand, or JAX's default; ``cpu``, ``gpu`` or ``tpu``."""
    return partition.platform() or jax.default_backend()


def capability() -> str | None:
    """Return the compute capability of the default device, ``None`` where it has none."""
    return getattr(jax.local_devices()[0], "compute_capability", None)


def refuse_unless_hopper(platform: str, capability: str | None) -> str | None:
    """Return why a Mosaic GPU kernel for Hopper cannot run here, or ``None``."""
    if platform != "gpu":
        return f"needs an NVIDIA GPU, got platform {platform!r}"
    if jax.__version_info__ < MOSAIC_GPU_JAX:
        return f"needs jax {'.'.join(map(str, MOSAIC_GPU_JAX))} or newer, got {jax.__version__}"
    if capability != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), got {capability}"
    return None


def refuse_peers(numbers: list[int]) -> str | None:
    """Return why devices of these numbers cannot write to each other's memory in a Mosaic GPU kernel, or ``None``."""
    if jax.process_count() > 1:
        return f"needs devices of one process to share layers, got {jax.process_count()} processes"
    if numbers != list(range(len(numbers))):
        return f"needs a mesh of the first devices, in the order of their numbers, to share layers, got {numbers}"
    return None


def refuse_dtypes(found: dict[str, Any], served: tuple[str, ...]) -> str | None:
    """Return why a kernel that takes one dtype everywhere cannot serve, or ``None``.

    Args:
        found: dtypes by what has them, such as ``{"queries": ..., "keys": ...}``.
        served: names of the dtypes that it takes.
    """
    names = [jnp.dtype(dtype).name for dtype in found.values()]
    if len(set(names)) == 1 and names[0] in served:
        return None
    got = " and ".join(f"{name} {what}" for what, name in zip(found, names, strict=True))
    return f"needs {' or '.join(served)} everywhere, got {got}"


def refuse_keys(dtype: Any, head_dim: int) -> str | None:
    """Return why kernels that move keys in parts of 64 features cannot take them, or ``None``."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {jnp.dtype(dtype).name}"
    if head_dim % 64 or head_dim > 256:
        return f"needs head_dim to be a multiple of 64 up to 256, got {head_dim}"
    return None


def _refuse_many(implementation: Implementation) -> str | None:
    """Return why a kernel of an operation that is not split among devices cannot run on several, or ``None``."""
    devices, single = partition.num_devices(), implementation.name.startswith("mosaic") and not implementation.splits
    return f"{MANY}, got a mesh of {devices}" if devices > 1 and single else None


@functools.cache
def _log_once(message: str) -> None:
    _logger.warning(message)
