"""The loop that all studies share: it resumes, says that a rehearsal is one, and its results can be loaded."""

import json

import pytest
import torch

from vlm_course import progress
from vlm_course.pretrained import load_small
from vlm_course.studies import STUDIES, study
from vlm_course.studies.common import Lab, Study, run_study
from vlm_course.studies.results import load_results, load_weights, save_weights
from vlm_course.studies.tiny import learned, tiny_llava


@pytest.fixture(scope="module")
def small():
    return load_small()


@pytest.fixture
def counting():
    """A study that trains nothing and counts its runs."""
    runs = []

    def train(variant, lab):
        runs.append((variant, lab.seed))
        lab.progress(0.5)
        return {"score": {"model": float(lab.seed), "blind": 0.25}}, {"w": torch.full((2,), float(lab.seed))}

    return Study("counting", "Does it count?", {"a": "first", "b": "second"}, train, ships={"b": 1}), runs


def test_every_registered_study_can_be_imported():
    for name in STUDIES:
        assert study(name).name == name
        assert study(name).variants


def test_an_unknown_study_is_named():
    with pytest.raises(ValueError, match="no study 'nothing'"):
        study("nothing")


def test_a_study_writes_mean_and_spread_and_skips_what_is_done(counting, tmp_path):
    plan, runs = counting
    shares = []
    path = run_study(plan, seeds=3, out=tmp_path, scale=0.5, log=lambda _: None, progress=shares.append)
    assert len(runs) == 6 and shares[-1] == 1.0 and shares == sorted(shares)
    record = json.loads(path.read_text())
    assert record["rehearsal"] is True
    score = record["variants"]["a"]["measures"]["score"]
    assert score["model"] == {"mean": 1.0, "spread": 2.0, "values": [0.0, 1.0, 2.0]}
    assert score["blind"]["spread"] == 0.0
    assert record["card"]["weights_of_seed"] == {"a": 0, "b": 1}
    for variant, seed in record["card"]["weights_of_seed"].items():
        assert load_weights(tmp_path / f"counting-{variant}.safetensors")["w"].tolist() == [seed, seed]
    run_study(plan, seeds=3, out=tmp_path, scale=0.5, log=lambda _: None)
    assert len(runs) == 6
    (tmp_path / "counting-b-1.json").unlink()
    run_study(plan, seeds=3, out=tmp_path, scale=0.5, log=lambda _: None)
    assert runs[6:] == [("b", 1)]


def test_a_rehearsal_is_not_mixed_with_a_result(counting, tmp_path):
    plan, _ = counting
    run_study(plan, seeds=1, out=tmp_path, scale=0.5, log=lambda _: None)
    with pytest.raises(ValueError, match=r"made with scale 0\.5, asked is 1\.0"):
        run_study(plan, seeds=1, out=tmp_path, log=lambda _: None)


@pytest.mark.parametrize(("options", "message"), [({"seeds": 0}, "seeds is 0"), ({"scale": 0.0}, "scale is 0")])
def test_what_cannot_be_run_is_said(counting, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run_study(counting[0], out=tmp_path, **options)


def test_results_are_read_by_name_and_a_rehearsal_says_so(counting, tmp_path):
    run_study(counting[0], seeds=2, out=tmp_path, scale=0.5, log=lambda _: None)
    results = load_results("counting", tmp_path)
    assert results.mean("b", "score", "model") == 0.5
    assert results.note().startswith("REHEARSAL")
    with pytest.raises(ValueError, match="no 'colour' here; there is score"):
        results.value("a", "colour")
    with pytest.raises(ValueError, match="no results of the study 'other'"):
        load_results("other", tmp_path)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_only_a_whole_study_answers_a_prediction(counting, tmp_path, scale, monkeypatch, capsys):
    monkeypatch.setenv("VLM_COURSE_HOME", str(tmp_path))
    run_study(counting[0], seeds=1, out=tmp_path, scale=scale, log=lambda _: None)
    progress.remember("p_test", "a", 0.9)
    load_results("counting", tmp_path).reveal("p_test", "b", because="The table says so.")
    said = capsys.readouterr().out
    assert progress.load()["p_test"].right == (None if scale < 1 else "b")
    assert ("nothing is decided" in said) == (scale < 1) and ("The answer is b" in said) == (scale == 1)


def test_fit_moves_bridge_and_decoder_and_leaves_the_tower(small, tmp_path):
    lab = Lab(small, scale=0.001, folder=tmp_path, log=lambda _: None)
    model = tiny_llava(small, seed=0)
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("vision.")) < 1_200_000
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(step, batch):
        scenes, generator = lab.scenes_at(0, step, batch)
        turns = [lab.dialogs.ask(scenes, "colour", generator=generator)]
        ids, labels = lab.dialogs.conversation(turns, visual_tokens=model.config.visual_tokens, length=190)
        return lab.answer_loss(model, ids, labels, lab.images(scenes, generator))

    lab.fit(model, loss, name="test", steps=1000, lr=1e-3, batch=4)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[0] for name in moved} == {"bridge", "decoder"}


def test_what_was_learned_can_be_loaded_again(small, tmp_path):
    model = tiny_llava(small, seed=3)
    save_weights(learned(model), tmp_path / "counting-a.safetensors")
    numbers = sum(value.numel() for value in learned(model).values())
    assert (tmp_path / "counting-a.safetensors").stat().st_size < 1.1 * numbers  # a byte a number
    (tmp_path / "counting.json").write_text(json.dumps({"study": "counting", "rehearsal": True}))
    again = load_results("counting", tmp_path).load("a", small)
    for name, value in model.state_dict().items():
        assert torch.allclose(again.state_dict()[name], value, atol=1e-3), name
    ids = torch.tensor([[small.tokenizer.bos_id, small.tokenizer.user_id]])
    assert torch.allclose(again(ids), model(ids), atol=0.02)
