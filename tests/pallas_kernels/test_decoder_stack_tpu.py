"""The loop over stacked layers, compiled for TPUs that are only described: no cache is copied."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import DecoderWeights, Selection, decode_layers
from pallas_kernels.partition import partitioned
from tests.pallas_kernels.tpus import TPUS


@pytest.mark.parametrize("select", [None, "all", "but_the_first"])
@pytest.mark.parametrize("tpu", [pytest.param(n, marks=pytest.mark.slow) for n in TPUS[:3]] + [TPUS[3]])
def test_the_loop_compiles_for_tpus_and_copies_no_cache(tpu, select):
    """A layer's keys take 16 MiB; what the program needs beside its arguments is far less."""
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=tpu).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    sharding, dtype = NamedSharding(mesh, PartitionSpec()), jnp.bfloat16
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    layers, batch, slots, width = 4, 2, 4096, 1024
    weights = DecoderWeights(
        norm_attn=shape((layers, width), dtype),
        wqkv=shape((layers, width, 3072), dtype),
        wo=shape((layers, 1024, width), dtype),
        norm_mlp=shape((layers, width), dtype),
        w_gate_up=shape((layers, 2, width, 2048), dtype),
        w_down=shape((layers, 2048, width), dtype),
    )
    cache, summary = (shape((layers, batch, *sizes), dtype) for sizes in ((slots, 8, 128), (slots // 64, 8, 256)))
    chosen = None
    if select is not None:
        chosen = Selection(kind="bounds", page_size=64, pages=8, dense_layers=int(select == "but_the_first"))

    def step(x, weights, k, v, summary, positions):
        with partitioned(mesh):
            out = decode_layers(
                x,
                weights,
                k,
                v,
                positions,
                order_M=jnp.arange(layers),
                planned_B=jnp.full(batch, layers),
                live_B=jnp.ones(batch, bool),
                frequencies=jnp.ones(64),
                eps=1e-5,
                summary_LBPKX=None if select is None else summary,
                select=chosen,
            )
        return out.x_BD, out.k_LBSKH, out.v_LBSKH, summary if select is None else out.summary_LBPKX

    given = (shape((batch, width), dtype), weights, cache, cache, summary, shape((batch,), jnp.int32))
    compiled = jax.jit(step, donate_argnums=(2, 3, 4), out_shardings=sharding).lower(*given).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**22
