"""Rows of the scaling study, on simulated devices at a shape that eight of them split."""

import json

import jax.numpy as jnp
import pytest

from bench import mesh_tables, scaling
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


def test_a_table_has_what_fits_and_what_does_not(monkeypatch):
    about = {"shape": "small", "mesh": "tensor=8", "stacked": True, "batch": 1, "device": "H200", "jax": "0.11.2"}
    about |= {"commit": "abc", "steps": 32, "context": 131072}
    ran = {"layers_run": 80, "tokens_per_s": 125.0, "of_floor": 0.5, "floor_ms": 4.0, "collectives_ms": 0.03}
    rows = [
        about | ran | {"plan": "dense", "median_ms": 8.0, "peak_gib": 35.2, "context": 2048},
        about | ran | {"plan": "half", "median_ms": 4.0, "peak_gib": 35.2, "context": 2048},
        about | {"plan": "dense", "needed_gib": 180.4, "had_gib": 131.6},
        about | ran | {"plan": "select", "median_ms": 8.0, "peak_gib": 99.9},
        about | ran | {"plan": "dense", "median_ms": 16.0, "peak_gib": 35.2, "context": 2048, "stacked": False},
        about | ran | {"plan": "dense", "median_ms": 16.0, "peak_gib": 101.0, "context": 2048, "shape": "large"},
        about | {"plan": "prompt", "median_ms": 4321.0, "stacked": False},
    ]
    two = {"dense": {"median_ms": 20.0}, "half": {"median_ms": 10.0}}
    two = {plan: row | {"context": 2048, "model": "small"} for plan, row in two.items()}
    monkeypatch.setattr(mesh_tables, "read_rows", lambda name: rows)
    monkeypatch.setattr(mesh_tables, "_on_two", lambda: two)
    lines = mesh_tables.scaling_table().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    head, _, *found = cells
    assert {len(line) for line in cells} == {len(head)}
    ends = [line[-2:] for line in found]
    assert ends == [["1.00x", "2.50x"], ["2.00x", "2.50x"], ["", ""], ["", ""], ["1.00x", ""], ["1.00x", ""]]
    assert found[0][:10] == ["small", "tensor=8", "dense", "1", "2048", "80", "8.00", "125", "50 %", "50 us"]
    assert found[2][2:7] == ["dense", "1", "131072", "", "does not fit: 180 of 132 GiB"]
    assert found[4][2] == "dense, layers in a list"
    assert lines[-1] == "A prompt of 131072 tokens, small, tensor=8: first token after 4.3 s."
