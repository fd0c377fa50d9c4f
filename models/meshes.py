"""Meshes of devices by the names of their axes."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

MESH_AXES = ("data", "fsdp", "sequence", "tensor")  # the last one varies fastest: its devices are the nearest ones


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of the first devices, neighbours of ``tensor`` nearest to each other.

    Args:
        axes: sizes by name, such as ``{"tensor": 4, "data": 2}``, in any order.
        devices: ``None`` for all.

    Raises:
        ValueError: if they are no sizes by name, a size is not a positive integer, or there are fewer devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if not isinstance(axes, Mapping):
        raise ValueError(f"expected sizes by name such as {{'tensor': 4}}, got {axes!r}; parse_mesh reads text")
    for name, size in axes.items():
        if not isinstance(name, str) or not isinstance(size, int) or size < 1:
            raise ValueError(f"expected names of axes with positive sizes, got {dict(axes)}")
    names = sorted(axes, key=lambda name: MESH_AXES.index(name) if name in MESH_AXES else -1)
    count = math.prod(axes.values())
    if not axes or count > len(devices):
        asked = " x ".join(f"{name}={axes[name]}" for name in names) or "no axes"
        simulated = "; JAX_NUM_CPU_DEVICES=N simulates N" if devices and devices[0].platform == "cpu" else ""
        raise ValueError(f"expected a mesh of 1 to {len(devices)} devices, got {asked} = {count}{simulated}")
    sizes = [axes[name] for name in names]
    # A slice of 4x4x4 holds a mesh of 8x8 only where an axis of it may be cut.
    grid = mesh_utils.create_device_mesh(sizes, devices[:count], allow_split_physical_axes=True)
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def parse_mesh(text: str) -> dict[str, int]:
    """Return the sizes of ``tensor=4,data=2`` for :func:`make_mesh`.

    Raises:
        ValueError: if it is written otherwise, names another axis than ``MESH_AXES`` or one twice.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in MESH_AXES or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise ValueError(
                f"expected a mesh as NAME=SIZE,... with each of {', '.join(MESH_AXES)} at most once and sizes of at "
                f"least 1, got {text!r}"
            )
        sizes[name] = int(size)
    return sizes
