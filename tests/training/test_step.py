"""One step of training against the same mathematics written out for one sequence at a time."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dyninf
from dyninf.models import ModelConfig, Transformer, stack_layers, unstack_layers
from dyninf.models.parameters import named_parameters
from dyninf.training.recipe import Recipe
from dyninf.training.states import hidden_states
from dyninf.training.step import check_exits, eval_step, init_state, optimizer, train_step

CONFIG = ModelConfig(
    vocab_size=47,
    num_layers=5,
    d_model=24,
    d_ff=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_length=16,
    qkv_bias=True,
    qk_norm=True,
)
RECIPE = Recipe(
    steps=60,
    batch_size=3,
    length=7,
    learning_rate=1e-2,
    warmup=2,
    dropout=0.6,
    e_scale=0.7,
    exit_period=2,
    compute_dtype="float32",
    chunk=8,  # does not divide 3 * 7
    seed=3,
)
SHAPE = (RECIPE.batch_size, RECIPE.length + 1)
LAYERS = CONFIG.num_layers

take_step = jax.jit(train_step.__wrapped__, static_argnames="recipe")
layer_states = jax.jit(dyninf.layer_states)
forward = jax.jit(dyninf.forward)
states_of = jax.jit(hidden_states)


@pytest.fixture(scope="module")
def model():
    """A model whose layers matter: at the usual initial weights each adds next to nothing to its input."""
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, Transformer(CONFIG, jax.random.key(5)))


@pytest.fixture
def tokens(rng):
    return rng.integers(0, CONFIG.vocab_size, SHAPE).astype(np.int32)


def begin(model, recipe, step=0):
    """A state of its own (a step gives its buffers away) that counts from ``step``."""
    stacked = stack_layers(jax.tree.map(jnp.copy, model))
    state = dataclasses.replace(init_state(CONFIG, recipe), model=stacked, step=jnp.int32(step))
    return dataclasses.replace(state, optimizer=optimizer(recipe).init(stacked))


def naive_attend(q_TNH, k_TKH, v_TKH, *, window=None):
    """Causal attention of one sequence ``[1, T, heads, H]``, one query head at a time."""
    assert window is None
    heads = []
    for n in range(q_TNH.shape[2]):
        k_TH, v_TH = (x[0, :, n * x.shape[2] // q_TNH.shape[2]] for x in (k_TKH, v_TKH))
        scores_TT = q_TNH[0, :, n] @ k_TH.T / q_TNH.shape[3] ** 0.5
        scores_TT = jnp.where(np.tri(len(scores_TT), dtype=bool), scores_TT, -jnp.inf)
        heads.append(jax.nn.softmax(scores_TT) @ v_TH)
    return jnp.stack(heads, 1)[None], None


run_layer = jax.jit(lambda layer, x, positions: layer(x, positions, naive_attend)[0][0])


def naive_states(model, tokens_T, keep_L):
    """The output of every layer for one sequence ``[L, T, D]``, without the layers that are not kept."""
    x_TD, positions = model.embedding[...][tokens_T], np.arange(len(tokens_T))[None]
    states = []
    for layer, keep in zip(model.layers, keep_L, strict=True):
        x_TD = run_layer(layer, x_TD[None], positions) if keep else x_TD
        states.append(x_TD)
    return np.stack(states)


def naive_entropies(model, tokens_BT1, keep_LB):
    """The mean cross-entropy of every exit, in float64 after the last state ``[L]``."""
    norm, matrix = (np.asarray(model_part, np.float64) for model_part in (model.norm_final, model.unembedding))
    sums = np.zeros(LAYERS)
    for tokens_T1, keep_L in zip(tokens_BT1, keep_LB.T, strict=True):
        x_LTD = naive_states(model, tokens_T1[:-1], keep_L).astype(np.float64)
        x_LTD /= np.sqrt((x_LTD**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
        logits_LTV = (x_LTD * norm[None, None]) @ matrix
        partition_LT = np.log(np.exp(logits_LTV).sum(-1))
        sums += (partition_LT - logits_LTV[:, np.arange(RECIPE.length), tokens_T1[1:]]).sum(1)
    return sums / tokens_BT1[:, 1:].size


def naive_weights(recipe, step):
    """LayerSkip 4.1.2 for five layers: e(l) = e_scale (0 + ... + l), and L-1 + e_scale (0 + ... + L-2) for the last."""
    scales = np.array([0, 1, 3, 6, 0]) * recipe.e_scale + np.array([0, 0, 0, 0, 4 + 6 * recipe.e_scale])
    if recipe.exit_scale == "linear":
        scales = np.array([1, 2, 3, 4, 5]) * np.array([*[recipe.e_scale] * 4, 1])
    on = {
        "rotational": [(layer - step) % recipe.exit_period == 0 for layer in range(LAYERS)],
        "gradual": [step >= recipe.steps * (LAYERS - layer) / (2 * LAYERS) for layer in range(LAYERS)],
        "none": [True] * LAYERS,
    }[recipe.exit_curriculum]
    scales = scales * np.array([*on[:-1], True])
    return scales / scales.sum()


def naive_keep(recipe, step):
    """Layer l is dropped with probability p (2^(l/(L-1)) - 1) (2^(t/T) - 1), the last factor from scratch only."""
    rates_L = recipe.dropout * (2 ** (np.arange(LAYERS) / (LAYERS - 1)) - 1)
    rates_L = rates_L * (2 ** (step / recipe.steps) - 1 if recipe.dropout_schedule == "exp" else 1)
    key = jax.random.fold_in(jax.random.key(recipe.seed), step)
    return np.asarray(jax.random.bernoulli(key, 1 - rates_L[:, None].astype(np.float32), (LAYERS, recipe.batch_size)))


def test_states_of_all_layers_are_those_of_the_unstacked_model(model, tokens):
    states = states_of(stack_layers(model), tokens, jnp.ones((LAYERS, len(tokens)), bool))
    np.testing.assert_allclose(states, layer_states(model, tokens)[1:], rtol=1e-5, atol=1e-5)


def test_a_dropped_layer_passes_on_its_input_for_its_sequence_only(model, tokens):
    keep = np.array([[1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 0, 1]], bool)
    states = np.asarray(states_of(stack_layers(model), tokens, jnp.asarray(keep)))
    entering = np.concatenate([np.asarray(model.embed(tokens))[None], states[:-1]])
    same = (states == entering).all((2, 3))
    np.testing.assert_array_equal(same, ~keep)
    for b, sequence in enumerate(tokens):
        np.testing.assert_allclose(states[:, b], naive_states(model, sequence, keep[:, b]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"exit_curriculum": "rotational"}, marks=pytest.mark.slow),  # as "continued", with other scales
        {"exit_curriculum": "gradual"},
        pytest.param({"exit_curriculum": "none"}, marks=pytest.mark.slow),  # as "gradual" in the end
        {"exit_curriculum": "rotational", "exit_scale": "linear", "dropout_schedule": "constant"},
    ],
    ids=["rotational", "gradual", "none", "continued"],
)
def test_the_loss_is_the_naive_one(changes, model, tokens):
    recipe = dataclasses.replace(RECIPE, **changes)
    before, dropped = take_step._cache_size(), 0
    # Gradual exits come on at 60 (5-l)/10: layer 3 at step 12, layer 2 at 18, layer 1 at 24.
    for step in (0, 17, 58):
        keep = naive_keep(recipe, step)
        dropped += (~keep).sum()
        entropies = naive_entropies(model, tokens, keep)
        _, metrics = take_step(begin(model, recipe, step), tokens, recipe)
        np.testing.assert_allclose(metrics["loss"], naive_weights(recipe, step) @ entropies, rtol=1e-5)
        np.testing.assert_allclose(metrics["final_loss"], entropies[-1], rtol=1e-5)
    assert dropped  # or nothing was tested
    assert take_step._cache_size() <= before + 1


def test_without_early_exits_and_dropout_the_gradient_is_that_of_the_plain_loss(model, tokens):
    recipe = dataclasses.replace(RECIPE, e_scale=0, dropout=0, exit_curriculum="none", clip=1e9)

    def plain(model):
        logits = dyninf.forward(model, tokens[:, :-1]).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    state, metrics = take_step(begin(model, recipe), tokens, recipe)
    expected = jax.jit(jax.grad(plain))(model)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(expected), rtol=1e-5)
    moments = named_parameters(unstack_layers(optax.tree.get(state.optimizer, "mu")))
    for name, gradient in named_parameters(expected).items():  # the first moment after one step is a tenth of it
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(10 * moments[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


def test_gradients_reach_every_parameter_of_every_layer(tokens):
    state, _ = take_step(init_state(CONFIG, RECIPE), tokens, RECIPE)
    moments = named_parameters(unstack_layers(optax.tree.get(state.optimizer, "mu")))
    assert moments.keys() == named_parameters(Transformer(CONFIG, jax.random.key(0))).keys()
    still = [name for name, moment in moments.items() if not np.any(np.asarray(moment))]
    assert not still


def test_weight_decay_is_for_matrices(model):
    recipe = dataclasses.replace(RECIPE, warmup=0, weight_decay=0.1)
    stacked = stack_layers(jax.tree.map(lambda leaf: leaf + 1, model))
    transform = optimizer(recipe)

    @jax.jit
    def update(model):
        return transform.update(jax.tree.map(jnp.zeros_like, model), transform.init(model), model)[0]

    updates = update(stacked)
    updates, weights = named_parameters(unstack_layers(updates)), named_parameters(unstack_layers(stacked))
    kept = {name for name, update in updates.items() if not np.any(np.asarray(update))}
    ends = ("norm_attn", "norm_mlp", "norm_q", "norm_k", "bqkv")
    assert kept == {"norm_final"} | {f"layers.{i}.{end}" for i in range(LAYERS) for end in ends}
    for name in updates.keys() - kept:  # gradients of zero: learning rate 0.01 times weight decay 0.1
        np.testing.assert_allclose(updates[name], -0.001 * weights[name], rtol=1e-5, err_msg=name)


def test_loss_falls_on_a_repetitive_text_with_one_compilation():
    recipe = RECIPE
    period = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5], np.int32)  # 1 is followed by 4 and by 5, so context is needed
    state, losses = init_state(CONFIG, recipe), []
    train_step(init_state(CONFIG, recipe), np.zeros(SHAPE, np.int32), recipe)
    before = train_step._cache_size()
    for step in range(recipe.steps):
        starts = np.arange(SHAPE[0]) * 2 + step
        state, metrics = train_step(state, period[(starts[:, None] + np.arange(SHAPE[1])) % len(period)], recipe)
        losses.append(float(metrics["final_loss"]))
    assert train_step._cache_size() == before
    assert int(state.step) == recipe.steps
    assert abs(losses[0] - np.log(CONFIG.vocab_size)) < 0.2
    assert np.mean(losses[-5:]) < 0.5


def test_the_first_update_is_made_at_a_learning_rate_of_zero_and_the_next_are_not(tokens):
    state, start = init_state(CONFIG, RECIPE), init_state(CONFIG, RECIPE).model
    state, _ = take_step(state, tokens, RECIPE)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, state.model, start)))
    state, _ = take_step(state, tokens, RECIPE)
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, state.model, start)))


@pytest.mark.slow
def test_bfloat16_keeps_float32_masters_and_adds_up_in_float32(model):
    recipe = dataclasses.replace(RECIPE, length=400, clip=1e9, chunk=600)
    # One token at every other place: its row of the gradient has 3 * 200 terms, of which a bfloat16 sum loses most.
    tokens = np.full((recipe.batch_size, recipe.length + 1), 7, np.int32)
    tokens[:, 1::2] = np.arange(200) % 5 + 8
    rows, losses = {}, {}
    for dtype in ("float32", "bfloat16"):
        recipe = dataclasses.replace(recipe, compute_dtype=dtype)
        state, metrics = take_step(begin(model, recipe), tokens, recipe)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
        assert metrics["loss"].dtype == np.float32
        losses[dtype] = float(metrics["loss"])
        rows[dtype] = np.asarray(optax.tree.get(state.optimizer, "mu").embedding[...])[7]
    assert 1e-5 < abs(losses["bfloat16"] / losses["float32"] - 1) < 0.05
    assert np.linalg.norm(rows["bfloat16"] - rows["float32"]) < 0.1 * np.linalg.norm(rows["float32"])


@pytest.mark.parametrize(("dtype", "shown"), [("bfloat16", "bf16"), ("float32", "f32")])
def test_the_states_of_layers_have_the_compute_dtype(dtype, shown, model, tokens):
    recipe = dataclasses.replace(RECIPE, compute_dtype=dtype)
    program = str(jax.make_jaxpr(lambda model: eval_step(model, tokens, recipe))(stack_layers(model)))
    assert set(re.findall(r"(\w+)\[5,3,7,24\]", program)) == {shown}


def test_evaluation_is_the_mean_over_tokens_at_every_exit(model, tokens):
    evaluate = jax.jit(eval_step.__wrapped__, static_argnames="recipe")
    losses = evaluate(stack_layers(model), tokens, RECIPE)
    states = layer_states(model, tokens[:, :-1])[1:]
    logits = jnp.stack([*map(model.unembed, states[:-1]), forward(model, tokens[:, :-1]).logits])
    targets = np.broadcast_to(tokens[:, 1:], logits.shape[:-1])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean((1, 2))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_the_same_seed_makes_the_same_numbers_and_another_others(model, tokens):
    def run(recipe, own_weights):
        state = init_state(CONFIG, recipe) if own_weights else begin(model, recipe, step=50)
        for _ in range(3):
            state, metrics = take_step(state, tokens, recipe)
        return [*map(np.asarray, jax.tree.leaves((state, metrics)))]

    other = dataclasses.replace(RECIPE, seed=RECIPE.seed + 1)
    for own_weights in (True, False):  # with weights that are given, the seed still decides what is dropped
        first = run(RECIPE, own_weights)
        assert all(map(np.array_equal, first, run(RECIPE, own_weights)))
        assert not all(map(np.array_equal, first, run(other, own_weights)))


def test_exits_that_a_model_has_no_place_for():
    kinds = {"soft": LAYERS, "jei": LAYERS - 1, "plain": 99, "layerskip": 99, "frozen": 99}
    for kind, largest in kinds.items():
        check_exits(LAYERS, dataclasses.replace(RECIPE, kind=kind, exit_period=largest))
    for kind in ("soft", "jei"):
        with pytest.raises(ValueError, match=rf"recipe\.exit_period .* the model's {LAYERS} layers, got"):
            check_exits(LAYERS, dataclasses.replace(RECIPE, kind=kind, exit_period=kinds[kind] + 1))


@pytest.mark.slow
def test_a_plain_recipe_reads_no_exit_period(model, tokens):
    recipes = [dataclasses.replace(RECIPE, kind="plain", exit_period=period) for period in (2, 99)]
    first, second = (take_step(begin(model, recipe), tokens, recipe)[1]["loss"] for recipe in recipes)
    assert first == second
