"""JEI-DNN training: each objective against torch, the loss of a model against float64 NumPy, and what it learns.

Numbers named TORCH were printed by torch 2.13.0 (CPU, float64) from a program written from the definitions, token by
token: the joint objective by walking the chain of gates, the masses with Python's min and max, the gate phase with
``binary_cross_entropy_with_logits(pos_weight=...)`` per gate.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dyninf.depth import JointExit
from dyninf.depth.jei import uncertainty_features
from dyninf.models import ModelConfig
from dyninf.training import jei
from dyninf.training.frozen import merge, select
from dyninf.training.states import exit_states

CONFIG = ModelConfig(
    vocab_size=11, num_layers=4, d_model=14, d_ff=20, num_heads=4, num_kv_heads=2, head_dim=6, max_length=16
)
L, D, B, T = 4, 14, 3, 6
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all the time of these tests
COSTS, PRICE = jnp.array([0.2, 0.4, 0.8, 1.0]), 0.7
# value; gradient of the cross-entropies [:, 0, 1], then the sum of its absolute values; the same of the gates' logits
TORCH = {
    "joint": (
        1.577092860,
        ((0.03571055, 0.03973448, 0.00322422, 0.06418789), 1.0),
        ((0.01981241, 0.02839599, 0.00201627), 0.3452794),
    ),
    "readout": (4.805856801, ((0.13987279, 0.20750464, 0.02676245, 0.18540982), 4.3909793), ((0, 0, 0), 0)),
    "gates": (0.668846024, ((0, 0, 0, 0), 0), ((0.01190352, 0.01765915, 0.00227755), 0.3512406)),
}
TORCH_MASSES = (0.249974, 0.370842, 0.047829, 0.331355)  # of token [0, 1]
TORCH_TARGETS = [[[1, 0, 0, 0], [0, 1, 1, 1]], [[1, 0, 0, 1], [1, 1, 1, 1]], [[1, 0, 0, 1], [1, 1, 1, 1]]]


def torch_case():
    """Cross-entropies [4, 2, 4], logits of gates [3, 2, 4] and mask: the inputs of TORCH."""
    ce = 1.2 + np.sin(0.9 * np.arange(32) + 0.4)
    logits = 1.5 * np.cos(1.3 * np.arange(24)) - 1.5
    mask = jnp.ones((2, 4), bool).at[1, 3].set(False)
    return jnp.asarray(ce, jnp.float32).reshape(4, 2, 4), jnp.asarray(logits, jnp.float32).reshape(3, 2, 4), mask


@pytest.mark.parametrize("phase", TORCH)
def test_the_objectives_are_those_of_torch(phase):
    ce, logits, mask = torch_case()

    def loss(ce, logits):
        if phase == "joint":
            return jei.expected_loss(ce, logits, COSTS, mask, price=PRICE)
        if phase == "readout":
            return jei.readout_loss(ce, logits, mask)
        return jei.gate_loss(logits, jei.gate_targets(ce, COSTS, price=PRICE), mask)

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=QUICK)(ce, logits)
    want, *want_grads = TORCH[phase]
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for grad, (entries, total) in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(grad[:, 0, 1], entries, atol=1e-6)
        np.testing.assert_allclose(np.abs(grad).sum(), total, rtol=1e-5)


def test_masses_and_targets():
    ce, logits, _ = torch_case()
    masses = jei.exit_masses(jax.nn.sigmoid(logits))
    np.testing.assert_allclose(masses[:, 0, 1], TORCH_MASSES, atol=1e-6)
    np.testing.assert_array_equal(jei.gate_targets(ce, COSTS, price=PRICE), np.array(TORCH_TARGETS, bool))
    for rule in (jei.exit_masses, jei.chain_masses):
        np.testing.assert_allclose(rule(jax.nn.sigmoid(5 * logits + 5)).sum(0), np.ones((2, 4)), rtol=1e-6)
    # Gates of 0.5, 0.25 and 0.5: clipped 0.5, 0.25, 0.25 and 0; in a chain 0.5, 0.125, 0.1875 and 0.1875.
    gates = jnp.array([0.5, 0.25, 0.5])[:, None, None]
    np.testing.assert_allclose(jei.exit_masses(gates)[:, 0, 0], [0.5, 0.25, 0.25, 0])
    np.testing.assert_allclose(jei.chain_masses(gates)[:, 0, 0], [0.5, 0.125, 0.1875, 0.1875])


def test_phases_alternate():
    assert [bool(jei.trains_gates(step, period=2)) for step in range(6)] == [False, False, True, True, False, False]
    assert jax.jit(jei.trains_gates)(399) and not jei.trains_gates(199) and not jei.trains_gates(400)


def test_a_gate_that_should_never_open_is_closed():
    value, grad = jax.value_and_grad(jei.gate_loss)(
        jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 2), bool), jnp.ones((1, 2), bool)
    )
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(grad, np.full((1, 1, 2), 0.25), rtol=1e-6)  # sigmoid(0) / 2 tokens


@pytest.fixture(scope="module")
def model(lively):
    return lively(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, T + 1)))


@pytest.fixture(scope="module")
def policy():
    return JointExit(gate=jax.random.normal(jax.random.key(0), (L, 4)), bias=jnp.linspace(-1, 1, L))


@pytest.mark.parametrize("phase", ["joint", "readout", "gates"])
def test_the_loss_of_a_model_by_numpy(model, policy, tokens, phase):
    mask = jnp.ones((B, T), bool).at[2, 4:].set(False)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(model, policy):
        loss = functools.partial(jei.jei_loss, phase=phase, price=0.5, mask_BT=mask)
        out = jax.value_and_grad(loss, (0, 1), has_aux=True)(model, policy, tokens, (1, 3))
        states = exit_states(model, tokens[:, :-1], (1, 3, 4))
        return *out, states, uncertainty_features(model.unembed(states.reshape(-1, T, D)))

    (loss, (ce, masses)), (for_model, for_policy), states, features = run(model, policy)
    states, features = np.asarray(states, np.float64), np.asarray(features, np.float64).reshape(3, B, T, 4)
    norm, head = np.asarray(model.norm_final[...], np.float64), np.asarray(model.unembedding[...], np.float64)
    scores = states / np.sqrt((states**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * norm @ head
    ces, gates, keep = [], [], np.argwhere(np.asarray(mask))
    for b, t in keep:
        z = scores[:, b, t]
        ces.append(np.log(np.exp(z).sum(-1)) - z[:, tokens[b, t + 1]])
        logits = [policy.gate[n] @ features[e, b, t] + policy.bias[n] for e, n in ((0, 1), (1, 3))]
        gates.append(1 / (1 + np.exp(-np.array(logits, np.float64))))
    ces, (g1, g2) = np.array(ces).T, np.array(gates).T
    costs = np.array([0.25, 0.75, 1.0])
    p = [g1, (1 - g1) * g2, (1 - g1) * (1 - g2)] if phase == "joint" else [g1, np.minimum(g2, 1 - g1)]
    p = np.array(p if phase == "joint" else [*p, 1 - p[0] - p[1]])
    if phase == "joint":
        want = np.mean((p * (ces + 0.5 * costs[:, None])).sum(0))
    elif phase == "readout":
        want = np.mean(ces.sum(0))
    else:
        best, want = (ces + 0.5 * costs[:, None]).argmin(0), 0
        for n, g in enumerate((g1, g2)):
            opens = best <= n
            weight = np.where(opens, (~opens).sum() / max(opens.sum(), 1), 1.0)
            want += np.mean(-weight * np.log(np.where(opens, g, 1 - g))) / 2
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(ce, ces.mean(1), rtol=1e-5)
    np.testing.assert_allclose(masses, p.mean(1), rtol=1e-4, atol=1e-6)
    model_learns = max(np.abs(leaf).max() for leaf in jax.tree.leaves(for_model)) > 0
    assert model_learns == (phase != "gates")
    assert (np.abs(for_policy.bias).max() > 0) == (phase != "readout")
    assert not np.any(for_policy.bias[jnp.array([0, 2])])


@pytest.mark.slow
def test_alternating_lowers_the_joint_objective(model, policy, tokens):
    """The readout alone of the model is trained, as in the paper; a period of 5 in 40 steps."""
    trained, optimizer = {"readout": select(model, ("norm_final", "unembedding")), "gates": policy}, optax.adam(0.05)
    moments = optimizer.init(trained)

    def loss_of(phase):
        def loss(trained):
            whole = merge(model, trained["readout"])
            return jei.jei_loss(whole, trained["gates"], tokens, (1, 3), phase=phase, price=0.5)[0]

        return loss

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(trained, moments, gates):
        joint = loss_of("joint")(trained)
        grads = jax.lax.cond(gates, jax.grad(loss_of("gates")), jax.grad(loss_of("readout")), trained)
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(trained, updates), moments, joint

    seen = []
    for number in range(40):
        trained, moments, joint = step(trained, moments, jei.trains_gates(number, period=5))
        seen.append(float(joint))
    assert seen[-1] < 0.6 * seen[0]


def test_what_does_not_fit_is_refused(model, policy, tokens):
    with pytest.raises(ValueError, match="phase 'joint', 'readout' or 'gates', got 'both'"):
        jei.jei_loss(model, policy, tokens, (1,), phase="both")
    with pytest.raises(ValueError, match=r"layers from 1 to 3, got \(0, 2\)"):
        jei.jei_loss(model, policy, tokens, (0, 2))
    with pytest.raises(ValueError, match="the first of 4 layers"):
        jei.jei_loss(model, JointExit.create(5), tokens, (1,))
