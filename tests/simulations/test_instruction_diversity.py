"""The controls of the simulation change a real answer, and what it says about the answer is true."""

import pytest

from vlm_course.pretrained import load_small
from vlm_course.simulations.instruction_diversity import IMAGES, InstructionExperiment, diversity_simulation
from vlm_course.studies.instruction_mix import NEW
from vlm_course.worlds.dialogs import KINDS


@pytest.fixture(scope="module")
def experiment():
    small = load_small()
    return InstructionExperiment({"shipped": small.model, "again": small.model}, small.tokenizer, scenes=4)


def test_every_kind_applies_to_every_scene(experiment):
    assert experiment.kinds == (*KINDS, NEW)
    assert len(experiment.world) == 4
    for kind in KINDS:
        assert experiment.turns[kind].valid.all()


def test_the_shipped_model_follows_its_instructions_and_needs_the_image(experiment):
    kinds = [kind for kind in KINDS if kind != "size"]
    score = {
        image: sum(experiment.reply("shipped", s, k, image).right for s in range(4) for k in kinds) / (4 * len(kinds))
        for image in IMAGES
    }
    assert score[IMAGES[0]] > 0.9
    assert all(score[image] < 0.6 for image in IMAGES[1:]), score


def test_controls_move_the_picture_and_the_words(experiment):
    simulation = diversity_simulation(experiment)
    seen = set()
    for kind in ("colour", "caption", "box", "point", NEW):
        simulation.controls["kind"].value = kind
        assert f"Instruction ({kind})" in simulation.readout.value
        seen.add(simulation.figure.value)
    assert len(seen) == 5
    simulation.controls["kind"].value = "box"
    before = simulation.shown
    simulation.controls["image"].value = "a black image"
    assert simulation.shown.text != before.text and "black" in simulation.shown.alt
    simulation.controls["image"].value = IMAGES[0]
    simulation.controls["scene"].value = 3
    assert simulation.shown.text != before.text
    simulation.controls["model"].value = "again"
    assert "The again model" in simulation.shown.text


def test_the_first_frame_needs_no_widget(experiment, capsys):
    diversity_simulation(experiment, kind="count", scene=1).first_frame()
    assert "Instruction (count)" in capsys.readouterr().out


def test_bars_are_probabilities_and_the_answer_begins_with_the_likeliest(experiment):
    reply = experiment.reply("shipped", 0, "colour")
    shares = [share for _, share in reply.first]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.0001
    assert reply.says.startswith(reply.first[0][0])


def test_what_cannot_be_shown_is_named(experiment):
    with pytest.raises(ValueError, match="image is 'mine'"):
        experiment.seen(0, "mine")
    with pytest.raises(ValueError, match="needs at least 2"):
        InstructionExperiment({}, experiment.tokenizer, scenes=1)
