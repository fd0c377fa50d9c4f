"""The Hopper kernel of prefill, interpreted on a CPU: its barriers, its lists and its masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, dispatch, prefill_attention
from pallas_kernels.block_sparse_attention import mosaic_gpu
from tests.pallas_kernels.test_block_sparse_gpu import Case, make

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < dispatch.MOSAIC_GPU_JAX, reason="Mosaic GPU kernels need jax 0.11.2"
)
# As many blocks of threads as ``cores``, each of which takes several tiles; several rows need masks at both ends.
CASES = {
    "turns": (Case(tokens=200, keys=200, heads=4, dim=64, entries=2, dtype="float16"), 3, True),
    "window": (
        Case(tokens=521, keys=521, heads=2, kv=1, dim=64, entries=4, window=90, sinks=3, dtype="float16"),
        2,
        False,
    ),
    "chunk": (Case(tokens=160, keys=500, heads=2, kv=1, dim=128, entries=3, offset=131, lengths=(290,)), 1, False),
    "wide": (Case(tokens=300, keys=300, heads=2, kv=2, dim=256, entries=2, dtype="float16"), 2, True),
}


def interpreted(function, *arrays, races):
    """Run a kernel without a GPU, and look for races."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=1)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=races)),
    ):
        result = jax.block_until_ready(jax.jit(function)(*arrays))
    assert not races or not gpu_callbacks.get_races().races_found
    return result


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "turns" else pytest.mark.slow) for n in CASES])
def test_equals_the_reference(rng, name):
    case, cores, races = CASES[name]
    arrays, index, lengths = make(case, rng)
    about = {"offset": jnp.int32(case.offset), "window": case.window, "with_lse": True}
    run = {"cores": cores, "interpreted": True}
    ends = case.keys if lengths is None else case.lengths[0]
    valid = case.offset + np.arange(case.tokens) < ends

    def sparse(q, k, v):
        return mosaic_gpu.block_sparse_attention(q, k, v, index, lengths, sinks=case.sinks, **about, **run)

    def dense(q, k, v):
        return mosaic_gpu.prefill_attention(q, k, v, lengths, **about, **run)

    wide, plain = [array.astype(jnp.float32) for array in arrays], about | {"implementation": "xla"}
    some = jax.jit(functools.partial(block_sparse_attention, sinks=case.sinks, **plain))
    every = jax.jit(functools.partial(prefill_attention, **plain))
    expected = {sparse: some(*wide, index, lengths), dense: every(*wide, lengths)}
    for function, (want, want_sums) in expected.items():
        got, sums = interpreted(function, *arrays, races=races)
        eps = float(jnp.finfo(case.dtype).eps)
        np.testing.assert_allclose(np.asarray(got, np.float32)[:, valid], want[:, valid], atol=4 * eps)
        np.testing.assert_allclose(sums[:, :, valid], want_sums[:, :, valid], atol=1e-4)
