"""The three-way classifier: labels, loss and report against torch and Python lists, and what it learns on a model.

Numbers named TORCH were printed by torch 2.13.0 (CPU, float64) from a program written from the definitions: labels and
decisions token by token with lists, ``cross_entropy(weight=1 / count)`` per exit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dyninf.depth import StopExit
from dyninf.models import ModelConfig
from dyninf.training.states import exit_states
from dyninf.training.stopping import evaluate_stops, judge_stops, stop_labels, stop_loss, three_way_loss

CONFIG = ModelConfig(
    vocab_size=5, num_layers=4, d_model=14, d_ff=20, num_heads=4, num_kv_heads=2, head_dim=6, max_length=16
)
L, D, B, T = 4, 14, 3, 6
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all the time of these tests
TORCH_LABELS = [
    [[0, 0, 1, 2, 0, 2], [2, 2, 0, 2, 2, 1]],
    [[0, 0, 1, 2, 0, 1], [2, 1, 0, 1, 1, 1]],
    [[0, 0, 1, 1, 0, 1], [1, 1, 0, 1, 1, 1]],
]
# balanced -> value, gradient of the logit of stop [:, 0, 1], sum of the absolute gradient
TORCH_LOSS = {
    True: (1.940580871, (-0.00330042, -0.00376833, -0.06018474), 1.31161124),
    False: (1.828204850, (-0.00396051, -0.00452200, -0.04814779), 1.22279140),
}
# at exit_threshold 0.6, stop_threshold 0.8 and depths 1, 2, 4 and 5
TORCH_REPORT = {
    "precision": 3 / 4,
    "recall": 3 / 7,
    "stopped": 0.4,
    "exited": 0.4,
    "depth": 2.8,
    "accuracy": 2 / 6,
    "full_accuracy": 0.3,
}


def torch_case():
    """Predictions [4, 2, 6], targets [2, 6], logits [3, 2, 6, 3] and mask: the inputs of TORCH."""
    number = np.arange(4 * 2 * 6)
    predictions, targets = (3 * number**2 + 5 * number + 2) % 7 % 4, (np.arange(12) * 5 + 1) % 4
    logits = 2 * np.sin(0.8 * np.arange(3 * 2 * 6 * 3) ** 1.2)
    mask = jnp.ones((2, 6), bool).at[0, 5].set(False).at[1, 0].set(False)
    return (
        jnp.asarray(predictions).reshape(4, 2, 6),
        jnp.asarray(targets).reshape(2, 6),
        jnp.asarray(logits, jnp.float32).reshape(3, 2, 6, 3),
        mask,
    )


def test_labels_are_those_of_torch_and_by_hand():
    predictions, targets, _, _ = torch_case()
    np.testing.assert_array_equal(stop_labels(predictions, targets), TORCH_LABELS)
    # Right at depth 2 and no longer at 3; right at the end only; never; with the end as the truth never "stop".
    four = jnp.array([[[1, 1, 1]], [[7, 1, 2]], [[3, 1, 1]], [[3, 7, 2]]])
    assert stop_labels(four, jnp.array([[7, 7, 7]])).tolist() == [[[2, 2, 0]], [[1, 2, 0]], [[1, 2, 0]]]
    assert stop_labels(four, four[-1]).tolist() == [[[2, 2, 2]], [[2, 2, 1]], [[1, 2, 1]]]


@pytest.mark.parametrize("balanced", [True, False])
def test_the_loss_is_that_of_torch(balanced):
    _, _, logits, mask = torch_case()
    labels = jnp.asarray(TORCH_LABELS)
    loss = functools.partial(three_way_loss, balanced=balanced)
    value, grad = jax.jit(jax.value_and_grad(loss))(logits, labels, mask)
    want, entries, total = TORCH_LOSS[balanced]
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad[:, 0, 1, 0], entries, atol=1e-7)
    np.testing.assert_allclose(np.abs(grad).sum(), total, rtol=1e-5)
    assert jax.jit(loss)(logits, labels, jnp.zeros_like(mask)) == 0


def test_the_report_is_that_of_lists():
    predictions, targets, logits, mask = torch_case()
    policy = StopExit.create(4, D, exit_threshold=0.6, stop_threshold=0.8)
    report = judge_stops(policy, logits, predictions, targets, mask, (1, 2, 4, 5))
    for name, want in TORCH_REPORT.items():
        np.testing.assert_allclose(getattr(report, name), want, rtol=1e-6, err_msg=name)
    right, live = np.asarray(predictions) == np.asarray(targets)[None], np.asarray(mask)
    stopped, hopeless = np.zeros(live.shape, bool), ~right.any(axis=0)
    for b, t in np.argwhere(live):
        for exit_ in np.asarray(logits, np.float64)[:, b, t]:
            probs = np.exp(exit_) / np.exp(exit_).sum()
            leaves, stops = (probs.argmax() == kind and probs[kind] > above for kind, above in ((1, 0.6), (0, 0.8)))
            stopped[b, t] = stops
            if leaves or stops:
                break
    assert 0 < (stopped & hopeless & live).sum() < min((stopped & live).sum(), (hopeless & live).sum())
    np.testing.assert_allclose(report.hopeless, hopeless[live].mean(), rtol=1e-6)
    np.testing.assert_allclose(report.hopeless_precision, hopeless[stopped & live].mean(), rtol=1e-6)
    np.testing.assert_allclose(report.hopeless_recall, stopped[hopeless & live].mean(), rtol=1e-6)
    never = StopExit.create(4, D, exit_threshold=1.0, stop_threshold=1.0)
    report = judge_stops(never, logits, predictions, targets, mask, (1, 2, 4, 5))
    assert (report.precision, report.recall, report.stopped, report.exited, report.depth) == (0, 0, 0, 0, 5)
    assert report.accuracy == report.full_accuracy


@pytest.fixture(scope="module")
def model(lively):
    return lively(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, T + 1)))


def test_the_loss_of_a_model_by_numpy(model, tokens):
    rng, mask = np.random.default_rng(3), jnp.ones((B, T), bool).at[2, 4:].set(False)
    weight, bias = rng.normal(size=(L, D, 3)) / 4, rng.normal(size=(L, 3))
    policy = StopExit(weight=jnp.asarray(weight, jnp.float32), bias=jnp.asarray(bias, jnp.float32))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(model, policy):
        loss = functools.partial(stop_loss, mask_BT=mask, balanced=False, chunk=7)
        out = jax.value_and_grad(loss, (0, 1), has_aux=True)(model, policy, tokens)
        return *out, exit_states(model, tokens[:, :-1], (1, 2, 3, 4))

    (loss, right), (for_model, for_policy), states = run(model, policy)
    states, keep = np.asarray(states, np.float64), np.argwhere(np.asarray(mask))
    norm, head = np.asarray(model.norm_final[...], np.float64), np.asarray(model.unembedding[...], np.float64)
    ces, hits = np.zeros((3, len(keep))), np.zeros((3, len(keep)))
    for index, (b, t) in enumerate(keep):
        x = states[:, b, t]
        predicted = (x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * norm @ head).argmax(-1)
        correct = [depth for depth in range(4) if predicted[depth] == tokens[b, t + 1]]
        for exit_ in range(3):
            label = 0 if not correct else 1 if correct[0] <= exit_ else 2
            z = x[exit_] @ weight[exit_ + 1] + bias[exit_ + 1]
            ces[exit_, index], hits[exit_, index] = np.log(np.exp(z).sum()) - z[label], z.argmax() == label
    np.testing.assert_allclose(loss, ces.mean(1) @ [1, 2, 3] / 6, rtol=1e-5)
    np.testing.assert_allclose(right, hits.mean(1), rtol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(for_model))
    assert np.abs(for_policy.weight[1:]).max() > 0 and not np.any(for_policy.weight[0])


def test_it_learns_when_to_say_nothing(model, tokens):
    policy, optimizer = StopExit.create(L, D), optax.adam(0.1)
    moments = optimizer.init(policy)
    judged = jax.jit(evaluate_stops, compiler_options=QUICK)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(policy, moments):
        (value, _), grads = jax.value_and_grad(stop_loss, 1, has_aux=True)(model, policy, tokens)
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(policy, updates), moments, value

    before, seen = judged(model, policy, tokens), []
    assert before.stopped == 0 and before.depth == L
    for _ in range(60):
        policy, moments, value = step(policy, moments)
        seen.append(float(value))
    after = judged(model, policy, tokens)
    assert seen[-1] < 0.4 * seen[0]
    assert after.recall > 0.5 and after.precision > 0.9 and after.depth < L
    assert after.accuracy > before.accuracy and after.full_accuracy == before.full_accuracy


def test_what_does_not_fit_is_refused(model, tokens):
    for call in (stop_loss, evaluate_stops):
        with pytest.raises(ValueError, match="the first of 4 layers"):
            call(model, StopExit.create(5, D), tokens)
