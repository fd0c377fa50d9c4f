"""Training on a mesh: the losses of one device, how the state lies, checkpoints of other meshes, what is refused."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from dyninf.models import load, make_mesh
from dyninf.training import checkpoints
from dyninf.training.batch_axes import in_chunks
from dyninf.training.loop import train
from dyninf.training.meshes import init_state_on, put_batch, state_shardings, steps_on, training_placement
from dyninf.training.step import init_state, train_step

DATA_FSDP = {"data": 2, "fsdp": 2}


@pytest.fixture(scope="module")
def split(recipe):
    """The recipe with a batch that divides, in chunks that do not."""
    return dataclasses.replace(recipe, batch_size=4, chunk=24)


def steps(where, config, recipe, make, count=2):
    """States and metrics of some steps on random tokens, and the held-out losses after them."""
    # A model of its own: a step donates the arrays that the state shares with it.
    state, rng, found = init_state_on(where, config, recipe, make()), np.random.default_rng(0), []
    step, evaluate = steps_on(where, state)
    for _ in range(count):
        tokens = rng.integers(0, config.vocab_size, (recipe.batch_size, recipe.length + 1), np.int32)
        tokens, mask = put_batch((tokens, rng.random(tokens[:, 1:].shape) < 0.8), where)
        state, metrics = step(state, tokens, recipe, mask)
        found.append({name: float(value) for name, value in metrics.items()})
    return state, found, np.asarray(evaluate(state.model, tokens, recipe, mask, state.exits))


def assert_same_training(axes, config, recipe, make=lambda: None):
    where = training_placement(make_mesh(axes), config, recipe)
    state, losses, held_out = steps(where, config, recipe, make)
    alone, losses_alone, held_out_alone = steps(None, config, recipe, make)
    # Sums in another order, and Adam's quotient of them.
    for got, want in zip(losses, losses_alone, strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(held_out, held_out_alone, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.model, alone.model)
    meant = state_shardings(state, where)
    jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim) or pytest.fail(str(place)), state, meant)


def test_a_step_has_the_loss_of_one_device_and_leaves_the_state_where_it_is(config, split):
    """From arrays that nothing compiled; without dropout and other exits the loss is the held-out one."""
    recipe, rng = dataclasses.replace(split, kind="plain"), np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype) ** 2, jax.eval_shape(lambda: init_state(config, recipe))
    )
    where = training_placement(make_mesh(DATA_FSDP), config, recipe)
    batch = rng.integers(0, config.vocab_size, (4, 17), np.int32), rng.random((4, 16)) < 0.8
    want = steps_on(None, state)[1](state.model, batch[0], recipe, batch[1])[-1]
    state = jax.device_put(state, state_shardings(state, where))
    tokens, mask = put_batch(batch, where)
    state, metrics = steps_on(where, state)[0](state, tokens, recipe, mask)
    assert float(metrics["loss"]) == pytest.approx(float(want), rel=1e-5)
    # Of the width 24 a device holds 12, of weights and of both moments; norms are whole.
    sizes = {leaf.shape: leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(state)}
    assert sizes[300, 24] == (300, 12) and sizes[3, 40, 24] == (3, 40, 12) and sizes[3, 24] == (3, 24)
    assert sum(leaf.shape == (300, 24) for leaf in jax.tree.leaves(state)) == 3


@pytest.mark.slow
def test_losses_are_those_of_one_device(config, split):
    assert_same_training(DATA_FSDP, config, split)


@pytest.mark.slow
def test_a_step_sends_weights_and_never_states(config, split):
    where = training_placement(make_mesh(DATA_FSDP), config, split)
    state = init_state_on(where, config, split)
    tokens, _ = put_batch(np.zeros((split.batch_size, split.length + 1), np.int32), where)
    with jax.set_mesh(where.mesh):
        text = train_step.lower(state, tokens, split).compile().as_text()
    sent = re.findall(r"= \(?f32\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|reduce-scatter)\(", text)
    assert "24,2,40" in sent and not any(str(split.length) in shape.split(",") for shape in sent)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 4}, {"fsdp": 4}, {"data": 1, "fsdp": 2}], ids=str)
def test_other_meshes_change_no_loss(axes, config, split):
    assert_same_training(axes, config, split)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["soft", "plain", "frozen", "jei", "stop"])
def test_every_recipe_trains_on_a_mesh(kind, config, split, lively):
    make = (lambda: None) if kind in ("soft", "plain") else (lambda: lively(config))
    assert_same_training(DATA_FSDP, config, dataclasses.replace(split, kind=kind), make)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_and_on_one_device(config, split, copy_data, tmp_path):
    recipe = dataclasses.replace(split, steps=12, save_every=4, warmup=2, eval_every=6)
    logs = []
    for number, meshes in enumerate([{12: None}, {4: DATA_FSDP, 8: {"fsdp": 4}, 12: None}]):
        run = copy_data(tmp_path / str(number))
        for step, axes in meshes.items():
            stop_after(step, config, recipe, run, None if axes is None else make_mesh(axes))
        logs.append([json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()])
    for got, want in zip(*logs, strict=True):
        name = "loss" if want["event"] == "step" else "exit_losses"
        assert (got["event"], got["step"]) == (want["event"], want["step"])
        assert got[name] == pytest.approx(want[name], rel=1e-4)
    assert load(tmp_path / "1" / "model").config.num_layers == 3


def stop_after(step, config, recipe, run, mesh):
    """Train until a checkpoint is written, as if the process was killed then; to the end if it is the last one."""

    def report(event):
        if event["event"] == "saved" and event["step"] == step < recipe.steps:
            raise KeyboardInterrupt

    if step < recipe.steps:
        with pytest.raises(KeyboardInterrupt):
            train(config, recipe, run, report=report, mesh=mesh)
        assert checkpoints.latest(run / "checkpoints") == step
    else:
        train(config, recipe, run, report=report, mesh=mesh)


@pytest.mark.parametrize(
    "axes, changes, message",
    [
        ({"tensor": 2}, {}, "expected a mesh of data and fsdp for training, got tensor; use data=N"),
        ({"data": 2, "fsdp": 4}, {}, r"recipe\.batch_size to divide by data=2 x fsdp=4, got 4; use 8"),
        ({"fsdp": 5}, {"batch_size": 5}, r"expected model\.d_model to divide by fsdp=5, got 24; use 25"),
    ],
    ids=["axes", "batch", "width"],
)
def test_a_mesh_that_does_not_fit_is_refused_before_work(axes, changes, message, config, split, tmp_path):
    with pytest.raises(ValueError, match=message):
        training_placement(make_mesh(axes), config, dataclasses.replace(split, **changes))


def test_chunks_have_their_share_of_every_part():
    """By hand: four sequences of three tokens on two devices, five tokens a chunk: three of each part."""
    tokens = np.arange(12).reshape(4, 3)
    np.testing.assert_array_equal(in_chunks(tokens, 5), [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 0, 0, 0]])
    with jax.set_mesh(make_mesh({"data": 2})):
        np.testing.assert_array_equal(in_chunks(tokens, 5), [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]])
        np.testing.assert_array_equal(in_chunks(tokens[:3], 8), [[*range(8)], [8] + [0] * 7])  # does not divide
