"""Checkpoints that several processes write together."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from dyninf.models import Transformer, load, make_mesh, model_shardings, save_hf
from dyninf.models.parameters import named_parameters

PROGRAM = """
import sys

import jax
import numpy as np

address, place, folder, target = sys.argv[1:]
jax.distributed.initialize(address, 2, int(place))

from dyninf.models import load, make_mesh, processes, save
from dyninf.models.parameters import named_parameters

model = load(folder, mesh=make_mesh({"data": 2, "tensor": 2}))
save(model, target)
again = load(target, mesh=make_mesh({"fsdp": 4}))
for name, array in processes.replicate(named_parameters(again)).items():
    np.testing.assert_array_equal(array, processes.replicate(named_parameters(model))[name])
wrong = {"a path that does not exist": model, "a model on devices of all": load(folder)}
for match, other in wrong.items():
    try:
        save(other, target)
    except ValueError as error:
        assert match in str(error), error
    else:
        raise AssertionError(match)
save(again, target, overwrite=True)
"""


@pytest.mark.slow
def test_two_processes_save_what_any_mesh_restores(small, tmp_path):
    model = Transformer(small(vocab_size=64, d_model=24, num_heads=8, num_kv_heads=4), jax.random.key(0))
    save_hf(model, tmp_path / "hf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", PROGRAM, address]
    started = [
        subprocess.Popen(
            [*command, str(place), str(tmp_path / "hf"), str(tmp_path / "saved")],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in range(2)
    ]
    for process in started:
        _, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "saved"]
    for mesh in (None, make_mesh({"data": 1, "tensor": 4}), make_mesh({"fsdp": 2, "tensor": 2})):
        got = load(tmp_path / "saved", mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, named_parameters(got), named_parameters(load(tmp_path / "hf")))
        if mesh is not None:
            meant = named_parameters(model_shardings(got, mesh))
            assert all(x.sharding.is_equivalent_to(meant[name], x.ndim) for name, x in named_parameters(got).items())
