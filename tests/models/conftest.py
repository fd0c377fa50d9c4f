"""A full forward pass without a cache, written from the definition, and a configuration whose sizes all differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.models import ModelConfig


@pytest.fixture
def small():
    """A factory of configurations whose axes all have different sizes (V 19, L 3, D 20, F 28, N 4, K 2, H 6)."""

    def make(**changes):
        sizes = {"vocab_size": 19, "num_layers": 3, "d_model": 20, "d_ff": 28, "num_heads": 4, "num_kv_heads": 2}
        return ModelConfig(**{**sizes, "head_dim": 6, "max_length": 64, **changes})

    return make


@pytest.fixture
def logits_of():
    """A function (model, tokens_BT) -> logits_BTV that attends to the whole sequence at once."""

    def attend(q_BTNH, k_BTKH, v_BTKH, *, window):
        length, group = q_BTNH.shape[1], q_BTNH.shape[2] // k_BTKH.shape[2]
        k_BTNH, v_BTNH = (jnp.repeat(x, group, axis=2) for x in (k_BTKH, v_BTKH))
        scores_BNTT = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) / q_BTNH.shape[-1] ** 0.5
        distance_TT = np.arange(length)[:, None] - np.arange(length)[None]
        seen_TT = (distance_TT >= 0) & (distance_TT < (window or length))
        weights_BNTT = jax.nn.softmax(jnp.where(seen_TT[None, None], scores_BNTT, -jnp.inf), axis=-1)
        return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTT, v_BTNH), None

    def forward(model, tokens_BT):
        tokens_BT = jnp.asarray(tokens_BT)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        x_BTD = model.embed(tokens_BT)
        for layer in model.layers:
            x_BTD, _ = layer(x_BTD, positions_BT, attend)
        return model.unembed(x_BTD)

    return jax.jit(forward)
