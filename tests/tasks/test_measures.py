"""Attention mass recall and output error against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.tasks import attention_mass_recall, keep_most_attended, kept_per_head, output_error

recall_of, error_of = jax.jit(attention_mass_recall), jax.jit(output_error)
best_of = jax.jit(keep_most_attended, static_argnames="budget")

B, T, S, N, K, H = 2, 3, 7, 6, 2, 5


@pytest.fixture
def qkv(rng):
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))


def oracle(q, k, v, kept, positions, scale):
    """Loops over every query and head: recall and error [B, T, N]."""
    recall, error = np.zeros((2, B, T, N))
    for b, t, n in np.ndindex(B, T, N):
        head = n // (N // K)
        scores = k[b, :, head].astype(np.float64) @ q[b, t, n] * scale
        seen = np.arange(S) <= positions[b, t]
        mask = kept[b, head] if kept.ndim == 3 else kept[b, head, t]
        p = np.where(seen, np.exp(scores), 0)
        dense = p @ v[b, :, head] / p.sum()
        part = np.where(mask, p, 0)
        sparse = part @ v[b, :, head] / part.sum() if part.sum() else np.zeros(H)
        recall[b, t, n] = part.sum() / p.sum()
        error[b, t, n] = np.linalg.norm(sparse - dense) / np.linalg.norm(dense)
    return recall, error


@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_both_agree_with_loops(qkv, rng, per_query, given):
    q, k, v = qkv
    kept = rng.random((B, K, T, S) if per_query else (B, K, S)) < 0.5
    positions = rng.integers(1, S, (B, T)) if given else np.tile(np.arange(S - T, S), (B, 1))
    extra = {"positions_BT": jnp.asarray(positions), "scale": 0.9} if given else {}
    recall, error = oracle(q, k, v, kept, positions, 0.9 if given else H**-0.5)
    np.testing.assert_allclose(recall_of(q, k, jnp.asarray(kept), **extra), recall, atol=1e-6)
    np.testing.assert_allclose(error_of(q, k, v, jnp.asarray(kept), **extra), error, rtol=1e-5, atol=1e-6)


def test_by_hand():
    # One query that scores log 1, log 2, log 5 on three slots with values 1, 2, 4: weights 1/8, 2/8, 5/8.
    q, k = jnp.ones((1, 1, 1, 1)), jnp.log(jnp.array([1.0, 2.0, 5.0])).reshape(1, 3, 1, 1)
    v = jnp.array([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1)
    kept = jnp.array([[[False, True, True]]])
    np.testing.assert_allclose(recall_of(q, k, kept), [[[7 / 8]]], rtol=1e-6)
    # Dense 25/8; kept (2 * 2 + 5 * 4) / 7 = 24/7; the difference is 17/56, a share of 17/175.
    np.testing.assert_allclose(error_of(q, k, v, kept), [[[17 / 175]]], rtol=1e-5)
    assert best_of(q, k, budget=2).tolist() == kept.tolist() and kept_per_head(kept).tolist() == [[2]]


def test_everything_and_nothing(qkv):
    q, k, v = qkv
    everything, nothing = jnp.ones((B, K, S), bool), jnp.zeros((B, K, S), bool)
    np.testing.assert_allclose(recall_of(q, k, everything), 1.0, rtol=1e-6)
    np.testing.assert_allclose(error_of(q, k, v, everything), 0.0, atol=1e-6)
    np.testing.assert_array_equal(recall_of(q, k, nothing), 0.0)
    np.testing.assert_allclose(error_of(q, k, v, nothing), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(error_of(q, k, 0 * v, nothing), 0.0)  # zero both times


def test_slots_of_hardly_any_mass_are_still_attended_alone():
    # The kept slot has e^-200 of the mass, nothing in float32; alone it has all.
    q, k = jnp.ones((1, 1, 1, 1)), jnp.array([200.0, 0.0]).reshape(1, 2, 1, 1)
    v = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    kept = jnp.array([[[False, True]]])
    assert recall_of(q, k, kept).item() == 0.0 and error_of(q, k, v, kept).item() == pytest.approx(2.0)


def test_the_most_attended_have_the_highest_recall(qkv, rng):
    q, k, _ = qkv
    best = best_of(q, k, budget=3)
    assert np.asarray(kept_per_head(best)).tolist() == [[3] * K] * B
    top = recall_of(q, k, best).mean()
    for _ in range(20):
        other = np.argsort(rng.random((B, K, S)), axis=-1) < 3
        assert recall_of(q, k, jnp.asarray(other)).mean() <= top + 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: attention_mass_recall(q, k, jnp.ones((B, K, S + 1), bool)), "bool mask"),
        (lambda q, k, v: attention_mass_recall(q, k, jnp.ones((B, K, S))), "bool mask"),
        (lambda q, k, v: attention_mass_recall(q[:, :, :5], k, jnp.ones((B, K, S), bool)), "N a multiple of K"),
        (lambda q, k, v: attention_mass_recall(k, q, jnp.ones((B, N, T), bool)), "N a multiple of K and T <= S"),
        (lambda q, k, v: output_error(q, k, v[:, 1:], jnp.ones((B, K, S), bool)), "expected values"),
        (lambda q, k, v: keep_most_attended(q, k, 0), "budget between 1 and 7 slots, got 0"),
        (lambda q, k, v: keep_most_attended(q, k, 2, positions_BT=jnp.zeros((B, 1))), "expected positions"),
    ],
)
def test_bad_shapes_are_refused(qkv, call, message):
    with pytest.raises(ValueError, match=message):
        call(*qkv)
