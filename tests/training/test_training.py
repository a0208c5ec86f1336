"""The training loop: what learns, at what rate, and that a run may stop anywhere and go on as if it had not."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from torch import nn

from vlm_course import training
from vlm_course.pretrained.recipe import STAGES, build
from vlm_course.tokenizer import WordTokenizer
from vlm_course.training import Paused, Stage, fit, freeze_all_but, learning_rate, parameter_groups, save_atomically

STEPS = 12
STAGE = Stage("toy", trains=("bridge.", "decoder."), steps=STEPS, batch=4, lr=1e-2, lrs=(("bridge.", 3e-2),))


class Toy(nn.Module):
    """Three parts named as LLaVA's, with dropout, so that the mode of a module shows."""

    def __init__(self):
        super().__init__()
        part = lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.5))  # noqa: E731
        self.vision, self.bridge, self.decoder = part(), part(), part()

    def forward(self, x):
        return self.decoder(self.bridge(self.vision(x)))


def toy():
    torch.manual_seed(0)
    return Toy()


def loss_of(model):
    """Data and dropout of a step follow from its number alone."""

    def loss_at(step):
        torch.manual_seed(step)
        return (model(torch.randn(STAGE.batch, 6)) - 1).square().mean()

    return loss_at


def run(model, checkpoint, **options):
    options = {"log": lambda line: None} | options
    fit(model, options.pop("stage", STAGE), options.pop("loss_at", loss_of(model)), checkpoint=checkpoint, **options)
    return model


@pytest.fixture
def unbroken(tmp_path):
    return run(toy(), tmp_path / "unbroken.pt").state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- the rate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup"), [(1000, 0.03), (1000, 0.2), (50, 0.1), (7, 0.03)])
def test_the_rate_rises_linearly_then_falls_as_a_cosine(steps, warmup):
    rates = [learning_rate(s, steps=steps, peak=2.0, warmup=warmup, final=0.05) for s in range(steps)]
    rise = max(1, round(warmup * steps))
    assert rates[:rise] == pytest.approx([2.0 * (s + 1) / rise for s in range(rise)])
    assert max(rates) == pytest.approx(2.0) and min(rates) > 0
    assert all(a >= b for a, b in zip(rates[rise - 1 :], rates[rise:], strict=False))
    assert rates[-1] == pytest.approx(0.1)
    middle = rise + (steps - 1 - rise) // 2
    share = (middle - rise) / (steps - 1 - rise)
    if share == 0.5:
        assert rates[middle] == pytest.approx(2.0 * (0.05 + 0.95 / 2))


def test_the_rate_of_very_short_runs_is_finite():
    for steps in (1, 2, 3):
        assert all(0 < learning_rate(s, steps=steps, peak=1.0) <= 1.0 for s in range(steps))


def test_the_optimizer_gets_the_rate_of_each_step_and_part(monkeypatch, tmp_path):
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: seen.append({g["lr"] for g in self.param_groups}) or step(self)
    )
    run(toy(), tmp_path / "toy.pt")
    rate = lambda s, peak: learning_rate(s, steps=STEPS, peak=peak)  # noqa: E731
    assert seen == [{rate(s, 1e-2), rate(s, 3e-2)} for s in range(STEPS)]


# --- what learns ------------------------------------------------------------------------------------------------------


def test_exactly_the_named_parts_learn_and_the_others_are_in_eval_mode():
    model = toy()
    learning = freeze_all_but(model, ("bridge.",))
    assert set(learning) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(learning) == {n for n, _ in model.named_parameters() if n.startswith("bridge.")}
    assert model.bridge.training and all(m.training for m in model.bridge)
    assert not model.vision.training and not model.decoder.training
    assert not model.vision[0].training and not model.vision[1].training
    freeze_all_but(model, ("",))
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name)
def test_the_stages_of_the_recipe_train_what_they_say(stage):
    with torch.device("meta"):
        contrastive, llava = build(WordTokenizer.small())
    model = contrastive if stage.name == "contrastive" else llava
    parts = {name.split(".")[0] for name in freeze_all_but(model, stage.trains)}
    expected = {
        "contrastive": {name.split(".")[0] for name, _ in contrastive.named_parameters()},
        "language": {"decoder"},
        "align": {"bridge"},
        "instruct": {"bridge", "decoder"},
    }
    assert parts == expected[stage.name]
    whole = {n for n, _ in model.named_parameters() if n.split(".")[0] in parts}
    assert whole == {n for n, p in model.named_parameters() if p.requires_grad}
    if stage.name != "contrastive":
        assert not any(module.training for module in llava.vision.modules())


def test_frozen_parameters_keep_every_bit_and_learning_ones_move(tmp_path, unbroken):
    start = toy().state_dict()
    after = run(toy(), tmp_path / "one.pt", stage=replace(STAGE, steps=1)).state_dict()
    for name, value in start.items():
        learns = name.startswith(STAGE.trains)
        assert torch.equal(after[name], value) is not learns, name
        assert torch.equal(unbroken[name], value) is not learns, name


def test_matrices_decay_and_vectors_do_not():
    model = toy()
    freeze_all_but(model, STAGE.trains)
    groups = parameter_groups(model, STAGE)
    assert {(g["peak"], g["weight_decay"]) for g in groups} == {(1e-2, 0.05), (1e-2, 0.0), (3e-2, 0.05), (3e-2, 0.0)}
    for group in groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    assert {p for g in groups for p in g["params"]} == {p for p in model.parameters() if p.requires_grad}


def test_an_unknown_part_is_refused_with_the_parts_that_there_are():
    with pytest.raises(ValueError, match=r"'projector\.'.*bridge.*decoder.*vision"):
        freeze_all_but(toy(), ("bridge.", "projector."))


# --- stopping and going on --------------------------------------------------------------------------------------------


def test_a_run_in_pauses_equals_the_unbroken_run_bit_for_bit(tmp_path, unbroken):
    checkpoint, pauses = tmp_path / "paused.pt", 0
    while True:
        model = toy()
        try:
            run(model, checkpoint, deadline=0.0)  # long past: a pause after every step
            break
        except Paused as pause:
            pauses += 1
            assert f"step {pauses} of {STEPS}" in str(pause)
    assert pauses == STEPS and same(model.state_dict(), unbroken)


def test_a_crash_between_two_saves_loses_steps_but_changes_nothing(monkeypatch, tmp_path, unbroken):
    seconds = iter(range(10_000))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(seconds))  # every look at the clock is a second later
    checkpoint, model = tmp_path / "crashed.pt", toy()

    def crash_at_8(step):
        if step == 8:
            raise KeyboardInterrupt
        return loss_of(model)(step)

    with pytest.raises(KeyboardInterrupt):
        run(model, checkpoint, loss_at=crash_at_8, save_every=5)
    assert 0 < torch.load(checkpoint, weights_only=True)["step"] < 8
    assert not same(model.state_dict(), torch.load(checkpoint, weights_only=True)["model"])
    assert same(run(toy(), checkpoint).state_dict(), unbroken)


def test_a_process_killed_while_it_saves_leaves_the_save_before(tmp_path):
    path = tmp_path / "state.pt"
    program = f"""
        import os, signal, torch
        from pathlib import Path
        from vlm_course.training import save_atomically
        path = Path({str(path)!r})
        save_atomically({{"step": 1}}, path)
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        save_atomically({{"step": 2}}, path)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 2, "the unfinished file lies beside it"
    save_atomically({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3} and list(tmp_path.iterdir()) == [path]


def test_a_finished_stage_is_not_trained_again(tmp_path, unbroken):
    def never(step):
        raise AssertionError("no step is left to do")

    assert same(run(toy(), tmp_path / "unbroken.pt", loss_at=never).state_dict(), unbroken)


def test_a_checkpoint_of_another_plan_is_refused(tmp_path, unbroken):
    with pytest.raises(ValueError, match="steps 12 there, 24 here; batch 4 there, 8 here"):
        run(toy(), tmp_path / "unbroken.pt", stage=replace(STAGE, steps=24, batch=8))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = toy()
    with pytest.raises(FloatingPointError, match="toy: the loss is nan at step 1;"):
        run(model, tmp_path / "nan.pt", loss_at=lambda step: loss_of(model)(step) * float("nan"))
    assert not (tmp_path / "nan.pt").exists()


def test_ten_lines_report_the_progress(tmp_path):
    lines = []
    run(toy(), tmp_path / "log.pt", stage=replace(STAGE, steps=20), log=lines.append)
    assert len(lines) == 10 and all("loss" in line and "images/s" in line for line in lines)
    assert lines[-1].startswith("toy ") and "20/20" in lines[-1]
