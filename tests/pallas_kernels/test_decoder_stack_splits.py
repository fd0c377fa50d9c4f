"""How the decoder stack's kernel combines what the splits of a head have found, each block its part of the features."""

import functools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decoder_stack import heads
from pallas_kernels.decoder_stack.geometry import Geometry

SIZES = {"layers": 1, "d_model": 256, "d_ff": 256, "head_dim": 128, "batch": 1, "capacity": 16384, "kv_heads": 2}
HEAD = 1  # the second of two


class Slots:
    """Global memory; what has not been written is NaN."""

    def __init__(self, *shape):
        self.held = np.full(shape, np.nan)

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        plain = [slice(int(at.start), int(at.start) + at.size) if hasattr(at, "start") else int(at) for at in index]
        return self.held[tuple(plain)]


class Worker(heads.Attention):
    """What is written of a head, by the first of its features; combined once all splits have handed over theirs."""

    def __init__(self, geometry):
        self.g, self.grid = geometry, SimpleNamespace(wait=lambda *_, **__: None)
        split = Slots(2, 2, 2 * geometry.split_places, 64, geometry.head_rows)
        self.r = SimpleNamespace(split=split, writes=[0])
        self.sharers, self.attended = [], {}

    def combine(self, at):
        self.sharers.append(at)
        return None

    def write_attended(self, at, place, tiles):
        if tiles[0] is not None:
            self.attended |= {place * 64 + 64 * i: tile for i, tile in enumerate(tiles)}


@pytest.fixture
def plain(monkeypatch):
    """Conditions, loops and memory as Python has them."""

    def put(slot, tiles):
        for place, tile in zip(slot, tiles, strict=True):
            assert np.isnan(place).all()
            place[:] = tile

    def take(slots, layout):
        found = [[jnp.asarray(tile) for tile in slot] for slot in slots]
        assert not any(np.isnan(tile).any() for tiles in found for tile in tiles)
        for slot in slots:
            slot[:] = np.nan
        return found

    def loop(first, stop, body, state):
        return functools.reduce(lambda state, turn: body(turn, state), range(first, int(stop)), state)

    monkeypatch.setattr(heads, "put", put)
    monkeypatch.setattr(heads, "take", take)
    monkeypatch.setattr(heads.lax, "fori_loop", loop)
    monkeypatch.setattr(heads.pl, "when", lambda condition: lambda body: body() if condition else None)
    monkeypatch.setattr(heads.plgpu, "layout_cast", lambda array, layout: array)


@pytest.mark.parametrize("group", [4, 9, 20])
@pytest.mark.parametrize(
    ("splits", "used"), [(1, 1), (2, 2), (2, 1), (3, 3), (4, 4), (6, 1), (16, 16), (33, 33), (33, 16), (64, 63)]
)
def test_splits_of_a_head_are_combined(rng, plain, splits, used, group):
    geometry = Geometry(group=group, blocks=2 * splits, **SIZES)
    assert geometry.splits == splits
    worker, rows = Worker(geometry), geometry.head_rows
    top, mass, mixed = rng.normal(size=(used, rows)) * 9, rng.uniform(1, 2, (used, rows)), []
    nothing = rng.random((used, rows)) < 0.2  # of a split has been seen
    nothing[:, 3] = True
    top, mass = np.where(nothing, heads.EMPTY, top), np.where(nothing, 0, mass)
    for split in range(splits):
        found = split < used
        mixed.append(np.where(nothing[split], 0, rng.normal(size=(2, 64, rows))) if found else np.zeros((2, 64, rows)))
        state = (top[split], mass[split]) if found else (np.full(rows, heads.EMPTY), np.zeros(rows))
        at = SimpleNamespace(batch=0, head=jnp.int32(HEAD), split=jnp.int32(split), splits=jnp.int32(used))
        worker.finish_item(0, 0, at, tuple(jnp.asarray(part, jnp.float32) for part in (*mixed[-1], *state)))
    for at in worker.sharers:
        part = heads.Attention.combine(worker, at)
        assert part.shape == (geometry.shared_features, rows)
        worker.attended[int(at.split) * geometry.shared_features] = part
    assert np.isnan(worker.r.split.held).all()
    found = np.concatenate([worker.attended[first] for first in sorted(worker.attended)])
    shares = np.exp2(top - top.max(axis=0))
    total = np.einsum("sr,shfr->hfr", shares, np.stack(mixed[:used])) / np.maximum((shares * mass).sum(axis=0), 1e-30)
    np.testing.assert_allclose(found, total.reshape(128, rows), rtol=2e-5, atol=1e-6)
    assert not found[:, 3].any()


@pytest.mark.parametrize(("group", "asked"), [(4, {33: 17, 64: 16}), (9, {33: 7, 64: 8}), (20, {33: 5, 64: 5})])
def test_what_is_asked_for_at_once_fits_registers(group, asked):
    for splits, together in asked.items():
        geometry = Geometry(group=group, blocks=2 * splits, **SIZES)
        assert geometry.splits_together == together
        assert 0 <= geometry.split_places - splits < together
