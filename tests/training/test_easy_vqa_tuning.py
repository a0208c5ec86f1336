"""Tuning on easy-VQA: only the bridge learns, a call that was cut off goes on exactly, and the file is read back."""

import sys

import pytest
import torch

from vlm_course.easy_vqa import easy_vqa_images, easy_vqa_questions
from vlm_course.pretrained import FOLDER, easy_vqa_tuning, load_small
from vlm_course.training import Stage

STAGE = Stage("easy-vqa", trains=("bridge.",), steps=4, batch=4, lr=5e-4, weight_decay=0.0, warmup=0.25)


@pytest.fixture(scope="module")
def few():
    """The first five training images with their questions."""
    images = dict(sorted(easy_vqa_images("train").items())[:5])
    rows = [row for row in zip(*easy_vqa_questions("train"), strict=True) if row[2] in images]
    return images, tuple(zip(*rows, strict=True))


@pytest.fixture(autouse=True)
def only_few(few, monkeypatch):
    monkeypatch.setattr(easy_vqa_tuning, "easy_vqa_images", lambda split: few[0])
    monkeypatch.setattr(easy_vqa_tuning, "easy_vqa_questions", lambda split: few[1])


def test_features_are_those_of_the_frozen_tower_whatever_the_batch(few):
    small = load_small()
    features, numbers = easy_vqa_tuning.patch_features(small, batch=2)
    assert numbers == sorted(few[0])
    assert features.shape == (5, small.model.config.vision.n_patches, small.model.config.vision.width)
    assert features.dtype == torch.float16
    alone, _ = easy_vqa_tuning.patch_features(small, batch=5)
    torch.testing.assert_close(features.float(), alone.float(), atol=2e-2, rtol=1e-2)


def test_every_question_becomes_a_turn_with_its_answer(few):
    small = load_small()
    tok, turns = small.tokenizer, easy_vqa_tuning.conversations(small)
    assert sum(map(len, turns.values())) == len(few[1][0]) and set(turns) <= set(few[0])
    question, answer, image = (column[0] for column in few[1])
    assert turns[image][0] == [tok.user_id, *tok.encode(question), tok.assistant_id, tok.id_of(answer), tok.eos_id]


def test_only_the_bridge_learns_and_a_run_that_was_cut_off_goes_on_exactly(tmp_path, monkeypatch):
    before = load_small().model.state_dict()
    whole = easy_vqa_tuning.tune(tmp_path / "whole.pt", stage=STAGE).model.state_dict()
    moved = {name for name, value in whole.items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("bridge.") for name in moved)

    class Interrupted(Exception):
        pass

    def interrupting_fit(model, stage, loss_at, **options):
        def loss(step):
            if step == 3:
                raise Interrupted
            return loss_at(step)

        return fit(model, stage, loss, **options, save_every=0.0)

    fit = easy_vqa_tuning.fit
    monkeypatch.setattr(easy_vqa_tuning, "fit", interrupting_fit)
    with pytest.raises(Interrupted):
        easy_vqa_tuning.tune(tmp_path / "cut.pt", stage=STAGE)
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(easy_vqa_tuning, "fit", fit)
    resumed = easy_vqa_tuning.tune(tmp_path / "cut.pt", stage=STAGE).model.state_dict()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_the_program_writes_the_bridge_that_is_loaded_again(tmp_path, monkeypatch, few):
    for file in FOLDER.glob("*"):
        if file.suffix in (".safetensors", ".json") and file.name != easy_vqa_tuning.FILE:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(FileNotFoundError, match=r"easy_vqa_bridge.safetensors is missing.*easy_vqa_tuning"):
        easy_vqa_tuning.load_tuned(folder=tmp_path)
    made, tune = [], easy_vqa_tuning.tune

    def briefly(checkpoint):
        made.append(tune(checkpoint, stage=STAGE))
        return made[0]

    monkeypatch.setattr(easy_vqa_tuning, "tune", briefly)
    monkeypatch.setattr(sys, "argv", ["tuning", "--out", str(tmp_path), "--checkpoint", str(tmp_path / "c.pt")])
    easy_vqa_tuning.main()
    loaded = easy_vqa_tuning.load_tuned(folder=tmp_path).model.state_dict()
    for name, value in made[0].model.state_dict().items():
        expected = value.half().float() if name.startswith("bridge.") else value
        assert torch.equal(loaded[name], expected), name
