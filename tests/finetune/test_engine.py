"""The engine: the same curve as a loop written by hand, however it is cut, rounded or interrupted by a full memory."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from vlm_course.finetune import engine
from vlm_course.finetune.checkpoint import read_log
from vlm_course.finetune.engine import Trainer
from vlm_course.finetune.losses import plain_loss
from vlm_course.finetune.memory import OutOfMemory
from vlm_course.finetune.plan import RATES, FinetunePlan
from vlm_course.loss import response_loss
from vlm_course.training import learning_rate

PLAN = FinetunePlan("full", steps=5, batch=6, lr=3e-3, bridge_lr=1e-2, lora_rank=4, weight_decay=0.1, clip=0.5)


def train(model, folder, batches, plan=PLAN, **options):
    return Trainer(model, plan, batches, folder, log=options.pop("log", lambda line: None), **options).run()


def losses(folder):
    return [line["loss"] for line in read_log(folder)]


def by_hand(model, batches, plan):
    """The loop as one would write it for this one case, without any of the engine's parts."""
    trained = [(n, p) for n, p in model.named_parameters() if not n.startswith("vision.")]
    model.vision.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": plan.weight_decay if p.dim() > 1 else 0.0, "name": n} for n, p in trained],
        betas=plan.betas,
    )
    curve = []
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            peak = plan.bridge_lr if group["name"].startswith("bridge.") else plan.lr
            group["lr"] = learning_rate(step, steps=plan.steps, peak=peak, warmup=plan.warmup, final=plan.final)
        batch = batches(step)
        loss = response_loss(model(batch.ids, batch.pixels), batch.labels)
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in trained], plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


# --- the curve --------------------------------------------------------------------------------------------------------


def test_the_curve_and_the_weights_are_those_of_a_loop_by_hand(tiny, loader, tmp_path):
    ours, theirs = tiny(), tiny()
    report = train(ours, tmp_path, loader(6))
    expected = by_hand(theirs, loader(6), PLAN)
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] and report.loss == losses(tmp_path)[-1] and report.done
    for (name, mine), value in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": 4}, {"workers": 2}])
def test_the_curve_does_not_depend_on_how_it_is_computed(tiny, loader, tmp_path, options):
    train(tiny(), tmp_path / "a", loader(6))
    train(tiny(), tmp_path / "b", loader(6), replace(PLAN, **options))
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)


def test_packed_conversations_teach_the_same(tiny, loader, tmp_path):
    train(tiny(), tmp_path / "a", loader(6))
    train(tiny(), tmp_path / "b", loader(6, pack=True))
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-4)


@pytest.mark.parametrize("dtype", ["autocast", "bfloat16"])
@pytest.mark.parametrize("mode", ["projector", "lora", "full"])
def test_bfloat16_stays_near_and_keeps_in_float32_what_would_be_rounded_away(tiny, loader, tmp_path, mode, dtype):
    plan = replace(PLAN, mode=mode, lora_dropout=0.0)
    train(tiny(), tmp_path / "a", loader(6), plan)
    model = tiny()
    train(model, tmp_path / "b", loader(6), replace(plan, dtype=dtype))
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=0.02)
    low = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    for name, parameter in model.named_parameters():
        learned = parameter.requires_grad and mode != "full"
        assert parameter.dtype == (torch.float32 if learned else low), name


def test_steps_inside_the_backward_pass_are_the_same_steps(tiny, loader, tmp_path):
    plan = replace(PLAN, dtype="bfloat16", clip=None)
    models = {}
    for name, options in {"apart": {}, "inside": {"micro_batch": 6}}.items():
        models[name] = tiny()
        trainer = Trainer(models[name], replace(plan, **options), loader(6), tmp_path / name, log=lambda line: None)
        assert trainer.inside == (name == "inside")
        trainer.run(minutes=0)
        again = Trainer(models[name], replace(plan, **options), loader(6), tmp_path / name, log=lambda line: None)
        assert again.step == 1 and again.run().done
    assert losses(tmp_path / "inside") == losses(tmp_path / "apart")
    theirs = models["apart"].state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in models["inside"].state_dict().items())
    Small(models["inside"], 1)
    (tmp_path / "inside" / "state.pt").unlink()
    with pytest.raises(OutOfMemory, match=r"6 rows of .* give micro_batch=3 and call again"):
        train(models["inside"], tmp_path / "inside", loader(6), replace(plan, micro_batch=6))


# --- what learns, and at what rate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["projector", "lora", "full"])
def test_what_is_frozen_keeps_every_bit(tiny, loader, tmp_path, mode):
    model, before = tiny(), tiny().state_dict()
    train(model, tmp_path, loader(6), replace(PLAN, mode=mode, steps=2))
    after = {name.replace(".base.", "."): value for name, value in model.state_dict().items() if "lora" not in name}
    parts = ("bridge.", "decoder.") if mode == "full" else ("bridge.",)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) is not name.startswith(parts), name
    lora = {name: value for name, value in model.state_dict().items() if "lora_b" in name}
    assert bool(lora) == (mode == "lora") and all(value.any() for value in lora.values())
    assert not any(module.training for module in model.vision.modules())


def test_two_rates_rise_and_fall_as_planned(tiny, loader, tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step
    watch = lambda self: seen.append({g["lr"] for g in self.param_groups}) or step(self)  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    train(tiny(), tmp_path, loader(6))
    rate = lambda s, peak: learning_rate(s, steps=5, peak=peak, warmup=0.03, final=0.0)  # noqa: E731
    assert seen[0] == {0.0}  # makes the moments and changes nothing
    assert seen[1:] == [{rate(s, 3e-3), rate(s, 1e-2)} for s in range(5)]
    assert [line["lr"] for line in read_log(tmp_path)] == [max(rates) for rates in seen[1:]]


def test_the_rates_of_a_plan_are_llavas_unless_given():
    for mode, (lr, bridge) in RATES.items():
        plan = FinetunePlan(mode)
        assert (plan.lr, plan.bridge_lr, plan.lora_alpha) == (lr, bridge, 256)
    assert FinetunePlan("projector", lr=5e-4).bridge_lr == 5e-4
    assert FinetunePlan("lora", lr=5e-4).bridge_lr == 2e-5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "all"}, "mode is 'all', expected one of 'projector', 'lora', 'full'"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"steps": 0}, "steps is 0"),
        ({"batch": 2.5}, "batch is 2.5"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"lr": 0}, "lr is 0"),
        ({"bridge_lr": -1.0}, "bridge"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"lora_dropout": 2}, "lora_dropout is 2"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"clip": math.nan}, "clip is nan"),
        ({"betas": (0.9, 1.2)}, r"betas\[1\] is 1.2"),
        ({"save_every": -1}, "save_every is -1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        FinetunePlan(**options)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_any_function_of_the_step_gives_batches_and_texts_alone_train_too(tiny, loader, tmp_path):
    one = loader(6)
    texts = [record for record in one.records if record.image is None]
    model, before = tiny(), tiny().bridge.state_dict()
    train(model, tmp_path, lambda step: one.collator(texts), replace(PLAN, mode="projector", weight_decay=0.0))
    assert len(losses(tmp_path)) == 5 and len(set(losses(tmp_path))) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.bridge.state_dict().items())


def test_batches_that_do_not_fit_the_plan_are_refused(tiny, loader, tmp_path):
    with pytest.raises(ValueError, match="the batches have 4 records, but the plan's batch is 6"):
        Trainer(tiny(), PLAN, loader(4), tmp_path)
    one = loader(6)
    mute = lambda step: replace(one(step), labels=torch.full_like(one(step).labels, -100))  # noqa: E731
    with pytest.raises(ValueError, match="step 1: 0 answer tokens in 6 rows"):
        train(tiny(), tmp_path, mute)


def test_a_model_that_has_lora_goes_on_with_the_same_or_is_merged_first(tiny, loader, tmp_path):
    model, plan = tiny(), replace(PLAN, mode="lora", lora_rank=4)
    Trainer(model, plan, loader(6), tmp_path)
    Trainer(model, plan, loader(6), tmp_path)
    with pytest.raises(ValueError, match="LoRA of rank 4, but the plan asks for LoRA of rank 8: merge_lora first"):
        Trainer(model, replace(plan, lora_rank=8), loader(6), tmp_path)
    with pytest.raises(ValueError, match="LoRA of rank 4, but the plan asks for mode 'full': merge_lora first"):
        Trainer(model, replace(plan, mode="full"), loader(6), tmp_path)


# --- what is said and written -----------------------------------------------------------------------------------------


def test_the_log_and_the_report_say_what_happened(tiny, loader, tmp_path):
    said = []
    report = train(tiny(), tmp_path, loader(6), log=said.append)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["tokens"] for line in lines] == [loader(6)(step).answer_tokens for step in range(5)]
    assert lines[0]["samples_per_s"] == 0 and lines[-1]["samples_per_s"] > 0
    assert (report.step, report.steps, report.micro_batch, report.memory) == (5, 5, 6, 0)
    assert report.samples_per_s > 0 and len(said) == 5 and "loss" in said[0] and "samples/s" in said[-1]
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {"step", "loss", "lr", "tokens", "samples_per_s"}


def test_a_loss_that_is_no_number_stops_and_keeps_the_state_before(tiny, loader, tmp_path):
    calls = []

    def loss(model, batch, count):
        calls.append(1)
        return plain_loss(model, batch, count) * (math.nan if len(calls) == 3 else 1)

    with pytest.raises(FloatingPointError, match=r"loss is nan at step 3 of 5; .* lower rate than 0.003"):
        train(tiny(), tmp_path, loader(6), replace(PLAN, save_every=0), loss=loss)
    assert torch.load(tmp_path / "state.pt")["step"] == 2


# --- memory -----------------------------------------------------------------------------------------------------------


class Small:
    """Stands in for a GPU of little memory: takes at most `rows` rows at once, in the forward or the backward pass."""

    def __init__(self, model, rows, *, backward=False):
        self.rows, self.backward, self.tried = rows, backward, []
        model.decoder.norm.register_forward_pre_hook(self.look)

    def look(self, module, arguments):
        (x,) = arguments
        self.tried.append(len(x))
        if len(x) <= self.rows:
            return x
        if not self.backward:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return Exhausted.apply(x)


class Exhausted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_without_a_micro_batch_memory_decides_and_the_curve_stays(tiny, loader, tmp_path, mode, backward):
    plan = replace(PLAN, mode=mode, batch=8, lora_dropout=0.0)
    train(tiny(), tmp_path / "a", loader(8), plan)
    model, said = tiny(), []
    small = Small(model, 2, backward=backward)
    report = train(model, tmp_path / "b", loader(8), plan, log=said.append)
    assert report.micro_batch == 2
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)
    assert small.tried == [8, 4, *[2] * 4 * 5]  # once for all steps
    assert [line for line in said if "memory" in line] == [
        f"Out of memory: 8 rows of {loader(8)(0).ids.shape[1]} tokens do not fit at once, but 2 do: it goes on with "
        "micro_batch=2, and the loss stays the same."
    ]


def test_dropout_is_the_same_when_a_step_is_tried_again(tiny, loader, tmp_path):
    plan = replace(PLAN, mode="lora", batch=8, lora_dropout=0.3)
    train(tiny(), tmp_path / "a", loader(8), replace(plan, micro_batch=2))
    model = tiny()
    Small(model, 2, backward=True)
    train(model, tmp_path / "b", loader(8), plan)
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def test_a_micro_batch_that_was_asked_for_is_refused_with_the_one_that_fits(tiny, loader, tmp_path):
    plan = replace(PLAN, batch=8, micro_batch=7, save_every=0)
    model = tiny()
    small = Small(model, 99)
    start = Trainer(model, plan, loader(8), tmp_path, log=lambda line: None)
    start.run(minutes=0)
    assert start.step == 1
    small.rows = 1
    with pytest.raises(OutOfMemory) as error:
        start.run()
    assert error.value.fits == 1 and "\n" not in str(error.value)
    assert "7 rows of" in str(error.value)
    assert str(error.value).endswith("but 1 do: give micro_batch=1 and call again; the loss stays the same.")
    assert all(parameter.grad is None for parameter in model.parameters())
    # The advice works: the run goes on from the step before.
    train(model, tmp_path, loader(8), replace(plan, micro_batch=1))
    train(tiny(), tmp_path / "whole", loader(8), plan)
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.parametrize("mode", ["projector", "lora", "full"])
def test_when_not_one_row_fits_the_sentence_says_what_else_helps(tiny, loader, tmp_path, mode):
    model = tiny()
    Small(model, 0)
    with pytest.raises(OutOfMemory, match=r"not even 1 row of \d+ tokens fits, so take a smaller max_tokens") as error:
        train(model, tmp_path, loader(6), replace(PLAN, mode=mode))
    assert error.value.fits is None and str(error.value).count(".") == 1


def test_the_moments_are_there_before_the_first_batch(tiny, loader, tmp_path):
    """What fits in the first step must fit in the second, when a lazy optimizer would have grown."""
    model = tiny()
    trainer = engine.Trainer(model, PLAN, loader(6), tmp_path)
    before = tiny().state_dict()
    for name, parameter in trainer.learning.items():
        state = trainer.optimizer.state[parameter]
        assert state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
        assert torch.equal(parameter, before[name])
