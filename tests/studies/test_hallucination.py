"""Chapter 3's study: its worlds are what they are said to be, its probe is balanced, a rehearsal runs end to end."""

import pytest
import torch

from vlm_course.studies.common import Study, run_study
from vlm_course.studies.hallucination import (
    ABSENT,
    STUDY,
    WORLDS,
    frequent_pairs,
    named_objects,
    objects_in,
    partners,
    probe,
    reduced,
    scores,
    skewed,
)
from vlm_course.studies.results import load_results
from vlm_course.tokenizer import WordTokenizer
from vlm_course.worlds.scenes import COLOURS, SHAPES, held_out_table, render, sample


def drawn(world, n=3000):
    generator = torch.Generator().manual_seed(5)
    return skewed(sample(n, generator=generator), world, generator)


def test_frequent_objects_have_every_shape_and_no_colour_twice():
    pairs = frequent_pairs()
    assert {pair // len(COLOURS) for pair in pairs} == set(range(len(SHAPES)))
    assert len({pair % len(COLOURS) for pair in pairs}) == len(pairs)
    assert not held_out_table().flatten()[list(pairs)].any()


def test_partners_go_both_ways_and_share_nothing():
    table, count = partners(), len(COLOURS)
    one = (table >= 0).nonzero()[:, 0]
    assert len(one) >= 40 and torch.equal(table[table[one]], one)
    assert (one // count != table[one] // count).all() and (one % count != table[one] % count).all()
    assert not held_out_table().flatten()[one].any()


@pytest.mark.parametrize("world", WORLDS)
def test_a_world_keeps_places_and_has_its_own_objects(world):
    scenes = drawn(world)
    even = sample(3000, generator=torch.Generator().manual_seed(5))
    assert torch.equal(scenes.centre, even.centre) and torch.equal(scenes.present, even.present)
    there = objects_in(scenes)
    assert torch.equal(there.sum(1), scenes.count)  # no object twice
    assert not there[:, held_out_table().flatten()].any()
    rate, usual = there.float().mean(0), partners() >= 0
    frequent = rate[list(frequent_pairs())].mean().item()
    together = there[:, usual] & there[:, partners()[usual]]
    together = together.sum().item() / there[:, usual].sum().item()
    assert (frequent > 0.3) == (world == "frequent") and (together > 0.6) == (world == "together")
    if world != "frequent":
        assert frequent == pytest.approx(rate[usual].mean().item(), rel=0.15)


def test_a_new_colour_is_painted():
    scenes = drawn("frequent", 8)
    image = render(scenes, noise=0)
    for row in range(8):
        x, y = scenes.centre[row, 0].long().tolist()
        torch.testing.assert_close((image[row, :, y, x] + 1) / 2, scenes.rgb[row, 0], atol=0.02, rtol=0)


def test_an_unknown_world_is_named():
    with pytest.raises(ValueError, match="'odd', expected one of even, frequent, together"):
        drawn("odd", 2)


def test_reducing_loses_detail_and_keeps_the_mean():
    image = render(drawn("even", 2))
    low = reduced(image, 24)
    assert low.shape == image.shape and (low - image).abs().mean() > 0.01
    assert low.mean().item() == pytest.approx(image.mean().item(), abs=0.01)
    assert reduced(image, None) is image
    with pytest.raises(ValueError, match="side is 97"):
        reduced(image, 97)


def test_half_of_the_probe_is_true_and_absent_objects_are_what_they_are_called():
    questions = probe(200, generator=torch.Generator().manual_seed(1))
    there = objects_in(questions.scenes)
    assert torch.equal(there[questions.image, questions.pair], questions.true)
    frequent = torch.isin(questions.pair, torch.tensor(frequent_pairs()))
    table = partners()
    beside = there[questions.image, table[questions.pair].clamp(min=0)] & (table[questions.pair] >= 0)
    for number, name in enumerate(ABSENT):
        rows = questions.absent == number
        assert questions.true[rows].float().mean() == 0.5
        absent = rows & ~questions.true
        assert frequent[absent].all() if name == "frequent" else not frequent[absent].any()
        assert beside[absent].all() if name == "together" else not beside[absent].any()


def test_scores_of_answers_that_are_known():
    questions = probe(50, generator=torch.Generator().manual_seed(1))
    right, always = scores(questions.true, questions), scores(torch.ones_like(questions.true), questions)
    for name in ABSENT:
        assert right[name] == {"accuracy": 1, "precision": 1, "recall": 1, "yes": 0.5, "hallucinated": 0}
        assert always[name] == {"accuracy": 0.5, "precision": 0.5, "recall": 1, "yes": 1, "hallucinated": 1}
    never = scores(torch.zeros_like(questions.true), questions)
    assert never["random"]["precision"] == never["random"]["yes"] == 0


def test_objects_are_found_in_captions():
    tokenizer = WordTokenizer.small()
    ids = tokenizer.encode("a large red circle , a small blue star .")
    named = named_objects(torch.tensor([ids, [0] * len(ids)]), tokenizer)
    pairs = [SHAPES.index("circle") * len(COLOURS) + COLOURS.index("red")]
    pairs += [SHAPES.index("star") * len(COLOURS) + COLOURS.index("blue")]
    assert named[0].nonzero()[:, 0].tolist() == sorted(pairs) and not named[1].any()


def test_a_rehearsal_gives_the_whole_table(tmp_path):
    name = "together-reduced"
    one = Study(**{**vars(STUDY), "variants": {name: STUDY.variants[name]}})
    run_study(one, seeds=1, out=tmp_path, scale=0.003, log=lambda _: None)
    results = load_results("hallucination", tmp_path)
    assert results.rehearsal
    for part in ("model", "blind", "swapped"):
        assert set(results.value(name, part)) == set(ABSENT)
    assert 0 <= results.mean(name, "captions", "recall") <= 1
