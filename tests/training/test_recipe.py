"""The recipe of the shipped weights, rehearsed with a few steps of a few images on the processor."""

import pytest
import torch
from safetensors.torch import load_file

from vlm_course.pretrained import LANGUAGE, TOWERS, load_small
from vlm_course.pretrained.recipe import MIX, STAGES, train_small
from vlm_course.worlds.dialogs import KINDS

REHEARSAL = {"device": "cpu", "scale": 0.0006, "batch": 8}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("unbroken"), []
    assert train_small(folder, log=lines.append, **REHEARSAL)
    return folder, lines


def test_four_stages_are_printed_in_order(unbroken):
    folder, lines = unbroken
    order = list(dict.fromkeys(line.split()[0] for line in lines if "step" in line))
    assert order == [stage.name for stage in STAGES] == ["contrastive", "language", "align", "instruct"]
    assert "parameters" in lines[0]
    assert {path.name for path in folder.iterdir()} == {TOWERS, LANGUAGE, *(f"{name}.pt" for name in order)}


def test_what_was_trained_loads_and_is_not_what_it_began_with(unbroken):
    small = load_small(folder=unbroken[0])
    shipped = load_small()
    assert not torch.equal(
        small.model.decoder.embed(torch.tensor([[7]])), shipped.model.decoder.embed(torch.tensor([[7]]))
    )
    towers = torch.load(unbroken[0] / "contrastive.pt", weights_only=True)["model"]
    last = torch.load(unbroken[0] / "instruct.pt", weights_only=True)["model"]
    vision = [name for name in towers if name.startswith("vision.")]
    assert vision and all(torch.equal(last[name], towers[name]) for name in vision), "the tower is frozen afterwards"


def test_a_run_in_pieces_gives_the_same_weights(unbroken, tmp_path):
    calls, lines = 1, []
    while not train_small(tmp_path, minutes=1e-6, log=lines.append, **REHEARSAL):
        calls += 1
        assert calls < 20
    assert calls > len(STAGES) and "call again to go on" in "\n".join(lines)
    for name in (TOWERS, LANGUAGE):
        ours, theirs = load_file(tmp_path / name), load_file(unbroken[0] / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_it_stops_after_a_stage_when_asked(tmp_path):
    lines = []
    assert not train_small(tmp_path, stage="contrastive", log=lines.append, **REHEARSAL)
    assert [path.name for path in tmp_path.iterdir()] == ["contrastive.pt"]
    assert "contrastive" in lines[-1] and "as asked" in lines[-1]


def test_errors_name_what_was_given(tmp_path):
    with pytest.raises(ValueError, match="'pretraining'"):
        train_small(tmp_path, stage="pretraining", **REHEARSAL)


def test_every_kind_of_question_is_trained():
    assert tuple(MIX) == KINDS and min(MIX.values()) > 0
