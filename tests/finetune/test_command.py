"""`vlm-course finetune`: the shipped model learns on a CPU in seconds, and every error is one sentence."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from vlm_course import cli
from vlm_course.finetune import command
from vlm_course.finetune.checkpoint import read_log
from vlm_course.pretrained import load_small

OPTIONS = ("--model", "small", "--steps", "2", "--batch", "4", "--device", "cpu")


def call(*arguments):
    return CliRunner().invoke(cli.app, ["finetune", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.parametrize("mode", ["projector", "lora", "full"])
def test_two_steps_of_the_small_model(talk_file, tmp_path, mode):
    began = time.process_time()
    result = call("--data", talk_file, "--mode", mode, "--out", tmp_path, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert time.process_time() - began < 30
    assert "24 conversations with 48 questions, 20 of them about an image" in result.output
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]
    before, after = load_small().model.state_dict(), load_small(folder=tmp_path / "model").model.state_dict()
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    # A rate this low moves LoRA's second matrix by less than half precision shows.
    assert {"projector": {"bridge"}, "lora": set(), "full": {"bridge", "decoder"}}[mode] <= moved
    assert "vision" not in moved
    again = call("--data", talk_file, "--mode", mode, "--out", tmp_path, *OPTIONS)
    assert again.exit_code == 0 and "goes on from step 2 of 2" in again.output and len(read_log(tmp_path)) == 2


def test_it_stops_in_good_time_and_goes_on(talk_file, tmp_path):
    options = ("--data", talk_file, "--mode", "projector", "--out", tmp_path, *OPTIONS)
    first = call(*options, "--minutes", "0")
    assert "stopped after step 1 of 2; the same command goes on from here" in first.output
    assert not (tmp_path / "model").exists()
    assert "the trained model is in" in call(*options).output
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_bad_records_stop_it_or_are_counted(talk_file, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(talk_file.parent, folder)
    with (folder / "talk.jsonl").open("a") as file:
        file.write('\n{"conversations": \n' + json.dumps({"image": "gone.png", "conversations": [
            {"from": "human", "value": "<image> Hm?"}, {"from": "gpt", "value": "Yes."}]}))  # fmt: skip
    arguments = ["--data", folder, "--mode", "projector", "--out", tmp_path / "run", *OPTIONS]
    run = subprocess.run(
        [sys.executable, "-m", "vlm_course", "finetune", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("vlm-course: talk.jsonl, line 25: not valid JSON (")
    assert run.stderr.count("\n") == 1
    result = call(*arguments, "--skip-bad")
    assert result.exit_code == 0
    assert "2 records skipped: 1 corrupt JSON, 1 missing image" in result.output and "line 26" in result.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": "nowhere"}, "there is no folder 'nowhere': give 'small' or a folder"),
        ({"mode": "all"}, "mode is 'all', expected one of"),
        ({"max_tokens": 20}, "max_tokens is 20, but an image alone takes 144"),
        ({"max_tokens": 148}, "line 1: every answer lies beyond max_tokens=148"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lora_rank": 500}, "rank"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(talk_file, tmp_path, options, says):
    options = {"model": "small", "batch": 4, "device": "cpu", "log": lambda line: None} | options
    with pytest.raises(ValueError, match=says):
        command.finetune(talk_file, out=tmp_path, **options)
    assert not (tmp_path / "state.pt").exists()


def test_a_folder_without_weights_is_said_to_have_none(talk_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither tokenizer.json"):
        command.finetune(talk_file, model=str(tmp_path), out=tmp_path / "run", device="cpu")


def test_steps_cover_the_epochs():
    assert [command.steps_for(24, 5, epochs) for epochs in (0.1, 1, 1.5, 2)] == [1, 5, 8, 10]


def test_a_checkpoint_in_the_published_layout_goes_in_and_comes_out(talk_file, tiny_config, tiny_smollm, tmp_path):
    from vlm_course.convert.llava import load_llava
    from vlm_course.finetune.published import save_published
    from vlm_course.finetune.tokenizers import for_folder, for_smollm
    from vlm_course.llava import Llava

    adapter = for_smollm(tiny_smollm)
    text = replace(tiny_config.text, vocab_size=adapter.vocab_size, max_positions=256)
    model = Llava(replace(tiny_config, text=text, image_id=adapter.image_id))
    base = save_published(model, tmp_path / "base", adapter=adapter)
    options = ("--mode", "lora", "--lora-rank", 4, "--lr", 0.01, "--steps", 3, "--batch", 4, "--device", "cpu")
    for _ in range(2):  # the second call finds the run finished, and the trained model in its place
        result = call("--data", talk_file, "--model", base, "--out", tmp_path / "run", *options)
        assert result.exit_code == 0, result.output
    trained = load_llava(tmp_path / "run" / "model")
    assert for_folder(tmp_path / "run" / "model").image_id == adapter.image_id
    before = model.state_dict()
    moved = {name.split(".")[0] for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"bridge", "decoder"}
