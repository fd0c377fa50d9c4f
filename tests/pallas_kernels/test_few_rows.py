"""Products of few rows: the same numbers, whichever rows XLA is given."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import few_rows
from pallas_kernels.few_rows import einsum_rows, norm_einsum_rows


def shapes_multiplied(spec, rows, weights, **options):
    jaxpr = jax.make_jaxpr(lambda rows, weights: einsum_rows(spec, rows, weights, **options))(rows, weights)
    return [equation.invars[0].aval.shape for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]


@pytest.mark.parametrize(
    ("spec", "rows", "weights"),
    [
        ("BTD,DCF->BTCF", (1, 1, 24), (24, 2, 8)),
        ("BTNH,NHD->BTD", (3, 1, 2, 8), (2, 8, 16)),
        ("BTD,DKMH->BTKMH", (2, 1, 16), (16, 2, 3, 4)),
    ],
)
def test_few_rows_on_a_gpu_are_multiplied_as_four_or_more(monkeypatch, spec, rows, weights):
    monkeypatch.setattr(few_rows, "platform", lambda: "gpu")
    monkeypatch.setattr(few_rows, "WEIGHTS", range(100, 10**6))
    keys = jax.random.split(jax.random.key(0))
    rows = jax.random.normal(keys[0], rows, jnp.bfloat16)
    weights = jax.random.normal(keys[1], weights, jnp.bfloat16)
    assert jnp.float32 == einsum_rows(spec, rows, weights, preferred_element_type=jnp.float32).dtype
    (multiplied,) = shapes_multiplied(spec, rows, weights)
    assert math.prod(multiplied) >= 4 * math.prod(rows.shape) / len(rows)
    want = np.einsum(spec, np.asarray(rows, np.float32), np.asarray(weights, np.float32))
    np.testing.assert_allclose(np.asarray(einsum_rows(spec, rows, weights), np.float32), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "shape", "dtype"),
    [
        ({"platform": lambda: "cpu"}, (1, 1, 24), jnp.bfloat16),
        ({}, (4, 1, 24), jnp.bfloat16),
        ({}, (1, 2, 24), jnp.bfloat16),
        ({}, (1, 1, 24), jnp.float32),
        ({"WEIGHTS": range(24 * 16 + 1, 10**9)}, (1, 1, 24), jnp.bfloat16),
        ({"WEIGHTS": range(24 * 16)}, (1, 1, 24), jnp.bfloat16),
        ({"parts": lambda: {"batch": 1, "heads": 4}}, (1, 1, 24), jnp.bfloat16),
        ({"parts": lambda: {"batch": 2, "heads": 1}}, (2, 1, 24), jnp.bfloat16),
    ],
    ids=[
        "not a GPU",
        "enough rows",
        "a prompt",
        "float32",
        "few weights",
        "many weights",
        "few weights of a device",
        "a split batch",
    ],
)
def test_other_products_are_left_alone(monkeypatch, changes, shape, dtype):
    for name, value in ({"platform": lambda: "gpu", "WEIGHTS": range(100, 10**6)} | changes).items():
        monkeypatch.setattr(few_rows, name, value)
    multiplied = shapes_multiplied("BTD,DF->BTF", jnp.ones(shape, dtype), jnp.ones((24, 16), dtype))
    assert multiplied == [shape]


@pytest.mark.parametrize(
    ("platform", "shape", "dtype", "squares_first"),
    [
        ("gpu", (3, 1, 24), jnp.bfloat16, False),
        ("gpu", (9, 1, 24), jnp.bfloat16, True),
        ("gpu", (3, 2, 24), jnp.bfloat16, True),
        ("gpu", (3, 1, 24), jnp.float32, True),
        ("cpu", (3, 1, 24), jnp.bfloat16, True),
    ],
)
def test_the_norm_is_behind_the_product_of_repeated_rows(monkeypatch, platform, shape, dtype, squares_first):
    monkeypatch.setattr(few_rows, "platform", lambda: platform)
    monkeypatch.setattr(few_rows, "WEIGHTS", range(100, 10**6))
    keys = jax.random.split(jax.random.key(0), 3)
    rows = 30 * jax.random.normal(keys[0], shape, dtype)
    scale, weights = jax.random.normal(keys[1], (24,), dtype), jax.random.normal(keys[2], (24, 2, 8), dtype)
    product = lambda *arrays: norm_einsum_rows("BTD,DCF->BTCF", arrays[0], arrays[1], 1e-5, arrays[2])  # noqa: E731
    got = product(rows, scale, weights)
    assert got.dtype == dtype
    x, norm, w = (np.asarray(array, np.float64) for array in (rows, scale, weights))
    want = np.einsum("BTD,DCF->BTCF", x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * norm, w)
    tolerance = 0.05 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)
    (dot,) = [eq for eq in jax.make_jaxpr(product)(rows, scale, weights).eqns if eq.primitive.name == "dot_general"]
    assert (dot.params["preferred_element_type"] == jnp.float32) == (dtype == jnp.float32 or not squares_first)
