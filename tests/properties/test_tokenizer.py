"""The small tokenizer: total, reversible on what it knows, and deaf to control tokens that somebody typed."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_course.pretrained import FOLDER
from vlm_course.tokenizer import LETTERS, NUMBERS, PUNCTUATION, SPECIAL, WordTokenizer
from vlm_course.worlds.templates import vocabulary

TOK = WordTokenizer.small()
KNOWN = [*TOK.words, *NUMBERS]
anything = st.text() | st.lists(st.sampled_from([*SPECIAL, *PUNCTUATION, *LETTERS, *KNOWN, "İ", "<", ">"])).map("".join)


@given(anything)
def test_any_text_becomes_ids_of_the_vocabulary_and_text_again(text):
    for special in (True, False):
        ids = TOK.encode(text, special=special)
        assert all(0 <= i < TOK.vocab_size for i in ids)
        assert isinstance(TOK.decode(ids), str)


@given(anything)
def test_typed_text_never_holds_a_control_token(text):
    control = set(range(len(SPECIAL))) - {TOK.unk_id}
    assert not control & set(TOK.encode(text, special=False))


def test_the_control_tokens_are_recognised_only_where_they_are_wanted():
    for i, name in enumerate(SPECIAL):
        assert TOK.encode(f"red {name} star")[1] == i
        assert TOK.encode(f"red {name} star", special=False)[1] == TOK.unk_id
    assert [TOK.pad_id, TOK.bos_id, TOK.eos_id, TOK.image_id, TOK.user_id, TOK.assistant_id, TOK.unk_id] == list(
        range(7)
    )


@given(st.lists(st.sampled_from(KNOWN), max_size=12))
def test_known_words_are_one_id_each_and_come_back(words):
    ids = TOK.encode(" ".join(words))
    assert len(ids) == len(words) and TOK.decode(ids) == " ".join(words)
    assert TOK.decode(torch.tensor(ids, dtype=torch.long)) == " ".join(words)


@given(st.from_regex(r"[a-z]{1,12}", fullmatch=True))
def test_an_unknown_word_is_spelled_and_comes_back(word):
    ids = TOK.encode(word)
    assert TOK.decode(ids) == word
    assert len(ids) == (1 if TOK.knows(word) else len(word))


@given(st.integers(0, 10**7))
def test_numbers_to_255_are_one_id_and_greater_ones_are_spelled(number):
    ids = TOK.encode(str(number))
    assert TOK.decode(ids) == str(number)
    assert len(ids) == (1 if number < 256 else len(str(number)))


@given(anything)
def test_decoding_and_encoding_again_changes_nothing_more(text):
    once = TOK.decode(TOK.encode(text, special=False), skip_special=False)
    assert TOK.decode(TOK.encode(once), skip_special=False) == once


def test_upper_case_and_spacing_do_not_matter():
    assert TOK.encode("  What COLOR is\tthe\nStar?") == TOK.encode("what color is the star ?")
    assert TOK.decode(TOK.encode("[ 1 2 3 4 ], ( 5 6 ).")) == "[1 2 3 4], (5 6)."


def test_padding_and_ends_are_not_printed_unless_asked_for():
    ids = [TOK.bos_id, *TOK.encode("a red star."), TOK.eos_id, TOK.pad_id]
    assert TOK.decode(ids) == "a red star."
    assert TOK.decode(ids, skip_special=False) == "<bos> a red star. <eos> <pad>"


def test_the_shipped_word_list_is_the_worlds_vocabulary():
    stored = json.loads((FOLDER / "vocabulary.json").read_text(encoding="utf-8"))
    assert stored == vocabulary() == TOK.words
    assert len(set(TOK.pieces)) == TOK.vocab_size == len(SPECIAL) + 256 + len(PUNCTUATION) + 36 + len(stored)


@pytest.mark.parametrize("word", ["Red", "two words", "", "a1", "<pad", "-ish"])
def test_a_word_that_the_text_could_never_give_is_refused(word):
    with pytest.raises(ValueError, match="single lower-case word"):
        WordTokenizer([word])


def test_errors_name_the_culprit():
    with pytest.raises(ValueError, match=r"\['red'\]"):
        WordTokenizer(["red", "star", "red"])
    with pytest.raises(ValueError, match="7"):
        WordTokenizer(["7"])
    for outside in (-1, TOK.vocab_size):
        with pytest.raises(ValueError, match=f"id {outside} "):
            TOK.decode([outside])
    with pytest.raises(KeyError):
        TOK.id_of("zebra")
