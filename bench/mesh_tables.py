"""The table of what a model takes of each device of a slice, made from the rows of ``bench/mesh_memory.py``."""

from bench.rendering import commits, read_rows, table


def memory_table() -> str:
    """Return bytes of each device and what a program sends, for each slice and mesh."""
    rows = read_rows("mesh_memory")
    head = ["slice", "mesh", "program", "held, GB", "temporaries, GB", "of the device", "all-reduce", "all-gather"]
    lines = [[*_where(row), *(_refused(row) if "needed_gib" in row else _taken(row))] for row in rows]
    about, compiled = rows[0], {tuple(row["compiled_layers"]) for row in rows}
    fitted = (
        "; programs of 2 and 4 of 80 layers, what differs counted for each layer beyond" if (2, 4) in compiled else ""
    )
    whole = ", of all layers where the compiler says what it would take" if (80,) in compiled else ""
    note = (
        f"\n{about['shape']}, bfloat16, plan `{about['plan']}`, one sequence of {about['context']} tokens for each "
        f"group of devices that splits the batch{fitted}{whole}; jax {about['jax']}, {commits(rows)}.\n"
    )
    return table(head, lines) + note


def _where(row: dict) -> list[str]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in row["mesh"].items())
    return [row["topology"], mesh, row["program"]]


def _taken(row: dict) -> list[str]:
    held = row["arguments"] + row["outputs"] - row["aliased"]
    peak = (held + row["temporaries"]) / 1e9
    verdict = f"{100 * peak / row['memory_gb']:.0f} %" + ("" if peak <= row["memory_gb"] else ", does not fit")
    sent = [_sent(row["sent"].get(kind)) for kind in ("all-reduce", "all-gather")]
    return [f"{held / 1e9:.1f}", f"{row['temporaries'] / 1e9:.2f}", verdict, *sent]


def _sent(found: dict | None) -> str:
    if found is None:
        return ""
    size = found["bytes"]
    return f"{found['count']}, {size / 1e9:.1f} GB" if size > 1e8 else f"{found['count']}, {size / 1e6:.1f} MB"


def _refused(row: dict) -> list[str]:
    return ["", f"{row['needed_gib'] * 1.073741824:.1f}", "does not fit, says the compiler", "", ""]
