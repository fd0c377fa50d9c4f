"""Rows of the scaling study, on simulated devices at a shape that eight of them split."""

import json

import jax.numpy as jnp
import pytest

from bench import scaling
from dyninf.cli import bench
from dyninf.models import ModelConfig

SHAPE = ModelConfig(
    vocab_size=64, num_layers=4, d_model=16, d_ff=32, num_heads=8, num_kv_heads=4, head_dim=8, max_length=512
)
SIZES = ["--shape", "small", "--dtype", "float32", "--steps", "2", "--repeats", "1", "--context", "16", "--batch", "2"]


@pytest.fixture
def small(monkeypatch):
    for module in (scaling, bench):
        monkeypatch.setattr(module, "shapes", lambda: {"small": SHAPE})
    monkeypatch.setattr(scaling, "BUDGET", 7)
    # a page of four tokens, and 7 of 16 slots
    plan = scaling.Plan(select=scaling.kv.TopK(scorer=scaling.kv.Quest(page_size=4), budget=8, sinks=0, recent=4))
    monkeypatch.setattr(scaling, "select", lambda: plan)


@pytest.mark.slow  # six programs on eight devices
def test_every_program_is_a_row(small, capsys):
    assert scaling.main(["--mesh", "data=2,tensor=4", "--prompt", "256", "--prefill-chunk", "128", *SIZES]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [(row["plan"], row["stacked"], row["batch"], row["context"]) for row in rows]
    stacked = [(name, True, 2, 16) for name in ("dense", "half", "exits", "select")]
    assert found == [*stacked, ("prompt", False, 1, 256), ("dense", False, 2, 16), ("select", False, 2, 16)]
    dense, half = rows[0], rows[1]
    assert (dense["layers_run"], half["layers_run"]) == (4, 2)
    # By hand: both groups read all layers, 2*8*8*16 + 2*4*8*16 + 3*16*32 = 4608 numbers each, and norms of 32 once; one
    # readout of 64 * 16; of two sequences (15 + 16) / 2 keys and values of 4 heads of 8 in each layer.
    numbers = 4 * (2 * 4608 + 32) + 64 * 16 + 4 * 2 * 15.5 * 2 * 4 * 8
    assert dense["floor_ms"] == pytest.approx(1e3 * 4 * numbers / (8 * 4140e9))
    assert dense["of_floor"] == pytest.approx(dense["floor_ms"] / dense["median_ms"])


def test_what_does_not_fit_is_said(small, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "room", lambda: 1000.0)
    assert scaling.main(["--mesh", "tensor=4", "--prompt", "0", *SIZES]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["plan"] for row in rows] == ["dense", "half", "exits", "select", "dense", "select"]
    # By hand: weights 4 * 4608 and two vocabularies of 64 * 16 on four devices; 2 * 16 tokens of 4 layers of 2 * 32.
    needed = (4 * 4608 + 2 * 64 * 16) / 4 + 2 * 16 * 4 * 2 * 32 / 4
    assert all(row["needed_gib"] == pytest.approx(needed * jnp.float32(0).itemsize / 2**30) for row in rows)
