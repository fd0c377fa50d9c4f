"""Recipes that train exits beside a model, and those that train it by another loss than LayerSkip's."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import models
from dyninf.depth import AdaptedExit, JointExit, StopExit
from dyninf.models.parameters import named_parameters
from dyninf.training import heads, meshes
from dyninf.training.exits_file import load_exits
from dyninf.training.loop import train
from dyninf.training.recipe import HEADS
from dyninf.training.soft import soft_loss
from dyninf.training.step import GATE_RATE, eval_step, init_state, train_step

QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all the time of these tests
POLICIES = {"frozen": AdaptedExit, "jei": JointExit, "stop": StopExit}
LEARNS = {
    "frozen": {"gate", "bias", "scale", "down", "up"},
    "jei": {"gate", "bias", "norm_final", "unembedding"},
    "stop": {"weight", "bias"},
}

take_step = jax.jit(train_step.__wrapped__, static_argnames="recipe", compiler_options=QUICK)
evaluate = jax.jit(eval_step.__wrapped__, static_argnames="recipe", compiler_options=QUICK)


@pytest.fixture(scope="module")
def short(recipe):
    """A recipe whose exits are before layers 1 and 2, and whose phases change at every second step."""
    return dataclasses.replace(recipe, exit_period=1, rank=3, phase=2, warmup=0, learning_rate=1e-2)


@pytest.fixture(scope="module")
def tokens(config, recipe):
    shape = (recipe.batch_size, recipe.length + 1)
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, shape), jnp.int32)


@pytest.fixture(scope="module")
def backbone(config, lively):
    return lively(config)


def arrays_of(state):
    """Every array of the model and the exits by its last name."""
    exits = {field.name: getattr(state.exits, field.name) for field in dataclasses.fields(state.exits)}
    return named_parameters(state.model) | {name: value for name, value in exits.items() if np.ndim(value)}


@pytest.fixture(scope="module", params=HEADS)
def run(request, short, config, backbone, tokens):
    """The state before and after four steps of a kind, with the metrics of each."""
    recipe = dataclasses.replace(short, kind=request.param)
    state = init_state(config, recipe, backbone)
    states, metrics = [state], []
    for _ in range(4):
        state, values = take_step(states[-1], tokens, recipe)
        states.append(state)
        metrics.append(values)
    return recipe, states, metrics


def test_the_backbone_keeps_its_bits_and_all_that_was_named_learns(run, backbone):
    recipe, states, metrics = run
    assert type(states[0].exits) is POLICIES[recipe.kind]
    before, after = arrays_of(states[0]), arrays_of(states[-1])
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == LEARNS[recipe.kind]
    assert all(np.isfinite(list(values.values())).all() for values in metrics)
    given = named_parameters(models.stack_layers(backbone))
    assert all(np.array_equal(given[name], before[name]) for name in given)
    if recipe.kind == "jei":  # a readout of its own, which began as the embedding
        np.testing.assert_array_equal(before["unembedding"], given["embedding"].T)


def test_there_is_no_optimizer_state_for_the_backbone(run):
    recipe, states, _ = run
    learns = [value for name, value in arrays_of(states[0]).items() if name in LEARNS[recipe.kind]]
    moments = [leaf for leaf in jax.tree.leaves(states[0].optimizer) if np.ndim(leaf)]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in learns)


def test_training_lowers_the_loss(run):
    _, _, metrics = run
    losses = [float(values["loss"]) for values in metrics]
    # The phases of jei have losses of their own: the readout's first two, then the gates'.
    assert losses[1] < losses[0] and losses[3] < losses[2]


def test_the_phases_of_jei_train_their_own_part(short, config, backbone, tokens):
    recipe = dataclasses.replace(short, kind="jei")
    state = init_state(config, recipe, backbone)

    def loss(arrays, step):
        return heads.heads_loss(arrays, state.model, state.exits, tokens, recipe, step, None)[0]

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)
    for step, learns in ((0, {"norm_final", "unembedding"}), (2, {"gate", "bias"})):
        grads = gradient(heads.trained_arrays(state.model, state.exits, recipe), step)
        assert {name.split(".")[1] for name, grad in grads.items() if np.any(grad)} == learns


def test_gates_of_jei_learn_faster(run):
    recipe, states, _ = run
    if recipe.kind == "jei":
        # Adam's first step moves every number that has a gradient by the rate; the gates have one from step 2 on, when
        # its mean and root mean square are 0.1 / (1 - 0.9^3) and sqrt(0.05 / (1 - 0.95^3)) of it.
        moved = np.abs(states[3].exits.bias - states[2].exits.bias)[1:].max()
        rate = recipe.learning_rate * (0.1 + 0.9 * (1 + np.cos(np.pi * 2 / recipe.steps)) / 2)
        want = rate * GATE_RATE * (0.1 / (1 - 0.9**3)) / np.sqrt(0.05 / (1 - 0.95**3))
        np.testing.assert_allclose(moved, want, rtol=1e-3)


def test_held_out_losses_are_those_of_the_adapted_states(short, config, backbone, tokens):
    recipe = dataclasses.replace(short, kind="frozen")
    state = init_state(config, recipe, backbone)
    plain = evaluate(state.model, tokens, recipe)
    np.testing.assert_allclose(evaluate(state.model, tokens, recipe, None, state.exits), plain, rtol=1e-6)
    doubled = dataclasses.replace(state.exits, up=jnp.full_like(state.exits.up, 0.5))
    adapted = evaluate(state.model, tokens, recipe, None, doubled)
    assert np.all(np.abs(adapted - plain)[:-1] > 1e-2) and adapted[-1] == plain[-1]


@pytest.mark.parametrize(("kind", "depths"), [("soft", (2, 3)), pytest.param("plain", (3,), marks=pytest.mark.slow)])
def test_soft_and_plain_take_the_gradient_of_their_loss(kind, depths, recipe, config, backbone, tokens):
    recipe = dataclasses.replace(recipe, kind=kind, warmup=0, dropout=0.9)  # which neither kind reads
    state = init_state(config, recipe, backbone)
    after, metrics = take_step(state, tokens, recipe)
    loss, grads = jax.jit(
        jax.value_and_grad(lambda model: soft_loss(model, tokens, depths)[0]), compiler_options=QUICK
    )(state.model)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert after.exits is None and after.step == 1


def test_the_exits_of_a_recipe(short):
    assert heads.exit_layers(16, dataclasses.replace(short, kind="jei", exit_period=4)) == (4, 8, 12)
    assert heads.exit_layers(4, dataclasses.replace(short, kind="frozen", exit_period=9)) == (1, 2, 3)
    with pytest.raises(ValueError, match="exit_period below the model's 3 layers, got 3"):
        heads.exit_layers(3, dataclasses.replace(short, kind="jei", exit_period=3))


@pytest.mark.parametrize("kind", HEADS)
def test_exits_need_a_model(kind, copy_data, config, short, tmp_path):
    with pytest.raises(ValueError, match=f"trained model to put exits on for the recipe '{kind}'"):
        train(config, dataclasses.replace(short, kind=kind), copy_data(tmp_path / "run"), report=list)


@pytest.mark.slow
def test_a_run_of_exits_goes_on_to_the_same_file(copy_data, config, short, tmp_path, monkeypatch):
    monkeypatch.setattr(meshes, "train_step", take_step)
    monkeypatch.setattr(meshes, "eval_step", evaluate)
    folder = copy_data(tmp_path / "run")
    vocab_size = models.load_tokenizer(folder).get_vocab_size()
    model = models.Transformer(dataclasses.replace(config, vocab_size=vocab_size), jax.random.key(7))
    models.save_hf(model, tmp_path / "trained", tokenizer_file=folder / "tokenizer.json")
    recipe, events = dataclasses.replace(short, kind="jei", steps=4, save_every=2, eval_every=9), []
    recipe = dataclasses.replace(recipe, price=0.0)  # so that the last layer, too, is the best exit of some tokens
    start = {"report": events.append, "init": str(tmp_path / "trained")}
    assert train(config, recipe, folder, **start) == folder / "model"
    added = {"event": "added", "policy": "JointExit", "parameters": 3 * 5 + 24 * vocab_size}
    assert events[0] == added | {"to": sum(leaf.size for leaf in jax.tree.leaves(model))}
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["kind"] == "jei"
    policy = load_exits(folder / "exits.safetensors")
    assert policy.decision_layers(3) == (1, 2) and np.any(policy.policy.gate)
    files = [folder / "exits.safetensors", folder / "model" / "model.safetensors"]
    before = [file.read_bytes() for file in files]
    shutil.rmtree(folder / "checkpoints" / "4")
    files[0].unlink()
    train(config, recipe, folder, **start)
    assert {"event": "resumed", "step": 2} in events
    assert [file.read_bytes() for file in files] == before
