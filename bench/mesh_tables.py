"""The table of what a model takes of each device of a slice, made from the rows of ``bench/mesh_memory.py``."""

from bench.rendering import commits, read_rows, table

# Memory of one device, as the makers state it; a chip of tpu7x is two devices.
MEMORY_GIB = {"v5p": 95, "v5e": 16, "v6e": 32, "tpu7x": 96}


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
