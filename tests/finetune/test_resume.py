"""Interrupted at any moment, a run goes on with the same curve, bit for bit."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlm_course.finetune import checkpoint
from vlm_course.finetune.checkpoint import LOG, STATE, read_log
from vlm_course.finetune.engine import Trainer
from vlm_course.finetune.plan import FinetunePlan

# Dropout is on, so the random state counts; every step is saved, so most deaths fall into the writing of a file.
PLAN = FinetunePlan("lora", steps=8, batch=6, lr=3e-3, lora_rank=4, lora_dropout=0.2, micro_batch=4, save_every=0)


def quiet(model, folder, batches, plan=PLAN):
    return Trainer(model, plan, batches, folder, log=lambda line: None)


def curve(folder):
    """Everything of the log that is no measurement of time."""
    return [{name: value for name, value in line.items() if name != "samples_per_s"} for line in read_log(folder)]


def final(folder):
    return torch.load(folder / STATE, weights_only=True)


def same(a, b):
    """Whether two running states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def unbroken(tiny, loader, tmp_path):
    folder = tmp_path / "unbroken"
    quiet(tiny(), folder, loader(6)).run()
    return folder


@pytest.mark.parametrize("mode", ["projector", "lora", "full"])
def test_stopped_after_every_step_it_goes_on_as_if_it_had_not(tiny, loader, tmp_path, mode):
    plan = replace(PLAN, mode=mode)
    quiet(tiny(), tmp_path / "a", loader(6), plan).run()
    for step in range(plan.steps):
        trainer = quiet(tiny(), tmp_path / "b", loader(6), plan)
        assert trainer.step == step
        report = trainer.run(minutes=0)
        assert report.step == step + 1 and report.done == (step + 1 == plan.steps)
    assert curve(tmp_path / "b") == curve(tmp_path / "a")
    assert same(final(tmp_path / "b"), final(tmp_path / "a"))
    again = quiet(tiny(), tmp_path / "b", loader(6), plan)
    assert again.run().done and curve(tmp_path / "b") == curve(tmp_path / "a")


class Death(BaseException):
    """What no one catches, as no one catches a kill."""


def test_dead_at_any_touch_of_the_disk_it_goes_on(tiny, loader, tmp_path, monkeypatch):
    """Dies at the n-th writing, syncing or renaming of a file, for every n, before it or behind it."""
    plan, deaths, touches = replace(PLAN, steps=2), 0, []
    quiet(tiny(), tmp_path / "a", loader(6), plan).run()
    expected, state = curve(tmp_path / "a"), final(tmp_path / "a")

    def mortal(function, before):
        def touch(*arguments, **options):
            touches.append(function.__name__)
            if before and len(touches) == at:
                raise Death
            result = function(*arguments, **options)
            if len(touches) == at:
                raise Death
            return result

        return touch

    for before in (True, False):
        for at in range(1, 100):
            folder = tmp_path / f"{at}-{before}"
            touches.clear()
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", mortal(os.fsync, before))
                patch.setattr(Path, "replace", mortal(Path.replace, before))
                patch.setattr(torch, "save", mortal(torch.save, before))
                try:
                    quiet(tiny(), folder, loader(6), plan).run()
                except Death:
                    deaths += 1
                else:
                    break
            quiet(tiny(), folder, loader(6), plan).run()
            assert curve(folder) == expected, (at, before)
            assert same(final(folder), state), (at, before)
    assert deaths >= 2 * 2 * 4  # two saves of four touches each


def test_killed_by_the_system_at_random_moments_it_goes_on(tiny, loader, tmp_path):
    """kill -9 to a process of its own, which is a fork of this one, so that it need not import torch first."""
    plan = replace(PLAN, steps=40)
    quiet(tiny(), tmp_path / "a", loader(6), plan).run()
    folder, draw, kills, steps = tmp_path / "b", random.Random(0), 0, []
    while kills < 40:
        begun, more, child = len(read_log(folder)), draw.randint(0, 6), os.fork()
        if not child:
            try:
                quiet(tiny(), folder, loader(6), plan).run()
            finally:
                os._exit(0)
        ended = (0, 0)
        while not ended[0] and len(read_log(folder)) < begun + more:
            ended = os.waitpid(child, os.WNOHANG)
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        if not ended[0]:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
        if ended[1] == 0:
            break
        assert os.WTERMSIG(ended[1]) == signal.SIGKILL
        kills += 1
        steps.append(final(folder)["step"] if (folder / STATE).is_file() else 0)
    assert kills >= 4 and steps == sorted(steps) and steps[-1] < 40
    assert curve(folder) == curve(tmp_path / "a")
    assert same(final(folder), final(tmp_path / "a"))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lr": 1e-3}, r"lr 0.003 there, 0.001 here"),
        ({"steps": 9}, r"steps 8 there, 9 here"),
        ({"mode": "projector"}, r"mode lora there, projector here"),
        ({"lora_rank": 8}, r"lora_rank 4 there, 8 here"),
    ],
)
def test_another_plan_does_not_go_on(tiny, loader, unbroken, change, says):
    with pytest.raises(ValueError, match=says):
        quiet(tiny(), unbroken, loader(6), replace(PLAN, **change))


def test_other_data_or_another_model_do_not_go_on(tiny, loader, unbroken):
    with pytest.raises(ValueError, match=r"data 24 records \(\d+\) of at most 96 tokens, padded there, .*packed here"):
        quiet(tiny(), unbroken, loader(6, pack=True))
    fewer = replace(loader(6), records=loader(6).records[:20])
    with pytest.raises(ValueError, match=r"data 24 records .* there, 20 records .* here"):
        quiet(tiny(), unbroken, fewer)
    model = tiny()
    with torch.no_grad():
        model.decoder.blocks[1].mlp.up.weight[0, 0] += 1
    with pytest.raises(ValueError, match="frozen weights"):
        quiet(model, unbroken, loader(6))


def test_what_changes_only_the_speed_may_change(tiny, loader, tmp_path):
    plan = replace(PLAN, lora_dropout=0.0)
    quiet(tiny(), tmp_path / "a", loader(6), plan).run()
    quiet(tiny(), tmp_path / "b", loader(6), plan).run(minutes=0)
    quiet(tiny(), tmp_path / "b", loader(6), replace(plan, micro_batch=1, save_every=9.0, log_every=3)).run()
    losses = [[line["loss"] for line in curve(tmp_path / name)] for name in "ab"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_file_that_is_no_state_is_said_to_be_none(tiny, loader, tmp_path):
    (tmp_path / STATE).write_bytes(b"PK\3\4 but not really")
    with pytest.raises(ValueError, match=r"state.pt is no running state of a fine-tuning"):
        quiet(tiny(), tmp_path, loader(6))


def test_the_log_is_cut_back_to_the_state(tmp_path):
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 6)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / LOG).write_text(text + '{"step": 6, "lo', encoding="utf-8")
    assert read_log(tmp_path) == lines
    log = checkpoint.Log(tmp_path, after=3)
    log.write([{"step": 4, "loss": 0.5}])
    log.close()
    assert read_log(tmp_path) == [*lines[:3], {"step": 4, "loss": 0.5}]
    assert read_log(tmp_path / "nowhere") == []


def test_a_state_holds_only_what_learns_and_at_the_end_no_moments(tiny, loader, tmp_path):
    quiet(tiny(), tmp_path, loader(6)).run(minutes=0)
    state = final(tmp_path)
    assert state["step"] == 1 and len(state["random"]) == 1
    assert all(name.startswith("bridge.") or name.endswith(("lora_a", "lora_b")) for name in state["weights"])
    assert state["optimizer"].keys() == state["weights"].keys()
    quiet(tiny(), tmp_path, loader(6)).run()
    assert final(tmp_path)["optimizer"] == {} and final(tmp_path)["weights"].keys() == state["weights"].keys()


def test_a_measurement_saves_nothing(tiny, loader, tmp_path):
    quiet(tiny(), tmp_path, loader(6), replace(PLAN, save_every=None)).run()
    assert not (tmp_path / STATE).exists() and len(read_log(tmp_path)) == PLAN.steps
