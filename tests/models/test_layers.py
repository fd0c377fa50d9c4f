"""Layers and the transformer: small cases by hand, frequencies against stored numbers, nothing changed in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.models import DecoderLayer, RopeScaling, Transformer, stack_layers, unstack_layers
from dyninf.models.layers import rope_frequencies, rotate
from dyninf.models.parameters import named_parameters, with_parameters
from pallas_kernels.norms import rms_norm


def randomized(model):
    """The model with every parameter drawn anew, so that no norm is one and no bias is zero."""
    arrays = named_parameters(model)
    keys = jax.random.split(jax.random.key(5), len(arrays))
    noise = {name: jax.random.normal(key, arrays[name].shape) for name, key in zip(arrays, keys, strict=True)}
    return with_parameters(model, noise)


def test_rms_norm_by_hand():
    # mean of squares of (3, 4) is 12.5, with eps 3.5 that is 16, so the vector is divided by 4.
    got = rms_norm(jnp.array([[3.0, 4.0]]), jnp.array([2.0, 1.0]), 3.5)
    np.testing.assert_allclose(got, [[1.5, 1.0]], rtol=1e-6)
    assert rms_norm(jnp.ones((1, 2), jnp.bfloat16), jnp.ones(2), 0.0).dtype == jnp.bfloat16


def test_rotation_by_hand():
    # H 2, so one pair and frequency 1: at position 2 the vector (1, 0) becomes (cos 2, sin 2).
    x_BTNH = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    got = rotate(x_BTNH, jnp.array([[2]]), 10000.0, None)
    np.testing.assert_allclose(got.ravel(), [-0.41614684, 0.90929743], rtol=1e-6)


@pytest.mark.parametrize(
    ("theta", "scaling", "wanted"),
    [
        # theta^(-i/4): 1, 1/10, 1/100, 1/1000
        (10000.0, None, [1.0, 0.1, 0.01, 0.001]),
        # numbers printed by transformers for H 16: the first is kept, the second blended, the rest divided by 8
        (
            500000.0,
            RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=64),
            [1.0, 0.079403013, 0.0047007538, 0.00091158313, 0.00017677668, 3.4281024e-05, 6.6478697e-06, 1.2891732e-06],
        ),
        (
            10000.0,
            RopeScaling(kind="linear", factor=4.0),
            [0.25, 0.079056941, 0.025, 0.0079056947, 0.0024999999, 0.00079056947, 0.00025000001, 7.9056947e-05],
        ),
    ],
    ids=["default", "llama3", "linear"],
)
def test_rope_frequencies(theta, scaling, wanted):
    got = rope_frequencies(2 * len(wanted), theta, scaling)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"qk_norm": True}], ids=["llama", "qwen2", "qwen3"])
def test_project_kv_is_what_attend_receives(changes, small):
    layer = randomized(Transformer(small(**changes, windows=(None, 5, None)), jax.random.key(0))).layers[1]
    x_BTD, positions_BT = jax.random.normal(jax.random.key(1), (2, 7, 20)), jnp.arange(14).reshape(2, 7)
    seen = {}

    def attend(q_BTNH, k_BTKH, v_BTKH, *, window):
        seen.update(q=q_BTNH, k=k_BTKH, v=v_BTKH, window=window)
        return q_BTNH, "carried"

    out_BTD, carry = layer(x_BTD, positions_BT, attend)
    k_BTKH, v_BTKH = layer.project_kv(x_BTD, positions_BT)
    assert (out_BTD.shape, carry, seen["window"]) == ((2, 7, 20), "carried", 5)
    assert (seen["q"].shape, k_BTKH.shape) == ((2, 7, 4, 6), (2, 7, 2, 6))
    np.testing.assert_allclose(k_BTKH, seen["k"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(v_BTKH, seen["v"], rtol=1e-5, atol=1e-5)


def test_activations_keep_the_dtype_of_the_weights(small, logits_of):
    model = Transformer(small(qkv_bias=True, qk_norm=True), jax.random.key(0), jnp.bfloat16)
    assert {str(array.dtype) for array in jax.tree.leaves(model)} == {"bfloat16"}
    x_BTD, _ = model.layers[0](
        model.embed(jnp.zeros((1, 4), int)), jnp.arange(4)[None], lambda q, k, v, *, window: (q, None)
    )
    assert x_BTD.dtype == jnp.bfloat16
    assert logits_of(model, np.zeros((1, 4), int)).dtype == jnp.float32


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_unembed_by_hand(tied, small):
    # The state (2, 0, ...) of D 20 has the mean square 4 / 20 = 0.2, so its 2 becomes 2 / sqrt(0.2 + 0.05) = 4.
    model = Transformer(small(tie_embeddings=tied, norm_eps=0.05), jax.random.key(0))
    x_BTD = jnp.zeros((1, 1, 20)).at[0, 0, 0].set(2.0)
    weights_V = model.embedding[:, 0] if tied else model.unembedding[0]
    np.testing.assert_allclose(model.unembed(x_BTD)[0, 0], 4 * weights_V, rtol=1e-5)


def test_stacking_round_trips_and_leaves_the_model_alone(small):
    model = randomized(Transformer(small(), jax.random.key(0)))
    before = named_parameters(model)
    stacked = stack_layers(model)
    assert isinstance(stacked.layers, DecoderLayer)
    assert stacked.layers.wqkv.shape == (3, 20, 2, 4, 6)
    back = unstack_layers(stacked)
    assert isinstance(stacked.layers, DecoderLayer)
    assert len(model.layers) == len(back.layers) == 3
    assert jax.tree.structure(back) == jax.tree.structure(model)
    for named in (named_parameters(model), named_parameters(back)):
        jax.tree.map(np.testing.assert_array_equal, named, before)


def test_stacking_works_inside_jit(small):
    model = Transformer(small(), jax.random.key(0))
    stacked = stack_layers(model)
    assert jax.jit(stack_layers)(model).layers.wo.shape == (3, 4, 6, 20)
    assert jax.jit(lambda: stack_layers(model))().layers.wo.shape == (3, 4, 6, 20)
    assert len(jax.jit(lambda: unstack_layers(stacked))().layers) == 3


def test_layers_with_different_windows_are_not_stacked(small):
    with pytest.raises(ValueError, match=r"same window, got \['4', 'None'\]"):
        stack_layers(Transformer(small(windows=(4, None, 4)), jax.random.key(0)))


def test_with_parameters_wants_exactly_the_names(small):
    model = Transformer(small(tie_embeddings=True), jax.random.key(0))
    arrays = named_parameters(model)
    norm = arrays.pop("norm_final")
    with pytest.raises(ValueError, match=r"\['other'\] in excess and \['norm_final'\] missing"):
        with_parameters(model, arrays | {"other": norm})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads=3"),
        ({"head_dim": 5}, "even head_dim"),
        ({"windows": (3,)}, r"one window per layer \(3\)"),
        ({"windows": (3, 0, 3)}, "at least 1 token"),
        ({"rope_theta": 0.0}, "rope_theta > 0"),
    ],
    ids=["layers", "heads", "head_dim", "windows", "window", "theta"],
)
def test_impossible_configurations_are_refused(changes, message, small):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    "changes", [{"kind": "yarn"}, {"factor": 0.0}, {"low_freq_factor": 4.0}], ids=["kind", "factor", "band"]
)
def test_impossible_rope_scaling_is_refused(changes):
    with pytest.raises(ValueError, match="expected"):
        RopeScaling(**{"kind": "llama3", "factor": 2.0} | changes)
