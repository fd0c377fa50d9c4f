"""``dyninf doctor``: versions, devices, what would run here, and whether the shipped models are whole."""

import argparse
import importlib.metadata
import importlib.util
import platform
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import dyninf
from dyninf import depth, models
from dyninf.cli.common import default_dtype, model_folder, table_console
from dyninf.cli.heldout import FILE
from dyninf.depth_loop import default_driver
from dyninf.timing import device_name
from pallas_kernels.attention import explain_attention
from pallas_kernels.decoder_stack import explain_decode

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors", "tokenizers")
EXTRAS = {"torch": "parity", "transformers": "parity", "libtpu": "tpu", "jax_cuda13_plugin": "gpu"}
HEAD_DIM = 128  # of Llama and Qwen3 models
NUM_LAYERS = 16  # of the model whose drivers are named; they do not depend on it
EXAMPLES = """\
example:
  dyninf doctor

Ends with status 1 if a shipped model is damaged.
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "doctor",
        help="versions, devices, and what would run here",
        description="Say what is installed, which devices there are, and which implementations would serve here.",
        epilog=EXAMPLES,
    )
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    console = table_console()
    _versions(console)
    _devices(console)
    _attention(console)
    _drivers(console)
    return 0 if _models(console) else 1


def _versions(console: Console) -> None:
    table = _table("Versions", "package", "version")
    table.add_row("dyninf", dyninf.__version__)
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        table.add_row(package, importlib.metadata.version(package))
    for module, extra in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        table.add_row(module, _version(module) if found else f"not installed: pip install 'dyninf\\[{extra}]'")
    console.print(table)


def _devices(console: Console) -> None:
    table = _table(f"Devices ({device_name()}; models run in {default_dtype()})", "device", "kind", "memory")
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
        memory = "the host's" if limit is None else f"{limit / 2**30:.1f} GiB for jax, {used / 2**30:.1f} in use"
        table.add_row(str(device), device.device_kind, memory)
    console.print(table)


def _attention(console: Console) -> None:
    title = f"Attention (head_dim {HEAD_DIM}, no window, every slot readable)"
    table = _table(title, "operation", "dtype", "implementation", "here")
    for dtype in ("bfloat16", "float32"):
        explained = explain_attention(head_dim=HEAD_DIM, dtype=dtype, num_queries=512)
        for operation, reasons in explained.items():
            serving = next(name for name, reason in reasons if reason is None)
            for name, reason in reasons:
                state = "serves" if name == serving else reason or f"could serve; {serving} is preferred"
                table.add_row(operation, dtype, name, state)
    console.print(table)


def _drivers(console: Console) -> None:
    """Say which driver decodes what, with the measurements of bench/results/depth_h200.jsonl as the reason."""
    serving, refused = _decode_kernel()
    if serving:
        indexed = "one kernel reads layers in place: depth by data costs no time (H200: 1.00 of dense)"
    else:
        indexed = f"runs as a loop here: {refused}; lists of layers are faster on a GPU"
    table = _table("Depth drivers while decoding", "layers", "plans", "example", "driver", "why")
    layers = (None,) * NUM_LAYERS
    for kind, policy, why in (
        ("static schedules", depth.UnifiedSkip(speedup=2.0), "no control flow: costs what its layers cost"),
        (
            "data-dependent depth",
            depth.Confidence(threshold=0.9),
            "layers that nobody needs are not read; a conditional costs about 30 us (H200), so ask seldom",
        ),
    ):
        table.add_row("a list", kind, repr(policy), default_driver(layers, dyninf.Plan(depth=policy)), why)
    table.add_row("stacked", "all but skips by token; pages chosen by Quest or PageMean", "", "indexed", indexed)
    console.print(table)


def _decode_kernel() -> tuple[bool, str | None]:
    """Return whether the kernel of stacked layers serves an 8B model here, and if not, why."""
    sizes = {"d_model": 4096, "d_ff": 14336, "kv_heads": 8, "group": 4, "head_dim": HEAD_DIM, "batch": 1}
    name, reason = explain_decode(**sizes, capacity=2048, dtype="bfloat16")[0]
    return reason is None, f"{name} {reason}"


def _models(console: Console) -> bool:
    """Print the shipped models; return whether all of them are whole."""
    table = _table("Shipped models", "model", "state", "held-out text")
    whole = True
    for name in models.available():
        try:
            model = models.load(name)
            models.load_tokenizer(name)
            leaves = jax.tree.leaves(model)
            if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves):
                raise ValueError("expected finite weights, got NaN or infinity")
            count = sum(leaf.size for leaf in leaves)
            state = f"intact: {count / 1e6:.1f} million parameters, {len(model.layers)} layers"
        except (ValueError, NotImplementedError, OSError) as error:
            whole, state = False, f"damaged: {error}"
        table.add_row(name, state, "present" if (model_folder(name) / FILE).is_file() else "missing")
    if not models.available():
        table.add_row("none", "this installation carries no model; give --model FOLDER", "")
    console.print(table)
    return whole


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
