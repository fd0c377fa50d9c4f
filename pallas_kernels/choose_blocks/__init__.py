"""Turn scores of blocks into the list of blocks that each row attends to: the best ones, or enough for a mass.

A row of ``block_size`` queries may attend to the blocks up to that of its last query. The first ``sinks`` of them and
its last ``recent`` ones are always taken, whatever their scores, and count towards budget and mass first; the others
follow in the order of their scores, equal ones by number.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choose_blocks import reference, topk
from pallas_kernels.dispatch import Implementation, capability, choose, platform
from pallas_kernels.index import BlockIndex
from pallas_kernels.partition import per_device

CHOOSE_BLOCKS = (
    Implementation(name="topk_pages", refuse=topk.refuse, run=topk.choose_blocks),
    Implementation(name="xla", refuse=reference.refuse, run=reference.choose_blocks),
)


@per_device("BNR BNRM BNR")
def choose_blocks(
    scores_BNRC: jax.Array,
    *,
    block_size: int,
    budget: int,
    mass: jax.Array | float | None = None,
    sinks: int = 1,
    recent: int = 1,
    offset: jax.Array | int = 0,
    implementation: str | None = None,
) -> tuple[BlockIndex, jax.Array]:
    """Return the blocks of each row in ascending order, and how many the rule asked for.

    With ``mass``, a row takes blocks until those before the next one hold at least ``mass`` of the sum of its scores
    (the block that crosses it is taken), without, as many as the budget allows. Cost: reads the scores once.

    Args:
        scores_BNRC: of C blocks for R rows, float32; at least 0 where ``mass`` is given. Blocks behind a row's last
            query are ignored, whatever they hold.
        budget: entries M of the index, at least ``sinks + recent`` and 1.
        mass: share of the sum of a row's scores, 0 to 1; may be traced.
        offset: position of the first query, an int32 scalar that may be traced.
        implementation: ``"topk_pages"`` or ``"xla"``; ``None`` takes the fastest that can serve.

    Returns:
        The index ``[B, N, R, M]`` and the blocks asked for, int32 ``[B, N, R]``: more than M where the budget cut a row
        short, which then attends to its forced blocks and the best others (``"topk_pages"`` says M + 1, however many
        more a mass asked for).

    Raises:
        ValueError: if shapes do not match or a number is out of range.
        NotImplementedError: if the requested implementation cannot serve.
    """
    if scores_BNRC.ndim != 4 or scores_BNRC.dtype != "float32":
        raise ValueError(f"expected scores [B, N, R, C] in float32, got {scores_BNRC.shape} in {scores_BNRC.dtype}")
    numbers = {"block_size": (block_size, 1), "sinks": (sinks, 0), "recent": (recent, 0), "budget": (budget, 1)}
    for name, (value, least) in numbers.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"expected {name} to be a whole number of at least {least}, got {value!r}")
    if budget < sinks + recent:
        raise ValueError(f"expected a budget of at least sinks + recent = {sinks + recent} blocks, got {budget}")
    if jnp.shape(offset) != () or (mass is not None and jnp.shape(mass) != ()):
        raise ValueError(f"expected scalars, got offset {jnp.shape(offset)} and mass {jnp.shape(mass)}")
    about = {"platform": platform(), "capability": capability(), "num_blocks": scores_BNRC.shape[3], "budget": budget}
    chosen = choose("choose_blocks", CHOOSE_BLOCKS, implementation, **about)
    options: dict[str, Any] = {"block_size": block_size, "budget": budget, "sinks": sinks, "recent": recent}
    mass = None if mass is None else jnp.asarray(mass, jnp.float32)
    return chosen.run(scores_BNRC, mass, jnp.asarray(offset, jnp.int32), **options)
