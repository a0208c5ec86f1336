"""The fusion simulation, driven through its real widgets, on the real classes with random weights."""

import pytest
import torch

from vlm_course.attention import causal_mask
from vlm_course.pretrained import load_small
from vlm_course.simulations.fusion_comparison import WORDS, FusionExperiment, fusion_simulation
from vlm_course.studies.fusion_strategies import QUERIES, STRATEGIES, build


@pytest.fixture(scope="module")
def experiment():
    small = load_small()
    models = {}
    for strategy in STRATEGIES:
        model = build(strategy, small, seed=3).eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            if name.endswith("gate"):
                weight.fill_(0.7)
            elif weight.dim() == 2 and not name.startswith("vision."):
                weight.mul_(3)
        models[strategy] = model
    return FusionExperiment(small, models, count=3)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("heads", ["mean", "best"])
def test_attention_stays_under_its_mask(experiment, strategy, heads):
    reading = experiment.read(strategy, 1, heads=heads)
    assert reading.attention.shape == reading.mask.shape
    assert reading.attention[~reading.mask].sum() == 0
    sums = reading.attention.sum(-1)
    torch.testing.assert_close(sums, reading.mask.any(-1).float(), atol=1e-4, rtol=0)
    assert len(reading.looks) == 1 + (strategy == "interleaved")
    assert 0 < reading.on_images <= 1.0001 and 0 < reading.object_area < 0.5


def test_every_strategy_has_its_own_sequence(experiment):
    readings = {strategy: experiment.read(strategy, 0) for strategy in STRATEGIES}
    text = len(readings["cross-attention"].ids) - 1
    assert len(readings["early"].ids) == text + 144 and len(readings["resampler"].ids) == text + QUERIES
    assert len(readings["interleaved"].ids) > 2 * 144
    assert torch.equal(readings["early"].mask, causal_mask(text + 144))
    outside = readings["cross-attention"].mask
    assert (
        outside.shape == (text + 1, 144) and outside[1:].all() and not outside[0].any()
    )  # <bos> stands before <image>


def test_the_best_head_looks_at_the_object_more_than_the_mean(experiment):
    mean, best = (experiment.read("early", 2, heads=heads) for heads in ("mean", "best"))
    assert (best.looks[-1][best.inside].sum() >= mean.looks[-1][mean.inside].sum()).item()
    assert mean.on_others is None and 0 < best.on_others <= 1
    with pytest.raises(ValueError, match="heads is 'all', expected 'mean' or 'best'"):
        experiment.read("early", 0, heads="all")


def test_the_control_of_the_best_head_chooses_anew_for_each_other_object(experiment):
    """With one head for every patch, each of which looks nowhere else, every object has its perfect head."""
    assert experiment._best_on_others(torch.eye(144), 0) > 0.99
    spread = torch.full((1, 144), 1 / 144)
    others = [n for n in experiment.scenes.present[0].nonzero()[:, 0].tolist() if n != experiment.target[0]]
    areas = [experiment.object_patches(0, slot).float().mean().item() for slot in others]
    assert experiment._best_on_others(spread, 0) == pytest.approx(sum(areas) / len(areas))


def test_the_patches_of_an_object_lie_where_it_is(experiment):
    slot = experiment.target[0]
    column, row = (experiment.scenes.centre[0, slot] // 8).long().tolist()
    assert experiment.object_patches(0).view(12, 12)[row, column]


def test_widgets_redraw_picture_and_text(experiment):
    simulation = fusion_simulation(experiment)
    assert "144 of them visual tokens" in simulation.readout.value
    picture = simulation.figure.value
    simulation.controls["strategy"].value = "cross-attention"
    assert simulation.figure.value != picture and WORDS["cross-attention"] in simulation.readout.value
    assert "patches stay outside" in simulation.readout.value
    simulation.controls["strategy"].value = "interleaved"
    assert "to the image before" in simulation.readout.value
    picture = simulation.figure.value
    simulation.controls["heads"].value = "best"
    assert simulation.figure.value != picture
    simulation.controls["scene"].value = 2
    assert experiment.questions[2] in simulation.readout.value
