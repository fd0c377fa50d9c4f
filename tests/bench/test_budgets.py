"""Quality against budget: the rule for budgets, the judge of attention, and the studies on a tiny model."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dyninf
from bench import budget_tables, budgets
from bench.attention_mass import attended, most_attended
from bench.budget_plans import plan_with_budget, policy_names, settings
from bench.resume import read_keys
from dyninf import models
from dyninf.kv import PageScorer, Quest, Recency, ShadowKV, TopK, pyramid_budgets
from dyninf.models.transformer import replace_layers
from dyninf.pytree import pytree
from dyninf.training.data import train_tokenizer

WORDS = ("self", "value", "index", "total", "result", "item", "node", "left", "right", "count", "name", "path")
LENGTH = 64


@pytest.fixture(scope="module")
def model():
    """A random model with the vocabulary of token tasks, and a rotary base of its own."""
    sizes = {"num_layers": 4, "d_model": 16, "d_ff": 24, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = models.ModelConfig(vocab_size=512, max_length=128, tie_embeddings=True, rope_theta=500.0, **sizes)
    return models.Transformer(config, jax.random.key(0))


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    return "\n".join(" ".join(rng.choice(WORDS, 8)) for _ in range(40))


@pytest.fixture(scope="module")
def folder(model, text, tmp_path_factory):
    """The model saved with a tokenizer and held-out text beside it."""
    path = tmp_path_factory.mktemp("budgets")
    train_tokenizer([text], 300).save(str(path / "tokenizer.json"))
    models.save_hf(model, path / "model", tokenizer_file=path / "tokenizer.json")
    (path / "model" / "heldout.jsonl").write_text(json.dumps({"name": "a.py", "text": text}) + "\n")
    return path / "model"


@pytest.fixture(scope="module")
def texts():
    tokens = np.random.default_rng(0).integers(1, 512, (3, LENGTH)).astype(np.int32)
    return tokens, np.array([LENGTH, LENGTH - 1, 40], np.int32)


def run(capsys, *arguments):
    """Run the script and return its rows and what it wrote to stderr."""
    capsys.readouterr()
    assert budgets.main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def test_sinks_and_recent_tokens_give_way_to_the_budget(model):
    large, small = (plan_with_budget("evict_d2o", budget, model).evict for budget in (1024, 12))
    assert (large.budget, large.sinks, large.recent) == (1024, 4, 256)
    assert (small.budget, small.sinks, small.recent) == (12, 3, 6)
    # 24 sinks and 96 recent tokens in pages of 8: of 8 pages two for sinks, four for the newest 25.
    votes = plan_with_budget("select_votes", 70, model).select
    assert (votes.budget, votes.sinks, votes.recent) == (64, 16, 25)
    assert votes.sink_pages + votes.recent_pages == 6
    assert settings(plan_with_budget("select_quest", 32, model))["dense_layers"] == 2


def test_every_policy_has_a_budget_or_says_why_not(model):
    for name in policy_names():
        assert plan_with_budget(name, 64, model) is not None
    with pytest.raises(ValueError, match="expected a budget of at least one page of 64 tokens for select_long, got 63"):
        plan_with_budget("select_long", 63, model)


def test_budgets_by_layer_keep_their_mean_and_proportions(model):
    made = plan_with_budget("evict_pyramid_kv", 256, model).evict
    assert np.allclose(made.budget, pyramid_budgets(256, 4, recent=32), atol=2)
    assert 255 <= np.mean(plan_with_budget("evict_pyramid_kv", 256, model).evict.budget) <= 256


def test_a_scorer_gets_the_rotation_of_the_model(model):
    assert plan_with_budget("evict_expected", 32, model).evict.scorer.theta == 500.0
    shadow = plan_with_budget("select_shadow_kv", 128, model).select.scorer
    assert shadow.theta == 500.0 and shadow.outliers == 3  # of 12 for 512


def test_what_is_read_with_the_newest_tokens_alone(model, texts):
    tokens, lengths = texts
    plan = dyninf.Plan(evict=TopK(scorer=Recency(), budget=8, sinks=2, recent=6))
    found = attended(model, tokens, lengths, plan)
    assert np.all(np.asarray(found.tokens) == 8)
    # The first layer by hand: probabilities of the last query, on slots 0, 1 and the last six.
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    seen = []

    def attend(q, k, v, *, window=None):
        seen.append((q, k, v))
        return jnp.zeros_like(q), None

    model.layers[0](model.embed(tokens), positions, attend)
    q, k, v = (np.asarray(part, np.float64) for part in seen[0])
    for row, last in enumerate(lengths - 1):
        held = np.r_[0:2, last - 5 : last + 1]
        recall, error = [], []
        for head in range(2):
            weights = np.exp(k[row, : last + 1, 0] @ q[row, last, head] / np.sqrt(8))
            weights /= weights.sum()
            exact, part = weights @ v[row, : last + 1, 0], weights[held] / weights[held].sum() @ v[row, held, 0]
            recall.append(weights[held].sum())
            error.append(np.linalg.norm(part - exact) / np.linalg.norm(exact))
        assert float(found.recall[0, row]) == pytest.approx(np.mean(recall), abs=1e-5)
        assert float(found.error[0, row]) == pytest.approx(np.mean(error), rel=1e-3)


def test_a_full_budget_reads_everything(model, texts):
    full = attended(model, *texts, plan_with_budget("evict_tova", LENGTH, model))
    assert np.allclose(full.recall, 1, atol=1e-5) and np.all(np.asarray(full.error) < 1e-4)
    assert np.all(np.asarray(full.tokens) == texts[1])


def test_nothing_beats_the_best_choice(model, texts):
    part = attended(model, *texts, plan_with_budget("select_page_mean", 16, model))
    best = most_attended(model, *texts, 16)
    assert np.all(np.asarray(part.tokens) <= 16) and np.all(np.asarray(best.tokens) == 16)
    assert np.all(np.asarray(part.recall) <= np.asarray(best.recall) + 1e-5)


@pytree(static=("page_size",))
class Backwards(PageScorer):
    """Prompts stored from their last token to the first, of which the first pages are read."""

    kind = "mean"

    page_size: int = 4

    def score(self, q_BTNH, summary_BPKX, num_pages_B):
        """Return scores that fall from page to page."""
        batch, pages, num_kv, _ = summary_BPKX.shape
        return -jnp.broadcast_to(jnp.arange(pages, dtype=jnp.float32), (batch, num_kv, pages))

    def arrange(self, obs, sinks, recent):
        """Return the prompt backwards, but for its recent tokens and the padding."""
        slot_BT = jnp.broadcast_to(jnp.arange(obs.k_BTKH.shape[1]), obs.k_BTKH.shape[:2])
        end_B1 = obs.lengths_B[:, None] - recent
        order_BT = jnp.where(slot_BT < end_B1, end_B1 - 1 - slot_BT, slot_BT)
        return jnp.broadcast_to(order_BT[:, :, None], obs.k_BTKH.shape[:3])


def test_prompts_in_another_order_than_the_text(model, texts):
    # Slots 0 to 3 hold tokens 61 to 58; the last page, slots 60 to 63, has tokens 1, 0, 62 and the new one, 63.
    backwards = dyninf.Plan(select=TopK(scorer=Backwards(), budget=8, sinks=0))
    ends = dyninf.Plan(evict=TopK(scorer=Recency(), budget=8, sinks=2, recent=6))
    found, same = (attended(model, *texts, plan) for plan in (backwards, ends))
    for name in ("recall", "error", "tokens"):
        np.testing.assert_allclose(getattr(found, name)[:, 0], getattr(same, name)[:, 0], rtol=1e-4)


def test_layers_that_take_the_scores_of_the_one_before(model, texts):
    # All layers alike, and none changes the state: what one scores is what the next would.
    layer = copy.copy(model.layers[0])
    layer.wo, layer.w_down = (nnx.Param(0 * weights[...]) for weights in (layer.wo, layer.w_down))
    layer.wqkv = nnx.Param(50 * layer.wqkv[...])
    alike = replace_layers(model, nnx.List([layer] * 4))
    quest = TopK(scorer=Quest(page_size=4), budget=12, sinks=0)
    alone, shared = (
        attended(alike, *texts, dyninf.Plan(select=select)) for select in (quest, dataclasses.replace(quest, share=2))
    )
    np.testing.assert_allclose(shared.recall, alone.recall, rtol=1e-5)
    np.testing.assert_allclose(shared.error, alone.error, rtol=1e-3)


@pytest.mark.slow
def test_caches_of_their_own_tell_an_error_and_no_recall(model, texts):
    shadow = TopK(scorer=ShadowKV(page_size=4, outliers=0, rank=8, theta=500.0), budget=8, sinks=0)
    found = attended(model, *texts, dyninf.Plan(select=shadow))
    assert np.all(np.isnan(found.recall)) and np.all(np.asarray(found.error) > 0)
    # Two pages, the tokens of the prompt behind its whole pages (of 63, 62 and 39), and the last one.
    np.testing.assert_array_equal(found.tokens, [[8 + 3 + 1, 8 + 2 + 1, 8 + 3 + 1]] * 4)


@pytest.mark.slow
def test_tasks_are_answered_and_a_stopped_run_goes_on(folder, tmp_path, capsys):
    file, options = tmp_path / "rows.jsonl", ["--study", "tasks", "--model", folder, "--length", LENGTH]
    options += ["--samples", 2, "--batch", 4, "--policies", "dense,select_long", "--budgets", 2, "--jsonl", file]
    rows, refused = run(capsys, *options)
    assert [(row["policy"], row["denominator"], row["query"]) for row in rows] == [
        ("dense", None, "with"),
        ("dense", None, "after"),
    ]
    assert refused.count("select_long at 1/2: expected a budget of at least one page of 64") == 2
    assert rows[0]["exact"] == rows[1]["exact"] and set(rows[0]["exact"]) == {
        "needle",
        "multikey_all",
        "multivalue",
        "multiquery",
    }
    whole = file.read_text()
    file.write_text(whole[:-30])  # killed while it wrote
    again, _ = run(capsys, *options)
    assert [row["query"] for row in again] == ["after"]
    assert run(capsys, *options)[0] == [] and len(file.read_text().splitlines()) == 2


@pytest.mark.slow
def test_text_is_predicted_and_attention_judged(folder, capsys):
    options = ["--model", folder, "--length", LENGTH, "--samples", 2, "--batch", 2, "--budgets", 4]
    rows, _ = run(capsys, "--study", "nll", "--policies", "dense,evict_recent", *options)
    dense, recent = rows
    assert dense["tokens"] == recent["tokens"] == 2 * LENGTH // 2
    assert 0 < dense["nll"] != recent["nll"] and recent["budget"] == 16
    rows, _ = run(capsys, "--study", "mass", "--policies", "dense,select_quest,most_attended", *options)
    assert [row["tokens_read"] for row in rows] == [64, 40, 16]  # two of four layers read all
    assert rows[0]["recall"] == pytest.approx(1, abs=1e-5) and rows[1]["recall"] < 1


def test_shards_share_the_work():
    def jobs(shard):
        arguments = budgets._parse(["--study", "mass", "--shard", shard])
        return budgets.list_jobs(arguments)[arguments.shard[0] :: arguments.shard[1]]

    parts = [job for part in range(3) for job in jobs(f"{part}/3")]
    assert set(parts) == set(jobs("0/1")) and len(parts) == len(jobs("0/1"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--policies", "dense,evict_all", "expected --policies among"),
        ("--budgets", "2,x", "expected --budgets as numbers"),
        ("--budgets", "2048", "expected --budgets between 1 and --length=1024"),
        ("--shard", "3/3", "expected --shard as I/N"),
        ("--samples", "0", "expected --samples of at least 1"),
    ],
)
def test_bad_options_are_refused(capsys, option, value, message):
    with pytest.raises(SystemExit):
        budgets.main(["--study", "tasks", option, value])
    assert message in capsys.readouterr().err


def test_a_file_of_something_else_stays_as_it_is(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("remember the milk\n")
    with pytest.raises(ValueError, match=r"expected rows of bench/budgets\.py"):
        read_keys(file, "budgets", budgets.KEY)
    assert file.read_text() == "remember the milk\n"


def made_rows(study):
    """Rows of two policies at two budgets, in no order."""
    about = {"study": study, "model": "m", "length": 1024, "samples": 4, "dense_layers": 0, "texts": 4}
    measured = {"tasks": {"exact": {"needle": 1.0, "multiquery": 0.5}}, "nll": {"nll": 1.5, "accuracy": 0.6}}
    measured["mass"] = {"recall": 0.9, "error": 0.2}
    jobs = [("select_quest", 8), ("evict_recent", 8), ("evict_recent", 2), ("dense", None)]
    queries = ("after", "with") if study == "tasks" else (None,)
    return [
        about | measured[study] | {"policy": policy, "denominator": denominator, "query": query}
        for policy, denominator in jobs
        for query in queries
    ]


def test_tables_have_policies_down_and_budgets_across():
    cells = {"tasks": "75 / 75", "nll": "1.500 / 60.0", "mass": "0.900 / 0.200"}
    own = made_rows("mass")[0] | {"recall": None}
    assert budget_tables.tables("mass", [own])[0][1] == [["select_quest", "– / 0.200"]]
    for study, cell in cells.items():
        ((head, lines, note),) = budget_tables.tables(study, made_rows(study))
        assert head == ["policy", "1/2", "1/8"]
        assert lines == [["evict_recent", cell, cell], ["select_quest", "", cell]]
        assert note.endswith(f"Dense: {cell}.")


def test_the_picture_is_drawn(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    budget_tables.draw(tmp_path / "budgets.png", made_rows("tasks"), made_rows("nll"), pyplot)
    assert (tmp_path / "budgets.png").stat().st_size > 10000
