"""What MInference, FlexPrefill and XAttention take by their official code, on the inputs of ``bench/prefill.py``.

For each peer up to three rows: ``_select`` chooses what to attend to, ``_attend`` attends to it, ``_total`` is the
official function that does both. Needs PyTorch, Triton and checkouts of the repositories; peers without a path are left
out. Nothing of them is changed, except what ``bench/official_code.py`` says. Keys and values are repeated to all heads
outside the times for MInference and XAttention, which need it. ``error`` is the distance of the output to that of
dense attention by its norm.

``python bench/official_prefill.py --minference PATH --flexprefill PATH --xattention PATH --jsonl FILE``
"""

import argparse
import faulthandler
import functools
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs the memory
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.names import names_among
from bench.official_code import choose_together, load_flexprefill, load_minference, load_xattention
from bench.official_rows import Case, clock, going_on, say

CASES = ("32768", "131072")
SINKS, WINDOW, TOP_BLOCKS = 128, 4096, 100


def time_dense(case: Case, _: Any) -> None:
    """Time dense attention by cuDNN, and keep its output."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = case.heads_first

    def run():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    case.dense_output = run()
    case.write("torch_cudnn", run, flops=case.flops(1.0), bench="prefill_dense", inputs="planted", kv="repeated")


def time_flexprefill(case: Case, module: Any) -> None:
    """Time FlexPrefill, which takes keys and values as they are."""
    options = {"gamma": 0.9, "tau": 0.1, "min_budget": case.arguments.min_budget}
    blocks = -(-case.tokens // 128)
    budget = -(-options["min_budget"] // 128)
    choose = functools.partial(module.get_active_blocks, case.q, case.k, case.v, 128, 0.9, budget, blocks, 0.1)
    attend = module.triton_block_wise_attention
    index = choose()
    try:
        attend(case.q, case.k, case.v, index, 128)
    except Exception as problem:  # the setting for an H100 may not fit
        say(f"FlexPrefill as on an H100: {problem!r}"[:300])
        module.GPU_NAME = "h200"
    listed = sum(len(ids) for of_heads in index for ids in of_heads)
    density = listed / (case.arguments.heads * blocks * (blocks + 1) / 2)
    facts = {"density": round(density, 4), "policy": f"{options}, blocks of 128", "settings_of": module.GPU_NAME}
    case.write("flexprefill_select", choose, **facts)
    case.write(
        "flexprefill_attend",
        lambda: attend(case.q, case.k, case.v, index, 128),
        flops=case.flops(density),
        **facts,
    )
    total = functools.partial(module.flex_prefill_attention, case.q, case.k, case.v, **options)
    case.write("flexprefill_total", total, error=case.error(total(), 2), **facts)


def time_vertical_slash(case: Case, loaded: tuple[Any, str]) -> None:
    """Time MInference's columns and slashes: 1000 and 6096, its default for heads that have no pattern of their own.

    It chooses head by head. ``_select`` times that, with attention left out; ``together_ms`` is the same for all heads
    at a time, by code of bench/. ``_attend`` is its attention to all heads in one call: it sorts and converts to blocks
    (``convert_ms``) and attends (``kernel_ms``). ``_total`` is its function for a layer, head by head.
    """
    import torch

    module, how = loaded
    q, k, v = case.heads_first
    total = functools.partial(module.minference_prefill_forward, q, k, v, _layer_options({}))
    attend, chosen = module.vertical_slash_sparse_attention, []

    def keep(query, key, value, columns, slashes):
        chosen.append((columns, slashes))
        return query

    def choose():
        module.vertical_slash_sparse_attention = keep
        try:
            chosen.clear()
            total()
        finally:
            module.vertical_slash_sparse_attention = attend

    choose()
    heads = case.arguments.heads
    columns, slashes = (torch.cat([x.reshape(1, 1, -1) for x in part], 1) for part in zip(*chosen, strict=True))
    chosen.clear()
    sorted_columns = columns.int().sort(-1).values.contiguous()
    sorted_slashes = slashes.int().sort(-1, descending=True).values.contiguous()
    lengths = torch.tensor([case.tokens], dtype=torch.int32, device=q.device)
    globals_of = sys.modules[attend.__module__]
    convert = functools.partial(
        globals_of.convert_vertical_slash_indexes, lengths, sorted_columns, sorted_slashes, case.tokens, 64, 64
    )
    lists = convert()
    rows = -(-case.tokens // 64)
    density = float((lists[0].double() + lists[2].double() / 64).sum()) / (heads * rows * (rows + 1) / 2)
    policy = f"{columns.shape[2]} columns, {slashes.shape[2]} slashes"
    facts = {"density": round(density, 4), "policy": policy, "conversion": how, "kv": "repeated"}
    together = clock(lambda: choose_together(q, k))["ms"]
    case.write("minference_vertical_slash_select", choose, together_ms=together, by_head=True, **facts)
    scale = case.arguments.head_dim**-0.5
    kernel = functools.partial(globals_of._triton_mixed_sparse_attention, q, k, v, lengths, *lists, scale, 64, 64)
    official, times = how.startswith("official"), {}
    with going_on("kernel alone"):
        times = {"kernel_ms": clock(kernel)["ms"]}
    if official:
        times["convert_ms"] = clock(convert)["ms"]
    run = functools.partial(attend, q, k, v, columns, slashes) if official else kernel
    facts["error"] = case.error(run(), 1)
    case.write("minference_vertical_slash_attend", run, flops=case.flops(density), **times, **facts)
    del lists, kernel
    if official:
        case.write("minference_vertical_slash_total", total, by_head=True, **facts)


def time_block_sparse(case: Case, loaded: tuple[Any, str]) -> None:
    """Time MInference's blocks of 64: 100 a row, its default; all heads in one call, ``by_head_ms`` head by head."""
    import torch

    module, _ = loaded
    official = sys.modules[module.block_sparse_attention.__module__]
    q, k, v = case.heads_first
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 64 - case.tokens % 64)) for x in (q, k, v)]
    choose = functools.partial(official._build_block_index, *padded[:2], TOP_BLOCKS, 64, 64)
    index, lengths = choose(), torch.tensor([case.tokens], dtype=torch.int32, device=q.device)
    rows = -(-case.tokens // 64)
    density = sum(min(row + 1, TOP_BLOCKS) for row in range(rows)) / (rows * (rows + 1) / 2)
    facts = {"density": round(density, 4), "policy": f"{TOP_BLOCKS} blocks of 64", "kv": "repeated"}
    case.write("minference_block_sparse_select", choose, **facts)
    scale = case.arguments.head_dim**-0.5
    kernel = functools.partial(official._triton_block_sparse_attention, *padded, lengths, index, scale, 64, 64)
    case.write("minference_block_sparse_attend", kernel, flops=case.flops(density), **facts)
    total = functools.partial(official.block_sparse_attention, q, k, v, TOP_BLOCKS)
    patterns = {str(head): ["block_sparse", TOP_BLOCKS, 1, 1] for head in range(case.arguments.heads)}
    by_head = functools.partial(module.minference_prefill_forward, q, k, v, _layer_options(patterns))
    facts["error"] = case.error(total(), 1)
    with going_on("head by head"):
        facts["by_head_ms"] = clock(by_head)["ms"]
    case.write("minference_block_sparse_total", total, **facts)


def time_a_shape(case: Case, loaded: tuple[Any, str]) -> None:
    """Time MInference's sinks and window, which chooses nothing; all heads in one call."""
    module, _ = loaded
    pairs = sum(min(row + 1, WINDOW) + min(max(row + 1 - WINDOW, 0), SINKS) for row in range(case.tokens))
    density = pairs / (case.tokens * (case.tokens + 1) / 2)
    total = functools.partial(module.streaming_forward, *case.heads_first, SINKS, WINDOW)
    facts = {"density": round(density, 4), "policy": f"{SINKS} sinks, window {WINDOW}", "kv": "repeated"}
    facts["error"] = case.error(total(), 1)
    case.write("minference_a_shape_total", total, flops=case.flops(density), **facts)


def _layer_options(patterns: dict[str, Any]) -> dict[str, Any]:
    """Return what MInference's function for a layer wants to know, for the first layer."""
    return {"layer_idx": 0, "num_hidden_layers": 1, "attn_forward_config": {"best_pattern": [patterns]}}


def time_xattention(case: Case, module: Any) -> None:
    """Time XAttention's choice of blocks, with the size of chunks that its function for a layer takes."""
    estimate, calls = module.xattn_estimate, []

    class Done(Exception):
        """The arguments are known."""

    def keep(*arguments, **options):
        calls.append((arguments, options))
        raise Done

    module.xattn_estimate = keep
    try:
        module.Xattention_prefill(*case.heads_first, stride=16, threshold=0.9)
    except Done:
        pass
    finally:
        module.xattn_estimate = estimate
    arguments, options = calls.pop()
    choose = functools.partial(estimate, *arguments, **options)
    _, mask = choose()
    blocks = -(-case.tokens // 128)
    density = float(mask[..., :blocks, :blocks].sum()) / (case.arguments.heads * blocks * (blocks + 1) / 2)
    policy = f"stride 16, threshold 0.9, blocks of 128, chunks of {options['chunk_size']}"
    case.write("xattention_select", choose, density=round(density, 4), policy=policy, kv="repeated")


PEERS = {
    "dense": (None, time_dense),
    "flexprefill": ("flexprefill", time_flexprefill),
    "vertical_slash": ("minference", time_vertical_slash),
    "block_sparse": ("minference", time_block_sparse),
    "xattention": ("xattention", time_xattention),
    "a_shape": ("minference", time_a_shape),
}
LOADERS = {"minference": load_minference, "flexprefill": load_flexprefill, "xattention": load_xattention}


def main() -> int:
    """Time the peers and print one JSON object a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in LOADERS:
        parser.add_argument(f"--{name}", type=Path, help="checkout of the repository")
    parser.add_argument("--case", action="append", help=f"tokens; may be repeated (default: {', '.join(CASES)})")
    parser.add_argument("--only", help=f"of {', '.join(PEERS)}, separated by commas (default: all)")
    parser.add_argument("--limit", type=float, default=420.0, help="seconds after which the process ends")
    parser.add_argument("--min-budget", type=int, default=1024, help="tokens of FlexPrefill (its README: 512)")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file, too")
    parser.set_defaults(heads=32, kv_heads=8, head_dim=128, dtype="bfloat16")
    arguments = parser.parse_args()
    wanted = names_among(parser, "--only", arguments.only, PEERS)
    faulthandler.dump_traceback_later(arguments.limit, exit=True)
    import torch

    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU")
    torch.set_grad_enabled(False)
    loaded = {None: None}
    for name in dict.fromkeys(PEERS[peer][0] for peer in wanted):
        if name is not None and getattr(arguments, name) is not None:
            with going_on(f"importing {name}"):
                loaded[name] = LOADERS[name](getattr(arguments, name))
                say(f"imported {name}")
    for tokens in map(int, arguments.case or CASES):
        with going_on(f"inputs of {tokens} tokens"):
            case = Case(tokens, arguments)
            for peer in wanted:
                if PEERS[peer][0] in loaded:
                    with going_on(f"{peer} at {tokens} tokens"):
                        PEERS[peer][1](case, loaded[PEERS[peer][0]])
            del case
    return 0


if __name__ == "__main__":
    sys.exit(main())
