"""The tables of models on several devices: what two GPUs gain and send, what a slice's devices hold."""

from pathlib import Path
from typing import Any

from bench.rendering import H200_COPY_GB_S, commits, read_rows, table

# Memory of one device, as the makers state it; a chip of tpu7x is two devices.
MEMORY_GIB = {"v5p": 95, "v5e": 16, "v6e": 32, "tpu7x": 96}


def speed_table() -> str:
    """Return what a model does on two GPUs, beside one where it fits."""
    rows = read_rows("mesh_h200")
    alone = {_case(row): row for row in rows if "mesh" not in row}
    dense = {(_case(row), row.get("mesh")): row for row in rows if row["plan"] == "dense"}
    lines = []
    for row in (row for row in rows if "mesh" in row and row["bench"] == "decode"):
        one, whole = alone.get(_case(row)), dense[_case(row | {"plan": "dense"}), row["mesh"]]
        lines.append(
            [
                row["model"],
                "stacked, one kernel" if row["stacked"] else "a list",
                row["plan"],
                str(row["batch"]),
                f"{row['filled']} of {row['context']}",
                f"{one['tokens_per_s']:.0f}" if one else "does not fit",
                f"{row['tokens_per_s']:.0f}",
                f"{one['median_ms'] / row['median_ms']:.2f}x" if one else "",
                f"{whole['median_ms'] / row['median_ms']:.2f}x",
            ]
        )
    head = ["shape", "layers", "plan", "batch", "cache filled", "tokens/s on one", "on two", "against one"]
    about = rows[0]
    prompt = next(row for row in rows if row["bench"] == "prompt")
    note = (
        f"\nRandom weights, bfloat16, {about['device']}, `tensor=2`, jax {about['jax']}, {commits(rows)}. A prompt of "
        f"{prompt['prompt']} tokens at the {prompt['model']} shape, plan `{prompt['plan']}`, {prompt['prefill_chunk']} "
        f"tokens at a time: first token after {prompt['median_ms'] / 1000:.1f} s.\n"
    )
    return table([*head, "against dense"], lines) + note


def exchange_table() -> str:
    """Return what it takes two GPUs to add up a projection, in the kernel of the layers, in its own and by XLA."""
    rows = read_rows("mesh_exchange_h200")
    names = {"in_kernel": "in the kernel of the layers", "kernel": "`add_devices`, norm by XLA"}
    names |= {"psum": "`jax.lax.psum`, residual and norm by XLA"}
    sizes = sorted({row["bytes"] for row in rows})
    took = {(row["program"], row["bytes"]): row["us"] for row in rows}
    lines = [
        [text, *(f"{took[name, size]:.1f} us" if (name, size) in took else "" for size in sizes)]
        for name, text in names.items()
    ]
    note = f"\n{rows[0]['shape']}, {rows[0]['device']}, jax {rows[0]['jax']}, {commits(rows)}.\n"
    return table(["", *(f"{size // 1024} KiB" for size in sizes)], lines) + note


def scaling_table() -> str:
    """Return what a model does on more GPUs, against the bytes it must read, dense decoding, and two GPUs."""
    rows, two = read_rows("scaling_h200"), _on_two()
    case = lambda row: tuple(row[name] for name in ("shape", "mesh", "stacked", "batch", "context"))  # noqa: E731
    dense = {case(row): row["median_ms"] for row in rows if row["plan"] == "dense" and "median_ms" in row}
    head = ["shape", "mesh", "plan", "batch", "cache slots", "layers run", "ms a step", "tokens/s", "of the floor"]
    head += ["beyond it, a layer", "XLA's collectives", "GiB a device", "against dense", "against two GPUs"]
    lines = []
    for row in (row for row in rows if row["plan"] != "prompt"):
        plan = row["plan"] if row["stacked"] else f"{row['plan']}, layers in a list"
        lines.append([row["shape"], row["mesh"].replace(",", ", "), plan, str(row["batch"]), str(row["context"])])
        if "needed_gib" in row:
            lines[-1] += ["", f"does not fit: {row['needed_gib']:.0f} of {row['had_gib']:.0f} GiB"]
            lines[-1] += [""] * (len(head) - len(lines[-1]))
            continue
        beyond = 1000 * (row["median_ms"] - row["floor_ms"]) / row["layers_run"]
        fewer = two.get(row["plan"], {}) if row["batch"] == 1 and row["stacked"] else {}
        same = fewer.get("context") == row["context"] and fewer["model"] == row["shape"]
        lines[-1] += [
            f"{row['layers_run']:.0f}",
            f"{row['median_ms']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{100 * row['of_floor']:.0f} %",
            f"{beyond:.0f} us",
            f"{1000 * row['collectives_ms']:.0f} us",
            f"{row['peak_gib']:.0f}",
            f"{dense[case(row)] / row['median_ms']:.2f}x" if case(row) in dense else "",
            f"{fewer['median_ms'] / row['median_ms']:.2f}x" if same else "",
        ]
    about = rows[0]
    note = (
        "\nRandom weights, bfloat16, stacked layers in one kernel unless said otherwise, all but "
        f"{about['steps']} of the slots filled, {about['device']}, jax {about['jax']}, {commits(rows)}. Two GPUs: the "
        "table above.\n"
    )
    for row in (row for row in rows if row["plan"] == "prompt" and "median_ms" in row):
        took = f"first token after {row['median_ms'] / 1000:.1f} s"
        note += f"A prompt of {row['context']} tokens, {row['shape']}, {row['mesh']}: {took}.\n"
    return table(head, lines) + note


def draw_scaling(path: Path, pyplot: Any) -> None:
    """Draw tokens a second of one sequence on two and more GPUs, dense and under plans, and what memory allows."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    two, rows = _on_two(), read_rows("scaling_h200")
    by_gpus = {2: two}
    for row in rows:
        if row["mesh"].startswith("tensor=") and "," not in row["mesh"] and row["stacked"] and "of_floor" in row:
            if (row["shape"], row["batch"], row["context"]) == (two["dense"]["model"], 1, two["dense"]["context"]):
                by_gpus.setdefault(int(row["mesh"].removeprefix("tensor=")), {})[row["plan"]] = row
    gpus = sorted(by_gpus)
    allowed = [count * H200_COPY_GB_S * 1e9 / by_gpus[count]["dense"]["bytes_per_step"] for count in gpus]
    axes.plot(gpus, allowed, "--", color="#888888", label="dense, if reading took all the time")
    labels = {"half": "half of the layers", "exits": "recorded exits", "dense": "dense"}
    for color, (plan, label) in enumerate(labels.items()):
        found = [(count, by_gpus[count][plan]["tokens_per_s"]) for count in gpus if plan in by_gpus[count]]
        axes.plot(*zip(*found, strict=True), "o-", color=f"C{color}", label=label)
    axes.set_xlabel("GPUs that share the model (tensor)")
    axes.set_ylabel("tokens/s, one sequence")
    axes.set_title(f"{two['dense']['model']} on H200s", fontsize=10)
    axes.set_xticks(gpus)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _on_two() -> dict[str, dict]:
    """Return the rows of one sequence at the 70B shape on two GPUs, by the names of plans that scaling has."""
    names = {"dense": "dense", "exit_half": "half"}
    found = [row for row in read_rows("mesh_h200") if row["model"] == "llama3.1-70b" and row["bench"] == "decode"]
    return {names[row["plan"]]: row for row in found if row["batch"] == 1}


def _case(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("bench", "model", "stacked", "plan", "batch", "context", "filled"))


def memory_table() -> str:
    """Return bytes of each device and what a program sends, for each slice and mesh."""
    rows = read_rows("mesh_memory")
    head = ["slice", "mesh", "program", "layers", "held, GiB", "temporaries, GiB", "of the device"]
    head += ["all-reduces", "all-gathers"]
    lines = [[*_where(row), *(_refused(row) if "needed_gib" in row else _taken(row))] for row in rows]
    about = rows[0]
    note = (
        f"\n{about['shape']}, bfloat16, plan `{about['plan']}`, one sequence of {about['context']} tokens for each "
        "group of devices that splits the batch; from programs of 2 and 4 layers what differs is counted for each of "
        f"the 80, temporaries are those of 4; jax {about['jax']}, {commits(rows)}.\n"
    )
    return table(head, lines) + note


def _where(row: dict) -> list[str]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in row["mesh"].items())
    return [row["topology"], mesh, row["program"], " and ".join(map(str, row["compiled_layers"]))]


def _taken(row: dict) -> list[str]:
    held, memory = row["arguments"] + row["outputs"] - row["aliased"], MEMORY_GIB[row["topology"].partition(":")[0]]
    share = (held + row["temporaries"]) / 2**30 / memory
    verdict = f"{100 * share:.0f} %" + (", does not fit" if share > 1 else "")
    sent = [_sent(row["sent"].get(kind)) for kind in ("all-reduce", "all-gather")]
    return [f"{held / 2**30:.1f}", f"{row['temporaries'] / 2**30:.2f}", verdict, *sent]


def _sent(found: dict | None) -> str:
    if found is None:
        return ""
    size = found["bytes"]
    return f"{found['count']}, {size / 1e9:.1f} GB" if size > 1e8 else f"{found['count']}, {size / 1e6:.1f} MB"


def _refused(row: dict) -> list[str]:
    return ["", f"{row['needed_gib']:.2f}", f"does not fit, the compiler has {row['had_gib']}", "", ""]
