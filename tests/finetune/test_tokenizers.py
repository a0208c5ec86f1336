"""The adapters: text there and back, control tokens out of reach, labels on answers alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlm_course.chat import IGNORE, encode_chat, vicuna_prompt
from vlm_course.finetune.tokenizers import IMAGE, ChatMLAdapter, FastAdapter, for_folder, for_small, for_smollm
from vlm_course.tokenizer import SPECIAL, WordTokenizer
from vlm_course.worlds.templates import ANSWERS, QUESTIONS, vocabulary

TURNS = [("what color is the circle?", "red"), ("where is it?", "[12 34 56 78]")]
# The course's template refuses what no <unk> stands for; the others must take any text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def chatml(tiny_smollm):
    return for_smollm(tiny_smollm)


@pytest.fixture(scope="module")
def vicuna_folder(tiny_smollm, tmp_path_factory):
    """A tokenizer with LLaVA-1.5's control tokens, the tiny model's bytes for the rest."""
    fast = AutoTokenizer.from_pretrained(tiny_smollm)
    backend = Tokenizer.from_str(
        fast.backend_tokenizer.to_str().replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    fast.add_special_tokens({"additional_special_tokens": [IMAGE]})
    folder = tmp_path_factory.mktemp("vicuna")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["small", "chatml", "vicuna"])
def adapter(request, chatml, vicuna_folder):
    return {"small": for_small, "chatml": lambda: chatml, "vicuna": lambda: for_folder(vicuna_folder)}[request.param]()


def test_every_adapter_has_what_the_engine_asks_for(adapter):
    numbers = [adapter.image_id, adapter.eos_id, adapter.pad_id]
    assert len(set(numbers)) == 3 and max(numbers) < adapter.vocab_size
    assert adapter.bos_id is None or adapter.bos_id < adapter.vocab_size
    assert all(0 <= i < adapter.vocab_size for i in adapter.encode("what color is the red circle ?"))


@given(text=TEXT)
def test_bytes_lose_nothing(chatml, text):
    ids = chatml.encode(text)
    assert chatml.decode(ids) == text


@given(text=TEXT, control=st.sampled_from([IMAGE, "<|im_end|>", "<|im_start|>", "<|endoftext|>"]))
def test_text_never_becomes_a_control_token(chatml, text, control):
    text = f"{text}{control}{text}"
    ids = chatml.encode(text)
    assert not {chatml.image_id, chatml.eos_id, chatml.pad_id, 1} & set(ids)
    assert chatml.decode(ids) == text


@given(words=st.lists(st.sampled_from(vocabulary()), max_size=12))
def test_words_come_back(words):
    adapter = for_small()
    text = " ".join(words)
    assert adapter.decode(adapter.encode(text)) == text


@given(text=TEXT)
def test_typed_text_has_no_control_words(text):
    adapter = for_small()
    assert all(i >= len(SPECIAL) or i == WordTokenizer.unk_id for i in adapter.encode(text + "<image><eos>" + text))
    assert "<" not in adapter.decode([adapter.bos_id, adapter.image_id, adapter.user_id, adapter.eos_id])


@pytest.mark.parametrize("adapter_name", ["chatml", "vicuna"])
def test_special_text_is_seen_when_asked_for(adapter_name, chatml, vicuna_folder):
    adapter = chatml if adapter_name == "chatml" else for_folder(vicuna_folder)
    assert adapter.encode(IMAGE, special=True) == [adapter.image_id]
    assert adapter.encode(IMAGE) != [adapter.image_id]  # the call before must not have changed it
    assert adapter.decode(adapter.encode(IMAGE)) == IMAGE
    assert for_small().encode(IMAGE, special=True) == [for_small().image_id]


def test_labels_are_the_answers_and_their_ends(adapter):
    ids, labels = adapter.encode_chat(TURNS, 5)
    assert len(ids) == len(labels) and ids.count(adapter.image_id) == 5
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    learned = [label for label in labels if label != IGNORE]
    assert learned.count(adapter.eos_id) == 2 and learned[-1] == adapter.eos_id
    first = learned[: learned.index(adapter.eos_id)]
    assert adapter.decode(first).strip() == "red"
    assert adapter.decode(learned[len(first) + 1 :]).strip() == TURNS[1][1]


def test_the_open_prompt_is_the_beginning_of_the_whole(adapter):
    whole, _ = adapter.encode_chat(TURNS, 3)
    prompt, labels = adapter.encode_chat([TURNS[0], (TURNS[1][0], None)], 3)
    assert whole[: len(prompt)] == prompt
    assert labels[-1] == IGNORE and whole[len(prompt)] != IGNORE
    assert sum(label != IGNORE for label in labels) < sum(label != IGNORE for label in adapter.encode_chat(TURNS, 3)[1])


def test_without_an_image(adapter):
    assert adapter.encode_chat(TURNS, 0)[0].count(adapter.image_id) == 0


def test_chatml_is_the_template_to_the_letter(chatml):
    text = (
        "<|im_start|>user\nwhat color is the circle?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nwhere is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids, _ = chatml.encode_chat([TURNS[0], (TURNS[1][0], None)], 0)
    assert ids == chatml.fast(text, add_special_tokens=False)["input_ids"]
    seeing, _ = chatml.encode_chat([TURNS[0], (TURNS[1][0], None)], 2)
    picture = text.replace("user\n", f"user\n{IMAGE}{IMAGE}\n", 1)
    assert seeing == chatml.fast(picture, add_special_tokens=False)["input_ids"]


def test_the_small_and_the_vicuna_templates_are_the_courses(vicuna_folder):
    assert for_small().encode_chat(TURNS, 3) == encode_chat(WordTokenizer.small(), TURNS, 3)
    adapter = for_folder(vicuna_folder)
    text, _ = vicuna_prompt(TURNS)
    ids, _ = adapter.encode_chat(TURNS, 3)
    assert [i for i in ids if i != adapter.image_id] == [
        i for i in adapter.fast(text)["input_ids"] if i != adapter.image_id
    ]


def test_a_saved_chatml_tokenizer_speaks_chatml_again(chatml, tmp_path):
    chatml.fast.save_pretrained(tmp_path)
    again = for_folder(tmp_path)
    assert isinstance(again, ChatMLAdapter)
    assert again.encode_chat(TURNS, 4) == chatml.encode_chat(TURNS, 4)


def test_a_turn_cannot_close_itself(chatml):
    ids, labels = chatml.encode_chat([("say <|im_end|> <image>", "no <|im_end|>")], 2)
    assert ids.count(chatml.eos_id) == 2 and ids.count(chatml.image_id) == 2
    assert labels.count(chatml.eos_id) == 1


class TestErrors:
    def test_no_turns(self, chatml):
        with pytest.raises(ValueError, match="0 turns"):
            chatml.encode_chat([], 1)

    def test_an_open_turn_in_the_middle(self, chatml):
        with pytest.raises(ValueError, match="turn 0 of 2 has no answer"):
            chatml.encode_chat([("a", None), ("b", "c")], 1)

    def test_a_folder_without_a_tokenizer(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tokenizer\.model"):
            for_folder(tmp_path)

    def test_a_tokenizer_without_image(self, tiny_smollm):
        with pytest.raises(ValueError, match=r"none of the tokenizer's .* is <image>"):
            for_folder(tiny_smollm)

    def test_a_tokenizer_without_an_end(self):
        backend = Tokenizer(models.WordLevel({"a": 0, IMAGE: 1}, unk_token="a"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=backend)
        with pytest.raises(ValueError, match="end token"):
            FastAdapter(fast)
        assert FastAdapter(fast, eos_id=0).pad_id == 0
        with pytest.raises(ValueError, match="of ChatML's 3 tokens"):
            ChatMLAdapter(fast)


def test_the_worlds_texts_survive_every_adapter(adapter):
    """What path 2 trains on: templates with their slots filled by one word each."""
    fillers = {"n": "3", "x1": "10", "y1": "200", "x2": "31", "y2": "255", "direction": "left", "noun": "object"}
    fillers |= {
        "size": "small",
        "colour": "red",
        "shape": "star",
        "size2": "large",
        "colour2": "blue",
        "shape2": "cross",
    }
    words = WordTokenizer.small()
    for template in [*(t for group in QUESTIONS.values() for t in group), *ANSWERS.values()]:
        text = words.decode(words.encode(template.format(**fillers)))
        assert adapter.decode(adapter.encode(text)) == text
        assert torch.tensor(adapter.encode(text)).max() < adapter.vocab_size
