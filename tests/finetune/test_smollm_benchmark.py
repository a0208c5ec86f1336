"""Path 2's benchmark from end to end on a CPU, with a stand-in for SmolLM2: what a GPU is paid for must not fail."""

import json
import sys
from dataclasses import asdict

import pytest

from benchmarks import finetune_smollm
from benchmarks.finetune_smollm import LEAST, Setting, affordable_steps, run
from vlm_course.finetune.stored import StoredRun
from vlm_course.finetune.tokenizers import for_smollm

SETTING = Setting(
    minutes=0.1, batch=2, micro_batch=None, scenes=2, easy_vqa=3, steps=2, align_steps=2, lr=1e-3, price=2.0, seed=0,
    device="cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Reading all 4,000 images of easy-VQA takes seconds."""
    from vlm_course.finetune import path_two

    whole = path_two.data
    monkeypatch.setattr(path_two, "data", lambda *a, **k: whole(*a, **k | {"images": 5, "easy_vqa": 0.5}))


def test_one_command_does_it_all(tiny_smollm):
    parts = []
    found = run(SETTING, cache=tiny_smollm, keep_part=parts.append)
    assert parts[0]["tables"]["after"] == found["tables"]["after"], "what is known before the control is kept at once"
    assert json.loads(json.dumps(found)) is not None
    assert found["saved"]["largest difference, loaded back"] == 0
    assert found["saved"]["largest difference, transformers"] < 1e-4
    stored = StoredRun(**found["stored"])
    assert set(stored.numbers) == {
        "steps", "batch", "parameters that learn", "minutes", "samples_per_s", "share_of_peak", "dollars",
    }  # fmt: skip
    assert set(stored.accuracy["colour"]) == {"before", "after", "blind", "swapped", "majority", "random tower"}
    assert [step for step, _ in stored.losses] == [1, 2, 3, 4]
    assert found["tables"]["random tower"].keys() == found["tables"]["after"].keys()


def test_steps_follow_from_the_minutes(tiny_smollm):
    steps, speed = affordable_steps(SETTING, tiny_smollm, for_smollm(tiny_smollm), began=0.0)
    assert steps == LEAST and speed > 0


@pytest.mark.parametrize("keep", [False, True])
def test_the_command_line(keep, tmp_path, monkeypatch, capsys):
    asked, kept = [], []
    stored = StoredRun(2, "a model", "some work", {"steps": 2}, ((1, 2.0),), {"colour": {"before": 0.0, "after": 1.0}})

    def pretend(setting, *, cache, keep_part):
        asked.append((setting, cache))
        keep_part({"part": 1})
        assert json.loads((tmp_path / "a" / "found.json").read_text()) == {"part": 1}
        return {"stored": asdict(stored)}

    monkeypatch.setattr(finetune_smollm, "run", pretend)
    monkeypatch.setattr(finetune_smollm.smollm, "cached", lambda file: ("unpacked", file.name))
    monkeypatch.setattr(finetune_smollm, "keep", lambda run: kept.append(run) or tmp_path / "path2.json")
    options = "--device cpu --steps 5 --batch 4 --lr 0.001 --price 3 --gguf x.gguf".split() + ["--keep"] * keep
    monkeypatch.setattr(sys, "argv", ["x", "--json", str(tmp_path / "a" / "found.json"), *options])
    finetune_smollm.main()
    setting, cache = asked[0]
    assert (setting.steps, setting.batch, setting.lr, setting.price, setting.device) == (5, 4, 0.001, 3.0, "cpu")
    assert cache == ("unpacked", "x.gguf") and setting.minutes == 7.5
    assert json.loads((tmp_path / "a" / "found.json").read_text())["stored"]["model"] == "a model"
    assert "a model; some work" in capsys.readouterr().out
    assert len(kept) == keep
