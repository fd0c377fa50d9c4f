"""Keeping the best slots of a cache in place, against loops in NumPy; its kernel interpreted and lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compact_cache
from pallas_kernels.compact_cache import mosaic_gpu, reference

L, B, K, H, S = 2, 2, 2, 64, 200
needs_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the GPU kernel needs jax 0.11.2")


def make(rng, kept, dtype=jnp.float32, head_dim=H):
    """A stacked cache and slots to keep; those of one head are its first ones, which stay where they are."""
    k, v = (jnp.asarray(rng.normal(size=(L, B, S, K, head_dim)), dtype) for _ in "kv")
    slots = np.array([[np.sort(rng.permutation(S)[:kept]) for _ in range(K)] for _ in range(B)])
    slots[0, 0] = np.arange(kept)
    slots[1, 1] = np.arange(S - kept, S)
    return k, v, jnp.asarray(slots, jnp.int32)


def hopper(cores):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=cores)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize("kept", [1, 37, S])
def test_slots_are_those_of_loops(rng, kept):
    k, v, slots = make(rng, kept)
    got = compact_cache(k, v, slots, layer=jnp.int32(1))
    single = compact_cache(k[1], v[1], slots)
    for old, new, alone in zip((k, v), got, single, strict=True):
        want = np.array(old)
        for b, head in np.ndindex(B, K):
            want[1, b, :kept, head] = np.asarray(old)[1, b, np.asarray(slots)[b, head], head]
        np.testing.assert_array_equal(new, want)
        np.testing.assert_array_equal(alone, want[1])


@needs_mosaic_gpu
@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["overlapping", "apart"])
def test_the_kernel_interpreted(rng, apart):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    k, v, slots = make(rng, 64 if apart else 128, jnp.bfloat16)
    slots = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32) * 2 + 64, slots.shape) if apart else slots
    want = reference.compact_cache(k, v, slots, jnp.int32(1))
    # The detector does not see that a copy has read what its barrier says, so that it is asked where nothing is read
    # and written.
    with hopper(1), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=apart)):
        got = jax.block_until_ready(jax.jit(mosaic_gpu.compact_cache)(k, v, slots, jnp.int32(1)))
    assert not apart or not gpu_callbacks.get_races().races_found
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))


@needs_mosaic_gpu
def test_the_kernel_lowers_for_cuda(rng):
    arrays = make(rng, 64, jnp.float16, head_dim=256)
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with hopper(132):
        exported = jax.export.export(jax.jit(mosaic_gpu.compact_cache), platforms=["cuda"], disabled_checks=unchecked)(
            *arrays, jnp.int32(1)
        )
    assert "mosaic_gpu_v2" in exported.mlir_module()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_kernel_on_a_gpu(rng, head_dim):
    arrays = make(rng, 192, jnp.bfloat16, head_dim=head_dim)
    run = jax.jit(compact_cache, static_argnames="implementation")
    got, want = (run(*arrays, layer=jnp.int32(1), implementation=name) for name in ("mosaic_gpu", "xla"))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))


def test_bad_input_is_refused(rng):
    k, v, slots = make(rng, 5)
    for arguments, message in (
        ((k, v, slots), "scalar layer"),
        ((k[0], v[0], slots[:1]), r"slots \[B, K, M\]"),
        ((k[0], v[0], slots.astype(jnp.float32)), "int32"),
        ((k[0], v[0], slots[..., :0]), "1 to 200 slots to keep, got 0"),
        ((k[0, :, :4], v[0, :, :4], slots), "1 to 4 slots to keep, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            compact_cache(*arguments)
