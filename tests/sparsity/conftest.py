"""Inputs that tests of sparse prefill share, and maps of blocks drawn as text."""

import functools

import jax
import numpy as np
import pytest

from dyninf.sparsity import PromptObs

QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all the time of these tests


def draw(seed, tokens, heads, kv, dim):
    """Queries and keys with a few themes, so that some blocks matter more than others."""
    rng = np.random.default_rng(seed)
    themes = rng.normal(size=(6, dim))
    follow = np.repeat(rng.integers(6, size=(-(-tokens // 64), 2)), 64, axis=0)[:tokens]
    k = rng.normal(size=(tokens, kv, dim)) + 1.5 * themes[follow[:, 0]][:, None]
    q = rng.normal(size=(tokens, heads, dim)) + themes[follow[:, 1]][:, None] * rng.uniform(0.5, 2, size=(1, heads, 1))
    return q.astype(np.float32), k.astype(np.float32)


@functools.partial(jax.jit, compiler_options=QUICK)
def select_blocks(policy, q, k, lengths=None, offset=0):
    """What a policy selects for queries and keys given as ``[T, N, H]`` or ``[B, T, N, H]``."""
    q, k = (part if part.ndim == 4 else part[None] for part in (q, k))
    return policy.select(PromptObs(layer=0, q_BTNH=q, k_BSKH=k, lengths_B=lengths, offset=offset))


def draw_maps(selected, sequence=0):
    """The blocks of each head as text: a word for each row that has any, a digit for each block up to its last one."""
    counts, blocks = (np.asarray(part[sequence]) for part in (selected.index.counts, selected.index.blocks))
    maps = []
    for head in range(counts.shape[0]):
        rows = [blocks[head, row, :count].tolist() for row, count in enumerate(counts[head])]
        assert all(row == sorted(set(row)) for row in rows)
        maps.append(" ".join("".join(str(int(c in row)) for c in range(row[-1] + 1)) for row in rows if row))
    return maps


@pytest.fixture
def themes():
    return draw


@pytest.fixture
def select():
    return select_blocks


@pytest.fixture
def maps():
    return draw_maps
