"""Inputs, clocks and rows of ``bench/official_prefill.py``."""

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from bench.prefill import dense_flops, time_calls
from bench.prompt_inputs import planted_inputs
from dyninf.cli.bench import describe_device, write_row

STARTED = time.monotonic()


class Case:
    """The inputs of one length, and the rows made on them.

    Args:
        q: ``[1, T, H, D]``, as ``k`` and ``v`` with fewer heads; ``heads_first`` has them as ``[1, H, T, D]``.
    """

    def __init__(self, tokens: int, arguments: Any):
        import torch

        self.tokens, self.arguments = tokens, arguments
        made = jax.block_until_ready(planted_inputs(tokens, arguments))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.q, self.k, self.v = (torch.from_dlpack(x).to(device).contiguous().clone() for x in made)
        repeats = arguments.heads // arguments.kv_heads
        swapped = [x.transpose(1, 2) for x in (self.q, self.k, self.v)]
        self.heads_first = [
            x.repeat_interleave(n, 1).contiguous() for x, n in zip(swapped, (1, repeats, repeats), strict=True)
        ]
        self.dense_output = None

    def write(
        self, name: str, run: Callable[[], Any], *, flops: float = 0.0, bench: str = "prefill_policies", **facts
    ) -> None:
        """Time a function and write its row."""
        import torch
        import triton

        say(f"{self.tokens}: {name}")
        row = {"bench": bench, "program": name, "case": [self.tokens]} | clock(run)
        rate = {"tflop_s": round(flops / row["ms"] / 1e9, 1)} if flops else {}
        settings = {part: getattr(self.arguments, part) for part in ("heads", "kv_heads", "head_dim", "dtype")}
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        write_row(row | rate | facts | settings | versions | describe_device(), self.arguments.jsonl)

    def flops(self, density: float) -> float:
        """Return the FLOPs of attention to this share of the causal pairs."""
        return density * dense_flops(self.tokens, self.arguments)

    def error(self, output: Any, heads_axis: int) -> float | None:
        """Return how far an output is from that of dense attention, ``None`` where that was not computed."""
        if self.dense_output is None:
            return None
        output = output if heads_axis == 1 else output.transpose(1, 2)
        return round(float((output - self.dense_output).float().norm() / self.dense_output.float().norm()), 4)


def clock(run: Callable[[], Any]) -> dict[str, Any]:
    """Return milliseconds of a call; what calls return is dropped at once, as many of them are enqueued."""
    import torch

    def call() -> None:
        run()

    return time_calls(call, lambda _: torch.cuda.synchronize())


@contextlib.contextmanager
def going_on(what: str) -> Iterator[None]:
    """Report what goes wrong inside and go on, unless the device can no longer be used."""
    import torch

    try:
        yield
    except Exception:
        sys.stderr.write(f"{what} failed:\n{traceback.format_exc(limit=-6)[-3000:]}\n")
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as problem:
        sys.exit(f"the device is lost after {what}; start again with --only and the other peers: {problem}")


def say(text: str) -> None:
    """Write what is done, and when, to standard error."""
    sys.stderr.write(f"[{time.monotonic() - STARTED:.0f} s] {text}\n")
    sys.stderr.flush()
