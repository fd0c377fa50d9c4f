"""Let each head choose between two patterns, and each pattern between blocks (Lai et al. 2025, "FlexPrefill: A
Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference").

The last ``block_size`` queries attend to everything, and their probabilities are added up by blocks. An estimate of
them is made from means: the softmax of the mean of these queries times the mean key of each block. Where the two are
close (the square root of their Jensen-Shannon divergence is below ``tau``), means can be trusted, and the head is
*query-aware*: of the map of mean queries times mean keys, a softmax in each row, it takes the largest entries of the
whole map that hold no more than ``gamma`` of it. Otherwise it is *vertical-slash*: of the columns and of the diagonals
that the last queries attend to, blocks are taken by their mass, as many as the tokens that hold ``gamma`` of it fill,
and one more. All heads take the first column, the diagonal and ``min_budget`` of both kinds at least.

Cost: probabilities of the last queries, ``2 * block_size * S * H`` FLOPs a head, and means of all queries and keys,
which are read once; for query-aware heads 15 passes over their R x C map. Heads are looked at in groups, so that their
maps take no more than 134 MB. Exact when ``min_budget`` and the budget are all blocks.

The rules are those of the authors' code, which chooses the same blocks where the budget cuts nothing off, with these
differences. They sort the map of a query-aware head; here the cut-off is found by bisection
(:mod:`dyninf.sparsity.cover`), which leaves out all of several equal entries that do not fit together. A row takes
``budget`` blocks at most: the first column, its own, and the best others by their mass in a column, a diagonal or the
map, where theirs has a bound on columns and diagonals instead. Tokens are divided by ``block_size`` where they have
128. A block without any mass adds nothing to the divergence, where theirs is then not a number and the head
vertical-slash. Prompts may be padded, and come in chunks, each judged by its own last queries; theirs is one whole
prompt, read densely up to ``min_budget`` and up to two blocks, of which all are taken here as well.
"""

import jax
import jax.numpy as jnp

from dyninf.depth.base import require_number
from dyninf.pytree import pytree
from dyninf.sparsity.base import PromptObs, Selected, SparsityPolicy, require_sizes
from dyninf.sparsity.cover import count_cover, cover
from pallas_kernels import BlockIndex, choose_blocks, summarize_pages

ENTRIES = 2**25  # of a float32 map of several heads at once: 134 MB


@pytree(static=("budget", "min_budget", "block_size"))
class FlexPrefill(SparsityPolicy):
    """Choose blocks by columns and diagonals, or by a map of means, whichever suits a head.

    Args:
        budget: blocks of a row at most, its first and its own included (at least 2).
        gamma: share of the attention that chosen blocks hold (0 to 1). The paper has 0.9 and 0.95.
        tau: distance below which a head is query-aware (0 to 1); 0 makes every head vertical-slash.
        min_budget: columns and diagonals of blocks that a head takes at least. The paper's 1024 tokens are 8 blocks.
        block_size: queries of a row, keys of a block, and last queries (at least 1).

    Raises:
        ValueError: from :meth:`validate`, if a parameter is out of its range.
    """

    budget: int
    gamma: jax.Array | float = 0.9
    tau: jax.Array | float = 0.1
    min_budget: int = 8
    block_size: int = 128

    def select(self, obs: PromptObs) -> Selected:
        """Return the blocks of each row, and how many its head's pattern asked for; none for rows of padding."""
        batch, length, num_heads, _ = obs.q_BTNH.shape
        ends_B = jnp.full(batch, obs.offset + length, jnp.int32)
        if obs.lengths_B is not None:
            ends_B = jnp.minimum(ends_B, obs.lengths_B)
        k_BCKH = summarize_pages(obs.k_BSKH, ends_B, page_size=self.block_size, kind="mean")
        q_BRNH = summarize_pages(obs.q_BTNH, ends_B - obs.offset, page_size=self.block_size, kind="mean")
        rows, blocks = q_BRNH.shape[1], k_BCKH.shape[1]
        heads_X = jnp.arange(batch * num_heads)

        def look(heads_X):
            return self._look(obs, ends_B, heads_X)

        def choose(heads_X, column_XC, diagonal_XC, aware_X):
            map_inputs = (q_BRNH, k_BCKH, ends_B)
            return self._choose(map_inputs, obs.offset, heads_X, column_XC, diagonal_XC, aware_X)

        looked = _map_groups(look, self.block_size * obs.k_BSKH.shape[1], heads_X)
        judged = self._judge(k_BCKH, ends_B, heads_X, *looked)
        chosen = _map_groups(choose, rows * blocks, heads_X, *judged)
        counts, listed, wanted = (part.reshape(batch, num_heads, *part.shape[1:]) for part in chosen)
        return Selected(index=BlockIndex(counts=counts, blocks=listed, block_size=self.block_size), wanted=wanted)

    def validate(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if a parameter is out of its range."""
        require_sizes(self, budget=2, min_budget=1, block_size=1)
        require_number("gamma", self.gamma, 0.0, 1.0)
        require_number("tau", self.tau, 0.0, 1.0)

    def _look(self, obs: PromptObs, ends_B: jax.Array, heads_X: jax.Array):
        """Return what the last queries attend to by column and by diagonal ``[X, S]``, and their mean ``[X, H]``."""
        size, num_heads = self.block_size, obs.q_BTNH.shape[2]
        sequence_X, head_X = heads_X // num_heads, heads_X % num_heads
        end_X, kv_X = ends_B[sequence_X], head_X // (num_heads // obs.k_BSKH.shape[2])
        position_XI = end_X[:, None] - size + jnp.arange(size)[None]
        live_XI = position_XI >= obs.offset
        index_XI = jnp.maximum(position_XI - obs.offset, 0)
        q_XIH = obs.q_BTNH[sequence_X[:, None], index_XI, head_X[:, None]]
        q_XIH = jnp.where(live_XI[:, :, None], q_XIH, jnp.zeros((), q_XIH.dtype))
        slots_1S = jnp.arange(obs.k_BSKH.shape[1])[None]
        k_XSH = obs.k_BSKH[sequence_X, :, kv_X]
        k_XSH = jnp.where((slots_1S < end_X[:, None])[:, :, None], k_XSH, jnp.zeros((), k_XSH.dtype))

        seen_XIS = (slots_1S[None] <= position_XI[:, :, None]) & live_XI[:, :, None]
        weights_XIS = _softmax(_products(q_XIH, k_XSH), seen_XIS)
        queries_X1 = jnp.maximum(jnp.sum(live_XI, axis=1, keepdims=True), 1)
        mean_XH = jnp.sum(q_XIH.astype(jnp.float32), axis=1) / queries_X1
        return jnp.sum(weights_XIS, axis=1) / queries_X1, _sum_diagonals(weights_XIS) / queries_X1, mean_XH

    def _judge(self, k_BCKH, ends_B, heads_X, by_column_XS, by_diagonal_XS, mean_XH):
        """Return the mass of the columns and diagonals that heads take, below 0 for others, and who is query-aware."""
        size, num_heads = self.block_size, heads_X.shape[0] // ends_B.shape[0]
        sequence_X, head_X = heads_X // num_heads, heads_X % num_heads
        end_X, kv_X = ends_B[sequence_X], head_X // (num_heads // k_BCKH.shape[2])
        columns_X, diagonals_X = ((count_cover(x, self.gamma) + 1) // size + 1 for x in (by_column_XS, by_diagonal_XS))
        column_XC, diagonal_XC = _pool(by_column_XS, size), _pool(by_diagonal_XS, size)

        # Whole blocks of diagonals are counted from the end of the prompt: the last one holds the main diagonal.
        blocks_X1 = (-(-end_X // size))[:, None]
        exists_XC = jnp.arange(column_XC.shape[1])[None] < blocks_X1
        from_end_XC = jnp.clip(blocks_X1 - 1 - jnp.arange(column_XC.shape[1])[None], 0)
        diagonal_XC = jnp.take_along_axis(diagonal_XC, from_end_XC, axis=1)

        estimate_X1C = _products(mean_XH[:, None], k_BCKH[sequence_X, :, kv_X].astype(jnp.float32))
        estimate_XC = _softmax(estimate_X1C[:, 0], exists_XC)
        aware_X = _distance(estimate_XC, column_XC) < self.tau

        def take(mass_XC, number_X):
            number_X = jnp.maximum(jnp.where(aware_X, 0, number_X), self.min_budget)
            mass_XC = jnp.where(exists_XC, mass_XC, -1.0)
            return jnp.where(_is_best(mass_XC, number_X), mass_XC, -1.0)

        return take(column_XC, columns_X), take(diagonal_XC, diagonals_X), aware_X

    def _choose(self, map_inputs, offset, heads_X, column_XC, diagonal_XC, aware_X):
        """Return counts ``[X, R]``, blocks ``[X, R, M]`` and the blocks asked for ``[X, R]`` of heads."""
        q_BRNH, k_BCKH, ends_B = map_inputs
        rows, num_heads, blocks = *q_BRNH.shape[1:3], k_BCKH.shape[1]
        sequence_X, head_X = heads_X // num_heads, heads_X % num_heads
        row_R1 = offset // self.block_size + jnp.arange(rows)[:, None]
        back_RC = row_R1 - jnp.arange(blocks)[None]
        live_XR = row_R1[None, :, 0] * self.block_size < ends_B[sequence_X][:, None]
        exists_XRC = (back_RC >= 0)[None] & live_XR[:, :, None]
        mass_XRC = jnp.maximum(column_XC[:, None], diagonal_XC[:, jnp.clip(back_RC, 0)])
        mass_XRC = jnp.where(exists_XRC, mass_XRC, -1.0)

        def ask_map(mass_XRC):
            kv_X = head_X // (num_heads // k_BCKH.shape[2])
            map_XRC = _products(q_BRNH[sequence_X, :, head_X], k_BCKH[sequence_X, :, kv_X])
            map_XRC = _softmax(map_XRC, exists_XRC)
            taken_XE = cover(map_XRC.reshape(len(heads_X), -1), self.gamma * jnp.sum(live_XR, axis=1))
            taken_XRC = (taken_XE.reshape(map_XRC.shape) & exists_XRC) | (mass_XRC >= 0)
            return jnp.where(aware_X[:, None, None], jnp.where(taken_XRC, map_XRC, -1.0), mass_XRC)

        mass_XRC = jax.lax.cond(jnp.any(aware_X), ask_map, lambda mass_XRC: mass_XRC, mass_XRC)
        index, _ = choose_blocks(
            mass_XRC[None],
            block_size=self.block_size,
            budget=max(2, min(self.budget, blocks)),
            sinks=1,
            recent=1,
            offset=offset,
        )
        # The budget's best blocks, of which a row that wants fewer keeps those it wants.
        counts_XR, listed_XRM = index.counts[0], index.blocks[0]
        mass_XRM = jnp.take_along_axis(mass_XRC, jnp.clip(listed_XRM, 0, blocks - 1), axis=2)
        entry_11M = jnp.arange(listed_XRM.shape[2])[None, None]
        kept_XRM = (mass_XRM >= 0) & (entry_11M < counts_XR[:, :, None])
        listed_XRM = jnp.sort(jnp.where(kept_XRM, listed_XRM, blocks), axis=2)
        wanted_XR = jnp.sum(mass_XRC >= 0, axis=2).astype(jnp.int32)
        return jnp.sum(kept_XRM, axis=2).astype(jnp.int32), listed_XRM, wanted_XR


def _map_groups(function, entries: int, *arrays: jax.Array):
    """Call a function of heads on as many of them at once as have ``ENTRIES`` together, with ``entries`` each."""
    heads = arrays[0].shape[0]
    group = max(size for size in range(1, heads + 1) if heads % size == 0 and (size == 1 or size * entries <= ENTRIES))
    groups = tuple(array.reshape(heads // group, group, *array.shape[1:]) for array in arrays)
    results = jax.lax.map(lambda parts: function(*parts), groups)
    return tuple(part.reshape(heads, *part.shape[2:]) for part in results)


def _products(q_XIH: jax.Array, k_XSH: jax.Array) -> jax.Array:
    scores_XIS = jnp.einsum("XIH,XSH->XIS", q_XIH, k_XSH, preferred_element_type=jnp.float32)
    return scores_XIS * q_XIH.shape[2] ** -0.5


def _softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Return the softmax of what is seen along the last axis; zeros for the rest."""
    peak = jnp.max(jnp.where(seen, scores, -jnp.inf), axis=-1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def _sum_diagonals(weights_XIS: jax.Array) -> jax.Array:
    """Return the sums along diagonals ``[X, S]``; entry j of S belongs to that which ends at slot j in the last row."""
    heads, queries, slots = weights_XIS.shape
    # Rows of one entry more than they have shift each row by one against that above.
    flat = jnp.pad(weights_XIS, ((0, 0), (0, 0), (queries - 1, 0))).reshape(heads, -1)
    shifted = jnp.pad(flat, ((0, 0), (0, queries))).reshape(heads, queries, -1)
    return jnp.sum(shifted[:, :, :slots], axis=1)


def _pool(mass_XS: jax.Array, size: int) -> jax.Array:
    heads, slots = mass_XS.shape
    return jnp.sum(jnp.pad(mass_XS, ((0, 0), (0, -slots % size))).reshape(heads, -1, size), axis=2)


def _distance(p_XC: jax.Array, q_XC: jax.Array) -> jax.Array:
    """Return the square root of the Jensen-Shannon divergence."""
    middle_XC = jnp.maximum((p_XC + q_XC) / 2, jnp.finfo(jnp.float32).tiny)
    terms = (jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x, 1.0) / middle_XC), 0.0) for x in (p_XC, q_XC))
    return jnp.sqrt(jnp.maximum(jnp.sum(sum(terms), axis=1) / 2, 0.0))


def _is_best(mass_XC: jax.Array, number_X: jax.Array) -> jax.Array:
    """Return whether a block is among as many of the largest mass, the first one before all."""
    ids_C = jnp.arange(mass_XC.shape[1])
    mass_XC = jnp.where(ids_C[None] == 0, jnp.inf, mass_XC)
    # Each block against each other one: as large as a map, and never written.
    before_XCC = mass_XC[:, None] > mass_XC[:, :, None]
    before_XCC |= (mass_XC[:, None] == mass_XC[:, :, None]) & (ids_C[None] < ids_C[:, None])[None]
    return jnp.sum(before_XCC, axis=2) < number_X[:, None]
