"""The protocol of sparse prefill: which blocks of keys each block of a prompt's queries attends to.

A method is one :class:`SparsityPolicy`: before a layer attends among the tokens of a prompt it sees their queries and
keys, and names blocks by a static budget. What it decides with (pooled scores, the attention of the last queries) is
its own affair; the attention itself is one kernel for all of them (:func:`pallas_kernels.block_sparse_attention`). A
method may also drop tokens on the way up (``stages``): the layers above run on the others alone.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax

from dyninf.pytree import pytree
from pallas_kernels import BlockIndex


@dataclass(frozen=True, kw_only=True)
class PromptObs:
    """What a policy may look at before a layer attends.

    Attributes:
        layer: number of the layer, static.
        q_BTNH: queries, rotated, at positions ``offset`` to ``offset + T - 1``: a prompt, or a chunk of one.
        k_BSKH: keys, rotated, at positions 0 to S - 1; those from ``offset + T`` on are not written yet.
        lengths_B: tokens of each prompt; the rest is padding. ``None`` when nothing is padded.
        offset: position of the first query, an int32 scalar, traced when a prompt is read in chunks.
    """

    layer: int
    q_BTNH: jax.Array
    k_BSKH: jax.Array
    lengths_B: jax.Array | None
    offset: jax.Array | int = 0


@pytree(static=("window", "sinks"))
class Selected:
    """The blocks that a layer attends to.

    Attributes:
        index: blocks for each row of queries, by query head.
        window: of these blocks, only keys of the last ``window`` positions are seen, and sinks; ``None`` for all.
        sinks: first positions that are seen whatever the window.
        wanted: blocks that the rule asked for ``[B, N, R]``; more than ``index.counts`` where the budget cut it short.
            ``None`` for rules that never ask for more.
        order: positions of a whole prompt ``[B, N, T]``, int32, in the order in which rows and blocks take its tokens;
            ``None`` for the order of the text.
    """

    index: BlockIndex
    window: int | None = None
    sinks: int = 0
    wanted: jax.Array | None = None
    order: jax.Array | None = None


class SparsityPolicy:
    """Base of sparse prefill policies; its answers are to attend to everything and to drop no token.

    Attributes:
        stages: layers before which tokens of a prompt are dropped, ascending, and how many stay ``(layer, tokens)``.
        revive: tokens that a decode step brings back at each of them, at most; see :mod:`dyninf.revival`.
    """

    stages: ClassVar[tuple[tuple[int, int], ...]] = ()
    revive: ClassVar[int] = 0

    def select(self, obs: PromptObs) -> Selected | None:
        """Return the blocks of each row, ``None`` to attend to all of them in this layer."""
        return None

    def worth(self, obs: PromptObs) -> jax.Array:
        """Return what the tokens at hand are worth ``[B, T]``, asked in the last layer before a stage.

        Positions of ``obs`` count the tokens that are left. The last token of a prompt stays whatever it is worth.
        """
        raise NotImplementedError(f"expected {type(self).__name__} to define worth, since it has stages")

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if the policy does not fit a model."""


@pytree()
class Dense(SparsityPolicy):
    """Attend to every block: exact."""


def require_sizes(policy: SparsityPolicy, **least: int) -> None:
    """Raise ValueError unless these fields, which decide shapes, are whole numbers of at least the given ones."""
    for name, low in least.items():
        value = getattr(policy, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(
                f"expected {name} of {type(policy).__name__} to be a whole number of at least {low}, got {value!r}"
            )
