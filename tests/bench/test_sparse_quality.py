"""Quality under sparse prefill: the rule for budgets, the judge of attention, and the studies on tiny texts."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import sparse_quality, sparse_tables
from bench.sparse_budgets import BestBlocks, policy_names, row_budget, with_budget
from bench.sparse_studies import PLANTED, Exact, judge
from dyninf.sparsity import AShape, Dense, PromptObs
from pallas_kernels import prefill_attention

TOKENS, SIZE = 196, 8  # 25 blocks, the last one of four tokens
NAMES = ("a_shape", "tri_shape", "power", "vertical_slash", "pooled_blocks", "zip_vl", "flex_prefill", "x_attention")
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all the time of these tests
judged = jax.jit(judge, compiler_options=QUICK)
attend = jax.jit(functools.partial(prefill_attention, with_lse=True), compiler_options=QUICK)


def drawn(length, scale=1.0):
    """The attention of random queries and keys, of a whole and of a padded text."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(scale * rng.normal(size=(2, TOKENS, heads, 8)), jnp.float32) for heads in (2, 1, 1))
    lengths_B = jnp.asarray([TOKENS, length])
    o, lse = attend(q, k, v, lengths_B)
    return Exact(q_BTNH=q, k_BTKH=k, v_BTKH=v, o_BTNH=o, lse_BNT=lse, lengths_B=lengths_B)


def observed(exact):
    return PromptObs(layer=0, q_BTNH=exact.q_BTNH, k_BSKH=exact.k_BTKH, lengths_B=exact.lengths_B)


def test_blocks_of_a_row():
    # Of 8 rows, 36 blocks: 18 are 1 + 2 * 7 = 15 for two a row, and 1 + 2 + 3 * 6 = 21 for three.
    assert row_budget(8, 2) == 2 and row_budget(8, 1) == 8 and row_budget(8, 36) == 0
    # 21 of 36 is less than 1/1.7, and three a row fit.
    assert row_budget(8, 1.7) == 3


def test_sizes_of_each_policy():
    made = {name: with_budget(f"sparse_{name}", 2, tokens=64 * 64, block_size=64) for name in NAMES}
    # 2080 blocks, 1040 of them: 18 * 64 - 153 = 999 for 18 a row, 1045 for 19.
    assert made["pooled_blocks"].budget == made["flex_prefill"].budget == made["x_attention"].budget == 18
    assert made["zip_vl"].budget == 17 and made["zip_vl"].mass == made["flex_prefill"].gamma == 1.0
    assert (made["vertical_slash"].vertical, made["vertical_slash"].slash) == (2, 15)  # one to six of 17
    assert made["x_attention"].mass is None and made["x_attention"].stride == 8
    # A sink and a window of 17 blocks are 18 a row; the 46 more blocks of a dense row leave room for one less.
    assert made["a_shape"].window == 16 * 64 + 1 and made["tri_shape"].window == 15 * 64 + 1
    assert made["power"].dense_layers == 0 and made["power"].unit == 64
    assert with_budget("best_blocks", 2, tokens=64 * 64, block_size=64) == BestBlocks(budget=18, block_size=64)
    assert all(policy.block_size == 64 for policy in made.values())


@pytest.fixture(scope="module")
def best():
    """Texts, and what half of the blocks of the first leave, the best ones."""
    exact = drawn(90, scale=3.0)
    return exact, judged(with_budget("best_blocks", 2, tokens=TOKENS, block_size=SIZE), exact)


@pytest.mark.parametrize("name", NAMES)
def test_no_policy_holds_more_than_its_share_or_beats_the_best_choice(name, best):
    found = judged(with_budget(f"sparse_{name}", 2, tokens=TOKENS, block_size=SIZE), best[0])
    assert 0.2 < float(found.density[0]) <= 0.5
    if name not in ("tri_shape", "power"):  # whose rows may differ in blocks
        assert float(found.mass[0]) <= float(best[1].mass[0]) + 1e-5


def test_a_budget_that_is_too_small_is_refused():
    # 13 rows of two blocks are 1 + 2 * 12 = 25, more than a quarter of 91.
    with pytest.raises(
        ValueError, match="at least 3 blocks a row for sparse_zip_vl, got 1, 1/4 of 13 rows of 8 tokens"
    ):
        with_budget("sparse_zip_vl", 4, tokens=100, block_size=SIZE)
    # Rows of power have, beside their own and the first block, those at distances 1, 2, 4 and 8: 1, 2, 3, 4, 4, 5, 5,
    # 5, 5, 6, 6, 6 and 6 blocks, as one of them is the first in some; 58 of 91.
    with pytest.raises(ValueError, match="at least 1 blocks a row for sparse_power, got 0, 1/2 of 13 rows"):
        with_budget("sparse_power", 2, tokens=100, block_size=SIZE)


def test_what_a_window_leaves_by_hand():
    exact = drawn(45)
    found = judged(AShape(sinks=3, window=9, block_size=SIZE), exact)
    q, k, v = (np.asarray(x, np.float64) for x in (exact.q_BTNH, exact.k_BTKH, exact.v_BTKH))
    for row, length in enumerate((TOKENS, 45)):
        mass, error = [], []
        for last in range(length):
            seen = np.arange(last + 1)
            seen = seen[(seen < 3) | (seen > last - 9)]
            for head in range(2):
                weights = np.exp(k[row, : last + 1, 0] @ q[row, last, head] / np.sqrt(8))
                weights /= weights.sum()
                whole, part = weights @ v[row, : last + 1, 0], weights[seen] / weights[seen].sum() @ v[row, seen, 0]
                mass.append(weights[seen].sum())
                error.append(np.linalg.norm(part - whole) / np.linalg.norm(whole))
        assert float(found.mass[row]) == pytest.approx(np.mean(mass), abs=1e-5)
        assert float(found.error[row]) == pytest.approx(np.mean(error), rel=1e-4)
    # 45 tokens are 6 rows with 1 to 6 blocks, 21. The first three rows have all; the window of the first query of row r
    # begins with block r - 1, so that the others have that, their own and the first.
    assert float(found.density[1]) == pytest.approx((1 + 2 + 3 + 3 + 3 + 3) / 21)


def test_dense_leaves_everything():
    found = judged(Dense(), drawn(45))
    assert (float(found.mass[0]), float(found.error[0]), float(found.density[0])) == (1, 0, 1)


def test_the_best_blocks_are_those_of_most_mass():
    exact = drawn(70, scale=3.0)
    policy = BestBlocks(budget=3, block_size=SIZE)
    select = jax.jit(lambda exact: policy.select(observed(exact)), compiler_options=QUICK)
    index = select(exact).index
    q, k = (np.asarray(x, np.float64) for x in (exact.q_BTNH, exact.k_BTKH))
    for row, length in enumerate((TOKENS, 70)):
        for head in range(2):
            scores = q[row, :length, head] @ k[row, :length, 0].T / np.sqrt(8)
            weights = np.exp(np.where(np.tri(length, dtype=bool), scores, -np.inf))
            weights /= weights.sum(axis=1, keepdims=True)
            for first in range(0, length, SIZE):
                tokens = weights[first : first + SIZE].sum(axis=0)
                masses = [tokens[at : at + SIZE].sum() for at in range(0, first + 1, SIZE)]
                listed = index.blocks[row, head, first // SIZE, : index.counts[row, head, first // SIZE]]
                assert sorted(np.asarray(listed)) == sorted(np.argsort(masses)[-3:])


def run(capsys, *arguments):
    """Run the script and return its rows and what it wrote to stderr."""
    capsys.readouterr()
    assert sparse_quality.main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def test_planted_patterns_are_judged_and_a_stopped_run_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # the same programs serve the second run
    file, options = tmp_path / "rows.jsonl", ["--study", "mass", "--model", "planted", "--length", 128]
    options += ["--block-size", 8, "--policies", "dense,sparse_a_shape", "--budgets", "4,2"]
    rows, refused = run(capsys, *options, "--jsonl", file)
    assert [(row["policy"], row["denominator"]) for row in rows] == [("dense", None), ("sparse_a_shape", 2)]
    assert "sparse_a_shape at 1/4: expected a budget of at least 3 blocks a row" in refused
    assert 0 < rows[1]["mass"] < rows[0]["mass"] == 1 and rows[1]["error"] > rows[0]["error"] == 0
    assert rows[1]["density"] <= 0.5 and rows[0]["density"] == 1 and rows[1]["shapes"]["heads"] == PLANTED.heads
    file.write_text(file.read_text()[:-30])  # killed while it wrote
    again, _ = run(capsys, *options, "--jsonl", file)
    assert [row["policy"] for row in again] == ["sparse_a_shape"] and len(file.read_text().splitlines()) == 2


def test_shards_share_the_work_and_bad_options_are_refused(capsys):
    def jobs(shard):
        arguments = sparse_quality._parse(["--study", "mass", "--shard", shard])
        return sparse_quality.list_jobs(arguments)[arguments.shard[0] :: arguments.shard[1]]

    parts = [job for part in range(3) for job in jobs(f"{part}/3")]
    assert set(parts) == set(jobs("0/1")) and len(parts) == len(jobs("0/1"))
    for option, value, message in (
        ("--policies", "dense,evict_h2o", "expected --policies among dense, sparse_a_shape"),
        ("--budgets", "0,2", "expected --budgets of at least 1"),
        ("--block-size", "0", "expected --block-size of at least 1"),
        ("--model", "planted", "expected a model that answers tasks"),
    ):
        with pytest.raises(SystemExit):
            sparse_quality.main(["--study", "tasks", option, value])
        assert message in capsys.readouterr().err


def test_tables_have_policies_down_and_budgets_across():
    about = {"model": "m", "length": 64, "block_size": 4, "samples": 2, "texts": 1}
    measured = {
        "tasks": {"exact": {"a": 1.0, "b": 0.0}, "score": {"a": 1.0, "b": 0.5}},
        "mass": {"mass": 0.9, "error": 0.2},
    }
    cells = {"tasks": "50 / 75", "mass": "0.900 / 0.200"}
    jobs = [("best_blocks", 8, 0.121), ("sparse_a_shape", 2, 0.5), ("sparse_a_shape", 8, 0.1), ("dense", None, 1.0)]
    for study, cell in cells.items():
        rows = [
            about | measured[study] | {"study": study, "policy": policy, "denominator": denominator, "density": share}
            for policy, denominator, share in jobs
        ]
        ((head, lines, note),) = sparse_tables.tables(study, rows)
        assert head == ["policy", "1/2", "1/8"]
        assert lines == [["sparse_a_shape", f"{cell} (50)", f"{cell} (10)"], ["best_blocks", "", f"{cell} (12)"]]
        assert note.endswith(f"Dense: {cell} (100).")


def test_every_listed_policy_has_a_rule():
    assert {f"sparse_{name}" for name in NAMES} | {"best_blocks"} <= set(policy_names())
