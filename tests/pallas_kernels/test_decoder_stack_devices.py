"""The Hopper kernel of the decoder stack on devices that share its layers: against numpy, and one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dyninf.models import make_mesh
from pallas_kernels.decoder_stack import decode_layers
from pallas_kernels.partition import partitioned
from tests.pallas_kernels.test_decoder_stack import CASES, EPS, close, frequencies_of, oracle


@pytest.mark.multigpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 9, 64])
def test_devices_that_share_layers_agree_with_numpy_and_with_each_other(rng, stack_case, name, batch):
    changes, order, planned, options = CASES[name]
    positions = [0, 135, *rng.integers(0, 136, size=64).tolist()][:batch]
    sizes = {"d_model": 384, "d_ff": 768, "kv_heads": 4, "positions": tuple(positions)}
    case = stack_case(**changes | sizes)
    if "planned" in name:
        planned = [int(p) for p in rng.integers(1, len(order) + 1, size=batch)]
    else:
        planned = [len(order)] * batch
    x, weights, k, v, positions = case.make(rng)
    frequencies = frequencies_of(case)

    @jax.jit
    def step(x, weights, k, v, positions):
        with partitioned(make_mesh({"tensor": 2}, jax.devices()[:2]), heads=["tensor"]):
            return decode_layers(
                x,
                weights,
                k,
                v,
                positions,
                order_M=jnp.array(order),
                planned_B=jnp.array(planned),
                live_B=jnp.ones(batch, bool),
                frequencies=jnp.asarray(frequencies, jnp.float32),
                eps=EPS,
                implementation="mosaic_gpu",
                **options,
            )

    first = step(x, weights, k, v, positions)
    assert first.k_LBSKH.sharding.spec == PartitionSpec(None, None, None, "tensor")
    close(
        (first.x_BD, first.before_BD, first.k_LBSKH, first.v_LBSKH, first.ran_B),
        oracle(x, weights, k, v, positions, order, planned, frequencies, **options),
        0.03,
    )
    for whole in (first.x_BD, first.before_BD, first.ran_B):
        one, other = (np.array(part.data, np.float32) for part in whole.addressable_shards)
        assert np.array_equal(one, other)
    for _ in range(20):
        again = step(x, weights, k, v, positions)
        for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            assert np.array_equal(np.array(one, np.float32), np.array(other, np.float32), equal_nan=True)
