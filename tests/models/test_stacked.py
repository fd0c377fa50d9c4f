"""Stacking the layers of a model for decoding by index, and taking them apart again."""

import jax
import numpy as np
import pytest

from dyninf.models import (
    ModelConfig,
    Transformer,
    list_layers,
    make_mesh,
    model_shardings,
    random_model,
    stack_for_decoding,
)
from dyninf.models.layers import INIT_STD
from dyninf.models.parameters import named_parameters

SIZES = {"vocab_size": 61, "num_layers": 3, "d_model": 24, "d_ff": 40, "num_heads": 6, "num_kv_heads": 2}


def make(**switches):
    return Transformer(ModelConfig(**SIZES, head_dim=8, max_length=64, **switches), jax.random.key(0))


@pytest.mark.parametrize("switches", [{}, {"qkv_bias": True}, {"qk_norm": True}], ids=["plain", "bias", "qk_norm"])
def test_stacking_and_back_gives_the_same_model(switches):
    model = make(**switches)
    back = list_layers(stack_for_decoding(model))
    assert jax.tree.structure(back) == jax.tree.structure(model)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True):
        assert np.array_equal(one, other)


def test_a_stack_is_a_sequence_of_layers():
    model = make()
    layers = stack_for_decoding(model).layers
    assert len(layers) == 3
    assert np.array_equal(layers[-1].wqkv[...], model.layers[2].wqkv[...])
    assert [layer.w_down.shape for layer in layers] == [(40, 24)] * 3
    with pytest.raises(IndexError, match="below 3, got 3"):
        layers[3]


def test_layers_with_different_windows_are_not_stacked():
    with pytest.raises(ValueError, match=r"one window for all.*keep a list"):
        stack_for_decoding(make(windows=(4, 4, None)))


def test_random_weights_are_stacked_where_they_lie():
    config = ModelConfig(**SIZES | {"vocab_size": 64}, head_dim=8, max_length=64)
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    model = random_model(config, mesh, key=jax.random.key(0), stacked=True)
    lie, made = named_parameters(model_shardings(model, mesh)), named_parameters(model)
    like = jax.eval_shape(lambda: stack_for_decoding(Transformer(config, jax.random.key(0))))
    assert jax.tree.structure(model) == jax.tree.structure(like)
    for name, array in made.items():
        assert array.sharding.is_equivalent_to(lie[name], array.ndim)
        if "norm" in name:
            assert np.all(np.asarray(array) == 1)
            continue
        assert np.std(array) == pytest.approx(INIT_STD, rel=0.1)
        if name.startswith("layers."):
            one, two, three = np.asarray(array)
            assert not np.any(one == two) and not np.any(two == three)
