"""The alignment simulation, driven through its real widgets, on the real class with random weights."""

import math

import pytest
import torch

from vlm_course.bridge_study import principal_basis, rotated_bridge, rotation
from vlm_course.llava import Llava, small_config
from vlm_course.probe_questions import question_set
from vlm_course.simulations.projection_alignment import AlignmentExperiment, alignment_simulation
from vlm_course.tokenizer import WordTokenizer


@pytest.fixture(scope="module")
def experiment():
    tokenizer = WordTokenizer.small()
    torch.manual_seed(0)
    model = Llava(small_config(tokenizer.vocab_size)).eval()
    return AlignmentExperiment(model, question_set(tokenizer, scenes=3))


def test_every_plane_turns_every_vector_by_the_angle():
    basis = principal_basis(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)))
    vectors = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    turned = vectors @ rotation(basis, 37, planes=4).T
    cosine = torch.cosine_similarity(vectors, turned, dim=-1)
    torch.testing.assert_close(cosine, torch.full_like(cosine, math.cos(math.radians(37))), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cdist(turned, turned), torch.cdist(vectors, vectors), atol=1e-4, rtol=0)


def test_one_plane_leaves_the_others():
    basis = torch.eye(6)
    turn = rotation(basis, 90, planes=1)
    assert torch.allclose(turn @ basis[:, 0], basis[:, 1], atol=1e-6)
    assert torch.equal(turn[2:, 2:], torch.eye(4))


def test_too_many_planes_are_refused():
    with pytest.raises(ValueError, match="3 planes at right angles, asked for 4"):
        rotation(torch.eye(6), 10, planes=4)


def test_turned_bridge_is_the_turned_output(experiment):
    turn = rotation(experiment.basis, 50, experiment.all_planes)
    rotated = rotated_bridge(experiment.model.bridge, turn)(experiment.features)
    torch.testing.assert_close(rotated, experiment.tokens @ turn.T, atol=1e-5, rtol=0)


def test_no_angle_is_the_trained_model(experiment):
    still = experiment.measure(0)
    assert still.cosine == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(experiment.turned(0), experiment.tokens, atol=1e-5, rtol=0)
    whole = experiment.measure(360)
    assert whole.score.loss == pytest.approx(still.score.loss, abs=1e-4)


def test_the_trained_bridge_is_not_changed(experiment):
    before = experiment.model.bridge.mlp[-1].weight.clone()
    experiment.measure(120)
    assert torch.equal(before, experiment.model.bridge.mlp[-1].weight)


def test_widgets_redraw_picture_and_text(experiment):
    simulation = alignment_simulation(experiment)
    first = simulation.frame()
    assert "Angle 0 degrees in 128 of 128 planes" in first.text and "cosine with the trained tokens: 1.00" in first.text
    picture = simulation.figure.value
    simulation.controls["degrees"].value = 90
    assert simulation.figure.value != picture
    assert "Angle 90 degrees" in simulation.readout.value
    assert experiment.measure(90).cosine == pytest.approx(0, abs=1e-5)
    simulation.controls["planes"].value = 1
    assert "in 1 of 128 planes" in simulation.readout.value
    assert f"{experiment.measure(90, 1).score.loss:.2f} nats" in simulation.readout.value


def test_static_frame_says_what_the_widgets_say(experiment, capsys):
    alignment_simulation(experiment, degrees=45).first_frame()
    printed = capsys.readouterr().out
    assert "Angle 45 degrees" in printed and "0.71" in printed


def test_errors_in_drawing_are_not_swallowed(experiment):
    simulation = alignment_simulation(experiment)
    simulation.draw = lambda **values: 1 / 0
    with pytest.raises(ZeroDivisionError):
        simulation.controls["degrees"].value = 60
