"""Block influence: three layers whose effect is known, a real model against numpy, and the ranking."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import layer_states
from dyninf.depth import SkipLayers, block_influence, least_influential


class Scale:
    """A layer that multiplies the state by a matrix and attends to nothing."""

    def __init__(self, matrix):
        self.matrix = jnp.asarray(matrix, jnp.float32)

    def __call__(self, x_BTD, positions_BT, attend):
        return x_BTD @ self.matrix, None


@dataclasses.dataclass
class Known:
    """Embeds token 0 as (1, 0), token 1 as (0, 2); a longer state, a quarter turn, then a sign change."""

    layers = (Scale([[3, 0], [0, 3]]), Scale([[0, 1], [-1, 0]]), Scale([[-1, 0], [0, -1]]), Scale([[1, 0], [0, 0]]))

    def embed(self, tokens_BT):
        return jnp.array([[1.0, 0.0], [0.0, 2.0]])[tokens_BT]


def test_influence_by_hand():
    # States of token 0: (1,0) (3,0) (0,3) (0,-3) (0,0); of token 1: (0,2) (0,6) (-6,0) (6,0) (6,0).
    # Cosines: 1, 0, -1, and 0 or 1 in the last layer.
    tokens = jnp.array([[0, 1, 1], [1, 0, 0]])
    np.testing.assert_allclose(block_influence(layer_states(Known(), tokens)), [0, 1, 2, 0.5], atol=1e-6)
    # Padding does not count: two tokens 0 and one token 1 make the last mean cosine 1/3.
    np.testing.assert_allclose(
        block_influence(layer_states(Known(), tokens), jnp.array([1, 2])), [0, 1, 2, 2 / 3], atol=1e-6
    )


def test_influence_against_numpy(tiny_model, rng):
    tokens, lengths = jnp.asarray(rng.integers(0, 61, (3, 5))), np.array([5, 2, 4])
    computed = jax.jit(layer_states)(tiny_model, tokens, jnp.asarray(lengths))
    states = np.asarray(computed, np.float64)
    want = np.zeros(6)
    for layer in range(6):
        cosines = [
            states[layer, row, t]
            @ states[layer + 1, row, t]
            / (np.linalg.norm(states[layer, row, t]) * np.linalg.norm(states[layer + 1, row, t]))
            for row in range(3)
            for t in range(lengths[row])
        ]
        want[layer] = 1 - np.mean(cosines)
    got = jax.jit(block_influence)(computed, jnp.asarray(lengths))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_least_influential_layers_are_skipped():
    influence = jnp.array([0.9, 0.1, 0.3, 0.2])
    assert least_influential(influence, 2) == SkipLayers(layers=(1, 3))
    assert least_influential(influence, 0) == SkipLayers(layers=())


@pytest.mark.parametrize("num_skipped", [-1, 4])
def test_skipping_nothing_or_everything_is_refused(num_skipped):
    with pytest.raises(ValueError, match=f"skip 0 to 3 of 4 layers, got {num_skipped}"):
        least_influential(jnp.arange(4.0), num_skipped)
