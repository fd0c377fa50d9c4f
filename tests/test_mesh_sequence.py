"""Prompts whose tokens are split over devices: plans give what they do on one, and odd lengths are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Plan, generate, prefill
from dyninf.models import Transformer, make_mesh, on_mesh, place
from dyninf.sparsity import AShape, PooledBlocks, XAttention

B, T, V = 2, 16, 64
LENGTHS, SPEC = np.array([16, 11]), CacheSpec(capacity=20)
PLANS = {
    "dense": Plan(),
    "a_shape": Plan(sparsity=AShape(sinks=2, window=3, block_size=2)),
    "x_attention": Plan(sparsity=XAttention(budget=3, stride=2, block_size=4)),
    "pooled_blocks": Plan(sparsity=PooledBlocks(budget=3, block_size=2)),
}


@pytest.fixture(scope="module")
def model(even_model):
    """Two layers, the second with a sliding window."""
    return Transformer(dataclasses.replace(even_model.config, num_layers=2, windows=(None, 4)), jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(0, V, (B, T))


@pytest.mark.parametrize(
    "name", [name if name == "a_shape" else pytest.param(name, marks=pytest.mark.slow) for name in PLANS]
)
def test_a_plan_reads_prompts_as_on_one_device(name, model, prompts):
    mesh, keys = make_mesh({"sequence": 4, "tensor": 2}), jax.random.split(jax.random.key(1), B)
    if name == "a_shape":  # whose sinks a sliding window would hide
        model = Transformer(dataclasses.replace(model.config, windows=None), jax.random.key(0))
    run = jax.jit(lambda model: prefill(model, jnp.asarray(prompts), jnp.asarray(LENGTHS), PLANS[name], SPEC, keys))
    want, state = run(model)
    got, split = run(on_mesh(place(model, mesh), mesh))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)  # as the laws of plans
    live = np.arange(SPEC.capacity)[None] < LENGTHS[:, None]
    for one, other in zip(split.cache.layers, state.cache.layers, strict=True):
        np.testing.assert_allclose(np.asarray(one.k)[live], np.asarray(other.k)[live], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_generation_is_that_of_one_device(name, model, prompts):
    model = Transformer(dataclasses.replace(model.config, windows=None), jax.random.key(0))
    mesh, options = make_mesh({"data": 2, "sequence": 2, "tensor": 2}), {"max_new_tokens": 4, "lengths": LENGTHS}
    want = generate(model, prompts, PLANS[name], **options)
    got = generate(on_mesh(place(model, mesh), mesh), prompts, PLANS[name], **options)
    np.testing.assert_array_equal(got.tokens, want.tokens)


@pytest.mark.parametrize(("name", "length", "unit"), [("dense", 14, 4), ("x_attention", 8, 16)])
def test_prompts_that_do_not_divide_are_refused(name, length, unit, model, prompts):
    mesh = make_mesh({"sequence": 4, "tensor": 2})
    with pytest.raises(
        ValueError, match=f"a multiple of {unit} tokens on 4 devices of the sequence axis.*got {length}"
    ):
        generate(on_mesh(place(model, mesh), mesh), prompts[:, :length], PLANS[name], max_new_tokens=1)
