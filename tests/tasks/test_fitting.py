"""Fitting samples to a length with tokenizers of many kinds."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dyninf.models import load_tokenizer
from dyninf.tasks import TASKS, make_samples
from dyninf.tasks.fitting import Encoder, weave


@pytest.mark.parametrize("length", [200, 333, 1000, 20_000])
def test_lengths_with_one_token_a_word(words, length):
    for name in ("niah_single_1", "niah_single_2", "passkey", "variable_tracking"):
        sample = make_samples(name, words, length, 0, 1)[0]
        assert 0.97 * length <= sample.length <= length


def test_every_task_takes_anything_that_encodes(words):
    for name in TASKS:
        (sample,) = make_samples(name, words, 1500, 0, 1)
        assert 0.97 * 1500 <= sample.length <= 1500 and sample.prompt_ids == sample.context_ids + sample.question_ids


def test_tokens_around_a_text_are_kept_before_it_alone(words):
    plain, marked = words, type(words)(before=[1], after=[2, 3])
    one, other = (make_samples("passkey", each, 300, 0, 1)[0] for each in (plain, marked))
    assert other.context_ids[0] == 1 and other.context_ids.count(1) == 1 and 2 not in other.context_ids
    assert len(other.question_ids) == len(one.question_ids) and not {1, 2, 3} & set(other.question_ids)
    assert not {1, 2, 3} & set(other.target_ids)


def test_a_template_of_the_tokenizers_library_is_seen():
    tokenizer = load_tokenizer("pycode-13m")
    bare = Encoder(tokenizer)("some words")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    encode = Encoder(tokenizer)
    assert encode.prefix == (0,) and encode("some words") == bare and encode("") == []


def word_level(unknown):
    vocabulary = {"[UNK]": 0, "The": 1, "river": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_a_tokenizer_that_does_not_know_the_words_is_refused():
    with pytest.raises(ValueError, match="can encode the text of this task, but 'A' does not survive"):
        make_samples("passkey", word_level("[UNK]"), 300, 0, 1)


def test_a_tokenizer_that_drops_characters_is_refused():
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz. ")}
    tokenizer = Tokenizer(models.BPE(letters, []))
    with pytest.raises(ValueError, match="'Special' does not survive"):
        make_samples("niah_single_2", tokenizer, 3000, 0, 1)


def test_a_tokenizer_that_truncates_is_refused():
    tokenizer = load_tokenizer("pycode-13m")
    tokenizer.enable_truncation(200)
    with pytest.raises(ValueError, match="switch off its truncation"):
        make_samples("niah_single_1", tokenizer, 1000, 0, 1)


def test_weave_by_hand():
    text, starts = weave(["u0", "u1", "u2"], ["last", "b", "a", "first"], [3, 1, 1, 0], "\n")
    assert text == "first\nu0\nb\na\nu1\nu2\nlast"
    assert [text[start:].split("\n")[0] for start in starts] == ["last", "b", "a", "first"]
