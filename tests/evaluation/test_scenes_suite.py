"""The scenes suite, given models whose every answer is known: one that is always right, ones that never look."""

import json
from collections import Counter

import pytest
import torch
from torch import nn

from vlm_course import evaluation
from vlm_course.evaluation import FRESH_SEED, evaluate_scenes
from vlm_course.llava import small_config
from vlm_course.tokenizer import NUMBERS, WordTokenizer
from vlm_course.worlds.dialogs import KINDS, Dialogs
from vlm_course.worlds.scenes import COLOURS, SHAPES, SIZES, held_out_table, render, sample
from vlm_course.worlds.templates import DIRECTIONS

TOK = WordTokenizer.small()
N = 60


class Scripted(nn.Module):
    """Stands where a `Llava` stands: sees an image as one number and answers from a list, word by word."""

    def __init__(self, answers):
        super().__init__()
        self.config = small_config(TOK.vocab_size, image_id=TOK.image_id)
        self.answers, self.device_of = answers, nn.Parameter(torch.zeros(1))

    def encode_images(self, pixels):
        return look(pixels)[:, None, None].expand(-1, 1, self.config.text.width)  # [B] -> [B, 1, D]

    def new_cache(self, capacity=0):
        return {"ids": torch.empty(0), "looks": None}

    def forward(self, ids, *, image_features=None, attention_mask=None, cache=None, logits_to_keep=0):
        if image_features is not None:
            cache["looks"], cache["ids"] = image_features[:, 0, 0].tolist(), ids
        else:
            cache["ids"] = torch.cat([cache["ids"], ids], 1)
        logits = torch.zeros(len(ids), 1, TOK.vocab_size)
        for row, (seen, text) in enumerate(zip(cache["looks"], cache["ids"].tolist(), strict=True)):
            start, end = text.index(TOK.user_id), text.index(TOK.assistant_id)
            answer = self.answers(seen, tuple(text[start + 1 : end]))
            said = len(text) - end - 1
            logits[row, 0, answer[said] if said < len(answer) else TOK.eos_id] = 1.0
        return logits


def look(pixels):
    return pixels.double().sum((1, 2, 3))


def unpadded(ids):
    return tuple(ids[ids != TOK.pad_id].tolist())


@pytest.fixture(scope="module")
def asked():
    """(image, question) -> the right answer, for everything that the suite asks."""
    world, right = Dialogs(TOK), {}
    for seed, split, kinds in ((FRESH_SEED, "train", KINDS), (FRESH_SEED + 1, "held_out", ("colour", "shape"))):
        generator = torch.Generator().manual_seed(seed)
        scenes = sample(N, generator=generator, split=split)
        images = look(render(scenes, generator=generator)).tolist()
        for kind in kinds:
            turns = world.ask(scenes, kind, generator=generator)
            for image, question, answer in zip(images, turns.question, turns.answer, strict=True):
                right[image, unpadded(question)] = unpadded(answer)
    return right


@pytest.fixture(scope="module")
def oracle_table(asked):
    return evaluate_scenes(Scripted(lambda seen, question: asked.get((seen, question), ())), TOK, n=N)


def test_right_answers_get_full_marks_in_every_measure(oracle_table):
    measures = {*KINDS, "box_iou", "box_iou>.5", "held-out colour", "held-out shape"} - {"box"}
    assert set(oracle_table) == measures
    marks = {measure: row["model"] for measure, row in oracle_table.items()}
    assert 0.97 < marks.pop("box_iou") < 1, "whole numbers on the grid cost a little overlap"
    assert set(marks.values()) == {1.0}


def test_an_oracle_without_the_image_scores_nothing(oracle_table):
    for row in oracle_table.values():
        assert row.get("blind", 0) == 0 and row.get("swapped", 0) < 0.5


def test_answers_drawn_from_other_questions_of_the_kind_do_not_pass(asked):
    by_kind = {}
    for answer in asked.values():
        by_kind.setdefault(kind_of(answer), []).append(answer)
    draw = torch.Generator().manual_seed(0)

    def random_answer(seen, question):
        draw.manual_seed(int(abs(seen) * 1000) + sum(question))
        same = by_kind[kind_of(asked[seen, question])]
        return same[int(torch.randint(len(same), (1,), generator=draw))]

    table = evaluate_scenes(Scripted(random_answer), TOK, n=N, controls=False)
    two_answers = ("size", "existence", "check")
    for measure, row in table.items():
        assert row["model"] < (0.75 if measure in two_answers else 0.6), measure


def kind_of(answer):
    """Which answers could stand for each other, by their first word."""
    first = TOK.pieces[answer[0]]
    lists = (COLOURS, SHAPES, SIZES, DIRECTIONS, ("yes", "no"), NUMBERS)
    return next((words for words in lists if first in words), first)


def test_a_word_too_many_or_too_few_is_wrong(asked):
    for spoil in (lambda a: (*a, TOK.id_of("and")), lambda a: a[:-1]):
        table = evaluate_scenes(Scripted(lambda seen, q, s=spoil: s(asked[seen, q])), TOK, n=N, controls=False)
        assert {row["model"] for row in table.values()} == {0.0}


def test_controls_are_what_they_say(oracle_table):
    generator = torch.Generator().manual_seed(FRESH_SEED)
    scenes = sample(N, generator=generator)
    render(scenes, generator=generator)
    world = Dialogs(TOK)
    turns = {kind: world.ask(scenes, kind, generator=generator) for kind in KINDS}
    for kind in ("colour", "count", "existence", "caption"):
        valid = turns[kind].valid
        answers = Counter(unpadded(a) for a in turns[kind].answer[valid])
        assert oracle_table[kind]["majority"] == pytest.approx(max(answers.values()) / int(valid.sum()))
    for kind in ("colour", "shape", "size"):
        shares = []
        for row in turns[kind].valid.nonzero().flatten().tolist():
            values = getattr(scenes, kind)[row, : scenes.count[row]].tolist()
            shares.append(values.count(values[turns[kind].target[row]]) / len(values))
        assert oracle_table[kind]["any object"] == pytest.approx(sum(shares) / len(shares), abs=1e-5)
    alone = 1 / scenes.count.float()  # objects do not overlap: only the right one hits
    assert oracle_table["point"]["any object"] == pytest.approx(alone.mean().item(), abs=1e-5)
    assert oracle_table["box_iou"]["any object"] == pytest.approx(alone.mean().item(), abs=1e-3)


def test_held_out_questions_are_about_held_out_objects(oracle_table):
    generator = torch.Generator().manual_seed(FRESH_SEED + 1)
    scenes = sample(N, generator=generator, split="held_out")
    render(scenes, generator=generator)
    for kind in ("colour", "shape"):
        turns = Dialogs(TOK).ask(scenes, kind, generator=generator)
        target = torch.arange(N), turns.target
        mine = held_out_table()[scenes.shape[target], scenes.colour[target]] & turns.valid
        assert oracle_table[f"held-out {kind}"]["questions"] == int(mine.sum()) > 0


def test_a_few_scenes_leave_out_what_they_do_not_admit_and_make_no_nan():
    for seed in range(12):
        table = evaluate_scenes(Scripted(lambda seen, question: ()), TOK, n=2, seed=seed)
        assert all(v == v for row in table.values() for v in row.values())


def test_errors_name_what_was_given():
    with pytest.raises(ValueError, match="got 1"):
        evaluate_scenes(Scripted(None), TOK, n=1)
    with pytest.raises(ValueError, match="'photos'"):
        evaluation.main("photos")


def test_the_program_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "table.json"
    result = evaluation.main("easy-vqa", json_file=path, n=4)
    assert json.loads(path.read_text()) == result
    assert set(result) == {"suite", "device", "seconds", "table"} and result["table"]["all"]["questions"] == 4
    assert evaluation.format_table(result["table"]) in capsys.readouterr().out
