"""Captions to ids and back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imcap_ray.errors import ConfigError, ModelError
from imcap_ray.text.vocabulary import END_ID, PADDING_ID, SPECIAL_TOKENS, START_ID, UNKNOWN_ID, Vocabulary

CAPTIONS = ["A dog runs .", "A dog sits on the grass .", "The dog's ball", "a cat"]
VOCABULARY = Vocabulary.build(CAPTIONS)


@given(st.lists(st.sampled_from(VOCABULARY.tokens[len(SPECIAL_TOKENS) :]), max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_caption_of_known_words_round_trips(words: list[str]) -> None:
    caption = VOCABULARY.to_text([*map(VOCABULARY.tokens.index, words), END_ID])

    ids = VOCABULARY.to_ids(caption, max_length=50)

    assert (ids[0], ids[-1]) == (START_ID, END_ID)
    assert VOCABULARY.to_text(ids) == caption


def test_a_contraction_is_rejoined() -> None:
    assert VOCABULARY.to_text(VOCABULARY.to_ids("The dog's ball.", max_length=9)) == "the dog's ball"


def test_an_unseen_word_becomes_unknown_and_is_not_generated() -> None:
    ids = VOCABULARY.to_ids("a zebra runs", max_length=9)

    assert ids[2] == UNKNOWN_ID
    assert VOCABULARY.to_text(ids) == "a runs"


def test_a_long_caption_is_truncated_and_still_ends() -> None:
    ids = VOCABULARY.to_ids("a dog sits on the grass", max_length=3)

    assert VOCABULARY.to_text(ids) == "a dog sits"
    assert ids[-1] == END_ID


def test_text_stops_at_the_first_end_and_leaves_out_special_tokens() -> None:
    dog = VOCABULARY.tokens.index("dog")

    assert VOCABULARY.to_text([START_ID, dog, PADDING_ID, UNKNOWN_ID, dog, END_ID, dog]) == "dog dog"
    assert VOCABULARY.to_text([]) == ""


def test_the_most_frequent_tokens_come_first_and_rare_ones_are_dropped() -> None:
    vocabulary = Vocabulary.build(CAPTIONS, min_count=2)

    assert vocabulary.tokens == [*SPECIAL_TOKENS, "a", "dog", "the"]
    assert len(vocabulary) == 7


def test_the_order_of_the_captions_does_not_matter() -> None:
    assert Vocabulary.build(reversed(CAPTIONS)).tokens == VOCABULARY.tokens


def test_a_special_token_in_a_caption_is_not_a_word() -> None:
    vocabulary = Vocabulary.build(["<start> a <unknown> <end>"])

    assert not set(vocabulary.tokens[len(SPECIAL_TOKENS) :]) & set(SPECIAL_TOKENS)


@pytest.mark.parametrize("tokenizer", ["ptb", "unicode", "arabic", "seed"])
def test_a_vocabulary_round_trips_through_json(tokenizer: str) -> None:
    vocabulary = Vocabulary.build([*CAPTIONS, "ein Straßenhund läuft", "犬が走る"], tokenizer=tokenizer)

    copy = Vocabulary.from_json(vocabulary.to_json())

    assert (copy.tokens, copy.tokenizer) == (vocabulary.tokens, tokenizer)
    assert copy.to_json() == vocabulary.to_json()


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "[]",
        "5",
        "{",
        b"\xff\xfe\xfd",
        '{"tokenizer": "ptb"}',
        '{"tokens": ["a"]}',
        '{"tokenizer": "ptb", "tokens": "abc"}',
        '{"tokenizer": "ptb", "tokens": ["a", 5]}',
        '{"tokenizer": "bpe", "tokens": ["a"]}',
        '{"tokenizer": ["ptb"], "tokens": ["a"]}',
    ],
)
def test_corrupt_json_is_a_model_error(damaged: str | bytes) -> None:
    with pytest.raises(ModelError, match="vocabulary.json must hold `tokenizer` and `tokens`"):
        Vocabulary.from_json(damaged)


def test_a_repeated_token_is_refused() -> None:
    with pytest.raises(ModelError, match="the vocabulary repeats 1 tokens, the first is 'dog'"):
        Vocabulary.from_json(json.dumps({"tokenizer": "ptb", "tokens": ["dog", "cat", "dog"]}))
    with pytest.raises(ModelError, match="<end>"):
        Vocabulary(["<end>"])


def test_an_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokenizer must be one of ptb, unicode, arabic, jieba, seed, got 'bpe'"):
        Vocabulary.build(CAPTIONS, tokenizer="bpe")


def test_an_extended_vocabulary_keeps_its_ids_and_appends_the_new_words_that_are_frequent_enough():
    vocabulary = Vocabulary.build(["a dog", "a cat"])

    extended = vocabulary.extend(["a viaduct", "a viaduct on a farm"], tokenizer="unicode", min_count=2)

    assert extended.tokens == [*vocabulary.tokens, "viaduct"]
    assert extended.tokenizer == "unicode"
