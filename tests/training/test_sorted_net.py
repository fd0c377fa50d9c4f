"""SortedNet: a masked sub-network is the model cut out of the full one, in values and gradients; and a step of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyninf
from dyninf.models import ModelConfig, stack_layers
from dyninf.models.parameters import named_parameters
from dyninf.training.sorted_net import draw, extract, masked_state, sorted_loss, sub_config, sub_networks

CONFIG = ModelConfig(
    vocab_size=37,
    num_layers=3,
    d_model=14,
    d_ff=20,
    num_heads=6,
    num_kv_heads=3,
    head_dim=4,
    max_length=16,
    qkv_bias=True,
    qk_norm=True,
    tie_embeddings=True,
)
B, T = 2, 5
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all the time of these tests


@pytest.fixture(scope="module")
def model(lively):
    return lively(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, T + 1)))


@pytest.fixture(scope="module")
def masked():
    """One program for all sub-networks: the state, its loss and the gradient of that."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(model, tokens, size):
        grads, (entropy,) = jax.grad(sorted_loss, has_aux=True)(model, tokens, size)
        return masked_state(model, tokens[:, :-1], size), entropy, grads

    return run


@pytest.mark.parametrize(
    ("depth", "width"), [(2, 0.5), pytest.param(3, 0.3, marks=pytest.mark.slow), (1, 1.0)], ids=str
)
def test_masked_is_extracted(model, tokens, masked, depth, width):
    state, entropy, grads = masked(model, tokens, sub_networks(CONFIG, (depth,), (width,))[0])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def of_small(model):
        def loss(model):
            small = extract(model, depth, width)
            out = dyninf.layer_states(small, tokens[:, :-1])[-1]
            picked = jnp.take_along_axis(jax.nn.log_softmax(small.unembed(out)), tokens[:, 1:, None], axis=-1)
            return -picked.mean(), out

        return jax.value_and_grad(loss, has_aux=True)(model)

    (want_loss, want), want_grads = of_small(model)
    np.testing.assert_allclose(state, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, want_loss, rtol=1e-5)
    want_grads = named_parameters(want_grads)
    for name, got in named_parameters(grads).items():
        np.testing.assert_allclose(got, want_grads[name], rtol=1e-4, atol=1e-5, err_msg=name)
    sizes = sub_config(CONFIG, depth, width)
    assert not np.any(want_grads["layers.0.wo"][sizes.num_heads :]) and np.any(want_grads["layers.0.wo"])
    assert depth == 3 or not np.any(want_grads["layers.2.w_down"])


def test_what_is_cut_out_by_hand(model):
    # Half of 3 key/value heads is 2 rounded up, with 2 query heads each; half of 20 columns is 10.
    small, whole = named_parameters(extract(model, 2, 0.5)), named_parameters(model)
    assert sub_config(CONFIG, 2, 0.5).num_heads == 4
    assert {name.split(".")[1] for name in small if name.startswith("layers")} == {"0", "1"}
    for name, cut in {
        "wqkv": np.s_[:, :2],
        "bqkv": np.s_[:2],
        "wo": np.s_[:4],
        "w_gate_up": np.s_[:, :, :10],
        "w_down": np.s_[:10],
        "norm_q": np.s_[:],
    }.items():
        np.testing.assert_array_equal(small[f"layers.1.{name}"], whole[f"layers.1.{name}"][cut])
    for name in ("embedding", "norm_final"):
        np.testing.assert_array_equal(small[name], whole[name])
    full = named_parameters(extract(model, 3))
    assert full.keys() == whole.keys() and all(np.array_equal(full[name], whole[name]) for name in whole)


def test_stacked_layers_are_masked_the_same(model, tokens, masked):
    size = sub_networks(CONFIG, (2,), (0.5,))[0]
    got = jax.jit(masked_state, compiler_options=QUICK)(stack_layers(model), tokens[:, :-1], size)
    np.testing.assert_allclose(got, masked(model, tokens, size)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="unstack the layers"):
        extract(stack_layers(model), 1)


def test_the_full_model_can_be_trained_in_every_step(model, tokens, masked):
    small, full = sub_networks(CONFIG, (1, 3), (1.0,))
    loss, entropy_2 = jax.jit(functools.partial(sorted_loss, with_full=True), compiler_options=QUICK)(
        stack_layers(model), tokens, small
    )
    want = [masked(model, tokens, size)[1] for size in (small, full)]
    np.testing.assert_allclose(entropy_2, want, rtol=1e-5)
    np.testing.assert_allclose(loss, sum(want) / 2, rtol=1e-5)


def test_sizes_and_draws():
    sizes = sub_networks(CONFIG, (1, 3), (0.1, 0.5, 1.0))
    assert sizes.tolist() == [[1, 1, 2], [1, 2, 10], [1, 3, 20], [3, 1, 2], [3, 2, 10], [3, 3, 20]]
    draws = jax.vmap(lambda key: draw(key, sizes))(jax.random.split(jax.random.key(0), 1200))
    counts = [(draws == size[None]).all(1).sum() for size in sizes]
    assert sum(counts) == 1200 and min(counts) > 150  # 200 each are expected; four standard deviations are 52


@pytest.mark.parametrize(
    ("depth", "width", "message"),
    [
        (0, 1.0, "depths between 1 and 3"),
        (4, 1.0, "depths between 1 and 3"),
        (2, 0.0, "got width=0.0"),
        (2, 1.1, "1.1"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(model, depth, width, message):
    with pytest.raises(ValueError, match=message):
        extract(model, depth, width)
