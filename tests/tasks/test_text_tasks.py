"""The rules of the text tasks: every sample is solved from its text alone, by regular expressions."""

import collections
import json
import re

import numpy as np
import pytest

from dyninf.tasks import TASKS, make_samples
from dyninf.tasks.frequent_words import zipf_counts
from dyninf.tasks.words import ADJECTIVES, NOISE, NOUNS, SINGULAR, VERBS

NEEDLE = re.compile(r"One special magic (number|word|uuid) for (\S+) is: (\S+)\.(?=\s|$)")
SHAPES = {"numbers": r"[1-9]\d{6}", "words": r"[a-z]+-[a-z]+", "uuids": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}
LENGTHS = {"common_words": 1024}
# task -> haystack, kinds of key and value, keys, values of a key, queries; None: as many keys as fit
NIAH = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("prose", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("prose", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("prose", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needles", "words", "numbers", None, 1, 1),
    "niah_multikey_3": ("needles", "uuids", "uuids", None, 1, 1),
    "niah_multivalue": ("prose", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("prose", "words", "numbers", 4, 1, 4),
}


def solve(sample):
    """The answers, as a set, that follow from the text."""
    name, context, question = sample.task, sample.context, sample.question
    if name.startswith("niah"):
        asked = re.search(r"does the text give for (.*)\?", question)[1].replace(" and ", ", ").split(", ")
        return {value for _, key, value in NEEDLE.findall(context) if key in asked}
    if name == "variable_tracking":
        value, holders = re.search(r"the value (\d+)", question)[1], set()
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", context):
            holders |= {name} if source == value or source in holders else set()
        return holders
    if name == "common_words":
        entries = re.findall(r"\d+\. (\S+)", context.rpartition("\n")[2])
        return {word for word, _ in collections.Counter(entries).most_common(10)}
    if name == "frequent_words":
        counts = collections.Counter(context.rpartition("\n")[2].split(" "))
        del counts["..."]
        return {word for word, _ in counts.most_common(3)}
    if name == "passkey":
        return {re.search(r"The pass key is (\d+)\.", context)[1]}
    return {json.loads(context[context.index("{") :])[re.search(r'for the key "(.*)"\?', question)[1]]}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [600, 2048])
def test_every_task_is_solved_by_its_text_and_has_its_length(tokenizer, name, length):
    length = max(length, LENGTHS.get(name, 0))
    samples = make_samples(name, tokenizer, length, 3, 4)
    for sample in samples:
        assert 0.97 * length <= sample.length <= length
        assert len(sample.answers) == len(set(sample.answers)) and solve(sample) == set(sample.answers)
        assert sample.context_ids == tuple(tokenizer.encode(sample.context).ids)
        assert sample.question_ids == tuple(tokenizer.encode(sample.question).ids)
        # The answer is not in the question, and the target holds every answer, in order and within its room.
        assert not any(answer in sample.question for answer in sample.answers)
        target = tokenizer.decode(list(sample.target_ids))
        places = [target.index(answer) for answer in sample.answers]
        assert places == sorted(places) and len(sample.target_ids) <= sample.max_new_tokens
        assert sample.task == name and sample.metric == "all" and all(0 <= depth <= 1 for depth in sample.depths)
    assert len({sample.context for sample in samples}) == 4


@pytest.mark.parametrize("name", NIAH)
def test_needles_follow_the_rule(tokenizer, name):
    haystack, keys, values, num_keys, num_values, num_queries = NIAH[name]
    for sample in make_samples(name, tokenizer, 1500, 0, 3):
        needles = NEEDLE.findall(sample.context)
        counts = collections.Counter(key for _, key, _ in needles)
        assert set(counts.values()) == {num_values} and (num_keys is None or len(counts) == num_keys)
        assert len({value for *_, value in needles}) == len(needles)
        for kind, key, value in needles:
            assert kind == SINGULAR[values]
            assert re.fullmatch(SHAPES[keys], key) and re.fullmatch(SHAPES[values], value)
        assert len(sample.answers) == len(sample.depths) == num_queries * num_values
        assert all(sample.context.count(answer) == 1 for answer in sample.answers)
        rest = NEEDLE.sub("", sample.context.partition("\n")[2]).strip()
        if haystack == "noise":
            assert set(rest.splitlines()) <= {NOISE, ""}
        elif haystack == "needles":
            assert len(rest) < 60 and len(needles) > 10
        else:
            sentences = re.split(r"(?<=\.)\s+", rest)
            assert len(sentences) > 40 and len(set(sentences)) > 0.95 * len(sentences)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_1", "niah_multikey_3", "passkey", "key_value"])
def test_depth_is_obeyed_and_recorded(tokenizer, name):
    for depth in (0.0, 0.3, 1.0):
        for sample in make_samples(name, tokenizer, 2048, 1, 2, depth=depth):
            assert sample.depths == pytest.approx([depth], abs=0.06)
            # Recorded in tokens of the text before the needle.
            place = sample.context.index(sample.answers[0]) - sample.context.index("\n")
            assert place / len(sample.context) == pytest.approx(depth, abs=0.08)


def test_depths_one_for_each_needle(tokenizer):
    (sample,) = make_samples("niah_multiquery", tokenizer, 2048, 1, 1, depth=(0.9, 0.1, 0.5, 0.1))
    assert sample.depths == pytest.approx([0.9, 0.1, 0.5, 0.1], abs=0.06)
    order = sorted(range(4), key=lambda i: sample.context.index(sample.answers[i]))
    assert order == [1, 3, 2, 0]  # equal depths keep their order


@pytest.mark.parametrize("chains", [1, 3])
def test_chains_are_stated_in_order_and_resolve(tokenizer, chains):
    for sample in make_samples("variable_tracking", tokenizer, 1500, 2, 3, num_chains=chains, num_hops=3):
        lines = re.findall(r"^VAR ([A-Z]{5}) = (?:(\d{5})|VAR ([A-Z]{5}))$", sample.context, re.M)
        values = {}
        for name, number, source in lines:
            assert name not in values  # assigned once
            values[name] = number or values[source]  # a KeyError would be a use before its assignment
        assert len(lines) == 4 * chains and collections.Counter(values.values()).most_common()[-1][1] == 4
        assert [name for name in values if values[name] in sample.question] == list(sample.answers)
        assert len(sample.depths) == 4 and list(sample.depths) == sorted(sample.depths)


@pytest.mark.parametrize(("length", "many", "few"), [(1024, 6, 1), (4096, 30, 3)])
def test_common_words_have_their_counts(tokenizer, length, many, few):
    (sample,) = make_samples("common_words", tokenizer, length, 0, 1)
    *_, answered, _, _, listing = sample.context.split("\n")
    entries = re.findall(r"(\d+)\. (\S+)", listing)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = collections.Counter(word for _, word in entries)
    assert sorted(set(counts.values())) == [few, many] and set(sample.answers) == {w for w in counts if counts[w] > few}
    # The worked example has other words, and its answer is right: ten words three times among ten others.
    example = collections.Counter(re.findall(r"\d+\. (\S+)", sample.context.split("\n")[1]))
    best = answered.rpartition(": ")[2].split(", ")
    assert {word: example[word] for word in best} == dict.fromkeys(best, 3) and len(best) == 10
    assert sorted(set(example.values())) == [1, 3] and not set(example) & set(counts)


def test_frequent_words_follow_zipfs_law(tokenizer):
    for sample in make_samples("frequent_words", tokenizer, 4096, 0, 2):
        counts = collections.Counter(sample.context.rpartition("\n")[2].split(" "))
        ranks = [count for _, count in counts.most_common()]
        total = sum(ranks)
        assert len(ranks) == 4096 // 50 and counts["..."] == ranks[0]
        # zeta of 81 words: sum of k^-2 is 1.6327; rank k has its share but for rounding, and at least one.
        expected = total / 1.6327 * np.arange(1, 82) ** -2.0
        np.testing.assert_allclose(ranks[:4], expected[:4], rtol=0.1)
        assert [counts[answer] for answer in sample.answers] == ranks[1:4] and ranks[3] > ranks[4]


@pytest.mark.parametrize("length", [500, 600, 700])
def test_the_most_frequent_words_are_never_tied(tokenizer, length):
    for sample in make_samples("frequent_words", tokenizer, length, 0, 2, alpha=0.3, num_words=12, num_answers=4):
        counts = collections.Counter(sample.context.rpartition("\n")[2].split(" "))
        ranks = [count for _, count in counts.most_common()]
        assert len(set(ranks[:6])) == 6 and [counts[answer] for answer in sample.answers] == ranks[1:5]


def test_zipf_counts_by_hand():
    # 100 (1, 1/4, 1/9, 1/16) / 1.4236 = 70.2, 17.6, 7.8, 4.4
    assert zipf_counts(100, 4, alpha=2.0, distinct=0).tolist() == [70, 18, 8, 4]
    # 4 / 1.4236 = 2.8, 0.7, 0.3, 0.2 -> 3, 1, 1, 1; two ranks have to differ from the next: 3, 2, 1, 1
    assert zipf_counts(4, 4, alpha=2.0, distinct=2).tolist() == [3, 2, 1, 1]


def test_key_value_is_json_with_distinct_uuids(tokenizer):
    (sample,) = make_samples("key_value", tokenizer, 3000, 0, 1)
    pairs = json.loads(sample.context[sample.context.index("{") :], object_pairs_hook=list)
    everything = [entry for pair in pairs for entry in pair]
    assert len(pairs) > 20 and len(set(everything)) == len(everything)
    assert all(re.fullmatch(SHAPES["uuids"], entry) for entry in everything)


def test_passkey_states_its_number_twice(tokenizer):
    (sample,) = make_samples("passkey", tokenizer, 1000, 0, 1, digits=7)
    assert re.fullmatch(r"\d{7}", sample.answers[0]) and sample.context.count(sample.answers[0]) == 2
    assert sample.context.count(NOISE) > 20


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_depends_on_task_seed_and_index_alone(tokenizer, name):
    length = LENGTHS.get(name, 700)
    three, two = (make_samples(name, tokenizer, length, 5, count) for count in (3, 2))
    assert three[:2] == two
    assert make_samples(name, tokenizer, length, 6, 1)[0].answers != two[0].answers
    if name.startswith("niah"):
        # A longer haystack hides the same needles.
        assert make_samples(name, tokenizer, 2 * length, 5, 1)[0].answers == two[0].answers


def test_no_pair_of_words_contains_another():
    for group in (ADJECTIVES, NOUNS, VERBS):
        assert len(group) == len(set(group))
    assert not [(a, b) for a in ADJECTIVES for b in ADJECTIVES if a != b and a.endswith(b)]
    assert not [(a, b) for a in NOUNS for b in NOUNS if a != b and a.startswith(b)]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("niah", {}, "one of the tasks niah_single_1, .*key_value, got 'niah'"),
        ("niah_single_1", {"depht": 1}, "to change one of haystack, .*, got depht"),
        ("niah_single_1", {"depth": 1.5}, "depth between 0 and 1"),
        ("niah_single_1", {"depth": (0.1, 0.2)}, "or 1 of them"),
        ("niah_single_1", {"haystack": "essay"}, "haystack to be one of noise, prose, needles, got 'essay'"),
        ("niah_single_1", {"values": "names"}, "values to be one of words, numbers, uuids"),
        ("niah_single_1", {"num_keys": 0}, "num_keys to be an integer of at least 1, got 0"),
        ("niah_single_1", {"answer_tokens": 2}, "answer_tokens of at least 8"),
        ("niah_single_1", {"length": 60}, r"length of at least \d+ tokens for niah_single_1 .* got 60"),
        ("niah_multikey_1", {"num_keys": 60}, r"length of at least \d+ tokens"),
        ("common_words", {"length": 300}, r"length of at least \d+ tokens for common_words"),
        ("common_words", {"other_repeats": 9}, "common_repeats above other_repeats, got 6 and 9"),
        ("frequent_words", {"alpha": 0}, "alpha above 0"),
        ("frequent_words", {"num_words": 4}, "num_words of at least 5 for 3 answers, got 4"),
        ("passkey", {"digits": 0}, "digits"),
        ("passkey", {"count": 0}, "count to be an integer of at least 1, got 0"),
        ("passkey", {"length": 0}, "length to be an integer of at least 1, got 0"),
        ("passkey", {"seed": 1.5}, "seed to be an integer, got 1.5"),
    ],
)
def test_bad_requests_are_refused(tokenizer, name, change, message):
    request = {"length": 1000, "seed": 0, "count": 1} | change
    with pytest.raises(ValueError, match=message):
        make_samples(name, tokenizer, **request)


def test_a_supply_of_words_that_runs_out_says_so(words):
    with pytest.raises(ValueError, match="hardly any is left"):
        make_samples("niah_multikey_2", words, 10**6, 0, 1)
