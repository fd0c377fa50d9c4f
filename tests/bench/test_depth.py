"""Rows of the study of dynamic depth, and the naive programs beside it, which must be the same model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import depth
from dyninf.cli.decoding import decode_steps, random_state
from dyninf.configs.models import shapes

SIZES = ["--context", "32", "--filled", "20", "--steps", "3", "--repeats", "1"]


def run(capsys, *arguments):
    assert depth.main([*SIZES, *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_rows_are_of_the_layers_that_their_names_say(capsys, tmp_path):
    layers = {"dense_list": 8, "segments_half": 4, "dense_indexed": 8, "indexed_quarter": 2}
    layers |= {"generate_indexed_half": 4, "naive_cond_half": 4}
    rows = run(capsys, "--batch", "2", "--only", ",".join(layers), "--jsonl", str(tmp_path / "rows"))
    assert [(row["program"], row["layers_run"]) for row in rows] == list(layers.items())
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == rows
    for row in rows:
        assert row["speedup"] == pytest.approx(rows[0]["median_ms"] / row["median_ms"])
        assert row["tokens_per_s"] == pytest.approx(2000 / row["median_ms"])


def test_rules_are_asked_and_never_leave(capsys):
    rows = run(capsys, "--study", "decisions", "--only", "indexed_saturation,indexed_max_prob,segments_candidates")
    assert {row["program"]: row["layers_run"] for row in rows} == dict.fromkeys(
        ("segments_candidates", "indexed_saturation", "indexed_max_prob"), 8
    )
    assert all(row["speedup"] is None for row in rows)


def test_recorded_depths_are_stretched(capsys, tmp_path):
    """By hand: of 4 layers, sequences leave after 1 and 2, then 3 and 1; asked before each, a batch runs the most."""
    file = tmp_path / "depths"
    file.write_text(json.dumps({"num_layers": 4, "depths": [[1, 3], [2, 1]]}))
    study = ("--study", "batch", "--depths", str(file), "--batch", "2", "--only", "dense_list,masked,indexed,compact_1")
    rows = {row["program"]: row for row in run(capsys, *study)}
    assert {name: row["layers_needed"] for name, row in rows.items() if name != "dense_list"} == dict.fromkeys(
        ("masked", "compact_1", "indexed"), pytest.approx(np.mean([2, 4, 6, 2, 2, 4]))
    )
    assert rows["masked"]["layers_run"] == 8 and rows["indexed"]["layers_run"] == pytest.approx(np.mean([4, 6, 4]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "20"], "--context=32"),
        (["--study", "batch"], "--depths FILE"),
        (["--depths", "rows"], "--depths FILE"),
        (["--study", "batch", "--depths", "no such file"], "no such file"),
    ],
)
def test_refused_before_any_work(capsys, arguments, message):
    with pytest.raises(SystemExit):
        depth.main([*SIZES, *arguments])
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


@pytest.fixture(scope="module")
def stacked():
    model = depth.models.Transformer(shapes()["tiny"], jax.random.key(0))
    return depth.models.stack_for_decoding(model)


@pytest.mark.parametrize(
    ("name", "share"), [("while", "all"), ("while", "half"), ("cond", "all"), ("cond", "half"), ("scan", "all")]
)
def test_naive_programs_compute_what_the_library_does(stacked, name, share):
    count = len(stacked.layers) // depth.SHARES[share]
    plan = depth.Plan(depth=depth.depth.Recorded(depths=jnp.array([count])))
    start = lambda: random_state(stacked, plan, batch=2, length=20, capacity=32, key=jax.random.key(1))  # noqa: E731
    tokens_NB = jax.random.randint(jax.random.key(2), (3, 2), 0, 512)
    counted = {} if name == "scan" else {"count": jnp.int32(count)}
    (got, chosen_NB), _ = jax.jit(getattr(depth, f"naive_{name}"))(stacked, start(), plan, tokens_NB, **counted)
    want, _ = decode_steps(stacked, start(), plan, tokens_NB)
    np.testing.assert_array_equal(chosen_NB[-1], want.token)
    np.testing.assert_array_equal(got[2], want.cache.length)
    caches = ((cache.k, cache.v) for cache in (want.cache.layers, start().cache.layers))
    for got_LBSKH, want_LBSKH, start_LBSKH in zip(got, *caches, strict=False):
        np.testing.assert_allclose(got_LBSKH[:count], want_LBSKH[:count], rtol=1e-4, atol=1e-5)
        assert not (got_LBSKH == start_LBSKH)[:count, :, 20:23].any()
