"""Dialogs: every answer is recomputed from the words of its question and the objects of its scene."""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from vlm_course.chat import encode_chat
from vlm_course.tokenizer import PUNCTUATION, WordTokenizer
from vlm_course.worlds.dialogs import KINDS, LOCATIONS, Dialogs, from_grid, to_grid
from vlm_course.worlds.scenes import HELD_OUT, IMAGE_SIZE, MAX_OBJECTS, sample
from vlm_course.worlds.templates import QUESTIONS, vocabulary

_spec = importlib.util.spec_from_file_location("worlds_oracle", Path(__file__).with_name("oracle.py"))
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

HALF_A_BIN = IMAGE_SIZE / LOCATIONS / 2
TOK = WordTokenizer.small()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def text(ids):
    return TOK.decode(ids)


def check_turns(turns, scenes):
    """Every valid turn against the oracle. Returns how many there were of each kind."""
    seen = Counter()
    for row in turns.valid.nonzero().flatten().tolist():
        kind, question, given = KINDS[turns.kind[row]], text(turns.question[row]), text(turns.answer[row])
        scene = oracle.objects(scenes, row)
        right = oracle.answer(kind, question, scene)
        if isinstance(right, str):
            assert given == right, (question, given, right, scene)
        else:
            form = r"\((\d+) (\d+)\)" if kind == "point" else r"\[(\d+) (\d+) (\d+) (\d+)\]"
            numbers = [int(n) for n in re.fullmatch(form, given).groups()]
            off = max(abs(from_grid(n) - r) for n, r in zip(numbers, right, strict=True))
            assert off <= HALF_A_BIN + 1e-4, (question, given, right)
        seen[kind] += 1
    return seen


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_right(kind, split):
    scenes = sample(400, generator=seeded(1), split=split)
    seen = check_turns(Dialogs().ask(scenes, kind, generator=seeded(2)), scenes)
    assert seen[kind] > 250


@pytest.mark.parametrize("kind", KINDS)
def test_canonical_questions_use_one_wording_and_are_right(kind):
    scenes = sample(200, generator=seeded(3))
    turns = Dialogs(canonical=True).ask(scenes, kind, generator=seeded(4))
    check_turns(turns, scenes)
    firsts = {QUESTIONS[k][0].split()[0] for k in ((kind,) if kind != "check" else ("beside", "over"))}
    assert {text(q).split()[0] for q in turns.question[turns.valid]} == firsts


def test_the_target_is_the_object_asked_about():
    scenes = sample(300, generator=seeded(5))
    rows = torch.arange(len(scenes))
    for kind, values in (("colour", scenes.colour), ("shape", scenes.shape), ("size", scenes.size)):
        turns = Dialogs().ask(scenes, kind, generator=seeded(6))
        ids = getattr(Dialogs(), kind + "_ids")[values[rows, turns.target]]
        assert (ids == turns.answer[:, 0])[turns.valid].all()
        assert scenes.present[rows, turns.target][turns.valid].all()


@pytest.mark.parametrize("kind", ["colour", "shape"])
def test_a_kind_applies_exactly_where_an_object_can_be_named(kind):
    scenes = sample(600, generator=seeded(7))
    valid = Dialogs().ask(scenes, kind, generator=seeded(8)).valid
    by = "shape" if kind == "colour" else "colour"
    for row in range(len(scenes)):
        with_size = Counter((getattr(o, by), o.size) for o in oracle.objects(scenes, row))
        assert bool(valid[row]) == (1 in with_size.values())
    assert 0 < (~valid).sum() < 60


def test_a_relation_applies_exactly_where_two_objects_clearly_differ():
    scenes = sample(400, generator=seeded(9))
    valid = Dialogs().ask(scenes, "relation", generator=seeded(10)).valid
    for row in range(len(scenes)):
        places = [(o.x, o.y) for o in oracle.objects(scenes, row)]
        gaps = [sorted((abs(a - c), abs(b - d))) for i, (a, b) in enumerate(places) for c, d in places[:i]]
        assert bool(valid[row]) == any(large > 1.3 * small for small, large in gaps)


@pytest.mark.parametrize("kind", ["existence", "check"])
def test_yes_is_half_of_the_answers_also_among_negated_questions(kind):
    scenes = sample(6000, generator=seeded(11))
    turns = Dialogs().ask(scenes, kind, generator=seeded(12))
    yes = turns.answer[:, 0] == TOK.id_of("yes")
    words = torch.tensor([TOK.id_of("not"), TOK.id_of("no")])
    negated = torch.isin(turns.question, words).any(1)
    groups = [turns.valid] if kind == "check" else [negated, ~negated]
    for group in groups:
        assert group.sum() > 1000
        assert abs(yes[group].float().mean() - 0.5) < 3.5 * 0.5 / group.sum() ** 0.5


def test_directions_are_balanced():
    turns = Dialogs().ask(sample(6000, generator=seeded(13)), "relation", generator=seeded(14))
    shares = Counter(turns.answer[turns.valid, 0].tolist())
    assert len(shares) == 4 and max(shares.values()) < 0.3 * sum(shares.values())


def test_training_texts_never_name_a_held_out_pair():
    scenes, dialogs = sample(3000, generator=seeded(15)), Dialogs()
    plurals = {v: k for k, v in oracle.PLURALS.items() if v}
    pair = re.compile("|".join(rf"\b{c} (?:{s}|{plurals[s]})\b" for s, c in HELD_OUT))
    texts = [text(q) for kind in KINDS for q in dialogs.ask(scenes, kind, generator=seeded(16)).question]
    texts += [text(row) for row in dialogs.captions(scenes)] + [text(row) for row in dialogs.contrastive_texts(scenes)]
    assert not [t for t in texts if pair.search(t)]
    held_out = sample(50, generator=seeded(15), split="held_out")
    assert all(pair.search(text(row)) for row in dialogs.captions(held_out)), "the pattern finds what it should"


def test_every_word_is_in_the_vocabulary_and_typed_text_gives_the_same_ids():
    scenes, words = sample(1500, generator=seeded(17)), set(vocabulary())
    for kind in KINDS:
        turns = Dialogs().ask(scenes, kind, generator=seeded(18))
        for ids in torch.cat([turns.question, turns.answer[:, : turns.question.shape[1]]]).unique(dim=0):
            ids = ids[ids != TOK.pad_id].tolist()
            pieces = [TOK.pieces[i] for i in ids]
            assert all(p in words or p.isdigit() or p in PUNCTUATION for p in pieces), pieces
            assert TOK.encode(text(ids), special=False) == ids


def test_every_wording_of_every_question_is_used():
    scenes, dialogs = sample(1500, generator=seeded(19)), Dialogs()
    questions = [q for kind in KINDS for q in dialogs.ask(scenes, kind, generator=seeded(20)).question]
    texts = "".join(" ".join(TOK.pieces[i] for i in ids[ids != TOK.pad_id]) + " \n" for ids in questions)
    for wording in (w for group in QUESTIONS.values() for w in group):
        pattern = "".join(r"(?:\w+ )?" if w.startswith("{") else re.escape(w) + " " for w in wording.split())
        assert re.search(f"^{pattern}$", texts, re.M), wording


def test_coordinates_round_trip():
    numbers = torch.arange(LOCATIONS)
    assert torch.equal(to_grid(from_grid(numbers)), numbers)
    pixels = torch.linspace(0, IMAGE_SIZE, 5001)
    grid = to_grid(pixels)
    assert grid.min() == 0 and grid.max() == LOCATIONS - 1
    assert (from_grid(grid) - pixels).abs().max() <= HALF_A_BIN + 1e-5


def test_contrastive_texts_say_where_things_are():
    scenes = sample(100, generator=seeded(21))
    for row, ids in enumerate(Dialogs().contrastive_texts(scenes)):
        ids = ids[ids != TOK.pad_id].tolist()
        assert ids[0] == TOK.bos_id and ids[-1] == TOK.eos_id and ids.count(TOK.eos_id) == 1
        rows, columns = ("top", "middle", "bottom"), ("left", "center", "right")
        places = [f"{rows[c // 3]} {columns[c % 3]}" for c in scenes.cell[row, : scenes.count[row]].tolist()]
        expected = [f"{what} {where}," for what, where in zip(scenes.describe(row), places, strict=True)]
        assert text(ids) == " ".join(expected)


def test_mixed_kinds_follow_the_weights_and_are_right():
    scenes = sample(1000, generator=seeded(22))
    weights = torch.zeros(len(KINDS))
    weights[KINDS.index("colour")], weights[KINDS.index("box")] = 3.0, 1.0
    turns = Dialogs().mixed(scenes, weights, generator=seeded(23))
    assert turns.valid.all()
    seen = check_turns(turns, scenes)
    assert set(seen) <= {"colour", "box", "existence"}, "existence stands in where the colour cannot be asked"
    assert 0.68 < (seen["colour"] + seen["existence"]) / 1000 < 0.82 and seen["existence"] < 60


def test_several_turns_are_about_the_same_scene():
    scenes = sample(60, generator=seeded(24))
    turns = Dialogs().several(scenes, 5, torch.ones(len(KINDS)), generator=seeded(25))
    seen = sum((check_turns(turn, scenes) for turn in turns), Counter())
    assert len(turns) == 5 and sum(seen.values()) == 300 and set(seen) == set(KINDS)
    assert any((turns[0].question[row] != turns[1].question[row]).any() for row in range(60))


def test_a_conversation_supervises_exactly_the_answers_and_their_ends():
    scenes = sample(40, generator=seeded(26))
    dialogs = Dialogs()
    turns = dialogs.several(scenes, 3, torch.ones(len(KINDS)), generator=seeded(27))
    ids, labels = dialogs.conversation(turns, visual_tokens=7)
    for row in range(len(scenes)):
        talk = [(text(t.question[row]), text(t.answer[row])) for t in turns]
        expected_ids, expected_labels = encode_chat(TOK, talk, 7)
        n = len(expected_ids)
        assert ids[row, :n].tolist() == expected_ids and labels[row, :n].tolist() == expected_labels
        assert (ids[row, n:] == TOK.pad_id).all() and (labels[row, n:] == -100).all()
        assert labels[row].eq(TOK.eos_id).sum() == 3
    for length in (30, ids.shape[1] + 9):
        cut_ids, cut_labels = dialogs.conversation(turns, visual_tokens=7, length=length)
        assert cut_ids.shape == cut_labels.shape == (40, length)
        shared = min(length, ids.shape[1])
        assert torch.equal(cut_ids[:, :shared], ids[:, :shared])
        assert torch.equal(cut_labels[:, :shared], labels[:, :shared])
        assert not cut_ids[:, shared:].any() and (cut_labels[:, shared:] == -100).all()


def test_same_seed_same_questions():
    scenes = sample(50, generator=seeded(28))
    a, b, c = (Dialogs().mixed(scenes, torch.ones(10), generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a.question, b.question) and torch.equal(a.answer, b.answer)
    assert not torch.equal(a.question, c.question)


def test_errors_name_what_was_given():
    scenes = sample(2, generator=seeded())
    with pytest.raises(ValueError, match="'weather'"):
        Dialogs().ask(scenes, "weather")
    with pytest.raises(ValueError, match="meta"):
        Dialogs().ask(scenes.to("meta"), "colour")
    with pytest.raises(KeyError):
        Dialogs(WordTokenizer(["red"]))


def test_the_oracle_can_tell_wrong_from_right():
    scenes = sample(200, generator=seeded(29), objects=(3, MAX_OBJECTS))
    others = scenes[torch.arange(len(scenes)).roll(1)]
    for kind in KINDS:
        turns = Dialogs().ask(scenes, kind, generator=seeded(30))
        with pytest.raises(AssertionError):
            check_turns(turns, others)
