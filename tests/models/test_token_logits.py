"""Logits of a few tokens: those of the whole vocabulary, on one device, on a mesh, and without a copy on a TPU."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.models import ModelConfig, Transformer, on_mesh, place
from dyninf.models.transformer import MOST_COLUMNS

D, V = 24, 64
CONFIG = ModelConfig(
    vocab_size=V, d_model=D, d_ff=40, num_heads=4, num_kv_heads=2, head_dim=8, num_layers=1, max_length=16
)
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def model_of(tied, **changes):
    return Transformer(dataclasses.replace(CONFIG, tie_embeddings=tied, **changes), jax.random.key(0))


def states_and_tokens(rng, batch, length, num_tokens):
    tokens = rng.integers(0, V, (batch, length, num_tokens))
    tokens[0, 0, :2] = 0, V - 1
    return jnp.asarray(rng.normal(size=(batch, length, D)), jnp.float32), jnp.asarray(tokens, jnp.int32)


@TIED
@pytest.mark.parametrize("shape", [(1, 1, 4), (3, 2, 5), (2, 9, 7)], ids=["one", "few", "many"])
def test_they_are_those_of_the_whole_vocabulary(rng, tied, shape):
    assert math.prod((3, 2, 5)) <= MOST_COLUMNS < math.prod((2, 9, 7))
    model, (x, tokens) = model_of(tied), states_and_tokens(rng, *shape)
    got = jax.jit(lambda model, *given: model.token_logits(*given))(model, x, tokens)
    assert got.dtype == jnp.float32
    want = np.take_along_axis(np.asarray(model.unembed(x)), np.asarray(tokens), axis=-1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@TIED
def test_devices_that_share_the_vocabulary_agree_and_send_no_matrix(rng, tied):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model, (x, tokens) = model_of(tied), states_and_tokens(rng, 2, 1, 3)
    laid_out = on_mesh(place(model, mesh), mesh)
    compiled = jax.jit(lambda model, *given: model.token_logits(*given)).lower(laid_out, x, tokens).compile()
    want = model.token_logits(x, tokens)
    np.testing.assert_allclose(compiled(laid_out, x, tokens), want, rtol=1e-5, atol=1e-6)
    assert "all-reduce" in compiled.as_text() and "all-gather" not in compiled.as_text()


@TIED
def test_a_tpu_reads_their_vectors_and_copies_no_matrix(tied):
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    vocab, width = 65536, 1024  # 256 MB: more than the memory of its own into which XLA would fetch a small one
    model = jax.eval_shape(lambda: model_of(tied, vocab_size=vocab, d_model=width))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        (model, jax.ShapeDtypeStruct((2, 1, width), jnp.float32), jax.ShapeDtypeStruct((2, 1, 4), jnp.int32)),
    )
    compiled = jax.jit(lambda model, *given: model.token_logits(*given)).lower(*shapes).compile()
    # Eight tokens; a column is read with the 127 beside it.
    assert compiled.cost_analysis()["bytes accessed"] < 2 * 8 * 128 * width * 4 < vocab * width * 4 / 4
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 8 * 128 * width * 4
