"""How the decoder stack's kernel combines what the splits of a head have found, in groups."""

import functools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decoder_stack import heads
from pallas_kernels.decoder_stack.geometry import Geometry

SIZES = {"layers": 1, "d_model": 256, "d_ff": 256, "head_dim": 128, "batch": 1, "capacity": 16384, "blocks": 132}


@pytest.mark.parametrize(("group", "together", "most_turns"), [(4, 4, 4), (9, 2, 8), (20, 1, 14)])
@pytest.mark.parametrize("splits", [1, 2, 5, 9, 10, 33, 63, 64])
def test_splits_of_a_head_are_combined_once_each(rng, monkeypatch, splits, group, together, most_turns):
    geometry = Geometry(kv_heads=2, group=group, **SIZES)
    assert (geometry.splits, geometry.splits_together) == (64, together)
    item = 64  # the first of the second head
    places = SimpleNamespace(at=range(geometry.items))
    worker, tops, turns = SimpleNamespace(g=geometry, r=SimpleNamespace(split=places)), rng.normal(size=splits) * 9, []
    # Of each split what it has mixed and the mass of it, at the scale of its largest score; those handed on, by place.
    states = [(*rng.normal(size=2), top, rng.uniform(1, 2)) for top in tops]
    handed = {}

    def loop(first, stop, body, state):
        turns[-1] += int(stop)
        return functools.reduce(lambda state, turn: body(turn, state), range(first, int(stop)), state)

    def take(asked):
        asked = [int(place) for place in asked]
        found = {place: handed.pop(place) for place in set(asked)}  # each is written once
        return [found[place] for place in asked]

    monkeypatch.setattr(heads, "take", take)
    monkeypatch.setattr(heads, "keep_if", lambda flag, kept, otherwise: kept if flag else otherwise)
    monkeypatch.setattr(heads.lax, "fori_loop", loop)
    for split in reversed(range(splits)):
        at = SimpleNamespace(item=item + split, split=jnp.int32(split), splits=jnp.int32(splits))
        size, last = heads.Attention.group(worker, at)
        turns.append(0)
        state = heads.Attention.merge(worker, at, states[split], 1, last)
        handed[item + split] = state
    low, high, top, mass = heads.Attention.merge(worker, at, handed.pop(item), size, (splits - 1) // size * size)
    assert not handed
    assert max(turns) <= most_turns
    shares = np.exp2(tops - tops.max())
    want = [sum(share * state[i] for share, state in zip(shares, states, strict=True)) for i in (0, 1, 3)]
    np.testing.assert_allclose([float(part) for part in (low, high, mass)], want, rtol=1e-5)
    assert float(top) == pytest.approx(tops.max())
