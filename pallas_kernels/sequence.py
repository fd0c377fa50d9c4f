"""Attention of a prompt whose tokens are split among devices: each has a run of them and fetches the keys it may see.

Without a window these are all keys, which are gathered. With one they are those of the window before the run, from the
devices before it, and the first ones where these are seen whatever the window: blocks that the pattern hides are not
sent. Of causal attention the devices of later runs have more to do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.index import BlockIndex


def is_whole_prompt(arguments: dict[str, Any], parts: int) -> bool:
    """Return whether a call attends among the tokens of whole prompts, which ``parts`` devices can share.

    Raises:
        ValueError: if so, and the tokens do not divide by the devices, and by the blocks of an index.
    """
    length, offset, index = arguments["q_BTNH"].shape[1], arguments["offset"], arguments.get("index")
    if not (offset is None or isinstance(offset, int)) or length != arguments["k_BSKH"].shape[1]:
        return False
    if arguments.get("order_BNT") is not None:
        return False
    unit = 1 if index is None else index.block_size
    if length % (parts * unit):
        blocks = "" if unit == 1 else f" with blocks of {unit}"
        raise ValueError(
            f"expected prompts of a multiple of {parts * unit} tokens on {parts} devices of the sequence axis{blocks}, "
            f"got {length}; pad them, or use a mesh without that axis"
        )
    return True


def attend_part(operation: Callable, arguments: dict[str, Any], axes: tuple[str, ...]) -> Any:
    """Attend from the tokens of this device, inside ``shard_map``, to those of all devices along the axes."""
    parts, first = lax.axis_size(axes), lax.axis_index(axes) * arguments["q_BTNH"].shape[1]
    length, index, window = arguments["q_BTNH"].shape[1], arguments.get("index"), arguments["window"]
    unit = 1 if index is None else index.block_size
    front = -(-arguments.get("sinks", 0) // unit) * unit
    masked = arguments.get("keep_BT") is not None
    reach = None if window is None or masked else -(-(window - 1) // unit) * unit
    if reach is None or front > length or front + reach >= (parts - 1) * length:
        both = {name: lax.all_gather(arguments[name], axes, axis=1, tiled=True) for name in ("k_BSKH", "v_BSKH")}
        return operation(**arguments | both | {"offset": first})
    # Slots: the first ``front`` tokens of the prompt, and from ``start`` on those of the window and of this device.
    # What is nearer to its query there than in the prompt is out of its window in both.
    start = jnp.maximum(front, first - reach)
    given = {
        name: _fetch(arguments[name], axes, parts, front, reach, first - reach - start) for name in ("k_BSKH", "v_BSKH")
    }
    if arguments["lengths_B"] is not None:
        given["lengths_B"] = jnp.clip(arguments["lengths_B"] - start + front, 0, front + reach + length)
    if index is not None:
        given["index"] = _renumber(index, start // unit, front // unit, (reach + length) // unit)
    return operation(**arguments | given | {"offset": first - start + front})


def _fetch(x_BSKH: jax.Array, axes: tuple[str, ...], parts: int, front: int, reach: int, turn: jax.Array) -> jax.Array:
    """Return the first tokens of the first device, then those before this one's and its own, turned by ``turn``."""
    length, pieces, missing, hop = x_BSKH.shape[1], [x_BSKH], reach, 1
    while missing > 0:
        piece = x_BSKH[:, max(0, length - missing) :]
        pieces.insert(0, lax.ppermute(piece, axes, [(part, part + hop) for part in range(parts - hop)]))
        missing, hop = missing - length, hop + 1
    near_BSKH = jnp.roll(jnp.concatenate(pieces, axis=1), turn, axis=1)
    if not front:
        return near_BSKH
    first_BSKH = jnp.where(lax.axis_index(axes) == 0, x_BSKH[:, :front], jnp.zeros((), x_BSKH.dtype))
    return jnp.concatenate([lax.psum(first_BSKH, axes), near_BSKH], axis=1)


def _renumber(index: BlockIndex, start: jax.Array, front: int, near: int) -> BlockIndex:
    """Return an index of the blocks where :func:`_fetch` puts them, without those that it does not have."""
    blocks, entries = index.blocks, jnp.arange(index.blocks.shape[3])[None, None, None]
    is_near = (blocks >= start) & (blocks < start + near)
    held = ((blocks < front) | is_near) & (entries < index.counts[..., None])
    moved = jnp.where(blocks < front, blocks, blocks - start + front)
    counts = jnp.sum(held, axis=3, dtype=jnp.int32)
    return BlockIndex(
        counts=counts, blocks=jnp.sort(jnp.where(held, moved, front + near), axis=3), block_size=index.block_size
    )
