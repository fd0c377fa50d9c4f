"""The LayerSkip recipe against torchtune 0.6.1, hand-computed cases and a plain, unchunked loss.

Numbers named TORCHTUNE were printed by torchtune 0.6.1 (torch 2.13.0, CPU) with the named function and arguments.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.training import layerskip as ls

# torchtune.modules.layer_dropout: 0.3 * get_scale(scale, L - 1, l)
TORCHTUNE_RATES = {
    ("exp", 1): [0.3],
    ("exp", 6): [0.0, 0.044609506, 0.095852373, 0.15471497, 0.22233034, 0.3],
    ("uniform", 6): [0.3, 0.3, 0.3, 0.3, 0.3, 0.3],
    ("linear", 1): [0.3],
    ("linear", 6): [0.0, 0.06, 0.12, 0.18, 0.24, 0.3],
}
# torchtune.modules.early_exit_loss: {uniform,linear_l,sum_l,sqrt_l,inv_l,inv_sqrt_l}_loss_scale(layers, L, e_scale)
# at (layers, L, e_scale) = ((1, 3, 5), 6, 0.2) and ((0, 4, 7, 8), 9, 0.5)
TORCHTUNE_SCALES = {
    "uniform": ([0.14285715, 0.14285715, 0.71428573], [0.2, 0.2, 0.2, 0.4]),
    "linear": ([0.05555556, 0.11111112, 0.83333337], [0.03125, 0.15625, 0.25, 0.5625]),
    "sum": ([0.029411765, 0.088235296, 0.88235289], [0.014925373, 0.089552239, 0.20895523, 0.68656719]),
    "sqrt": ([0.090297796, 0.12770036, 0.78200185], [0.082887843, 0.18534286, 0.23444222, 0.49732706]),
    "inv": ([0.31578949, 0.15789475, 0.52631581], [0.64631957, 0.12926391, 0.080789946, 0.14362657]),
    "inv_sqrt": ([0.21768196, 0.15392439, 0.62839365], [0.40527937, 0.18124644, 0.1432879, 0.27018628]),
}
# RotationalEarlyExitCurriculum([l % R == 0 for l in range(L)]).get() before step 0, 1, ... for (L, R)
TORCHTUNE_ROTATION = {
    (6, 3): [(0, 3, 5), (1, 4, 5), (2, 5), (0, 3, 5)],
    (8, 4): [(0, 4, 7), (1, 5, 7), (2, 6, 7), (3, 7), (0, 4, 7), (1, 5, 7)],
    (7, 3): [(0, 3, 6), (0, 1, 4, 6), (1, 2, 5, 6), (2, 3, 6)],
}
# GradualEarlyExitCurriculum(layers, max_steps=T).get() after 1, 2, ... calls of step(), for (L, T, layers)
TORCHTUNE_GRADUAL = {
    (4, 16, None): ["0001"] * 4 + ["0011"] * 2 + ["0111"] * 2 + ["1111"] * 8,
    (5, 20, (0, 2, 4)): ["00001"] * 6 + ["00101"] * 4 + ["10101"] * 10,
    (3, 7, None): ["001"] * 3 + ["011"] + ["111"] * 3,
}
# early_exit_loss(llama3 of 6 layers, {1: h, 4: h, 5: h}, labels, CrossEntropyLoss(), e_scale=0.2, scale), arrays below
TORCHTUNE_LOSS = {"uniform": 4.9375091, "linear": 5.1848817, "sum": 5.3622866}
TORCHTUNE_EXIT_LOSSES = [3.1311011, 3.0103261, 5.6842265]
# gradients of the "sum" loss: of the state of exit 5 at [0, 1], of row 2 of the head, of the scale of the norm
TORCHTUNE_GRADIENTS = (
    [0.32973239, 0.022638142, 0.047903359, 0.48558912],
    [-0.10481516, 0.013201917, 0.12961158, 0.15476535],
    [0.79563808, 0.68882596, 0.96520269, 1.0033345],
)


def torchtune_case():
    """Hidden states [3, 2, 5, 4], head [11, 4] and norm scale [4], targets and mask: the inputs of TORCHTUNE_LOSS."""
    hiddens = np.cos(0.37 * np.arange(3 * 2 * 5 * 4) ** 1.5).reshape(3, 2, 5, 4).astype(np.float32)
    head = (1.5 * np.sin(0.7 * np.arange(11 * 4) + 0.2)).reshape(11, 4).astype(np.float32)
    scale = (1 + 0.1 * np.arange(4)).astype(np.float32)
    targets = ((7 * np.arange(10) + 3) % 11).reshape(2, 5).astype(np.int32)
    mask = np.ones((2, 5), bool)
    mask[0, 3] = mask[1, 0] = mask[1, 4] = False
    return jnp.asarray(hiddens), (jnp.asarray(head), jnp.asarray(scale)), jnp.where(mask, targets, -100), mask


def readout(params, hidden):
    head, scale = params
    normed = hidden * jax.lax.rsqrt(jnp.mean(hidden**2, axis=-1, keepdims=True) + 1e-5)
    return jnp.einsum("btd,vd->btv", normed * scale[None, None], head)


def chunked(params, hiddens, targets, weights, mask, chunk):
    return ls.exit_loss(lambda hidden: readout(params, hidden), hiddens, targets, weights, jnp.asarray(mask), chunk)


def naive(params, hiddens, targets, weights, mask):
    logits = readout(params, hiddens.reshape(-1, *hiddens.shape[2:])).reshape(*hiddens.shape[:3], -1)
    picked = jnp.take_along_axis(logits, jnp.where(mask, targets, 0)[None, :, :, None], axis=-1)[..., 0]
    losses = jnp.where(mask[None], jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
    entropy = jnp.sum(losses, axis=(1, 2)) / mask.sum()
    return jnp.dot(weights, entropy), entropy


def exits_on(num_layers, num_steps, **settings):
    """The exits of positive weight at each step, from one compilation."""
    weights = jax.vmap(lambda step: ls.exit_weights(num_layers, step, e_scale=0.2, scale="uniform", **settings))
    return [tuple(np.flatnonzero(row).tolist()) for row in jax.jit(weights)(jnp.arange(num_steps))]


def assert_trees_close(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        # an element is a difference of terms as large as the largest, and so is its rounding error
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize(("curriculum", "num_layers"), TORCHTUNE_RATES, ids=str)
def test_dropout_rates_equal_torchtune(curriculum, num_layers):
    rates = ls.layer_dropout_rates(num_layers, 0.3, curriculum=curriculum)
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, TORCHTUNE_RATES[curriculum, num_layers], rtol=1e-6)


def test_dropout_rates_by_hand():
    # L=3: 2^0-1 = 0, 2^(1/2)-1 = 0.41421356, 2^1-1 = 1, times 0.5
    np.testing.assert_allclose(ls.layer_dropout_rates(3, 0.5), [0.0, 0.20710678, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(ls.layer_dropout_rates(3, 0.0), np.zeros(3))


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (5, 0.41421356), (10, 1.0), (25, 1.0)])
def test_dropout_schedule(step, expected):
    # T=10: 2^0-1, 2^(5/10)-1, 2^1-1, and no more than 1 beyond the run
    np.testing.assert_allclose(ls.dropout_schedule(step, 10, curriculum="exp"), expected, rtol=1e-6)
    assert ls.dropout_schedule(step, 10) == 1.0


def test_dropout_mask_draws_at_the_rates():
    rates = jnp.array([0.0, 0.25, 0.7, 1.0])
    mask = ls.layer_dropout_mask(jax.random.key(3), rates, 4000)
    assert mask.shape == (4, 4000) and mask.dtype == jnp.bool_
    kept = mask.mean(axis=1)
    assert kept[0] == 1.0 and kept[3] == 0.0
    # four standard deviations: 4 sqrt(p (1-p) / 4000) = 0.027 and 0.029
    np.testing.assert_allclose(kept[1:3], [0.75, 0.3], atol=0.029)
    # layers draw independently: both of layers 1 and 2 run for 0.75 * 0.3 = 0.225 of the sequences, 4 sd = 0.026
    np.testing.assert_allclose((mask[1] & mask[2]).mean(), 0.225, atol=0.026)


@pytest.mark.parametrize("scale", TORCHTUNE_SCALES)
def test_exit_scales_equal_torchtune(scale):
    cases = (((1, 3, 5), 6, 0.2), ((0, 4, 7, 8), 9, 0.5))
    for (layers, num_layers, e_scale), expected in zip(cases, TORCHTUNE_SCALES[scale], strict=True):
        weights = ls.exit_weights(num_layers, 0, 1, e_scale=e_scale, curriculum="none", scale=scale, layers=layers)
        assert weights.dtype == jnp.float32
        np.testing.assert_allclose(weights[np.array(layers)], expected, rtol=1e-6)
        np.testing.assert_array_equal(np.delete(weights, layers), 0.0)


def test_paper_scale_by_hand():
    # L=4, e_scale=0.5: e = [.5*0, .5*(0+1), .5*(0+1+2), 3 + .5*(0+1+2)] = [0, .5, 1.5, 4.5], sum 6.5
    weights = ls.exit_weights(4, 0, 9, e_scale=0.5, curriculum="none")
    np.testing.assert_allclose(weights, np.array([0.0, 0.5, 1.5, 4.5]) / 6.5, rtol=1e-6)
    raw = ls.exit_weights(4, 0, 9, e_scale=0.5, curriculum="none", normalise=False)
    np.testing.assert_allclose(raw, [0.0, 0.5, 1.5, 4.5], rtol=1e-6)
    # step 1 of period 2 has exits 1 and 3 on: [0, .5, 0, 4.5] / 5
    rotated = ls.exit_weights(4, 1, 9, e_scale=0.5, curriculum="rotational", period=2)
    np.testing.assert_allclose(rotated, [0.0, 0.1, 0.0, 0.9], rtol=1e-6)


@pytest.mark.parametrize("scale", ["paper", *TORCHTUNE_SCALES])
def test_no_early_exit_is_the_plain_loss(scale):
    weights = ls.exit_weights(5, 3, 9, e_scale=0.0, curriculum="none", scale=scale)
    np.testing.assert_array_equal(weights, [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(ls.exit_weights(1, 3, 9, e_scale=0.5, curriculum="none", scale=scale), [1])


@pytest.mark.parametrize(("num_layers", "period"), TORCHTUNE_ROTATION, ids=str)
def test_rotation_equals_torchtune_if_the_period_divides_the_layers(num_layers, period):
    expected = TORCHTUNE_ROTATION[num_layers, period]
    if num_layers % period:  # there exit 0 is on in steps 0 and 1: the pattern rolls around the end of the stack
        expected = [(0, 3, 6), (1, 4, 6), (2, 5, 6), (0, 3, 6)]
    assert exits_on(num_layers, len(expected), total_steps=99, curriculum="rotational", period=period) == expected


@pytest.mark.parametrize(("num_layers", "total", "layers"), TORCHTUNE_GRADUAL, ids=str)
def test_gradual_equals_torchtune_one_step_later(num_layers, total, layers):
    expected = TORCHTUNE_GRADUAL[num_layers, total, layers]
    ours = exits_on(num_layers, len(expected), total_steps=total, curriculum="gradual", layers=layers)
    assert ["".join(str(int(layer in exits)) for layer in range(num_layers)) for exits in ours] == expected


@pytest.mark.parametrize(("num_layers", "period"), [(12, 4), (13, 4), (5, 1), (3, 8), (1, 2)], ids=str)
def test_active_exits_cover_every_layer_once_in_a_period(num_layers, period):
    @jax.jit
    @jax.vmap
    def at(step):
        settings = {"curriculum": "rotational", "period": period, "scale": "linear"}
        weights = ls.exit_weights(num_layers, step, 9, e_scale=0.3, **settings)
        exits = ls.active_exits(num_layers, step, period)
        active = ls.active_exit_weights(weights, exits)
        return exits, weights, active, jnp.zeros(num_layers).at[exits].add(active)

    exits, weights, active, scattered = at(jnp.arange(5 * period, 6 * period))
    assert exits.shape == (period, -(-num_layers // period) + 1) and exits.dtype == jnp.int32
    assert np.all(exits[:, -1] == num_layers - 1) and np.all(np.diff(exits) >= 0)
    np.testing.assert_allclose(active.sum(1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(scattered, weights)  # nothing is lost and nothing counted twice
    seen = np.bincount(np.concatenate([np.unique(row[:-1]) for row in np.asarray(exits)]), minlength=num_layers)
    assert np.all(seen[:-1] == 1)


@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "none"])
@pytest.mark.parametrize("scale", ["paper", "sum", "inv"])
def test_weights_sum_to_one_and_keep_the_last_exit(curriculum, scale):
    settings = {"curriculum": curriculum, "period": 3 if curriculum == "rotational" else None, "scale": scale}
    weights = jax.jit(jax.vmap(lambda step: ls.exit_weights(7, step, 12, e_scale=0.2, **settings)))(jnp.arange(15))
    np.testing.assert_allclose(weights.sum(1), np.ones(15), rtol=1e-6)
    assert np.all(weights[:, -1] > 0) and np.all(weights >= 0)


def test_a_traced_step_compiles_once():
    traces = []

    def schedule(step, e_scale):
        traces.append(step)
        rotational = ls.exit_weights(7, step, 12, e_scale=e_scale, curriculum="rotational", period=3, scale="sum")
        gradual = ls.exit_weights(7, step, 12, e_scale=e_scale, curriculum="gradual")
        exits = ls.active_exits(7, step, 3)
        dropout = ls.dropout_schedule(step, 12, curriculum="exp")
        return rotational, gradual, exits, ls.active_exit_weights(rotational, exits), dropout

    compiled = jax.jit(schedule)
    traced = [compiled(step, 0.1 + step / 100) for step in range(13)]
    assert len(traces) == 1
    for step in (0, 7):
        assert_trees_close(traced[step], schedule(step, 0.1 + step / 100))  # a concrete step gives the same


def test_loss_and_gradient_equal_torchtune():
    hiddens, params, targets, mask = torchtune_case()
    step = jax.jit(jax.value_and_grad(lambda p, h, w: chunked(p, h, targets, w, mask, 5), argnums=(0, 1), has_aux=True))
    for scale, expected in TORCHTUNE_LOSS.items():  # "sum" comes last: the gradients below are its own
        weights = ls.exit_weights(6, 0, 1, e_scale=0.2, curriculum="none", scale=scale, layers=(1, 4))
        (loss, entropy), ((head, norm), hidden) = step(params, hiddens, weights[np.array([1, 4, 5])])
        assert loss.dtype == entropy.dtype == jnp.float32
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_allclose(entropy, TORCHTUNE_EXIT_LOSSES, rtol=1e-6)
    assert_trees_close((hidden[2, 0, 1], head[2], norm), [np.array(row) for row in TORCHTUNE_GRADIENTS])


@pytest.mark.parametrize("chunk", [2, 4, 64], ids=["divides", "padded", "larger"])
def test_value_and_gradient_equal_the_plain_loss(chunk):
    hiddens, params, targets, mask = torchtune_case()
    weights = jnp.array([0.2, 0.0, 0.7])
    ours = jax.jit(jax.value_and_grad(lambda *a: chunked(*a, mask, chunk), argnums=(0, 1, 3), has_aux=True))
    plain = jax.value_and_grad(lambda *a: naive(*a, mask), argnums=(0, 1, 3), has_aux=True)
    assert_trees_close(ours(params, hiddens, targets, weights), jax.jit(plain)(params, hiddens, targets, weights))


def test_masked_tokens_change_nothing():
    hiddens, params, targets, mask = torchtune_case()
    weights = jnp.array([0.2, 0.3, 0.5])
    loss = jax.value_and_grad(lambda p, h, t, m: chunked(p, h, t, weights, m, 4), argnums=(0, 1), has_aux=True)
    loss = jax.jit(loss)
    clean = loss(params, hiddens, targets, mask)
    poisoned = jnp.where(mask[None, :, :, None], hiddens, jnp.nan)
    dirty = loss(params, poisoned, jnp.where(mask, targets, 2**30), mask)
    for a, b in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.all(clean[1][1][:, ~mask] == 0) and np.all(np.abs(clean[1][1][:, mask]).sum(-1) > 0)
    for leaf in jax.tree.leaves(loss(params, poisoned * jnp.nan, targets, mask & False)):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_no_array_holds_more_logits_than_one_chunk():
    hiddens, params, targets, mask = torchtune_case()
    loss = jax.grad(lambda p, h: chunked(p, h, targets, jnp.ones(3) / 3, mask, 5)[0], argnums=(0, 1))
    shapes = re.findall(r"\[([\d,]+)\]", str(jax.make_jaxpr(loss)(params, hiddens)))
    sizes = [np.prod(shape) for shape in (list(map(int, text.split(","))) for text in shapes) if 11 in shape]
    assert max(sizes) == 5 * 11  # chunk * V; all logits would be 330, the head is 44


BAD_LOSS = {
    "hiddens": (1, jnp.ones((2, 5, 4)), r"expected hiddens \[K, B, T, D\]"),
    "targets": (2, jnp.ones((2, 4), jnp.int32), "match them to the hiddens"),
    "weights": (3, jnp.ones(2), "match them to the hiddens"),
    "mask": (4, jnp.ones((2, 5)), "expected bool mask"),
    "chunk": (5, 0, "expected chunk to be an int >= 1"),
    "logits": (0, lambda hidden: hidden[0], r"expected logits of shape \[1, 5, V\]"),
}


@pytest.mark.parametrize(("position", "value", "message"), BAD_LOSS.values(), ids=BAD_LOSS)
def test_wrong_loss_arguments_are_refused(position, value, message):
    hiddens, params, targets, mask = torchtune_case()
    arguments = [lambda hidden: readout(params, hidden), hiddens, targets, jnp.ones(3), jnp.asarray(mask), 5]
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        ls.exit_loss(*arguments)


BAD_SCHEDULES = {
    "p_max": (lambda: ls.layer_dropout_rates(4, 1.5), "probability"),
    "step": (lambda: ls.dropout_schedule(0.5, 4), "integer scalar"),
    "total": (lambda: ls.dropout_schedule(0, 0), "total_steps"),
    "rates": (lambda: ls.layer_dropout_mask(jax.random.key(0), jnp.ones((2, 3)), 2), r"shape \[L\]"),
    "period_missing": (lambda: ls.exit_weights(4, 0, 9, e_scale=1.0, curriculum="rotational"), "period"),
    "period_extra": (lambda: ls.exit_weights(4, 0, 9, e_scale=1.0, curriculum="none", period=2), "period"),
    "curriculum": (lambda: ls.exit_weights(4, 0, 9, e_scale=1.0, curriculum="random"), "curriculum"),
    "e_scale": (lambda: ls.exit_weights(4, 0, 9, e_scale=-1.0, curriculum="none"), "e_scale >= 0"),
    "exit": (lambda: ls.exit_weights(4, 0, 9, e_scale=1.0, curriculum="none", layers=(4,)), "count layers from 0"),
}


@pytest.mark.parametrize(("call", "message"), BAD_SCHEDULES.values(), ids=BAD_SCHEDULES)
def test_wrong_schedule_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
