"""The tables of reading prompts, made from the rows of ``bench/prefill.py``."""

from bench.rendering import commits, read_rows, table

PROGRAMS = {
    "mosaic_gpu": "`prefill_attention`, kernel",
    "cudnn": "`jax.nn.dot_product_attention`, cuDNN",
    "torch_cudnn": "PyTorch, cuDNN",
}
PEERS = {  # official code -> policy
    "minference_a_shape": "a_shape",
    "minference_vertical_slash": "vertical_slash",
    "minference_block_sparse": "pooled_blocks",
    "flexprefill": "flex_prefill",
    "xattention": "x_attention",
}


def prefill_table(study: str) -> str:
    """Return what attention of a prompt costs: to all keys, to lists of blocks, or as policies choose them."""
    rows = read_rows("prefill_h200")
    mine = [row for row in rows if row["bench"] == f"prefill_{study}"]
    if study == "blocks":
        mine += [row for row in rows if row["bench"] == "prefill_a_shape"]
    about = mine[0]
    head, lines = {"dense": _dense_rows, "blocks": _block_rows, "policies": _policy_rows}[study](mine, rows)
    inputs = "planted patterns" if study == "policies" else "random numbers"
    where = f"\nOne sequence, {about['heads']} query and {about['kv_heads']} key/value heads of {about['head_dim']}, "
    where += f"{about['dtype']}, {inputs}, {about['device']}, jax {about['jax']}, {commits(mine)}.\n"
    return table(head, lines) + where


def peers_table() -> str:
    """Return what the official code of other projects takes on the same inputs, beside the policies."""
    peers, ours = read_rows("prefill_peers_h200"), read_rows("prefill_h200")
    lines = []
    for tokens in dict.fromkeys(row["case"][0] for row in peers):
        for name, policy in PEERS.items():
            official, own = (
                {
                    row["program"].removeprefix(f"{program}_"): row
                    for row in rows
                    if row["case"] == [tokens] and row["program"].rsplit("_", 1)[0] == program
                }
                for rows, program in ((peers, name), (ours, policy))
            )
            select, attend, total = (official.get(part) for part in ("select", "attend", "total"))
            about, together = total or select, own["select"]["ms"] + own["attend"]["ms"]
            lines.append(
                [
                    f"{tokens}",
                    f"{name}, {100 * about['density']:.1f} %",
                    *(f"{row['ms']:.1f}" if row else "" for row in (select, attend, total)),
                    f"{about['error']:.3f}" if "error" in about else "",
                    f"{policy}, {100 * own['select']['density']:.1f} %",
                    *(f"{ms:.1f}" for ms in (own["select"]["ms"], own["attend"]["ms"], together)),
                    f"{own['attend']['error']:.3f}",
                    f"{total['ms'] / together:.1f}x" if total else "",
                ]
            )
    head = ["tokens", "official, causal blocks", "choosing, ms", "attention", "its function", "error"]
    head += ["dyninf, causal blocks", "choosing, ms", "attention", "together", "error", "faster"]
    row = peers[0]
    where = f"\nPlanted patterns, {row['device']}, PyTorch {row['torch']}, Triton {row['triton']}, {commits(peers)}.\n"
    return table(head, lines) + where


def prompt_table() -> str:
    """Return the time until a whole model has read a prompt."""
    rows, lines = read_rows("prompt_h200"), []
    for row in rows:
        plan = row["plan"].replace("@sparsity.", ", ")
        lines.append([f"{row['prompt']}", plan, f"{row['median_ms']:.0f}", f"{row['speedup']:.2f}x"])
    about = f"\nShape of {rows[0]['model']} with random weights, {rows[0]['dtype']}, one prompt of random tokens, "
    about += f"{rows[0]['device']}, jax {rows[0]['jax']}, {commits(rows)}.\n"
    return table(["tokens", "plan", "ms to the first token", "speed-up"], lines) + about


def _dense_rows(mine, rows):
    cases = sorted({(row["head_dim"], row["case"][0]) for row in mine})
    lines = []
    for program in dict.fromkeys(row["program"] for row in mine):
        found = {(row["head_dim"], row["case"][0]): row for row in mine if row["program"] == program}
        cells = [f"{found[case]['ms']:.2f} ms, {found[case]['tflop_s']:.0f}" if case in found else "" for case in cases]
        lines.append([PROGRAMS[program], *cells])
    return ["program (ms, TFLOP/s)", *(f"{tokens} tokens" for _, tokens in cases)], lines


def _block_rows(mine, rows):
    lines = []
    for case in dict.fromkeys((row["bench"], tuple(row["case"])) for row in mine):
        found = {row["program"]: row for row in mine if (row["bench"], tuple(row["case"])) == case}
        ours, peer = found["mosaic_gpu"], found.get("torch_flex")
        dense = _dense(rows, case[1][0])
        lines.append(
            [
                f"{case[1][0]}",
                f"{case[1][1]} %" if len(case[1]) > 1 else "A-shape, 128 + 4096",
                f"{ours['ms']:.2f}",
                f"{ours['tflop_s']:.0f}",
                f"{dense / ours['ms']:.1f}x" if dense else "",
                f"{peer['ms']:.2f}" if peer else "",
                f"{peer['ms'] / ours['ms']:.2f}x" if peer else "",
            ]
        )
    head = ["tokens", "causal blocks", "ms", "TFLOP/s of what is computed", "of dense cuDNN", "FlexAttention, ms"]
    return [*head, "of FlexAttention"], lines


def _policy_rows(mine, rows):
    lines = []
    names = dict.fromkeys((row["case"][0], row["program"].rsplit("_", 1)[0]) for row in mine)
    for tokens, name in names:
        select, attend = (
            next((row for row in mine if row["case"][0] == tokens and row["program"] == f"{name}_{part}"), None)
            for part in ("select", "attend")
        )
        if select is None or attend is None:
            continue
        total, dense = select["ms"] + attend["ms"], _dense(rows, tokens)
        lines.append(
            [
                f"{tokens}",
                name,
                f"{100 * select['density']:.1f} %",
                f"{select['ms']:.2f}",
                f"{attend['ms']:.2f}",
                f"{100 * select['ms'] / attend['ms']:.0f} %",
                f"{dense / total:.1f}x" if dense else "",
                f"{attend['error']:.3f}" if "error" in attend else "",
            ]
        )
    head = ["tokens", "policy", "causal blocks", "choosing, ms", "attention, ms", "choosing of attention"]
    return [*head, "together, of dense cuDNN", "error"], lines


def _dense(rows, tokens):
    """Return the milliseconds of dense attention by cuDNN in JAX on as many tokens, ``None`` if it was not timed.

    Those of a slice of the queries are scaled by the FLOPs.
    """
    found = [
        2e-9 * tokens**2 * row["heads"] * row["head_dim"] / row["tflop_s"] if "slice" in row else row["ms"]
        for row in rows
        if row["bench"] == "prefill_dense" and row["program"] == "cudnn" and row["case"] == [tokens]
        and row["head_dim"] == 128
    ]  # fmt: skip
    return found[0] if found else None
