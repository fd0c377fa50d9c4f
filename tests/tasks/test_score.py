"""Scores of answers, and answering with the question in the prompt or after it."""

import dataclasses

import numpy as np
import pytest

import dyninf
from dyninf.depth import ExitAt
from dyninf.tasks import (
    Needles,
    Sample,
    TaskResult,
    draw,
    evaluate_task,
    forced_accuracy,
    make_samples,
    mixture,
    score_answers,
    to_samples,
)

MIXED = ["needle", "multiquery", "multivalue", "tracking_names"]


def sample(**changes):
    given = {"task": "t", "context_ids": (1,), "question_ids": (2,), "answers": ("Red", "blue"), "target_ids": (3,)}
    return Sample(**given | {"max_new_tokens": 4} | changes)


@pytest.mark.parametrize(
    ("answers", "metric", "generated", "text", "score"),
    [
        (("Red", "blue"), "all", [], "it is red, or BLUE", 1.0),
        (("Red", "blue"), "all", [], "it is red", 0.5),
        (("Red", "blue"), "part", [], "it is red", 1.0),
        (("Red", "blue"), "part", [], "green", 0.0),
        (((5, 6), (7,)), "all", [7, 5, 5, 6], "", 1.0),
        (((5, 6), (7,)), "all", [5, 7, 6], "", 0.5),
        (((5, 6),), "all", [5], "", 0.0),
        (((5, 6), (9,)), "part", [5, 6], "", 1.0),
    ],
)
def test_scores_by_hand(answers, metric, generated, text, score):
    assert score_answers(sample(answers=answers, metric=metric), generated, text) == score


@pytest.fixture(scope="module")
def samples(small):
    """Contexts, questions and answers of many lengths, in one batch."""
    samples = to_samples(mixture(MIXED, [1, 1, 1, 1], (44, 54), 0, 8, vocabulary=small))
    assert len({len(one.question_ids) for one in samples}) > 1 and len({one.max_new_tokens for one in samples}) > 1
    return samples


@pytest.fixture(scope="module")
def dense(random_model, samples):
    return evaluate_task(random_model, None, samples)


@pytest.fixture(scope="module")
def needles(small):
    """Seven needles among four others, the last in a shorter text."""
    batches = [draw(Needles(num_keys=5), length, 0, count, vocabulary=small) for length, count in ((48, 6), (40, 1))]
    return [one for batch in batches for one in to_samples(batch)]


@pytest.mark.parametrize("query", ["with", "after"])
def test_a_model_made_by_hand_finds_every_needle(solver, needles, query):
    result = evaluate_task(solver, dyninf.Plan(), needles, query=query, batch_size=3)
    assert result.score == result.exact == 1.0 and len(result.results) == 7
    assert [one.generated for one in result.results] == [one.target_ids for one in needles]
    assert [one.depths for one in result.results] == [one.depths for one in needles]
    assert all(row.tolist() == [True] for row in forced_accuracy(solver, None, needles, batch_size=3))


def test_wrong_answers_are_wrong(solver, small, needles):
    bad = (small.noise.start,)
    wrong = [dataclasses.replace(one, target_ids=bad, answers=(*one.answers, bad)) for one in needles]
    result = evaluate_task(solver, None, wrong, batch_size=3)
    assert result.exact == 0.0 and result.score == 0.5  # one of two answers
    assert all(row.tolist() == [False] for row in forced_accuracy(solver, None, wrong, batch_size=3))


def test_both_ways_of_asking_agree_for_the_dense_model(random_model, samples, dense):
    assert evaluate_task(random_model, dyninf.Plan(), samples, query="after") == dense
    assert len({one.generated for one in dense.results}) > 5
    assert [len(one.generated) for one in dense.results] == [one.max_new_tokens for one in samples]
    # Feeding its own answers back by teacher forcing, the model finds each of them most probable.
    own = [dataclasses.replace(one, target_ids=out.generated) for one, out in zip(samples, dense.results, strict=True)]
    assert all(row.all() for row in forced_accuracy(random_model, None, own))


def test_a_plan_changes_what_is_generated(random_model, samples, dense):
    plan = dyninf.Plan(depth=ExitAt(layer=1), sampler=dyninf.Temperature(temperature=2.0))
    other = evaluate_task(random_model, plan, samples)  # greedy all the same: no key is asked for
    assert [one.generated for one in other.results] != [one.generated for one in dense.results]


@pytest.mark.parametrize("query", ["with", "after"])
def test_a_stop_ends_an_answer(random_model, samples, dense, query):
    stop = next(one.generated[2] for one in dense.results if len(one.generated) > 2)
    stopped = evaluate_task(random_model, None, samples, query=query, stop=[stop])
    for one, whole in zip(stopped.results, dense.results, strict=True):
        end = whole.generated.index(stop) if stop in whole.generated else None
        assert one.generated == whole.generated[:end]
    assert stopped != dense


def test_samples_that_fill_the_context_run_in_groups(random_model, small):
    # Prompts of 63 and 59 tokens and answers of 1 and 5: the longest of each do not fit the 64 together.
    batches = [draw(task, 64, 0, 2, vocabulary=small) for task in ("needle", "tracking_names")]
    samples = [one for batch in batches for one in to_samples(batch)]
    together = evaluate_task(random_model, None, samples)
    alone = [evaluate_task(random_model, None, part) for part in (samples[:2], samples[2:])]
    assert together.results == alone[0].results + alone[1].results


def test_text_is_decoded_and_scored(random_model, samples, dense):
    class Spelled:
        def decode(self, ids):
            return f"The Answer is {len(ids)}"

    asked = [dataclasses.replace(one, answers=("answer is", "no")) for one in samples]
    result = evaluate_task(random_model, None, asked, tokenizer=Spelled())
    assert [one.text for one in result.results] == [f"The Answer is {len(one.generated)}" for one in dense.results]
    assert result.score == 0.5


def test_scores_by_depth():
    def result(score, *depths):
        return dyninf.tasks.SampleResult(task="t", score=score, exact=False, depths=depths, generated=(), text="")

    some = (result(1.0, 0.1), result(0.0, 0.2), result(0.5, 1.0), result(1.0, 0.4, 0.6), result(9))
    means, counts = TaskResult(results=some).by_depth(4)
    np.testing.assert_array_equal(means, [0.5, np.nan, 1.0, 0.5])
    assert counts.tolist() == [2, 0, 1, 1]
    means, counts = TaskResult(results=(result(1.0),)).by_depth()
    assert np.isnan(means).all() and counts.sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": []}, "at least one sample, got none"),
        ({"query": "before"}, "query 'with' or 'after', got 'before'"),
        ({"batch_size": 0}, "batch_size to be an integer of at least 1"),
        ({"plan": "dense"}, "expected a Plan, got str"),
        ({"samples": [sample(answers=("text",))]}, "expected a tokenizer"),
        ({"samples": [sample(answers=((1,),), question_ids=())]}, "got an empty one in sample 0"),
        (
            {"samples": [sample(answers=((56,),), target_ids=(56,))]},
            "token ids below 56, .* got 56",
        ),
        (
            {"samples": [sample(answers=((3,),), context_ids=(1,) * 60)]},
            "context of 64 tokens, got 65 in sample 0 of 't', room for the answer included; make them with length=64",
        ),
    ],
)
def test_bad_requests_are_refused(random_model, change, message):
    request = {"plan": None, "samples": [sample(answers=((1,),))]} | change
    with pytest.raises(ValueError, match=message):
        evaluate_task(random_model, **request)


def test_the_target_of_a_text_sample_scores_full_marks(tokenizer):
    for name in ("passkey", "niah_multiquery", "variable_tracking", "frequent_words", "key_value"):
        (one,) = make_samples(name, tokenizer, 700, 0, 1)
        assert score_answers(one, (), tokenizer.decode(list(one.target_ids))) == 1.0
