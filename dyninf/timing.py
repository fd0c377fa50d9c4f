"""Measure how long device work takes.

Feed measured functions random numbers, never zeros: an accelerator clocks higher on operands without set bits, and a
compiler may fold what it knows. A time ends when the results are ready, not when the call returns.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall-clock seconds of repeated runs, in the order they ran."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds that half of the runs stayed below."""
        return float(np.median(self.samples))

    @property
    def p10(self) -> float:
        """Seconds that one run in ten stayed below."""
        return float(np.percentile(self.samples, 10))

    @property
    def p90(self) -> float:
        """Seconds that nine runs in ten stayed below."""
        return float(np.percentile(self.samples, 90))

    def per(self, count: int) -> "Timing":
        """Return the times of one of ``count`` equal parts of each run."""
        return Timing(samples=tuple(sample / count for sample in self.samples))


def measure(
    function: Callable[..., Any], *, warmup: int = 1, repeats: int = 10, setup: Callable[[], Any] | None = None
) -> Timing:
    """Time ``function`` until its results are ready.

    Args:
        function: called without arguments, or with the value of ``setup`` where that is given.
        warmup: runs before the first that counts; the first one compiles.
        repeats: runs that count.
        setup: prepares the argument of each run, for functions that donate it; not timed.

    Raises:
        ValueError: if no run would count.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"expected repeats >= 1 and warmup >= 0, got {repeats=} and {warmup=}")
    samples = []
    for _ in range(warmup + repeats):
        arguments = () if setup is None else (jax.block_until_ready(setup()),)
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        samples.append(time.perf_counter() - start)
    return Timing(samples=tuple(samples[warmup:]))


def device_name() -> str:
    """Return the name of the device that JAX computes on by default."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor() or platform.machine()
