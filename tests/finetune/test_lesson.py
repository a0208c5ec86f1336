"""What chapter 10 trains: true questions about what is not there, and a job of one kind on every path."""

import pytest
import torch

from vlm_course.finetune import absent, lesson, smollm
from vlm_course.finetune.choose import Choice
from vlm_course.finetune.data import read_records
from vlm_course.finetune.exams import grade
from vlm_course.finetune.published import random_checkpoint, save_published
from vlm_course.finetune.stored import stored_run
from vlm_course.llava import DecoderConfig, LlavaConfig
from vlm_course.pretrained import load_small
from vlm_course.vit import ViTConfig
from vlm_course.worlds.scenes import COLOURS, SHAPES, sample

TINY = LlavaConfig(
    vision=ViTConfig(image_size=28, patch_size=14, width=16, layers=2, heads=2, mlp_width=32),
    text=DecoderConfig(vocab_size=320, width=32, layers=2, heads=2, kv_heads=2, mlp_width=48, max_positions=512),
    image_id=300,
)


def test_questions_are_true_of_the_scene():
    generator = torch.Generator().manual_seed(0)
    scenes = sample(60, generator=generator)
    kinds = set()
    for row in range(60):
        here = scenes.present[row]
        things = list(zip(scenes.shape[row][here].tolist(), scenes.colour[row][here].tolist(), strict=True))
        for kind, question, answer in absent.questions(scenes, row, generator, 2):
            kinds.add(kind)
            (shape,) = [name for name in SHAPES if f" {name}?" in question]
            of_it = [COLOURS[colour] for number, colour in things if SHAPES[number] == shape]
            assert of_it == ([answer] if kind == absent.PRESENT else [])
            assert kind == absent.PRESENT or answer == f"there is no {shape}"
    assert kinds == {absent.PRESENT, absent.ABSENT}


def test_records_can_be_read_and_the_seed_decides(tmp_path):
    one, two, other = (absent.write_records(tmp_path / n, 4, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert one.read_text() == two.read_text() != other.read_text()
    records = read_records(one)
    assert len(records) == 4 and all(record.image is not None and record.turns for record in records)


def test_the_exam_asks_both_kinds_about_fresh_scenes():
    exam = absent.exam(12)
    assert set(exam.kind) == {absent.PRESENT, absent.ABSENT} and len(exam.pixels) == 12
    assert exam.kind.count(absent.ABSENT) == 12
    assert set(absent.exam(4, kept=2).kind) == {absent.PRESENT, absent.ABSENT, *absent.KEPT}


def test_path_1_runs_from_a_folder_in_the_published_layout(tmp_path):
    folder = random_checkpoint(TINY, tmp_path / "model", dtype=torch.float32)
    choice = Choice(1, str(folder), "lora", "a test")
    job = lesson.job(choice, tmp_path, steps=2, scenes=4, asked=2)
    assert job.exam.pixels.shape[-2:] == (28, 28)
    (report,) = job.train(tmp_path / "run", log=lambda text: None)
    assert report.done and [step for step, _ in job.losses(tmp_path / "run")] == [1, 2]
    assert "LoRA of rank 32 and the bridge, 2 steps of 16" in job.work
    table, answers = grade(job.model, job.adapter, job.exam)
    assert len(answers) == len(job.exam) and {"model", "blind", "swapped"} <= set(table["all"])


def test_path_3_is_the_small_model(tmp_path):
    job = lesson.job(Choice(3, "small", "full", "a test"), tmp_path, steps=1, scenes=2, asked=2)
    ((plan, batches),) = job.stages
    assert plan.mode == "lora" and plan.dtype == "float32" and len(batches(0)) == plan.batch
    assert job.exam.pixels.shape[-2:] == (96, 96)


def test_the_stored_runs_of_a_laptop_show_what_the_chapter_says():
    """Alone, the new questions are learned and the old ones lost; mixed, what is in the mix stays."""
    alone, mixed = stored_run(3).accuracy, stored_run(3, variant="mixed").accuracy
    for table in (alone, mixed):
        assert table[absent.ABSENT]["before"] < 0.1 and all(table[kind]["before"] > 0.95 for kind in absent.KEPT)
        for kind in (absent.ABSENT, absent.PRESENT):
            assert table[kind]["after"] > 0.9, kind
        assert table[absent.ABSENT]["blind"] + table[absent.PRESENT]["blind"] < 1.3
    assert sum(alone[kind]["after"] for kind in absent.KEPT) / 3 < 0.2
    for kind in absent.KEPT:
        assert (mixed[kind]["after"] > 0.9) == (kind in absent.MIXED), kind
    assert mixed["relation"]["after"] < 0.7


def test_the_stored_run_of_path_2_shows_what_the_chapter_says():
    """It learned to see; while only the bridge learned the trained tower was ahead, in the end no longer."""
    run = stored_run(2)
    every = run.accuracy["all"]
    assert every["before"] < 0.05 and every["after"] > 0.9 and every["random tower"] > 0.9
    assert max(every[name] for name in ("blind", "swapped", "majority")) < 0.5
    mine, other = dict(run.losses), dict(run.controls["random tower"])
    assert mine.keys() == other.keys()
    first_stage = [step for step in mine if 100 < step <= 200]
    assert first_stage and all(mine[step] < 0.75 * other[step] for step in first_stage)
    assert all(other[step] < 1.05 * mine[step] for step in mine if step > 600)


def test_the_stored_run_of_path_1_says_that_its_weights_are_random():
    run = stored_run(1)
    assert "random" in run.notes[0] and run.numbers["parameters that learn"] > 3e8 and run.numbers["memory_gb"] < 86


def test_the_command_keeps_what_it_found(tmp_path, monkeypatch, capsys):
    from vlm_course.finetune import choose

    monkeypatch.setattr(choose, "look", lambda checkpoint=None: choose.Machine())
    options = ["--steps", "2", "--scenes", "2", "--asked", "2", "--dollars-an-hour", "3600", "--note", "a test"]
    assert lesson.main([*options, "--folder", str(tmp_path)]) == 0
    run = stored_run(3, tmp_path, variant="lesson")
    assert (
        run.numbers["steps"] == 2
        and len(run.losses) == 2
        and run.notes[0] == "a test"
        and "3600 an hour" in run.notes[1]
    )
    assert abs(run.numbers["dollars"] - 60 * run.numbers["minutes"]) < 1e-6 and 0 < run.numbers["share_of_peak"] < 1
    assert {"before", "after", "blind", "swapped", "majority"} <= set(run.accuracy[absent.PRESENT])
    assert run.title in capsys.readouterr().out


@pytest.mark.parametrize("tower", lesson.TOWERS)
def test_path_2_learns_in_two_stages(tiny_smollm, tmp_path, monkeypatch, tower):
    """With a stand-in for SmolLM2: the bridge alone, then all but the tower, which stays as it was."""
    monkeypatch.setattr(smollm, "cached", lambda: tiny_smollm)
    job = lesson.job(Choice(2, "SmolLM2", "full", "a test"), tmp_path, steps=1, asked=2, tower=tower)
    assert [plan.mode for plan, _ in job.stages] == ["projector", "full"]
    vision = {name: value.clone() for name, value in job.model.vision.state_dict().items()}
    assert torch.equal(vision["class_token"], load_small().model.vision.class_token) == (tower == "trained")
    reports = job.train(tmp_path / "run", log=lambda text: None)
    assert [report.steps for report in reports] == [1, 1]
    assert [step for step, _ in job.losses(tmp_path / "run")] == [1, 2]
    for name, value in job.model.vision.state_dict().items():
        assert torch.equal(value, vision[name]), name
    assert {"caption", "easy-VQA yes/no"} <= set(job.exam.kind)
    save_published(job.model, tmp_path / "checkpoint", adapter=job.adapter)
    assert lesson.numbers(job, reports)["steps"] == 1  # of the last stage
