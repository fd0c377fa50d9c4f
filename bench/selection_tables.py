"""The tables of reading long caches, made from the rows of ``bench/selection.py``."""

from bench.rendering import H200_COPY_GB_S, commits, read_rows, table

PROGRAMS = {
    "mosaic_gpu": "`decode_attention`, kernel",
    "cudnn": "`jax.nn.dot_product_attention`, cuDNN",
    "xla": "plain JAX",
    "torch_cudnn": "PyTorch, cuDNN",
    "lax_top_k": "`lax.top_k`",
    "torch_topk": "`torch.topk`",
    "selected_fastest": "selected, kernels",
    "selected_xla": "selected, plain JAX",
    "dense_mosaic_gpu": "dense, kernel",
    "dense_cudnn": "dense, cuDNN",
}
EVICTION = {"mosaic_gpu": "`merge_victims`, kernels", "xla": "`merge_victims`, plain JAX"}
TOPK = {"mosaic_gpu": "`topk_pages`, kernel", "xla": "`topk_pages`, plain JAX"}


def selection_table(kind: str) -> str:
    """Return what reading a long cache costs: whole (``decode``), by a selected step (``step``), or to choose pages."""
    rows = read_rows(f"selection_{kind}_h200")
    tables = {"decode": decode_rows, "step": step_rows}
    head, lines = (tables | {"topk": topk_rows})[kind](rows)
    about = rows[0]
    heads = f"{about['heads']} query and {about['kv_heads']} key/value heads of {about['head_dim']}, {about['dtype']}, "
    budget = f"budget {about['budget']} tokens, " if kind == "step" else ""
    return table(head, lines) + f"\n{'' if kind == 'topk' else heads}random numbers, {budget}{_where(rows)}"


def eviction_table() -> str:
    """Return what merging an evicted token costs."""
    rows = read_rows("eviction_merge_h200")
    about = f"\n{rows[0]['kv_heads']} key/value heads of {rows[0]['head_dim']}, {rows[0]['dtype']}, random numbers, "
    return table(*eviction_rows(rows)) + about + _where(rows)


def whole_table() -> str:
    """Return the speed of a whole model with a long cache."""
    rows = read_rows("decode_128k_h200")
    about = f"\nLlama-3.1-8B shape, random weights, {rows[0]['dtype']}, {_where(rows)}"
    return table(*whole_rows(rows)) + about


def _where(rows: list[dict]) -> str:
    return f"{rows[0]['device']}, jax {rows[0]['jax']}, {commits(rows)}.\n"


def decode_rows(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the table of attention to a whole cache."""
    cases = _cases(rows)
    lines = []
    for program in dict.fromkeys(row["program"] for row in rows):
        found = {tuple(row["case"]): row for row in rows if row["program"] == program}
        cells = [
            f"{_time(found[case]):.0f} us, {found[case]['tb_s']:.2f} TB/s" if case in found else "" for case in cases
        ]
        lines.append([PROGRAMS[program], *cells])
    return ["program", *(f"batch {batch}, {slots} slots" for batch, slots in cases)], lines


def topk_rows(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the table of choosing pages."""
    cases = _cases(rows)
    lines = []
    for program in dict.fromkeys(row["program"] for row in rows):
        found = {tuple(row["case"]): row for row in rows if row["program"] == program}
        cells = [f"{_time(found[case]):.1f} us" if case in found else "" for case in cases]
        lines.append([TOPK.get(program) or PROGRAMS[program], *cells])
    return ["program", *(f"{count} rows of {pages}, k={k}" for count, pages, k in cases)], lines


def step_rows(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the table of whole selected steps, against the best dense one of each case."""
    lines = []
    for case in _cases(rows):
        group = [row for row in rows if tuple(row["case"]) == case]
        dense = min(_time(row) for row in group if row["program"].startswith("dense"))
        for row in group:
            pages = f"{row['page_size']}, {row['kind']}" if row["program"].startswith("selected") else ""
            lines.append(
                [
                    f"{case[0]} x {case[1]}",
                    PROGRAMS[row["program"]],
                    pages,
                    f"{_time(row):.1f}",
                    f"{row['wall_us']:.1f}",
                    f"{dense / _time(row):.1f}x",
                ]
            )
    return ["batch x slots", "step", "pages", "us of kernels", "us by the wall clock", "against dense"], lines


def whole_rows(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the table of a whole model's steps, against reading its weights alone."""
    lines = []
    for row in rows:
        weights_ms = _weight_bytes(row["shapes"]) / H200_COPY_GB_S / 1e6
        lines.append(
            [
                row["plan"].replace("@", " "),
                str(row["batch"]),
                f"{row['filled']} of {row['context']}",
                f"{row['median_ms']:.2f}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['speedup']:.2f}x",
                f"{100 * weights_ms / row['median_ms']:.0f} %",
            ]
        )
    head = ["plan", "batch", "cache filled", "ms/step", "tokens/s", "against dense", "of reading the weights alone"]
    return head, lines


def eviction_rows(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the table of what a step that evicts does beside attention."""
    cases = _cases(rows)
    lines = []
    for program in dict.fromkeys(row["program"] for row in rows):
        found = {tuple(row["case"]): row for row in rows if row["program"] == program}
        cells = [f"{_time(found[case]):.1f} us, {found[case]['tb_s']:.2f} TB/s" for case in cases]
        lines.append([EVICTION[program], *cells])
    return ["program", *(f"batch {case[0]}, {case[1]} slots" for case in cases)], lines


def _weight_bytes(shapes: dict[str, int]) -> int:
    """Return the bytes of the weights that a step reads, in bfloat16."""
    heads = (2 * shapes["num_heads"] + 2 * shapes["num_kv_heads"]) * shapes["head_dim"]
    layer = shapes["d_model"] * (heads + 3 * shapes["d_ff"])
    return 2 * (shapes["num_layers"] * layer + shapes["vocab_size"] * shapes["d_model"])


def _cases(rows: list[dict]) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(tuple(row["case"]) for row in rows))


def _time(row: dict) -> float:
    return row["kernels_us"] or row["wall_us"]
