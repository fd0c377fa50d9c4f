"""Mixture-of-Depths training: by hand on a layer of uniform attention, and against the dense and the decoding model."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dyninf
from dyninf import Plan
from dyninf.depth import MixtureOfDepths
from dyninf.models import ModelConfig, Transformer, stack_layers
from dyninf.training.mixture import mixture_forward, mixture_loss, num_selected

CONFIG = ModelConfig(
    vocab_size=43, num_layers=4, d_model=24, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=6, max_length=32
)
L, D, B, T = 4, 24, 3, 8
LENGTHS = jnp.array([8, 3, 6])
forward = jax.jit(mixture_forward)
dense_states = jax.jit(dyninf.layer_states)
grad_of_loss = jax.jit(jax.grad(mixture_loss, argnums=(0, 1), has_aux=True))


@pytest.fixture(scope="module")
def model():
    """A model whose layers matter: at the usual initial weights each adds next to nothing to its input."""
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, Transformer(CONFIG, jax.random.key(5)))


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, T)))


def policy_of(**settings):
    return MixtureOfDepths.create(jax.random.key(3), L, D, **settings)


class Uniform:
    """A layer that adds the mean of the states it may attend to; it notes how many tokens it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, x_BTD, positions_BT, attend):
        self.seen.append(positions_BT.shape)
        heads = x_BTD[:, :, None]
        o_BTNH, carry = attend(jnp.zeros_like(heads), heads, heads)
        return x_BTD + o_BTNH[:, :, 0], carry


def run_uniform(policy, text, lengths=None):
    """The forward pass of a model of one such layer, whose states are the token ids, and what the layer was given."""
    layer = Uniform()
    model = types.SimpleNamespace(layers=[layer], embed=lambda tokens: tokens[:, :, None].astype(jnp.float32))
    run = jax.jit(lambda policy: mixture_forward(model, policy, jnp.array(text), lengths))
    return run(policy), layer.seen


def test_one_layer_by_hand():
    # States 1, 5, 2, 4; router logits x - 4.5 = -3.5, 0.5, -2.5, -0.5: half of the tokens are 5 and 4.
    policy = MixtureOfDepths(router=jnp.ones((1, 1)), bias=jnp.full(1, -4.5), capacity=0.5, start=0)
    out, seen = run_uniform(policy, [[1, 5, 2, 4]])
    # 5 attends to itself: 5 + 5. 4 attends to 5 and itself, not to 1 and 2: 4 + 9 / 2.
    np.testing.assert_allclose(out.x_BTD[0, :, 0], [1, 10, 2, 8.5], rtol=1e-6)
    np.testing.assert_array_equal(out.ran_LBT, [[[False, True, False, True]]])
    assert seen == [(1, 2)]
    # ln(1 + e^-3.5) + ln(1 + e^-0.5) + ln(1 + e^-2.5) + ln(1 + e^0.5) = 0.029750 + 0.474077 + 0.078889 + 0.974077
    np.testing.assert_allclose(out.predictor_loss, 1.556793 / 4, rtol=1e-5)
    np.testing.assert_allclose(out.agreement, 0.75)  # the sign of -0.5 is wrong

    grads = jax.grad(lambda policy: jnp.sum(run_uniform(policy, [[1, 5, 2, 4]])[0].x_BTD))(policy)
    # sigmoid' = 0.235004 at 0.5 and at -0.5; the updates are 5 and 4.5.
    np.testing.assert_allclose(grads.bias, [0.235004 * 9.5], rtol=1e-5)
    np.testing.assert_allclose(grads.router, [[0.235004 * (5 * 5 + 4.5 * 4)]], rtol=1e-5)


def test_padding_is_picked_last_and_attended_by_none():
    # Two of four tokens are text, three may run: 1 and 5 do, and one of padding that counts nowhere.
    policy = MixtureOfDepths(router=jnp.ones((1, 1)), bias=jnp.zeros(1), capacity=0.7, start=0)
    out, seen = run_uniform(policy, [[1, 5, 90, 80]], jnp.array([2]))
    np.testing.assert_allclose(out.x_BTD[0, :2, 0], [2, 8], rtol=1e-6)  # 1 + 1 and 5 + 6 / 2
    np.testing.assert_array_equal(out.ran_LBT, [[[True, True, False, False]]])
    assert seen == [(1, 3)] and out.agreement == 1


@pytest.mark.parametrize(
    ("num_tokens", "capacity", "count"),
    [(16, 0.125, 2), (17, 0.125, 3), (30, 0.1, 3), (5, 0.0, 1), (5, 1.0, 5), (1, 0.5, 1)],
)
def test_capacity_in_tokens(num_tokens, capacity, count):
    assert num_selected(num_tokens, capacity) == count


def test_all_tokens_are_the_dense_model(model, tokens):
    out = forward(model, policy_of(capacity=1.0), tokens, LENGTHS)
    want = dense_states(model, tokens, LENGTHS)[-1]
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(out.x_BTD[row, :length], want[row, :length], rtol=1e-5, atol=1e-5)
    live = np.arange(T)[None] < LENGTHS[:, None]
    np.testing.assert_array_equal(out.ran_LBT, np.broadcast_to(live, (L, B, T)))


def test_no_routed_layer_is_the_dense_model():
    policy = MixtureOfDepths(router=jnp.ones((1, 1)), bias=jnp.zeros(1), capacity=0.5)
    out, _ = run_uniform(policy, [[1, 5]])
    np.testing.assert_allclose(out.x_BTD[0, :, 0], [2, 8], rtol=1e-6)  # 1 + 1 and 5 + 6 / 2
    assert out.predictor_loss == 0 and out.ran_LBT.all()


def test_it_is_decoding_where_the_sign_predicts_the_picks(model, tokens):
    """Shift each router's zero between the picked and the others; of one text, as others differ in that place."""
    text, count = tokens[:1, :7], 4  # half of 7, rounded up

    @functools.partial(jax.jit)
    def shifted(model, policy, text):
        for layer in policy.decision_layers(L):
            below = MixtureOfDepths(router=policy.router[:layer], bias=policy.bias[:layer], capacity=0.5)
            part = types.SimpleNamespace(embed=model.embed, layers=list(model.layers)[:layer])
            logits = jnp.sort(policy.logits(layer, mixture_forward(part, below, text).x_BTD)[0], descending=True)
            middle = (logits[count - 1] + logits[count]) / 2
            policy = dataclasses.replace(policy, bias=policy.bias.at[layer].add(-middle))
        return policy

    policy = shifted(model, policy_of(capacity=0.5), text)
    out = forward(model, policy, text)
    assert out.agreement == 1 and np.asarray(out.ran_LBT).sum(-1).tolist() == [[7], [count], [7], [count]]
    plan = Plan(depth=policy, fill="mask")
    want = jax.jit(dyninf.forward)(model, text, plan, prompt_lengths=jnp.array([0]))
    np.testing.assert_array_equal(np.asarray(out.ran_LBT).sum(0), want.needed)
    np.testing.assert_allclose(out.x_BTD, want.states, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_model_and_the_routers_of_routed_layers_only(model, tokens):
    policy = policy_of(capacity=0.3)
    (for_model, for_policy), out = grad_of_loss(model, policy, tokens, predictor_weight=0.01)
    assert np.asarray(out.ran_LBT).sum(-1).tolist() == [[7] * B, [3] * B] * 2  # ceil(0.3 * 7)
    for leaf in jax.tree.leaves(for_model):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    for leaf in (for_policy.router, for_policy.bias):
        assert np.isfinite(leaf).all() and np.abs(leaf[jnp.array([1, 3])]).min() > 0
        assert not leaf[jnp.array([0, 2])].any()
    # Without the auxiliary loss the routers still learn, from the language model's.
    (_, alone), _ = grad_of_loss(model, policy, tokens, predictor_weight=0.0)
    assert np.abs(alone.router[1]).max() > 0 and np.abs(alone.router[3]).max() > 0
    assert np.abs(alone.router - for_policy.router).max() > 1e-6


def test_the_predictor_loss_teaches_the_sign(model, tokens):
    policy, optimizer = policy_of(capacity=0.25), optax.adam(0.02)
    moments, seen = optimizer.init(policy), []

    def loss(policy):
        out = mixture_forward(model, policy, tokens)
        return out.predictor_loss, out.agreement

    @functools.partial(jax.jit)
    def step(policy, moments):
        (value, agreement), grads = jax.value_and_grad(loss, has_aux=True)(policy)
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(policy, updates), moments, (value, agreement)

    for _ in range(80):
        policy, moments, values = step(policy, moments)
        seen.append(values)
    (loss_before, agreement_before), (loss_after, agreement_after) = seen[0], seen[-1]
    assert agreement_before < 0.8 and agreement_after > 0.95 and loss_after < 0.5 * loss_before


def test_what_does_not_fit_is_refused(model, tokens):
    with pytest.raises(ValueError, match="unstack the layers"):
        mixture_forward(stack_layers(model), policy_of(), tokens)
    with pytest.raises(ValueError, match="the first of 4 layers"):
        mixture_forward(model, MixtureOfDepths.create(jax.random.key(0), 3, D), tokens)


def test_windows_are_refused_where_they_would_count_picked_tokens(tokens):
    windowed = Transformer(dataclasses.replace(CONFIG, windows=(2,) * L), jax.random.key(0))
    out = jax.eval_shape(mixture_forward, windowed, policy_of(capacity=1.0), tokens)
    assert out.x_BTD.shape == (B, T, D)
    with pytest.raises(NotImplementedError, match="attention window, got window=2"):
        jax.eval_shape(mixture_forward, windowed, policy_of(capacity=0.5), tokens)
