"""Path 2's data: the same ids as string operations would give, from the step's number alone, and its exams."""

import sys
from dataclasses import replace

import pytest
import torch

from vlm_course.chat import IGNORE
from vlm_course.evaluation import evaluate_scenes
from vlm_course.finetune import exams, recipes, smollm
from vlm_course.finetune.collate import Collator
from vlm_course.finetune.data import read_records
from vlm_course.finetune.examples import write_scene_records
from vlm_course.finetune.tokenizers import for_small, for_smollm
from vlm_course.finetune.wording import Wording
from vlm_course.llava import SMALL
from vlm_course.loss import response_loss
from vlm_course.pretrained import load_small
from vlm_course.tokenizer import WordTokenizer
from vlm_course.training import freeze_all_but
from vlm_course.worlds.dialogs import KINDS, Dialogs
from vlm_course.worlds.scenes import sample


@pytest.fixture(scope="module")
def chatml(tiny_smollm):
    return for_smollm(tiny_smollm)


@pytest.fixture(scope="module")
def model(tiny_smollm):
    torch.manual_seed(0)
    return smollm.smollm_llava(load_small(), folder=tiny_smollm)


@pytest.fixture(scope="module", params=["small", "chatml"])
def pair(request, chatml, model):
    """An adapter and the config of its model."""
    return (for_small(), SMALL) if request.param == "small" else (chatml, model.config)


def plain(ids, pad):
    return [i for i in ids.tolist() if i != pad]


class TestWording:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_table_says_what_the_tokenizer_would(self, kind, pair):
        adapter, words = pair[0], WordTokenizer.small()
        wording, generator = Wording(words, adapter), torch.Generator().manual_seed(5)
        turns = Dialogs(words).ask(sample(60, generator=generator), kind, generator=generator)
        for ids in (turns.question, turns.answer):
            for row, ours in zip(ids, wording(ids), strict=True):
                text = words.decode([i for i in row.tolist() if i])
                assert plain(ours, adapter.pad_id) == adapter.encode(text), text

    def test_another_shape(self, chatml):
        with pytest.raises(ValueError, match="ids"):
            Wording(WordTokenizer.small(), chatml)(torch.zeros(3, dtype=torch.long))


class TestBatches:
    @pytest.mark.parametrize("make", [recipes.align_batches, recipes.instruct_batches], ids=["align", "instruct"])
    def test_a_row_is_the_conversation_that_the_adapter_writes(self, make, pair):
        adapter, config = pair
        length = {"length": 420} if adapter.image_id < 10 else {"length": 1400}  # the tiny tokenizer spells words
        batch = make(adapter, config, rows=3, seed=2, **length)(7)
        assert batch.pixels.shape == (3, 3, 96, 96) and batch.ids.shape == batch.labels.shape
        for ids, labels in zip(batch.ids, batch.labels, strict=True):
            ids, turns = plain(ids, adapter.pad_id), []
            learned = labels[: len(ids)].tolist()
            start, frame = ids.index(adapter.image_id) + config.visual_tokens, adapter.frame
            start += len(frame.asking)
            while start < len(ids):
                first = next(n for n in range(start, len(ids)) if learned[n] != IGNORE)
                last = next((n for n in range(first, len(ids)) if learned[n] == IGNORE), len(ids))
                question, answer = ids[start : first - len(frame.answering)], ids[first : last - len(frame.ending)]
                turns.append((adapter.decode(question), adapter.decode(answer)))
                start = last + len(frame.again)
            assert adapter.encode_chat(turns, config.visual_tokens) == (ids, learned)
        assert (batch.labels[:, : batch.first] == IGNORE).all() and batch.first > config.visual_tokens

    def test_a_batch_follows_from_seed_and_step_alone(self, pair):
        def batch(seed, step):
            torch.manual_seed(step + 17)  # the global generator must not matter
            return recipes.instruct_batches(*pair, rows=4, easy_vqa=1, images=9, seed=seed)(step)

        first, again = batch(1, 5), batch(1, 5)
        for name in ("ids", "labels", "pixels"):
            assert torch.equal(getattr(first, name), getattr(again, name))
        for other in (batch(1, 6), batch(2, 5)):
            assert not torch.equal(first.pixels, other.pixels) and not torch.equal(first.ids, other.ids)

    def test_the_default_lengths_cut_next_to_nothing(self, pair):
        if pair[0].image_id > 10:
            pytest.skip("the tiny tokenizer spells its words: its rows are longer than SmolLM2's")
        assert recipes.shown(recipes.align_batches(*pair, rows=64)).turns == 1.0
        both = recipes.shown(recipes.instruct_batches(*pair, rows=64, easy_vqa=8, images=40))
        assert both.turns == 1.0 and 0.5 < both.filled < 1

    def test_what_is_too_long_is_cut(self, pair):
        adapter, config = pair
        batch = recipes.instruct_batches(adapter, config, rows=3, length=200)(0)
        assert batch.ids.shape == (3, 200) and not (batch.ids[0] == adapter.pad_id).any()
        assert recipes.shown(recipes.instruct_batches(adapter, config, rows=8, length=200)).turns < 1

    def test_easy_vqa_shows_its_own_images_and_questions(self, chatml, model):
        source = recipes.EasyVqaBatches(chatml, model.config, rows=4, turns=3, length=500, images=6)
        assert source.pixels.dtype == torch.uint8 and len(source.pixels) == 6
        batch = source(0)
        assert batch.pixels.min() >= -1 and batch.pixels.max() <= 1
        texts = [chatml.decode(plain(row[row != IGNORE], chatml.pad_id)) for row in batch.labels]
        known = {"yes", "no", "circle", "rectangle", "triangle", "red", "green", "blue", "black", "gray", "teal"}
        assert all(any(word in text for word in known | {"brown", "yellow"}) for text in texts)
        questions = [chatml.fast.decode(row) for row in batch.ids]
        assert all(text.count("<|im_start|>user") == 3 for text in questions)
        for row in batch.ids:  # no question is asked twice while there are others
            asked = chatml.fast.decode(row).split("<|im_start|>user\n")[1:]
            assert len({text.split("<|im_end|>")[0].replace("<image>", "").strip() for text in asked}) == 3

    def test_the_fingerprint_names_what_would_change_the_data(self, pair):
        def fingerprint(**options):
            return recipes.instruct_batches(*pair, rows=4, images=9, **options).fingerprint

        assert fingerprint() == fingerprint()
        others = [fingerprint(seed=1), fingerprint(turns=3), fingerprint(length=300), fingerprint(easy_vqa=1)]
        assert len({fingerprint(), *others}) == 5

    def test_a_stand_in_for_smollm2_learns_from_them(self, model, chatml):
        freeze_all_but(model, ("bridge.", "decoder."))
        batches = recipes.align_batches(chatml, model.config, rows=4, length=400)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for step in range(6):
            batch = batches(step)
            loss = response_loss(model(batch.ids, batch.pixels), batch.labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0], losses


class TestErrors:
    def test_a_kind_that_does_not_exist(self, pair):
        with pytest.raises(ValueError, match="1 unknown kinds"):
            recipes.SceneBatches(*pair, rows=1, weights={"smell": 1.0})

    def test_no_row_left(self, pair):
        with pytest.raises(ValueError, match="4 of 4 rows"):
            recipes.instruct_batches(*pair, rows=4, easy_vqa=4)

    def test_no_room(self, pair):
        with pytest.raises(ValueError, match="no room behind an image of 144"):
            recipes.align_batches(*pair, rows=1, length=140)(0)

    def test_another_image_size(self):
        other = replace(SMALL, vision=replace(SMALL.vision, image_size=64))
        with pytest.raises(ValueError, match="64 x 64"):
            recipes.align_batches(for_small(), other, rows=1)

    def test_two_lengths(self, pair):
        parts = [recipes.align_batches(*pair, rows=1, length=length) for length in (200, 208)]
        with pytest.raises(ValueError, match="200, 208"):
            recipes.Together(*parts)

    def test_a_template_that_cannot_be_built_from_parts(self, chatml):
        class Vicuna:
            pad_id = 0

        with pytest.raises(ValueError, match="Vicuna has no frame"):
            recipes.align_batches(Vicuna(), SMALL, rows=1)


def test_scenes_as_records_are_read_by_the_engine(tmp_path, pair):
    folder = write_scene_records(tmp_path / "scenes", 3, turns=2, seed=4)
    records = read_records(folder)
    assert len(records) == 3 and all(len(record.turns) == 2 for record in records)
    batch = Collator(*pair)(list(records))
    assert batch.pixels.shape == (3, 3, 96, 96)
    again = read_records(write_scene_records(tmp_path / "again", 3, turns=2, seed=4))
    assert again.fingerprint == records.fingerprint
    with pytest.raises(FileExistsError):
        write_scene_records(folder, 3)


@pytest.fixture(scope="module")
def graded():
    exam = exams.together(exams.scene_exam(4), exams.easy_vqa_exam(limit=6))
    return exam, *exams.grade(load_small().model, for_small(), exam)


class TestExams:
    def test_the_shipped_model_scores_as_in_its_own_evaluation(self, graded):
        exam, table, given = graded
        small = load_small()
        own = evaluate_scenes(small.model, small.tokenizer, n=4, held_out=False, controls=False)
        for kind in KINDS:
            assert table[kind]["model"] == pytest.approx(own["box_iou>.5" if kind == "box" else kind]["model"]), kind
        assert table["all"]["model"] > 0.9 > table["all"]["swapped"] + 0.2 > table["all"]["blind"]
        assert table["all"]["questions"] == len(exam) == len(given)
        assert set(table["count"]) == {"model", "blind", "swapped", "majority", "questions"}
        assert "majority" not in table["box"]

    def test_right_answers_are_right_and_others_are_not(self, graded):
        exam = graded[0]
        assert exams.scores(exam, exam.answer).min() == 1
        assert exams.scores(exam, ["[1 2 3 4] or so"] * len(exam)).max() == 0
        assert exams.scores(exam, ["[900 1 2 3]"] * len(exam)).max() == 0
        with pytest.raises(ValueError, match="one each"):
            exams.scores(exam, ["yes"])

    def test_a_few_of_each_kind(self, graded):
        exam = graded[0]
        few = exam.few(2)
        wanted = [kind for kind in exam.kinds for _ in range(min(2, exam.kind.count(kind)))]
        assert [exam.kind[n] for n in few] == wanted

    def test_another_look(self, graded):
        with pytest.raises(ValueError, match="look"):
            exams.answers(load_small().model, for_small(), graded[0], look="sideways")

    def test_questions_without_images(self, graded):
        with pytest.raises(ValueError, match="2 images and 1 questions"):
            exams.ask(load_small().model, for_small(), torch.zeros(2, 144, 256), ["what?"])

    def test_a_byte_pair_model_can_sit_it_too(self, model, chatml):
        exam = exams.scene_exam(2, kinds=("colour", "caption"))
        table, given = exams.grade(model, chatml, exam, controls=False)
        assert set(table["all"]) == {"model", "questions"} and len(given) == len(exam)
        assert not any("<|" in text for text in given)

    def test_without_easy_vqa(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "easy_vqa", None)
        with pytest.raises(ModuleNotFoundError):
            exams.easy_vqa_exam()

    def test_a_limit_of_nothing(self):
        with pytest.raises(ValueError, match="at least 1"):
            exams.easy_vqa_exam(limit=0)
