"""Splicing, chat templates, the loss's edge cases and the shape tracer."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_course.chat import VICUNA_SYSTEM, encode_chat, encode_vicuna, pad_rows, vicuna_prompt
from vlm_course.fusion import expand_image_placeholder, splice_image_features
from vlm_course.llava import LLAVA_7B, LLAVA_13B, Llava, small_config
from vlm_course.loss import response_loss
from vlm_course.tokenizer import WordTokenizer
from vlm_course.trace import format_table, to_json, trace, trace_config

IMAGE = 3


@settings(max_examples=50, deadline=None)
@given(
    images=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    per_image=st.integers(1, 4),
    gaps=st.lists(st.integers(0, 3), min_size=4, max_size=4),
)
def test_splice_equals_a_loop(images, per_image, gaps):
    rows = []
    for count in images:
        row = [7] * gaps[0]
        for i in range(count):
            row += [IMAGE] * per_image + [8] * gaps[1 + i % 3]
        rows.append(row)
    length = max(1, max(map(len, rows)))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    if sum(images) == 0:
        return
    embeds = torch.randn(len(rows), length, 5)
    features = torch.arange(sum(images) * per_image * 5.0).view(sum(images), per_image, 5)
    expected, source = embeds.clone(), iter(features.flatten(0, 1))
    for row in range(len(rows)):
        for token in range(length):
            if ids[row, token] == IMAGE:
                expected[row, token] = next(source)
    kept = embeds.clone()
    assert torch.equal(splice_image_features(embeds, ids, features, IMAGE), expected)
    assert torch.equal(embeds, kept)  # nothing is written in place


def test_splice_keeps_dtype_and_passes_gradients_to_both():
    ids = torch.tensor([[7, IMAGE, IMAGE, 8]])
    embeds = torch.randn(1, 4, 3, requires_grad=True)
    features = torch.randn(1, 2, 3, requires_grad=True)
    splice_image_features(embeds, ids, features, IMAGE).sum().backward()
    assert embeds.grad[0, :, 0].tolist() == [1, 0, 0, 1]
    assert features.grad.flatten().tolist() == [1.0] * 6
    half = splice_image_features(embeds.bfloat16(), ids, features.float(), IMAGE)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("placeholders", "features", "message"),
    [
        ([575], (1, 576), "image has 575 placeholders but the tower gave 576 features .*dropped with CLS"),
        ([576], (1, 577), "image has 576 placeholders but the tower gave 577 features .*is the CLS token still"),
        ([576], (1, 575), "576 placeholders but the tower gave 575 features .*dropped with CLS"),
        ([1], (1, 576), "image has 1 placeholders but the tower gave 576 .*not expanded"),
        ([300], (1, 576), "did truncation cut"),
        ([4, 4], (1, 4), "8 placeholders but the tower gave 1 x 4 = 4 features: .*more images"),
        ([4, 0], (2, 4), "4 placeholders but the tower gave 2 x 4 = 8 features"),
        ([6, 2], (2, 4), "image has 6 placeholders but the tower gave 4 features .row 0."),
    ],
)
def test_splice_names_both_numbers_and_the_cause(placeholders, features, message):
    length = max(placeholders) + 1
    ids = torch.tensor([[IMAGE] * count + [7] * (length - count) for count in placeholders])
    embeds = torch.zeros(len(ids), length, 2)
    with pytest.raises(ValueError, match=message):
        splice_image_features(embeds, ids, torch.zeros(*features, 2), IMAGE)


def test_splice_names_widths():
    with pytest.raises(ValueError, match="another width than the language model's"):
        splice_image_features(torch.zeros(1, 2, 4), torch.tensor([[IMAGE, 7]]), torch.zeros(1, 1, 5), IMAGE)


def test_expand_image_placeholder():
    assert expand_image_placeholder([1, IMAGE, 5, IMAGE], IMAGE, 3) == [1, *[IMAGE] * 3, 5, *[IMAGE] * 3]
    assert expand_image_placeholder([1, 5], IMAGE, 3) == [1, 5]
    with pytest.raises(ValueError, match="count is 0"):
        expand_image_placeholder([IMAGE], IMAGE, 0)


TOKENIZER = WordTokenizer(["what", "colour", "is", "the", "ball", "red", "blue", "cube"])


def test_encode_chat():
    turns = [("what colour is the ball?", "red"), ("the cube?", "blue")]
    ids, labels = encode_chat(TOKENIZER, turns, 2)
    t = TOKENIZER
    first, second = t.encode(turns[0][0]), t.encode(turns[1][0])
    red, blue = t.encode("red"), t.encode("blue")
    expected = [t.bos_id, t.image_id, t.image_id, t.user_id, *first, t.assistant_id, *red, t.eos_id]
    expected += [t.user_id, *second, t.assistant_id, *blue, t.eos_id]
    assert ids == expected
    assert [label for label in labels if label != -100] == [*red, t.eos_id, *blue, t.eos_id]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    assert labels[ids.index(red[0])] == red[0]


def test_open_chat_ends_at_the_assistant_and_is_a_prefix_of_the_closed_one():
    ids, labels = encode_chat(TOKENIZER, [("what is the ball?", None)], 4)
    closed, _ = encode_chat(TOKENIZER, [("what is the ball?", "red")], 4)
    assert ids[-1] == TOKENIZER.assistant_id and set(labels) == {-100}
    assert closed[: len(ids)] == ids
    assert encode_chat(TOKENIZER, [("the cube?", None)], 0)[0][1] == TOKENIZER.user_id


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "no turns"),
        ([("the ball?", None), ("the cube?", "red")], "turn 0 of 2 has no answer"),
        ([("what is <image>?", "red")], "control token <image>"),
        ([("what?", "red <eos> blue")], "control token <eos>"),
    ],
)
def test_encode_chat_refuses(turns, message):
    with pytest.raises(ValueError, match=message):
        encode_chat(TOKENIZER, turns, 2)


def test_vicuna_prompt():
    text, spans = vicuna_prompt([("What is it?", "A cat."), ("Sure?", None)])
    assert text == f"{VICUNA_SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    assert [text[start:end] for start, end in spans] == ["A cat.</s>"]
    assert "<image>" not in vicuna_prompt([("Hi", None)], image=False)[0]
    with pytest.raises(ValueError, match="spells out <image>"):
        vicuna_prompt([("<image>\nWhat is it?", None)])


@pytest.fixture(scope="module")
def fast_tokenizer():
    """A byte-pair tokenizer trained on the spot, with Llama's habits: a mark for spaces, <s> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<image>"]
    corpus = [VICUNA_SYSTEM, "USER: What is it? ASSISTANT: A cat. Sure? Yes, a cat.\n"] * 4
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=200, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_encode_vicuna(fast_tokenizer):
    turns = [("What is it?", "A cat."), ("Sure?", "Yes, a cat.")]
    ids, labels = encode_vicuna(fast_tokenizer, turns, 5, image_id=3)
    learned = [label for label in labels if label != -100]
    assert fast_tokenizer.decode(learned).replace(" ", "") == "Acat.</s>Yes,acat.</s>"
    assert learned.count(2) == 2
    first = ids.index(3)
    assert first > 20 and ids[first : first + 5] == [3] * 5  # behind the system text, not at the start
    assert ids[0] == 1 and ids.count(1) == 1
    open_ids, open_labels = encode_vicuna(fast_tokenizer, [("What is it?", None)], 5, image_id=3)
    assert ids[: len(open_ids)] == open_ids and set(open_labels) == {-100}
    with pytest.raises(ValueError, match="0 placeholders instead of 5"):
        encode_vicuna(fast_tokenizer, turns, 5, image_id=150_000)


def test_pad_rows():
    padded, mask = pad_rows([[1, 2], [3]], 0)
    assert padded.tolist() == [[1, 2], [3, 0]] and mask.tolist() == [[True, True], [True, False]]
    padded, mask = pad_rows([[1, 2], [3]], -100, side="left")
    assert padded.tolist() == [[1, 2], [-100, 3]] and mask.tolist() == [[True, True], [False, True]]


def test_loss_shifts_once():
    """Position t is scored against the label at t + 1: a model that predicts the next id has no loss."""
    ids = torch.randint(0, 9, (2, 6), generator=torch.Generator().manual_seed(0))
    next_ids = ids.roll(-1, dims=1)
    assert response_loss(50.0 * torch.nn.functional.one_hot(next_ids, 9), ids) < 1e-6
    assert response_loss(50.0 * torch.nn.functional.one_hot(ids, 9), ids) > 5


def test_loss_ignores_what_is_masked_and_splits_with_count():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, 9, generator=generator)
    labels = torch.randint(0, 9, (4, 7), generator=generator)
    labels[:, :3] = -100
    changed = logits.clone()
    changed[:, :2] += 5 * torch.randn(4, 2, 9, generator=generator)
    assert response_loss(changed, labels) == response_loss(logits, labels)
    count = int((labels[:, 1:] != -100).sum())
    parts = [response_loss(logits[i : i + 2], labels[i : i + 2], count=count) for i in (0, 2)]
    torch.testing.assert_close(sum(parts), response_loss(logits, labels))
    assert response_loss(logits.bfloat16(), labels).dtype == torch.float32


def test_loss_refuses_what_it_cannot_score():
    logits = torch.zeros(2, 4, 9)
    with pytest.raises(ValueError, match="all 2 x 4 labels are -100"):
        response_loss(logits, torch.full((2, 4), -100))
    only_first = torch.full((2, 4), -100)
    only_first[:, 0] = 5  # nothing predicts the first token
    with pytest.raises(ValueError, match="no response to learn from"):
        response_loss(logits, only_first)
    with pytest.raises(ValueError, match=r"labels \(2, 3\).*pass both unshifted"):
        response_loss(logits, torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize(("config", "width", "blocks"), [(LLAVA_7B, 4096, 31), (LLAVA_13B, 5120, 39)])
def test_trace_of_a_model_without_memory(config, width, blocks):
    shapes = {row.name: row.shape for row in trace_config(config, text_tokens=50)}
    assert shapes["ids"] == (1, 626)
    assert shapes["vision.blocks.0-22"] == (1, 577, 1024)  # the last of 24 blocks is not read
    assert shapes["bridge:in"] == (1, 576, 1024) and shapes["bridge"] == (1, 576, width)
    assert shapes["decoder.blocks.0:in"] == (1, 626, width)
    assert shapes[f"decoder.blocks.0-{blocks}"] == (1, 626, width)
    assert shapes["decoder.head"] == (1, 626, 32064)


def test_trace_of_a_real_model_leaves_it_alone():
    config = small_config(300)
    model = Llava(config)
    ids = torch.tensor([[1] + [IMAGE] * 144 + [7, 8]])
    rows = trace(model, ids, torch.zeros(1, 3, 96, 96))
    assert [(row.name, row.shape, row.dtype) for row in rows] == [
        (row.name, row.shape, row.dtype) for row in trace_config(config, text_tokens=3)
    ]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [row.stage for row in trace(model, torch.tensor([[1, 7]]))][:2] == ["input", "fusion"]
    with pytest.raises(ValueError, match="143 placeholders"):
        trace(model, ids[:, 2:], torch.zeros(1, 3, 96, 96))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_trace_as_table_and_json():
    rows = trace_config(small_config(300))
    table = format_table(rows).splitlines()
    assert len(table) == len(rows) + 2 and "[B=1 M=144 D_llm=256]" in format_table(rows)
    read = json.loads(to_json(rows))
    assert all(set(row) == {"stage", "name", "shape", "axes", "dtype", "meaning"} for row in read)
    assert [tuple(row["shape"]) for row in read] == [row.shape for row in rows]
    assert all(len(row.axes) == len(row.shape) and row.meaning for row in rows)
