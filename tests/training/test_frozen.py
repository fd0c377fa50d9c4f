"""Training a part of a tree: the rest keeps its bits and costs no optimizer state; and heads against float64 NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dyninf.depth import AdaptedExit
from dyninf.models import ModelConfig
from dyninf.models.parameters import named_parameters
from dyninf.training.frozen import head_loss, merge, only, select
from dyninf.training.soft import soft_loss
from dyninf.training.states import exit_states

CONFIG = ModelConfig(
    vocab_size=37, num_layers=3, d_model=14, d_ff=20, num_heads=4, num_kv_heads=2, head_dim=6, max_length=16
)
L, D, R, B, T = 3, 14, 2, 2, 5
NAMES = ("norm_final", "layers.*.norm_*")
TRAINED = {"norm_final"} | {f"layers.{i}.norm_{part}" for i in range(L) for part in ("attn", "mlp")}
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all the time of these tests


@pytest.fixture(scope="module")
def model(lively):
    return lively(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, T + 1)))


@pytest.fixture(scope="module")
def policy():
    rng = np.random.default_rng(2)
    policy = AdaptedExit.create(jax.random.key(0), L, D, R)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=jnp.shape(leaf)), jnp.float32), policy)
    return dataclasses.replace(drawn, threshold=0.5)


def deep_policy():
    return AdaptedExit.create(jax.random.key(0), 4, D, R)


@pytest.fixture(scope="module")
def stepped(model, tokens):
    """Three steps both ways: arrays taken out, and an optimizer over the whole tree."""
    adam = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def out(model, arrays, moments):
        loss, grads = jax.value_and_grad(lambda arrays: soft_loss(merge(model, arrays), tokens, (1, 3))[0])(arrays)
        updates, moments = adam.update(grads, moments, arrays)
        return optax.apply_updates(arrays, updates), moments, loss

    @functools.partial(jax.jit, compiler_options=QUICK)
    def whole(model, moments):
        grads = jax.grad(lambda model: soft_loss(model, tokens, (1, 3))[0])(model)
        updates, moments = only(adam, NAMES).update(grads, moments, model)
        return optax.apply_updates(model, updates), moments

    arrays, full, losses = select(model, NAMES), model, []
    moments, full_moments = adam.init(arrays), only(adam, NAMES).init(model)
    for _ in range(3):
        arrays, moments, loss = out(model, arrays, moments)
        full, full_moments = whole(full, full_moments)
        losses.append(float(loss))
    assert losses[0] > losses[1] > losses[2]
    return merge(model, arrays), moments, full, full_moments


@pytest.mark.parametrize("way", ["select", "only"])
def test_the_backbone_keeps_its_bits(model, stepped, way):
    after = named_parameters(stepped[0] if way == "select" else stepped[2])
    for name, before in named_parameters(model).items():
        same = np.array_equal(np.asarray(before).view(np.uint32), np.asarray(after[name]).view(np.uint32))
        assert same == (name not in TRAINED), name


def test_both_ways_train_the_same(stepped):
    for got, want in zip(jax.tree.leaves(stepped[0]), jax.tree.leaves(stepped[2]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["select", "only"])
def test_there_is_no_optimizer_state_for_the_backbone(stepped, way):
    moments = jax.tree.leaves(stepped[1] if way == "select" else stepped[3])
    # Two moments of 7 norms of D, and one count.
    assert sum(np.size(leaf) for leaf in moments) == 2 * 7 * D + 1


def test_names(model, policy):
    tree = {"model": model, "policy": policy}
    assert set(select(tree, ("policy.*", "model.layers.1.w?"))) == {
        *(f"policy.{name}" for name in ("gate", "bias", "scale", "down", "up", "threshold")),
        "model.layers.1.wo",
    }
    assert set(select(model, ("*",))) == set(named_parameters(model))
    changed = merge(tree, {"policy.bias": jnp.full(L, 7.0)})
    assert changed["policy"].bias[0] == 7 and changed["model"] is not model
    np.testing.assert_array_equal(changed["policy"].gate, policy.gate)


def test_the_loss_of_heads_is_that_of_numpy(model, policy, tokens):
    mask = jnp.ones((B, T), bool).at[1, 3:].set(False)
    weights = jnp.array([0.25, 0.75])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(model, policy):
        def loss(model, policy):
            return head_loss(model, policy, tokens, (1, 2), weights, mask_BT=mask, chunk=3)

        states = exit_states(model, tokens[:, :-1], (1, 2))
        return *jax.value_and_grad(loss, (0, 1), has_aux=True)(model, policy), states

    (loss, entropy), (for_model, for_policy), states = run(model, policy)
    p = {name: np.asarray(getattr(policy, name), np.float64) for name in ("scale", "down", "up")}
    head, norm = (np.asarray(w[...], np.float64) for w in (model.unembedding, model.norm_final))
    want = []
    for layer, state in zip((1, 2), np.asarray(states, np.float64), strict=True):
        terms = []
        for b, t in zip(*np.nonzero(np.asarray(mask)), strict=True):
            z = p["down"][layer].T @ state[b, t]
            z = z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2
            y = p["scale"][layer] * state[b, t] + p["up"][layer].T @ z
            scores = (y / np.sqrt((y**2).mean() + CONFIG.norm_eps) * norm) @ head
            terms.append(np.log(np.exp(scores).sum()) - scores[tokens[b, t + 1]])
        want.append(np.mean(terms))
    np.testing.assert_allclose(entropy, want, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.25 * want[0] + 0.75 * want[1], rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(for_model))
    assert not np.any(for_policy.gate) and not np.any(for_policy.bias)
    for name in ("scale", "down", "up"):
        assert np.abs(getattr(for_policy, name)[1:]).min() > 0 and not np.any(getattr(for_policy, name)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, p, t: select(m, ("norm_final", "gate")),
            "arrays named 'gate', got only embedding, layers.0.norm_at",
        ),
        (lambda m, p, t: only(optax.sgd(1.0), ("gate",)).init(m), "arrays named 'gate'"),
        (lambda m, p, t: merge(m, {"gate": jnp.ones(1)}), r"names of the tree, got \['gate'\]"),
        (lambda m, p, t: head_loss(m, p, t, (0,), jnp.ones(1)), r"layers among \(1, 2\), .* got \(0,\)"),
        (lambda m, p, t: head_loss(m, p, t, (2, 1), jnp.ones(2)), "ascending depths"),
        (lambda m, p, t: head_loss(m, deep_policy(), t, (1,), jnp.ones(1)), "the first of 3 layers"),
    ],
    ids=["select", "only", "merge", "layers", "order", "policy"],
)
def test_what_does_not_fit_is_refused(model, policy, tokens, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, policy, tokens)
