"""One decode step over stacked layers, and how the Hopper kernel is interpreted on a CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decoder_stack import DecoderWeights, mosaic_gpu, readers


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackCase:
    """Sizes and contents of one step."""

    layers: int = 3
    d_model: int = 128
    d_ff: int = 256
    kv_heads: int = 1
    group: int = 2
    head_dim: int = 128
    capacity: int = 136
    positions: tuple[int, ...] = (70, 0)
    bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"

    def make(self, rng):
        """Return states, weights and a cache whose empty slots are NaN."""

        def draw(*shape, scale=0.08, offset=0.0):
            return jnp.asarray(rng.normal(size=shape) * scale + offset, self.dtype)

        layers, batch, keys = self.layers, len(self.positions), self.kv_heads * self.head_dim
        wide = keys * (self.group + 2)
        weights = DecoderWeights(
            norm_attn=draw(layers, self.d_model, offset=1.0),
            wqkv=draw(layers, self.d_model, wide),
            bqkv=draw(layers, wide) if self.bias else None,
            norm_q=draw(layers, self.head_dim, offset=1.0) if self.qk_norm else None,
            norm_k=draw(layers, self.head_dim, offset=1.0) if self.qk_norm else None,
            wo=draw(layers, keys * self.group, self.d_model),
            norm_mlp=draw(layers, self.d_model, offset=1.0),
            w_gate_up=draw(layers, 2, self.d_model, self.d_ff),
            w_down=draw(layers, self.d_ff, self.d_model),
        )
        shape = (layers, batch, self.capacity, self.kv_heads, self.head_dim)
        empty = np.arange(self.capacity)[None] >= np.array(self.positions)[:, None]
        cache = [jnp.where(empty[None, :, :, None, None], np.nan, draw(*shape, scale=1.0)) for _ in "kv"]
        x = draw(batch, self.d_model, scale=1.0)
        return x, weights, *(part.astype(self.dtype) for part in cache), jnp.array(self.positions, jnp.int32)


def choose_plainly(geometry, scores, row, live, pages, shared):
    """Stand for the code of threads that no interpreter runs: take the best page so many times, then sort."""
    page = jnp.arange(geometry.num_pages)
    last = live - geometry.recent
    forced = (page < live) & ((page < geometry.sinks) | (page >= last))
    worth = scores[row, :]
    worth = jnp.where(jnp.isnan(worth), jnp.finfo(jnp.float32).min, jnp.clip(worth, *([-3.3e38, 3.3e38])))
    worth = jnp.where((page >= geometry.sinks) & (page < last), worth, -jnp.inf)
    taken = forced | ((live <= geometry.k) & (page < live))
    for _ in range(geometry.k - geometry.sinks - geometry.recent):
        left = jnp.where(taken, -jnp.inf, worth)
        best = jnp.min(jnp.where((left == jnp.max(left)) & (left > -jnp.inf), page, geometry.num_pages))
        taken = taken | (page == best)
    before = jnp.int32(-1)
    for place in range(geometry.k):
        before = jnp.min(jnp.where(taken & (page > before), page, geometry.num_pages - 1)).astype(jnp.int32)
        pages[place] = before


def interpret_kernel(*arrays, races=False, **options):
    """Run the kernel of the decoder stack with one block; also look for races, which takes longer."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=1)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=races)),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(readers, "choose_in_warpgroup", choose_plainly)
        result = jax.jit(functools.partial(mosaic_gpu.decode_layers, blocks=1, **options))(*arrays)
        jax.block_until_ready(result)
    assert not races or not gpu_callbacks.get_races().races_found
    return result


@pytest.fixture
def stack_case():
    return StackCase


@pytest.fixture
def interpret():
    return interpret_kernel
