"""Initial weights of models that retrieve: where attention goes before any training, and that training takes off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.configs.training import RECALL, RECALL_RECIPE
from dyninf.models import ModelConfig, Transformer
from dyninf.tasks import Vocabulary, mixture
from dyninf.training.retrieval_start import retrieval_start
from dyninf.training.states import hidden_states
from dyninf.training.step import init_state, train_step

CONFIG = ModelConfig(
    vocab_size=200, num_layers=2, d_model=128, d_ff=160, num_heads=4, num_kv_heads=2, head_dim=64, max_length=4096,
    rope_theta=RECALL.rope_theta, tie_embeddings=True, qkv_bias=True,
)  # fmt: skip


def attention(layer, x_BTD):
    """Return the probabilities of a layer on states that stand at positions 0 to T - 1, ``[N, T, T]``."""
    seen = []

    def attend(q, k, v, *, window=None):
        seen.extend((np.asarray(q[0], np.float64), np.asarray(k[0], np.float64)))
        return q, None

    layer(x_BTD, jnp.arange(x_BTD.shape[1])[None], attend)
    q_TNH, k_TKH = seen
    k_TNH = np.repeat(k_TKH, q_TNH.shape[1] // k_TKH.shape[1], axis=1)
    scores = np.einsum("tnh,snh->nts", q_TNH, k_TNH) / np.sqrt(q_TNH.shape[-1])
    scores = np.where(np.tri(len(q_TNH), dtype=bool)[None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_the_first_layer_looks_back_and_the_next_finds_equals(rng):
    model = retrieval_start(Transformer(CONFIG, jax.random.key(0)), jax.random.key(1))
    tokens = rng.permutation(200)[:90]
    tokens[80] = tokens[13]  # the only token that comes twice
    x_BTD = model.embed(jnp.asarray(tokens)[None])
    np.testing.assert_allclose(jnp.linalg.norm(x_BTD, axis=-1), 1, rtol=0.35)
    back = attention(model.layers[0], x_BTD)
    for head in range(4):
        assert np.diagonal(back[head], -head - 1).min() > 0.8, "head n attends n + 1 tokens back"
    equal = attention(model.layers[1], x_BTD)[:, 80]
    others = np.delete(equal, [13, 80], axis=1)
    assert (equal[:, 13] > 5 * others.max(axis=1)).all(), "the same token, 67 positions back, stands out"


def test_a_model_without_biases_is_refused():
    model = Transformer(dataclasses.replace(CONFIG, qkv_bias=False), jax.random.key(0))
    with pytest.raises(ValueError, match="expected a model with qkv_bias=True"):
        retrieval_start(model, jax.random.key(1))


def test_the_recipe_begins_so_and_goes_on_from_a_model_as_it_is():
    recipe = dataclasses.replace(RECALL_RECIPE, steps=60, batch_size=2, length=32)
    began = init_state(CONFIG, recipe).model
    normal = init_state(CONFIG, dataclasses.replace(recipe, start="normal")).model
    assert np.abs(began.layers.bqkv[...]).max() > 6 and not np.any(normal.layers.bqkv[...])
    given = Transformer(CONFIG, jax.random.key(3))
    kept = init_state(CONFIG, recipe, given).model
    np.testing.assert_array_equal(kept.layers.wqkv[...][1], given.layers[1].wqkv[...])


@pytest.mark.slow
def test_retrieval_is_learned_within_some_dozens_of_steps():
    """From small random weights the same model stays at guessing, one in four or less."""
    vocabulary = Vocabulary(num_keys=64, num_values=32)
    config = dataclasses.replace(CONFIG, vocab_size=vocabulary.size, num_layers=3)
    recipe = dataclasses.replace(
        RECALL_RECIPE, steps=120, batch_size=64, length=64, warmup=10, exit_period=3, compute_dtype="float32"
    )
    rows = mixture(["multikey_4"], [1.0], 65, 10**9, 128, vocabulary=vocabulary)
    exact = {}
    for start in ("normal", "retrieval"):
        state = init_state(config, dataclasses.replace(recipe, start=start))
        for step in range(recipe.steps):
            batch = mixture(["multikey_4"], [1.0], (48, 65), 0, 64, start=step * 64, vocabulary=vocabulary, questions=8)
            state, _ = train_step(state, jnp.asarray(batch.tokens), recipe, jnp.asarray(batch.loss_mask[:, 1:]))
        tokens = jnp.asarray(rows.tokens[:, :-1])
        states = hidden_states(state.model, tokens, jnp.ones((3, len(rows.tokens)), bool))[-1]
        right = np.asarray(jnp.argmax(state.model.unembed(states), -1)) == rows.tokens[:, 1:]
        exact[start] = float((right | ~rows.loss_mask[:, 1:]).all(axis=1).mean())
    assert exact["retrieval"] > 0.9 and exact["normal"] < 0.5, exact
