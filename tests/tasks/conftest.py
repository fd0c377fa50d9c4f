"""Tokenizers and models for the tests of tasks: one shipped, one of whole words, one that solves needles by hand."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import pytree
from dyninf.models import load_tokenizer
from dyninf.tasks import Vocabulary


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of the shipped model."""
    return load_tokenizer("pycode-13m")


@dataclasses.dataclass
class Encoded:
    ids: list


class Words:
    """One id for every word and every mark, learnt as they come; nothing but ``encode(text).ids``."""

    def __init__(self, before=(), after=()):
        self.before, self.after, self.ids = list(before), list(after), {}

    def encode(self, text):
        pieces = re.findall(r"\w+|[^\w\s]", text)
        return Encoded(self.before + [self.ids.setdefault(piece, len(self.ids) + 10) for piece in pieces] + self.after)


@pytest.fixture
def words():
    return Words()


@pytest.fixture(scope="session")
def small():
    """A vocabulary of 56 ids."""
    return Vocabulary(num_keys=24, num_values=16, num_noise=8)


@pytree()
class Block:
    wqkv: jax.Array  # [D, 3, N, H]
    wo: jax.Array  # [N, H, D]
    where: jax.Array  # [T, D]

    def __call__(self, x, positions, attend):
        q, k, v = jnp.einsum("btd,dcnh->cbtnh", x + self.where[positions], self.wqkv)
        o, carry = attend(q, k, v)
        return x + jnp.tanh(jnp.einsum("btnh,nhd->btd", o, self.wo)), carry

    def project_kv(self, x, positions):
        return tuple(jnp.einsum("btd,dcnh->cbtnh", x + self.where[positions], self.wqkv[:, 1:]))


@pytree()
class Model:
    table: jax.Array  # [V, D]
    out: jax.Array  # [D, V]
    layers: list
    config = types.SimpleNamespace(max_length=64)

    def embed(self, tokens):
        return self.table[tokens]

    def unembed(self, x):
        return x @ self.out


@pytest.fixture(scope="session")
def random_model():
    """Two random layers with sharp predictions, for the vocabulary ``small``; quicker to compile than a real model."""
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    blocks = [Block(wqkv=draw(24, 3, 4, 6) / 5, wo=draw(4, 6, 24), where=draw(64, 24)) for _ in range(2)]
    return Model(table=draw(56, 24), out=draw(24, 56), layers=blocks)


@pytree(static=("vocab", "positions"))
class LookBack:
    """Write the tokens one and two places before into the state ``[now | one | two | found]``."""

    vocab: int
    positions: int
    sharp: jax.Array

    def __call__(self, x, positions, attend):
        queries = jnp.stack([jax.nn.one_hot(positions - back, self.positions) for back in (1, 2)], axis=2)
        o, carry = attend(self.sharp * queries, *self.project_kv(x, positions))
        now, one, two = x[..., : self.vocab], o[..., 0, : self.vocab], o[..., 1, : self.vocab]
        return jnp.concatenate([now, one, two, jnp.zeros_like(now)], axis=-1), carry

    def project_kv(self, x, positions):
        k = jnp.repeat(jax.nn.one_hot(positions, self.positions)[:, :, None], 2, axis=2)
        v = jnp.pad(x[..., : self.vocab], ((0, 0), (0, 0), (0, self.positions - self.vocab)))
        return k, jnp.repeat(v[:, :, None], 2, axis=2)


@pytree(static=("vocab", "positions"))
class Match:
    """Copy the token whose second predecessor is the token before this one: KEY k VALUE v ... k VALUE -> v."""

    vocab: int
    positions: int
    sharp: jax.Array

    def __call__(self, x, positions, attend):
        k, v = self.project_kv(x, positions)
        one = self._head(x, 1)
        o, carry = attend(self.sharp * one, k, v)
        return x.at[..., 3 * self.vocab :].set(o[..., 0, : self.vocab]), carry

    def project_kv(self, x, positions):
        return self._head(x, 2), self._head(x, 0)

    def _head(self, x, part):
        piece = x[..., part * self.vocab : (part + 1) * self.vocab]
        piece = jnp.pad(piece, ((0, 0), (0, 0), (0, self.positions - self.vocab)))
        return jnp.repeat(piece[:, :, None], 2, axis=2)


@pytree(static=("vocab",))
class Solver:
    """Two layers made by hand that answer single needles exactly."""

    vocab: int
    layers: tuple

    def embed(self, tokens):
        return jnp.pad(jax.nn.one_hot(tokens, self.vocab), ((0, 0), (0, 0), (0, 3 * self.vocab)))

    def unembed(self, x):
        return 10 * x[..., 3 * self.vocab :]


@pytest.fixture(scope="session")
def solver(small):
    sharp = jnp.float32(400.0)
    parts = {"vocab": small.size, "positions": 64, "sharp": sharp}
    return Solver(vocab=small.size, layers=(LookBack(**parts), Match(**parts)))
