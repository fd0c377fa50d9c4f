"""The tables of reading long caches, made from the rows of ``bench/selection.py``."""

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
TOPK = {"mosaic_gpu": "`topk_pages`, kernel", "xla": "`topk_pages`, plain JAX"}


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


def _cases(rows: list[dict]) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(tuple(row["case"]) for row in rows))


def _time(row: dict) -> float:
    return row["kernels_us"] or row["wall_us"]
