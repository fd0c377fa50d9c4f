"""The commands that measure: compare, eval, bench; and those that report: plans, doctor."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyninf
from dyninf import models
from dyninf.cli import evaluate, main, quality
from dyninf.cli.compare import excerpts
from dyninf.cli.decoding import Excerpt, bytes_per_step, random_state, summary_bytes, time_excerpt
from dyninf.cli.heldout import Windows, cut_windows
from dyninf.configs.plans import plans
from dyninf.kv import Quest, ShadowKV, TopK
from dyninf.sparsity import LazyLLM
from dyninf.training.corpus import Document

TEXT = "def name(self):\n    return self.größe\n" * 6


@pytest.fixture(scope="module")
def windows(loaded):
    return cut_windows([Document(name="a", text=TEXT)], loaded[1], length=40, separator=0)


def forced(model, windows, plan):
    """Log probabilities and layers needed, one window at a time without padding or batches."""
    forward = jax.jit(dyninf.forward)
    for row, length in enumerate(windows.lengths):
        out = forward(model, windows.inputs[row : row + 1, :length], plan)
        yield np.asarray(jax.nn.log_softmax(out.logits[0])), windows.targets[row, :length], np.asarray(out.needed[0])


def test_quality_is_that_of_the_windows_one_by_one(loaded, windows):
    plan = plans(4)["exit_patience"]
    measured = quality.evaluate(loaded[0], plan, windows)
    bits, right, needed = [], [], []
    for log_probs, targets, layers in forced(loaded[0], windows, plan):
        bits.extend(-log_probs[np.arange(len(targets)), targets] / np.log(2))
        right.extend(log_probs.argmax(axis=-1) == targets)
        needed.extend(layers[1:])  # the first token of a window is its prompt
    assert windows.lengths[-1] < windows.lengths[0]  # padding is part of this test
    np.testing.assert_allclose(measured.bits_per_byte, sum(bits) / len(TEXT.encode()), rtol=1e-5)
    np.testing.assert_allclose([measured.accuracy, measured.layers_needed], [np.mean(right), np.mean(needed)])
    assert len(measured.choices) == len(right)


def test_batches_cover_every_window_in_order(loaded, windows, monkeypatch):
    row = 4 * 40 * (loaded[0].config.vocab_size + loaded[0].config.num_heads * 40)  # bytes of one window
    monkeypatch.setattr(quality, "CPU_BYTES", 2 * row)
    count = len(windows.lengths)
    parts = quality.batches(loaded[0], windows)
    assert {len(part) for part in parts} == {2} and count % 2 == 1
    assert np.concatenate(parts)[:count].tolist() == list(range(count))
    assert parts[-1].tolist() == [count - 1, count - 1]


def test_exits_are_those_of_static_plans(loaded, windows, folder):
    result = evaluate.measure_exits(evaluate.Loaded(**_loaded(loaded, folder)), windows)
    rights = []
    for layers in (1, 2):
        plan = dyninf.Plan(depth=dyninf.depth.ExitAt(layer=layers))
        measured = quality.evaluate(loaded[0], plan, windows)
        assert result["exits"][layers - 1]["right"] == measured.accuracy
        assert result["exits"][layers - 1]["bits_per_byte"] == pytest.approx(measured.bits_per_byte, rel=1e-5)
        rights.append(measured.choices == windows.targets[windows.live])
    assert result["exits"][-1]["agreement"] == 1.0
    assert result["bits_per_byte"] == result["exits"][-1]["bits_per_byte"]
    assert result["exits"][1]["first_right"] == np.mean(rights[1] & ~rights[0]) > 0
    assert 0 < result["right_nowhere"] < 1 - result["exits"][-1]["right"]
    assert sum(row["first_right"] for row in result["exits"]) + result["right_nowhere"] == pytest.approx(1)


def _loaded(loaded, folder):
    return {"name": "tiny", "folder": folder, "dtype": "float32", "model": loaded[0], "tokenizer": loaded[1]}


def test_compare_writes_rows_and_a_table(folder, tmp_path, capsys, monkeypatch):
    traces = []
    forward = dyninf.forward
    monkeypatch.setattr(dyninf, "forward", lambda *a, **k: traces.append(1) or forward(*a, **k))
    low, high = "exit_margin@depth.start=1@depth.threshold=0.1", "exit_margin@depth.start=1@depth.threshold=0.99"
    file = tmp_path / "rows.json"
    arguments = ["--plans", f"{low},{high}", "--tokens", "90", "--json", str(file)]
    assert main(["compare", "--model", folder, *arguments]) == 0
    assert len(traces) <= 2  # dense, and one trace for both thresholds
    written = json.loads(file.read_text())
    dense, loose, strict = written["plans"]
    assert [row["plan"] for row in written["plans"]] == ["dense", low, high]
    assert dense["accuracy_of_dense"] == dense["agreement_with_dense"] == dense["speedup"] == 1.0
    assert dense["layers_needed"] == dense["layers_run"] == 4.0
    assert loose["layers_needed"] < strict["layers_needed"] <= 4.0
    assert 0 < loose["agreement_with_dense"] < 1
    assert dense["kv_live_bytes"] == dense["kv_read_bytes"] > loose["kv_read_bytes"] > 0
    assert loose["seconds_per_token"] > 0 and loose["layers_needed_share"] == loose["layers_needed"] / 4
    out = capsys.readouterr().out
    assert (
        low in out
        and "speed-up" in out
        and f"{dense['kv_live_bytes'] / 1e6:.2f} MB" in out
        and f"{loose['bits_per_byte']:.3f}" in out
    )


@pytest.mark.slow
def test_decoding_for_the_time_follows_the_text(loaded, windows):
    plan = plans(4)["exit_patience"]
    text = Excerpt(prompt=windows.inputs[0, :9], following=windows.inputs[0, 9:25])
    timing, means = time_excerpt(loaded[0], plan, text, warmup=0, repeats=2)
    assert len(timing.samples) == 2
    whole = jax.jit(dyninf.forward)(loaded[0], windows.inputs[:1, :25], plan, prompt_lengths=np.asarray([9]))
    assert means["layers_needed"] == pytest.approx(np.mean(whole.needed[0, 9:]))
    assert means["tokens"] == 16 and means["own_layers"] == means["own_bytes"] == 0
    select = TopK(scorer=ShadowKV(page_size=2, outliers=1, rank=3), budget=4, sinks=0, dense_layers=3)
    _, means = time_excerpt(loaded[0], dyninf.Plan(select=select), text, warmup=0, repeats=1)
    # Two heads of 6, float32: 26 values, keys of 2 outliers and 18 tokens, 4 landmarks and 3 rows; 8 tokens of factors;
    # 4 pages that may be chosen, an outlier and a start.
    held = 4 * (12 * (26 + 20 + 4 + 3) + 8 * 3) + 2 * 4 + 2 * 4 + 4
    assert (means["own_layers"], means["own_bytes"]) == (1, held)


def test_excerpts_have_one_size_and_come_from_the_text():
    inputs = np.arange(60).reshape(3, 20)
    made = excerpts(Windows(inputs=inputs, targets=inputs, lengths=np.asarray([20, 20, 7]), num_bytes=inputs))
    assert [(len(text.prompt), len(text.following)) for text in made] == [(10, 10)] * 2
    assert made[1].prompt[0] == 20 and made[1].following[-1] == 39
    with pytest.raises(ValueError, match="three tokens"):
        excerpts(Windows(inputs=inputs, targets=inputs, lengths=np.asarray([1, 1, 1]), num_bytes=inputs))


@pytest.mark.parametrize(
    "name", ["exit_half", "exit_confidence_masked", "exit_patience", "evict_d2o", "selects", "factors", "revives"]
)
def test_a_random_state_is_one_that_a_prefill_could_leave(name, loaded):
    selects = dyninf.Plan(select=TopK(scorer=Quest(page_size=4), budget=8, dense_layers=1))
    factors = dyninf.Plan(select=TopK(scorer=ShadowKV(page_size=2, outliers=1), budget=2, sinks=0, dense_layers=1))
    revives = dyninf.Plan(sparsity=LazyLLM(layers=(1, 3), budgets=(4, 2), revive=2))
    named = {**plans(4), "selects": selects, "factors": factors, "revives": revives}
    model, plan, spec = loaded[0], named[name], dyninf.CacheSpec(capacity=11)
    made = random_state(model, plan, batch=3, length=5, capacity=11, key=jax.random.key(0))
    tokens = jnp.ones((3, 5), jnp.int32)
    _, real = jax.eval_shape(
        lambda model, plan: dyninf.prefill(model, tokens, jnp.full(3, 5), plan, spec, jax.random.key(0)), model, plan
    )
    assert jax.tree.structure(made) == jax.tree.structure(real)
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(real), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert made.cache.length.tolist() == [5, 5, 5] and np.abs(made.cache.layers[3].k[:, :2]).min() > 0


def test_bytes_of_a_step_by_hand(loaded):
    # One layer: 2 norms of 24; wqkv 24 x 2 x 4 x 6; wo 4 x 6 x 24; gate and up 24 x 2 x 40; down 40 x 24. Float32.
    layer = 4 * (2 * 24 + 24 * 2 * 4 * 6 + 4 * 6 * 24 + 24 * 2 * 40 + 40 * 24)
    cache = 4 * 2 * 3 * 10 * 2 * 6  # keys and values of three sequences of 10 tokens, two heads of 6
    means = {"layers_run": 2.0, "kv_read": 10.0}
    assert bytes_per_step(loaded[0], means, 3) == 2 * (layer + cache) + 4 * 290 * 24


@pytest.mark.parametrize(("share", "scoring"), [(1, 3), (2, 2)])
def test_bytes_of_summaries_by_hand(loaded, share, scoring):
    """Of the three layers that select, all score, or the first and the third."""
    plan = dyninf.Plan(select=TopK(scorer=Quest(page_size=2), budget=8, dense_layers=1, share=share))
    key = jax.random.key(0)
    cache = jax.eval_shape(lambda: random_state(loaded[0], plan, batch=3, length=20, capacity=30, key=key)).cache
    # 15 pages, 16 with padding; two heads; an upper and a lower bound of 6 features; float32.
    assert summary_bytes(cache) == scoring * 3 * 16 * 2 * 12 * 4


def test_eval_prints_and_writes_its_table(folder, tmp_path, capsys):
    file = tmp_path / "exits.json"
    arguments = ["--tokens", "90", "--plan", "exit_half", "--set", "depth.layer=3", "--json", str(file)]
    assert main(["eval", "--model", folder, *arguments]) == 0
    written = json.loads(file.read_text())
    out = capsys.readouterr().out
    assert written["plan"]["accuracy"] == written["exits"][2]["right"]
    assert f"right at no layer: {100 * written['right_nowhere']:.1f} %" in out
    assert "plan exit_half depth.layer=3" in out


def test_bench_appends_rows(folder, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    arguments = ["--batch", "2,1", "--context", "24", "--steps", "8", "--repeats", "3", "--plans", "dense,exit_half"]
    assert main(["bench", "--model", folder, *arguments, "--jsonl", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["batch"], row["plan"], row["layers_run"]) for row in rows] == [
        (1, "dense", 4.0),
        (1, "exit_half", 2.0),
        (2, "dense", 4.0),
        (2, "exit_half", 2.0),
    ]
    for row in rows:
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["tokens_per_s"] == pytest.approx(1000 * row["batch"] / row["median_ms"])
        assert row["achieved_gb_s"] == pytest.approx(row["bytes_per_step"] / row["median_ms"] / 1e6)
        assert row["shapes"]["d_model"] == 24 and row["jax"] == jax.__version__ and "commit" in row
    assert rows[2]["speedup"] == 1.0
    # Slots 16 to 23 are written one step after another: 17 to 24 are live, 20.5 in the mean.
    cache_1, cache_2 = (rows[i]["bytes_per_step"] for i in (0, 2))
    assert cache_2 - cache_1 == 4 * 2 * 4 * 20.5 * 2 * 6
    assert "tokens/s" in capsys.readouterr().out


def test_bench_times_prompts(folder, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    arguments = [
        "--prompt",
        "23",
        "--batch",
        "2",
        "--repeats",
        "2",
        "--plans",
        "exit_half,dense",
        "--prefill-chunk",
        "8",
    ]
    assert main(["bench", "--model", folder, *arguments, "--jsonl", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["bench"], row["plan"], row["prompt"], row["prefill_chunk"]) for row in rows] == [
        ("prompt", "exit_half", 23, 8),
        ("prompt", "dense", 23, 8),
    ]
    assert rows[0]["tokens_per_s"] == pytest.approx(1000 * 2 * 23 / rows[0]["median_ms"])
    assert rows[0]["speedup"] == pytest.approx(rows[1]["median_ms"] / rows[0]["median_ms"])
    title = " ".join(capsys.readouterr().out.split())  # as long as the folder's name, in lines as wide as the table
    assert "prompts of 23" in title
    assert main(["bench", "--model", folder, "--prefill-chunk", "8"]) != 0
    assert "--prompt beside --prefill-chunk" in capsys.readouterr().err


def test_plans_lists_every_plan_its_fields_and_its_policies(capsys):
    assert main(["plans", "--layers", "8"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in plans(8))
    assert "depth.patience=2" in out
    assert "Exit where the layer's own prediction is confident enough." in out


def test_doctor_names_what_serves_and_why_the_rest_does_not(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert jax.__version__ in out and "unrolled" in out and "segments" in out
    assert "needs an NVIDIA GPU" in out and "serves" in out


@pytest.mark.parametrize("whole", [True, False], ids=["intact", "damaged"])
def test_doctor_finds_a_damaged_model(whole, folder, monkeypatch, capsys):
    def load(name, **_):
        if not whole:
            raise ValueError("truncated")
        return load_model(folder)

    load_model, load_tokenizer = models.load, models.load_tokenizer
    monkeypatch.setattr(models, "available", lambda: ("shipped",))
    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "load_tokenizer", lambda name: load_tokenizer(folder))
    assert main(["doctor"]) == (0 if whole else 1)
    assert ("intact: " if whole else "damaged: truncated") in capsys.readouterr().out


def test_a_random_state_of_a_plan_that_catches_up_has_an_empty_window(tiny_model):
    plan = dyninf.Plan(depth=dyninf.depth.Saturation(threshold=0.5), fill="catch_up")
    state = random_state(tiny_model, plan, batch=2, length=3, capacity=8, key=jax.random.key(0))
    state, stats = jax.jit(dyninf.decode_step)(tiny_model, state, plan)
    assert state.cache.length.tolist() == [4, 4] and int(stats.run) >= 1


def test_bench_on_a_mesh(capsys):
    asked = "--mesh fsdp=2,data=2 --stacked --batch 4 --context 32 --steps 4 --repeats 1 --plans exit_half --jsonl -"
    assert main(["bench", "--shape", "tiny", *asked.split()]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["plan"], row["layers_run"], row["mesh"], row["speedup"]) == ("exit_half", 4.0, "fsdp=2,data=2", None)
    assert row["bytes_per_step"] > 0 and row["stacked"]
