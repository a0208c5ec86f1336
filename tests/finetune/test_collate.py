"""Records to batches: the model's own template, answers as labels, images that never lose a token or change places."""

import json
import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vlm_course.chat import IGNORE, encode_chat, encode_vicuna
from vlm_course.finetune.collate import Batch, Collator, default_preprocess, fitting
from vlm_course.finetune.data import read_records
from vlm_course.finetune.loader import Loader, ahead, shared
from vlm_course.finetune.losses import plain_loss
from vlm_course.finetune.tokenizers import FastAdapter, for_small
from vlm_course.images import clip_preprocess, pad_to_square, small_preprocess
from vlm_course.llava import LLAVA_7B, SMALL
from vlm_course.tokenizer import WordTokenizer

VISUAL = 16  # of the tiny model


@pytest.fixture
def records(talk_file):
    return read_records(talk_file)


@pytest.fixture
def collator(tiny_config):
    return lambda **options: Collator(for_small(), tiny_config, **options)


def fast_tokenizer():
    """A tokenizer of transformers with a few words, <s>, </s> and <image>, made without any file."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *"USER: ASSISTANT: What colour is the object ? red . no".split()]
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    own.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>", "<image>")])
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


# --- the template and its labels --------------------------------------------------------------------------------------


def test_rows_are_the_template_padded_on_the_right_and_answers_alone_are_labels(records, collator):
    batch, words = collator()(records[:8]), WordTokenizer.small()
    for row, record in enumerate(records[:8]):
        ids, labels = encode_chat(words, record.turns, VISUAL if record.image else 0)
        gap = batch.ids.shape[1] - len(ids)
        assert batch.ids[row].tolist() == ids + [words.pad_id] * gap
        assert batch.labels[row].tolist() == labels + [IGNORE] * gap
        learned = words.decode([i for i in batch.labels[row].tolist() if i != IGNORE], skip_special=False)
        assert learned == " ".join(answer.replace(".", ". <eos>").strip() for _, answer in record.turns).strip()
    assert batch.lengths == tuple((batch.ids != words.pad_id).sum(dim=1).tolist())
    assert batch.answer_tokens == (batch.labels != IGNORE).sum()


def test_a_checkpoints_tokenizer_gives_llavas_published_format(records, tiny_config):
    fast = fast_tokenizer()
    adapter = FastAdapter(fast)
    text = replace(tiny_config.text, vocab_size=adapter.vocab_size)
    collator = Collator(adapter, replace(tiny_config, text=text, image_id=adapter.image_id))
    record = records[0]
    ids, labels = encode_vicuna(fast, record.turns, VISUAL, image_id=adapter.image_id)
    batch = collator([record])
    assert batch.ids.tolist() == [ids] and batch.labels.tolist() == [labels]
    learned = [i for i in labels if i != IGNORE]
    assert learned[-1] == adapter.eos_id and ids.count(adapter.image_id) == VISUAL
    with pytest.raises(ValueError, match=rf"<image> is {adapter.image_id} for the tokenizer and 3 for the model"):
        Collator(adapter, tiny_config)


def test_images_stand_in_the_order_of_the_rows(records, collator):
    batch = collator()(records[3:9])
    assert batch.images == (1, 1, 0, 1, 1, 1)
    # The tiny tower is no one's own, so its images are LLaVA-1.5's.
    expected = [clip_preprocess(pad_to_square(Image.open(r.image)), size=32) for r in records[3:9] if r.image]
    assert torch.equal(batch.pixels, torch.stack(expected))
    assert collator()([records[5]]).pixels is None


def test_the_preprocessing_belongs_to_the_tower(records):
    image = Image.open(records[0].image)
    assert torch.equal(default_preprocess(SMALL)(image), small_preprocess(image))
    assert torch.equal(default_preprocess(LLAVA_7B)(image), clip_preprocess(pad_to_square(image), size=336))
    flat = replace(SMALL, vision=replace(SMALL.vision, image_size=(64, 96)), visual_tokens=None)
    with pytest.raises(ValueError, match="64 x 96, not squares"):
        default_preprocess(flat)


# --- too long ---------------------------------------------------------------------------------------------------------


def test_answers_are_cut_and_images_never(records, collator):
    record = records[2]  # three questions
    ids, labels = collator().encode(record)
    for length in range(VISUAL + 1, len(ids) + 1):
        try:
            kept, learned = collator(max_tokens=length).encode(record)
        except ValueError as error:
            assert "talk.jsonl, line 3: every answer lies beyond" in str(error) and f"max_tokens={length}" in str(error)
            assert all(label == IGNORE for label in labels[:length])
        else:
            assert kept == ids[:length] and learned == labels[:length] and kept.count(3) == VISUAL
    with pytest.raises(ValueError, match=r"max_tokens is 16, but an image alone takes 16"):
        collator(max_tokens=VISUAL)
    with pytest.raises(ValueError, match=r"max_tokens is 97, but the model was made for at most 96"):
        collator(max_tokens=97)


def test_an_image_that_stands_later_is_not_cut_either(records, collator):
    """Behind a system text, as in Vicuna's template, a row may be long enough for an image and still not hold it."""
    tight = collator(max_tokens=VISUAL + 4)
    encode = tight.tokenizer.encode_chat
    tight.tokenizer.encode_chat = lambda turns, visual: tuple([7] * 9 + part for part in encode(turns, visual))
    with pytest.raises(ValueError, match=r"line 1: max_tokens=20 would cut the image's 16 tokens"):
        tight.encode(records[0])


def test_what_does_not_fit_is_found_before_training(tmp_path, collator):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    ask = lambda question, answer: {  # noqa: E731
        "image": "a.png",
        "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
    }
    talks = [ask("a?", "red."), ask("a " * 60, "red."), ask("a <eos> b", "red."), ask("2 < 3?", "yes.")]
    (tmp_path / "t.json").write_text(json.dumps(talks, indent=1), encoding="utf-8")
    records = read_records(tmp_path, skip_bad=True)
    short = collator(max_tokens=64)
    with pytest.raises(ValueError, match=r"t.json, line 15, record 2: every answer lies beyond max_tokens=64"):
        fitting(records, short)
    kept = fitting(records, short, skip_bad=True)
    assert [r.place.number for r in kept] == [1, 4] and kept.skipped == {"too long": 1, "control token": 1}
    assert "2 records skipped: 1 too long, 1 control token" in str(kept)
    tried = []
    long = collator()
    long.tokenizer.encode_chat = lambda *arguments: tried.append(arguments) or ([1, 2], [1, 2])
    long.max_tokens = 10_000
    assert len(fitting(records, long)) == 4 and len(tried) == 2  # the two with a "<": the others are short enough


def test_an_image_that_went_bad_is_named_with_its_line(records, collator, tmp_path):
    gone = replace(records[0], image=tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"talk.jsonl, line 1: the image There is no file"):
        collator()([gone])


# --- parts of a batch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"pack": True, "max_tokens": 64}, {"pad_to": 8}])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_the_parts_of_a_batch_have_its_loss(records, collator, tiny, options, size):
    batch, model = collator(**options)(records), tiny()
    count = batch.answer_tokens
    with torch.no_grad():
        parts = batch.micro(size)
        total = sum(plain_loss(model, part, count) for part in parts)
        whole = plain_loss(model, batch, count)
    assert sum(map(len, parts)) == len(batch) and all(len(part) <= size for part in parts)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
    if not options:  # each with no more padding than it needs
        assert [part.ids.shape[1] for part in parts] == [max(part.lengths) for part in parts]
        assert batch.ids.shape[1] == max(batch.lengths)


@pytest.mark.parametrize("pack", [False, True])
def test_the_loss_is_the_mean_over_every_answer_token(records, collator, tiny, pack):
    model, one = tiny(), collator()
    with torch.no_grad():
        alone = [one([record]) for record in records]
        weights = torch.tensor([each.answer_tokens for each in alone], dtype=torch.float32)
        losses = torch.stack([plain_loss(model, each, each.answer_tokens) for each in alone])
        batch = collator(pack=pack)(records)
        together = plain_loss(model, batch, batch.answer_tokens)
    assert batch.answer_tokens == weights.sum()
    torch.testing.assert_close(together, (losses * weights).sum() / weights.sum(), rtol=1e-5, atol=1e-6)


def test_packed_documents_do_not_see_each_other(records, collator, tiny):
    """Another image in one conversation changes the logits of no other one in its row."""
    model, batch = tiny(), collator(pack=True)(records[:4])
    assert len(batch) < 4 and batch.ids.shape[1] == 96 and batch.positions.max() < 96
    other = replace(batch, pixels=torch.cat([batch.pixels[:1] + 1, batch.pixels[1:]]))

    def tokens(given):
        with torch.no_grad():
            each = []
            for row in range(len(given)):
                part = given.part(row, row + 1)
                for document in part.documents.unique().tolist():
                    labels = torch.where(part.documents == document, part.labels, IGNORE)
                    if document >= 0:
                        masked = replace(part, labels=labels, first=None)
                        each.append(plain_loss(model, masked, masked.answer_tokens))
            return torch.stack(each)

    changed = (tokens(batch) != tokens(other)).tolist()
    assert changed.count(True) == 1


def test_parts_that_cannot_be_are_refused(records, collator):
    batch = collator()(records[:4])
    for start, stop in ((0, 5), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"rows {start} to {stop} were asked of a batch of 4"):
            batch.part(start, stop)
    with pytest.raises(ValueError, match="size is 0"):
        batch.micro(0)
    with pytest.raises(ValueError, match="4 rows name 4 images, but there are 3"):
        Batch(batch.ids, batch.labels, batch.pixels[:3]).micro(1)
    with pytest.raises(ValueError, match="0 records"):
        collator()([])
    assert [p.pixels is None for p in Batch(batch.ids, batch.labels).micro(2)] == [True, True]


def test_moving_a_batch_moves_all_of_it_and_rounds_only_pixels(records, collator):
    moved = collator(pack=True)(records[:3]).to("meta", dtype=torch.bfloat16)
    for name in ("ids", "labels", "pixels", "positions", "documents"):
        assert getattr(moved, name).device.type == "meta"
    assert moved.pixels.dtype == torch.bfloat16 and moved.ids.dtype == torch.int64


# --- which records a step reads ---------------------------------------------------------------------------------------


def test_every_record_once_an_epoch_in_another_order_each_time(loader):
    batches = loader(6)
    seen = [record.id for step in range(8) for record in batches.at(step)]
    first, second = seen[:24], seen[24:]
    assert sorted(first) == sorted(second) == sorted(map(str, range(24))) and first != second
    assert first != sorted(first) and [r.id for r in loader(6, seed=1).at(0)] != first[:6]
    across = loader(7)
    assert Counter(r.id for step in range(24) for r in across.at(step)) == Counter({str(n): 7 for n in range(24)})
    assert [r.id for r in loader(6).at(5)] == seen[30:36]  # a step asks nobody what came before


def test_processes_share_a_batch_without_remainder(loader):
    whole = loader(7)
    for world in (1, 2, 3, 7):
        parts = [whole.share(rank, world) for rank in range(world)]
        for step in (0, 3):
            assert [r.id for part in parts for r in part.at(step)] == [r.id for r in whole.at(step)]
    with pytest.raises(ValueError, match="a batch of 7 cannot be shared by 8 processes"):
        whole.share(0, 8)
    with pytest.raises(ValueError, match="batch is 0"):
        loader(0)
    with pytest.raises(ValueError, match="0 records"):
        Loader((), whole.collator, 1)


def test_a_plain_function_is_shared_by_rows(loader):
    whole = loader(7)
    plain = lambda step: whole(step)  # noqa: E731
    assert shared(plain, 0, 1) is plain
    parts = [shared(plain, rank, 2)(3) for rank in range(2)]
    own = [shared(whole, rank, 2)(3) for rank in range(2)]
    for part, mine in zip(parts, own, strict=True):
        assert torch.equal(part.ids, mine.ids) and torch.equal(part.pixels, mine.pixels)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_reading_ahead_changes_neither_order_nor_errors(workers):
    started, gate = [], threading.Event()

    def batches(step):
        started.append(step)
        if step == 9:
            raise ValueError("step 9")
        return step

    given = ahead(batches, 2, 20, workers=workers)
    assert next(given) == 2
    gate.wait(0.05)
    assert len(started) <= 2 + workers
    with pytest.raises(ValueError, match="step 9"):
        for expected, got in enumerate(given, 3):
            assert got == expected
    with pytest.raises(ValueError, match="workers is -1"):
        next(ahead(batches, 0, 1, workers=-1))
