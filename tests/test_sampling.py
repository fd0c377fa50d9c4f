"""Samplers: filters by hand and against numpy, ties and extremes, and the distribution that is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import Greedy, MinP, Plan, Temperature, TopK, TopP, chain, check

# Probabilities 0.4, 0.3, 0.15, 0.1, 0.05 out of order.
PROBS = np.array([0.15, 0.4, 0.05, 0.3, 0.1])


def kept(sampler, probs):
    """Indices that may be drawn."""
    filtered = sampler.filter(jnp.log(jnp.asarray(probs, jnp.float32))[None])
    return np.flatnonzero(np.asarray(filtered[0]) > -np.inf).tolist()


@pytest.mark.parametrize(
    ("sampler", "left"),
    [
        (TopK(k=1), [1]),
        (TopK(k=3), [0, 1, 3]),
        (TopK(k=5), [0, 1, 2, 3, 4]),
        (TopK(k=99), [0, 1, 2, 3, 4]),
        (TopP(p=0.0), [1]),
        (TopP(p=0.39), [1]),
        (TopP(p=0.5), [1, 3]),  # 0.4 does not reach 0.5, 0.7 does
        (TopP(p=0.8), [0, 1, 3]),
        (TopP(p=0.96), [0, 1, 2, 3, 4]),
        (TopP(p=1.0), [0, 1, 2, 3, 4]),
        (MinP(p=0.0), [0, 1, 2, 3, 4]),
        (MinP(p=0.2), [0, 1, 3, 4]),  # at least 0.08
        (MinP(p=0.5), [1, 3]),  # at least 0.2
        (MinP(p=1.0), [1]),
        (chain(TopK(k=4), TopP(p=0.7)), [1, 3]),  # of 0.95: 0.421, 0.737
        (chain(TopP(p=0.8), TopK(k=2)), [1, 3]),
        (chain(TopK(k=2), TopK(k=4)), [1, 3]),
        (chain(), [0, 1, 2, 3, 4]),
    ],
    ids=str,
)
def test_what_a_filter_leaves_by_hand(sampler, left):
    assert kept(sampler, PROBS) == left


@pytest.mark.parametrize(
    ("sampler", "left"),
    [
        (TopK(k=1), [1, 2]),
        (TopK(k=3), [0, 1, 2, 3]),
        (TopP(p=0.0), [1, 2]),
        (TopP(p=0.75), [0, 1, 2, 3]),  # 0.35 + 0.35 fall short: both 0.15 come
        (TopP(p=0.6), [1, 2]),
        (MinP(p=1.0), [1, 2]),
    ],
    ids=str,
)
def test_equal_tokens_stay_or_go_together(sampler, left):
    assert kept(sampler, [0.15, 0.35, 0.35, 0.15]) == left


def test_temperature_divides_logits():
    # p ** (1 / 0.5) of 0.8 and 0.2: 0.64 : 0.04 = 16 : 1
    scaled = jax.nn.softmax(Temperature(temperature=0.5).filter(jnp.log(jnp.array([[0.8, 0.2]]))))
    np.testing.assert_allclose(scaled, [[16 / 17, 1 / 17]], atol=1e-6)


def numpy_filter(name, parameter, logits):
    """The same filters from their definitions, one row at a time, in float64."""
    order = np.argsort(-logits, kind="stable")
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    if name == "top_k":
        return set(order[:parameter].tolist())
    if name == "min_p":
        return set(np.flatnonzero(probs >= parameter * probs.max()).tolist())
    mass, left = 0.0, set()
    for token in order:
        left.add(int(token))
        mass += probs[token]
        if mass >= parameter:
            break
    return left


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
@pytest.mark.parametrize(
    ("name", "parameter", "sampler"),
    [("top_k", 7, TopK(k=7)), ("top_p", 0.9, TopP(p=0.9)), ("top_p", 0.3, TopP(p=0.3)), ("min_p", 0.1, MinP(p=0.1))],
    ids=["top_k", "top_p_0.9", "top_p_0.3", "min_p"],
)
def test_filters_are_those_of_numpy(rng, name, parameter, sampler, scale):
    logits = scale * rng.normal(size=(20, 61))
    filtered = np.asarray(sampler.filter(jnp.asarray(logits, jnp.float32)))
    for row in range(20):
        left = np.flatnonzero(filtered[row] > -np.inf)
        assert set(left.tolist()) == numpy_filter(name, parameter, logits[row])
        np.testing.assert_array_equal(filtered[row, left], logits[row, left].astype(np.float32))


def test_greedy_takes_the_first_of_the_best():
    logits = jnp.array([[0.0, 2.0, 2.0], [5.0, -jnp.inf, 1.0]])
    drawn = Greedy()(logits, jax.random.split(jax.random.key(0), 2))
    assert drawn.tolist() == [1, 0] and drawn.dtype == jnp.int32


def draw(sampler, probs, count):
    """Draw ``count`` tokens, each as a sequence of its own with its own key."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)), (count, len(probs)))
    return np.asarray(jax.jit(lambda s, x, k: s(x, k))(sampler, logits, jax.random.split(jax.random.key(11), count)))


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Temperature(), PROBS),
        (Temperature(temperature=2.0), PROBS**0.5),
        (TopK(k=3), PROBS * (PROBS >= 0.15)),
        (TopP(p=0.5), PROBS * (PROBS >= 0.3)),
        (MinP(p=0.2), PROBS * (PROBS >= 0.08)),
        # Halved temperature first: 0.16, 0.09, 0.0225, 0.01, 0.0025; then the best two.
        (chain(Temperature(temperature=0.5), TopK(k=2)), PROBS**2 * (PROBS >= 0.3)),
        # 0.4 ** 0.1 = 0.912 is 28 % of the sum 3.2: reaching 0.6 takes three tokens, at temperature 1 two.
        (chain(Temperature(temperature=10.0), TopP(p=0.6)), PROBS**0.1 * (PROBS >= 0.15)),
        (chain(TopP(p=0.6), Temperature(temperature=10.0)), PROBS**0.1 * (PROBS >= 0.3)),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_what_is_left(sampler, expected):
    count = 20_000
    drawn = np.bincount(draw(sampler, PROBS, count), minlength=5)
    expected = count * expected / expected.sum()
    possible = expected > 0
    assert drawn[~possible].sum() == 0
    chi_square = ((drawn - expected)[possible] ** 2 / expected[possible]).sum()
    # Critical values of chi-square at 1e-4 for 1 to 4 degrees of freedom.
    assert chi_square < {2: 15.14, 3: 18.42, 4: 21.11, 5: 23.51}[possible.sum()]


@pytest.mark.parametrize(
    ("sampler", "tokens"),
    [
        (Temperature(temperature=1e-6), {1}),
        (Temperature(temperature=1e6), {0, 1, 2, 3, 4}),
        (TopP(p=0.0), {1}),
        (MinP(p=1.0), {1}),
        (chain(TopK(k=2), Temperature(temperature=1e6)), {1, 3}),
        (chain(TopK(k=2), TopP(p=1.0), MinP(p=0.0)), {1, 3}),
        (chain(MinP(p=1.0), TopP(p=0.999999)), {1}),
    ],
    ids=str,
)
def test_extremes(sampler, tokens):
    sampler.validate()
    assert set(draw(sampler, PROBS, 400).tolist()) == tokens


def test_parameters_are_swept_without_another_trace():
    traced = []

    @jax.jit
    def sample(sampler, logits, keys):
        traced.append(sampler)
        return sampler(logits, keys)

    logits, keys = jnp.log(jnp.asarray(PROBS))[None], jax.random.split(jax.random.key(0), 1)
    for value in np.linspace(0.1, 0.9, 8):
        sample(chain(Temperature(temperature=value), TopP(p=value), MinP(p=value)), logits, keys)
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Temperature(temperature=0.0), r"temperature between 1e-06 and 1e\+06, got 0.0; use Greedy\(\) for 0"),
        (Temperature(temperature=-1.0), "temperature .* got -1.0"),
        (Temperature(temperature=float("inf")), "temperature .* got inf"),
        (Temperature(temperature=float("nan")), "temperature .* got nan"),
        (Temperature(temperature="1"), "temperature .* got '1'"),
        (TopK(k=0), "k to be an integer of at least 1, got 0"),
        (TopK(k=2.5), "k to be an integer of at least 1, got 2.5"),
        (TopP(p=1.5), "p between 0 and 1, got 1.5"),
        (TopP(p=float("nan")), "p between 0 and 1, got nan"),
        (MinP(p=-0.1), "p between 0 and 1, got -0.1"),
        (chain(Temperature(), TopP(p=2.0)), "p between 0 and 1, got 2.0"),
        (chain(TopK(k=3), Greedy()), "filters in a chain, got Greedy"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(tiny_model, sampler, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(sampler=sampler), tiny_model)
