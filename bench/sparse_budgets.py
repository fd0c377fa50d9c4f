"""The sparse prefill policies of ``configs/plans.py`` with a share of a prompt's causal blocks, by one rule for all.

All policies get one block size, and no layer attends to everything. A share of 1/N of the blocks that dense attention
has becomes:

- for most policies the largest number of blocks a row that all rows together keep to, those that have fewer before them
  included (:func:`row_budget`). A row takes as many as it may: masses are ``None`` or 1. Of a tri-shape the row of the
  last token is dense and counts. Power takes the most nearest blocks beside its powers (:func:`power_window`), its unit
  being a block.
- Of these, A-shape and tri-shape give one to sinks; vertical-slash, beside the diagonal, one part of seven to columns
  and six to slashes, as its default does. ZipVL's budget is without a row's own block; X-attention's stride is an
  eighth of a block, as 16 is of 128.

A row has at least three blocks, the first one, its own and one more (of power, the one before it). What is attended to
may be less than the share, as early rows have few columns and slashes.
"""

import bisect
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.configs.plans import plans
from dyninf.pytree import pytree
from dyninf.sparsity import (
    AShape,
    Dense,
    FlexPrefill,
    PooledBlocks,
    PowerAttention,
    PromptObs,
    Selected,
    SparsityPolicy,
    TriShape,
    VerticalSlash,
    XAttention,
    ZipVL,
)
from dyninf.sparsity.probes import block_attention
from pallas_kernels import choose_blocks

BEST = "best_blocks"
FAMILY = "sparse_"
SHALLOW = 4  # layers of the smallest model that has named plans; sparsity does not depend on it
LEAST = 3  # blocks of a row: the first one, its own and one to choose
STRIDED_ROWS = 8  # strided rows of a block of X-attention, the default's 128 / 16


@pytree(static=("budget", "block_size"))
class BestBlocks(SparsityPolicy):
    """Attend to the ``budget`` blocks of each row that its queries pay most attention to, which costs dense scores.

    No other ``budget`` blocks of a row hold more of its attention.
    """

    budget: int
    block_size: int

    def select(self, obs: PromptObs) -> Selected:
        """Return the best blocks of each row by exact attention, none of them forced."""
        batch, length = obs.q_BTNH.shape[:2]
        lengths_B = jnp.full(batch, length) if obs.lengths_B is None else obs.lengths_B
        plain = jnp.ones((1, 1, 1, 1), jnp.float32)

        def add_up(first):
            asking_1W = (first + jnp.arange(self.block_size))[None]
            asking_BW = jnp.where(asking_1W < lengths_B[:, None], asking_1W, -1)
            return jnp.sum(block_attention(obs, asking_BW, plain, self.block_size)[0], axis=2)

        masses_RBNC = jax.lax.map(add_up, jnp.arange(0, length, self.block_size, dtype=jnp.int32))
        about = {"block_size": self.block_size, "budget": self.budget, "sinks": 0, "recent": 0}
        return Selected(index=choose_blocks(jnp.moveaxis(masses_RBNC, 0, 2), **about)[0])


def policy_names() -> list[str]:
    """Return the names of the sparse plans, and that of the choice that knows the attention."""
    return [*(name for name in plans(SHALLOW) if name.startswith(FAMILY)), BEST]


def row_budget(blocks: int, denominator: float, dense_rows: int = 0) -> int:
    """Return the most blocks a row so that all ``blocks`` rows together hold at most 1/``denominator`` of the causal
    ones, the last ``dense_rows`` holding all of theirs."""
    causal = np.arange(1, blocks + 1)
    dense = causal > blocks - dense_rows
    held = [int(np.where(dense, causal, np.minimum(causal, budget)).sum()) for budget in causal]
    return bisect.bisect_right(held, int(causal.sum()) / denominator)


def power_window(blocks: int, denominator: float) -> int:
    """Return the most nearest blocks so that all ``blocks`` rows of :class:`PowerAttention` together hold at most
    1/``denominator`` of the causal ones."""
    powers = [1 << digits for digits in range(blocks.bit_length())]

    def held(window: int) -> int:
        distances = {*range(window), *(power for power in powers if power >= window)}
        return sum(len({0, *(row - distance for distance in distances if distance <= row)}) for row in range(blocks))

    return bisect.bisect_right(range(1, blocks + 1), blocks * (blocks + 1) / 2 / denominator, key=held)


def with_budget(name: str, denominator: int, *, tokens: int, block_size: int) -> SparsityPolicy:
    """Return the policy of a named plan with 1/``denominator`` of the causal blocks of a prompt, or fewer.

    Raises:
        ValueError: if the policy cannot have this budget, or there is no rule for it.
    """
    policy = Dense() if name == BEST else plans(SHALLOW)[name].sparsity
    blocks = -(-tokens // block_size)
    if isinstance(policy, PowerAttention):
        budget, least = power_window(blocks, denominator), 1
    else:
        budget, least = row_budget(blocks, denominator, dense_rows=int(isinstance(policy, TriShape))), LEAST
    if budget < least:
        raise ValueError(
            f"expected a budget of at least {least} blocks a row for {name}, got {budget}, 1/{denominator} of {blocks} "
            f"rows of {block_size} tokens; take smaller blocks or longer texts"
        )
    # A window reaches from the first query of a row over the blocks before it that are not sinks.
    shape = {"sinks": block_size, "window": (budget - 2) * block_size + 1}

    def change(**sizes: object) -> SparsityPolicy:
        return dataclasses.replace(policy, block_size=block_size, **sizes)

    match policy:
        case Dense():
            return BestBlocks(budget=budget, block_size=block_size)
        case AShape():
            return change(**shape)
        case TriShape():
            return change(**shape, last=1)
        case PowerAttention():
            return change(window=budget, unit=block_size, dense_layers=0)
        case VerticalSlash():
            vertical = max(1, round((budget - 1) / 7))
            return change(vertical=vertical, slash=budget - 1 - vertical)
        case PooledBlocks():
            return change(budget=budget)
        case ZipVL():
            return change(budget=budget - 1, mass=1.0)
        case FlexPrefill():
            return change(budget=budget, gamma=1.0)
        case XAttention():
            return change(budget=budget, mass=None, stride=max(1, block_size // STRIDED_ROWS))
    raise ValueError(f"expected a policy that bench/sparse_budgets.py has a rule for, got {name}; give it one")
