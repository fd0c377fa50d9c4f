"""Streams: the tokens of generate, one by one, while the device has another step to go on with."""

import importlib

import jax
import numpy as np
import pytest

from dyninf import Plan, Temperature, TopK, chain, generate, stream
from dyninf.depth import Confidence

V, B, T, NEW = 61, 3, 7, 9
LENGTHS = np.array([7, 4, 5])
PROMPTS = np.random.default_rng(0).integers(0, V, (B, T))
PLAN = Plan(depth=Confidence(threshold=0.9), sampler=chain(Temperature(temperature=2.0), TopK(k=20)))
ARGUMENTS = {"max_new_tokens": NEW, "key": jax.random.key(4), "lengths": LENGTHS}


@pytest.fixture
def steps(monkeypatch):
    """What has been handed to the device: a list with an entry for each step."""
    module, handed = importlib.import_module("dyninf.generate"), []
    run = module._decode_step
    monkeypatch.setattr(module, "_decode_step", lambda *given: handed.append(given) or run(*given))
    return handed


def test_a_stream_is_generate_token_by_token(shallow_model):
    got = generate(shallow_model, PROMPTS, PLAN, **ARGUMENTS)
    pieces = list(stream(shallow_model, PROMPTS, PLAN, **ARGUMENTS))
    np.testing.assert_array_equal(np.stack([tokens for tokens, _ in pieces], 1), got.tokens)
    assert pieces[0][1] is None
    for step, (_, stats) in enumerate(pieces[1:]):
        jax.tree.map(lambda one, every, i=step: np.testing.assert_array_equal(one, every[i]), stats, got.stats)


def test_one_step_runs_while_a_token_is_read(shallow_model, steps):
    for number, _ in enumerate(stream(shallow_model, PROMPTS, PLAN, **ARGUMENTS)):
        assert len(steps) == (min(number + 1, NEW - 1) if number else 0)
    assert len(steps) == NEW - 1


def test_a_text_that_ends_loses_one_step_at_most(shallow_model, steps):
    alone = ARGUMENTS | {"lengths": None}
    whole = generate(shallow_model, PROMPTS[0], PLAN, **alone).tokens[0].tolist()
    last = next(place for place in range(2, NEW) if whole[place] not in whole[:place])
    pieces = stream(shallow_model, PROMPTS[0], PLAN, **alone, stop=[whole[last]])
    assert [int(token_B[0]) for token_B, _ in pieces] == whole[: last + 1]
    assert len(steps) <= last + 1
    steps.clear()
    assert len(list(stream(shallow_model, PROMPTS[0], PLAN, **alone, stop=[whole[0]]))) == 1
    assert not steps
