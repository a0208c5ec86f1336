"""What a stage changes, bit for bit, on a real model; accumulation by token; resuming with dropout; the schedule."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlm_course.decoder import DecoderConfig
from vlm_course.llava import Llava, LlavaConfig
from vlm_course.loss import response_loss
from vlm_course.training import (
    LLAVA_15_STAGES,
    Paused,
    Stage,
    accumulated,
    fit,
    freeze_all_but,
    learning_rate,
    micro_batches,
)
from vlm_course.vit import ViTConfig

CONFIG = LlavaConfig(
    vision=ViTConfig(image_size=8, patch_size=4, width=8, layers=3, heads=2, mlp_width=12),
    text=DecoderConfig(vocab_size=11, width=8, layers=2, heads=2, kv_heads=1, mlp_width=12),
    image_id=3,
)
PARTS = ("vision.", "bridge.", "decoder.", "decoder.head.", "bridge.mlp.2.", "vision.blocks.1.", "decoder.blocks.0.mlp")
small_run = settings(max_examples=8)


def llava(seed=0):
    torch.manual_seed(seed)
    return Llava(CONFIG)


def batch_at(step, rows=4):
    """Two visual rows of text behind four placeholders; a part of the labels is no response, another for each row."""
    draw = torch.Generator().manual_seed(step)
    text = torch.randint(4, 11, (rows, 6), generator=draw)
    ids = torch.cat([torch.full((rows, 4), 3), text], dim=1)
    labels = torch.where(torch.rand(ids.shape, generator=draw) < 0.5, ids, -100)
    labels[:, :5] = -100
    labels[0, 5:] = text[0, 1:]
    return {"ids": ids, "labels": labels, "pixels": torch.randn(rows, 3, 8, 8, generator=draw)}


def fit_llava(model, stage, folder, **options):
    def loss_at(step):
        batch = batch_at(step, stage.batch)
        return response_loss(model(batch["ids"], batch["pixels"]), batch["labels"])

    options = {"log": lambda line: None, "loss_at": loss_at} | options
    fit(model, stage, checkpoint=folder / f"{stage.name}.pt", **options)
    return model


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- exactly the named parameters -------------------------------------------------------------------------------------


@small_run
@given(trains=st.sets(st.sampled_from(PARTS), min_size=1, max_size=3), steps=st.integers(1, 3))
def test_exactly_the_named_parameters_change(tmp_path_factory, trains, steps):
    """Every bit of what is frozen stays, and everything named moves that the features reach: LLaVA reads the last
    layer but one, so the tower's last block and final norm see no gradient."""
    model = llava()
    before = bits(model)
    fit_llava(model, Stage("some", tuple(trains), steps=steps, batch=4, lr=1e-2), tmp_path_factory.mktemp("stage"))
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    unreached = ("vision.blocks.2.", "vision.post_norm.")
    assert changed == {n for n in before if n.startswith(tuple(trains)) and not n.startswith(unreached)}


def test_llavas_two_stages_one_after_the_other(tmp_path):
    model = llava()
    align, instruct = (replace(stage, steps=2, batch=4) for stage in LLAVA_15_STAGES)
    start = bits(model)
    fit_llava(model, align, tmp_path)
    aligned = bits(model)
    fit_llava(model, instruct, tmp_path)
    after = bits(model)
    for name in start:
        part = name.split(".")[0]
        assert torch.equal(start[name], aligned[name]) is (part != "bridge"), name
        assert torch.equal(aligned[name], after[name]) is (part == "vision"), name


def test_the_published_stages():
    """LLaVA-1.5, table 9: batches of 256 and 128, rates 1e-3 and 2e-5, 3 % warm-up, no decay."""
    align, instruct = LLAVA_15_STAGES
    assert (align.batch, align.lr, instruct.batch, instruct.lr) == (256, 1e-3, 128, 2e-5)
    assert align.steps == math.ceil(558_128 / 256) and instruct.steps == math.ceil(665_298 / 128)
    with torch.device("meta"):
        model = Llava(CONFIG)
    for stage, frozen in ((align, {"vision", "decoder"}), (instruct, {"vision"})):
        learning = set(freeze_all_but(model, stage.trains))
        assert {n.split(".")[0] for n, _ in model.named_parameters() if n not in learning} == frozen
        assert stage.warmup == 0.03 and stage.weight_decay == 0 and stage.final == 0


def test_two_rates_move_two_parts_at_two_speeds(tmp_path):
    """AdamW's first step moves a parameter by its rate, whatever the size of the gradient."""
    model = llava()
    before = bits(model)
    stage = Stage("two", ("vision.", "bridge."), steps=1, batch=4, lr=1e-3, lrs=(("vision.", 1e-5),), weight_decay=0.0)
    fit_llava(model, stage, tmp_path)
    moved = {name: (model.state_dict()[name] - before[name]).abs().max().item() for name in before}
    for name, rate in (("bridge.mlp.0.weight", 1e-3), ("vision.blocks.0.mlp.fc1.weight", 1e-5)):
        assert moved[name] == pytest.approx(rate, rel=0.02)
    assert moved["decoder.head.weight"] == 0


@pytest.mark.parametrize(("steps", "warmup"), [(200, 0.03), (101, 0.1), (50, 0.2)])
def test_the_schedule_is_transformers_shifted_by_the_first_step(steps, warmup):
    """Theirs spends optimizer step 0 at a rate of zero and never quite reaches the end; ours starts one step later."""
    from transformers import get_cosine_schedule_with_warmup

    rise = round(warmup * steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, rise, steps - 1)
    factor = theirs.lr_lambdas[0]
    for step in range(steps):
        ours = learning_rate(step, steps=steps, peak=2.0, warmup=warmup, final=0.0)
        assert ours == pytest.approx(2.0 * factor(step + 1 if step < rise else step), abs=1e-9)


# --- accumulation by token --------------------------------------------------------------------------------------------


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@small_run
@given(rows=st.integers(1, 7), size=st.integers(1, 7), seed=st.integers(0, 99))
def test_accumulated_gradients_are_those_of_the_whole_batch(rows, size, seed):
    model, batch = llava().double(), batch_at(seed, rows)
    batch["pixels"] = batch["pixels"].double()
    whole = response_loss(model(batch["ids"], batch["pixels"]), batch["labels"])
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    parts = micro_batches(batch, size)
    assert [len(part["ids"]) for part in parts] == [min(size, rows - at) for at in range(0, rows, size)]
    losses = []
    for loss in accumulated(parts, lambda part: model(part["ids"], part["pixels"])):
        loss.backward()
        losses.append(loss.item())
    assert sum(losses) == pytest.approx(whole.item(), rel=1e-5)
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-6)


def test_the_mean_of_micro_batch_means_is_another_gradient():
    """One row with a single response token, three with many: a mean of means gives the single one a quarter."""
    model, batch = llava(), batch_at(0)
    batch["labels"][0] = -100
    batch["labels"][0, 7] = 5
    forward = lambda part: model(part["ids"], part["pixels"])  # noqa: E731
    whole = response_loss(forward(batch), batch["labels"])
    parts = micro_batches(batch, 1)
    by_token = sum(loss.item() for loss in accumulated(parts, forward))
    by_part = sum(response_loss(forward(part), part["labels"]).item() for part in parts) / len(parts)
    assert by_token == pytest.approx(whole.item(), rel=1e-5) and abs(by_part - whole.item()) > 1e-3


def test_a_part_without_a_response_adds_nothing():
    model, batch = llava(), batch_at(0)
    batch["labels"][2:] = -100
    forward = lambda part: model(part["ids"], part["pixels"])  # noqa: E731
    losses = [loss.item() for loss in accumulated(micro_batches(batch, 2), forward)]
    assert losses[1] == 0 and math.isfinite(losses[0])


def test_fit_with_micro_batches_learns_what_fit_learns(tmp_path):
    stage = Stage("parts", ("bridge.", "decoder."), steps=3, batch=6, lr=1e-2)
    whole = fit_llava(llava(), stage, tmp_path)
    model, alive = llava(), []

    def loss_at(step):
        forward = lambda part: alive.append(len(part["ids"])) or model(part["ids"], part["pixels"])  # noqa: E731
        return accumulated(micro_batches(batch_at(step, 6), 4), forward)

    lines = []
    fit_llava(model, replace(stage, name="cut"), tmp_path, loss_at=loss_at, log=lines.append)
    assert alive == [4, 2] * 3 and len(lines) == 3
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-4)


def test_backward_runs_before_the_next_part_is_computed(tmp_path):
    model, order = llava(), []
    model.decoder.head.weight.register_hook(lambda gradient: order.append("backward"))

    def loss_at(step):
        return accumulated(
            micro_batches(batch_at(step), 2), lambda part: order.append("forward") or model(part["ids"], part["pixels"])
        )

    fit_llava(model, Stage("order", ("decoder.",), steps=1, batch=4, lr=1e-3), tmp_path, loss_at=loss_at)
    assert order == ["forward", "backward"] * 2


# --- an exact resume --------------------------------------------------------------------------------------------------


@small_run
@given(pauses=st.sets(st.integers(0, 6), max_size=4))
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path_factory, pauses):
    """Weights and optimizer, wherever it stops, with dropout that draws from torch's own random state."""
    folder = tmp_path_factory.mktemp("resume")
    stage = Stage("drop", ("bridge.", "decoder."), steps=7, batch=4, lr=1e-2, lrs=(("bridge.", 3e-2),))

    def run(name, stops):
        model = llava()
        model.bridge.mlp.append(nn.Dropout(0.3))
        torch.manual_seed(5)  # before a resume this is another state than the one in which the run stopped

        def loss_at(step):
            if step in stops:
                stops.remove(step)
                raise KeyboardInterrupt
            batch = batch_at(step)
            return response_loss(model(batch["ids"], batch["pixels"]), batch["labels"])

        fit_llava(model, replace(stage, name=name), folder, loss_at=loss_at, save_every=-1.0)
        state = torch.load(folder / f"{name}.pt", weights_only=True)
        return model.state_dict(), state["optimizer"]["state"]

    unbroken = run("unbroken", set())
    left = set(pauses)
    while True:
        try:
            resumed = run("resumed", left)
            break
        except KeyboardInterrupt:
            continue
    assert unbroken[0].keys() == resumed[0].keys()
    assert all(torch.equal(unbroken[0][name], resumed[0][name]) for name in unbroken[0])
    for key, moments in unbroken[1].items():
        assert all(torch.equal(value, resumed[1][key][name]) for name, value in moments.items())


def test_a_pause_in_the_middle_of_a_stage_is_exact_with_micro_batches(tmp_path):
    stage = Stage("whole", ("decoder.",), steps=4, batch=4, lr=1e-2)

    def run(name, **options):
        model = llava()
        loss_at = lambda step: accumulated(  # noqa: E731
            micro_batches(batch_at(step), 3), lambda part: model(part["ids"], part["pixels"])
        )
        return fit_llava(model, replace(stage, name=name), tmp_path, loss_at=loss_at, **options)

    expected = copy.deepcopy(run("whole").state_dict())
    for _ in range(4):
        with pytest.raises(Paused):
            run("broken", deadline=0.0)
    got = run("broken").state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Stage("s", (), steps=1, batch=1, lr=1.0), "0 parts.*at least 1"),
        (lambda: Stage("s", ("a",), steps=0, batch=1, lr=1.0), "steps is 0.*at least 1"),
        (lambda: Stage("s", ("a",), steps=1, batch=0, lr=1.0), "batch is 0.*at least 1"),
        (lambda: Stage("s", ("a",), steps=1, batch=1, lr=float("nan")), "lr is nan.*above 0"),
        (lambda: Stage("s", ("a",), steps=1, batch=1, lr=1.0, lrs=(("a", -1.0),)), "rate of a is -1.0.*above 0"),
        (lambda: Stage("s", ("a",), steps=1, batch=1, lr=1.0, warmup=1.5), "warmup is 1.5.*0 to 1"),
        (lambda: Stage("s", ("a",), steps=1, batch=1, lr=1.0, clip=0), "clip is 0.*above 0"),
        (lambda: learning_rate(5, steps=5, peak=1.0), "step is 5.*5 steps"),
        (lambda: micro_batches(batch_at(0), 0), "size is 0.*at least 1"),
        (lambda: micro_batches({"a": torch.zeros(2), "b": torch.zeros(3)}, 1), "'a': 2, 'b': 3"),
        (lambda: micro_batches({}, 1), "expected the same number, at least 1"),
        (lambda: accumulated([], None), "0 parts.*at least 1"),
        (lambda: accumulated([{"ids": torch.zeros(1)}], None), r"\['ids'\], expected labels"),
        (lambda: accumulated([{"labels": torch.full((2, 3), -100)}], None), "0 response tokens.*at least 1"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_step_without_a_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"0 losses.*at least 1"):
        fit_llava(llava(), Stage("none", ("decoder.",), steps=1, batch=4, lr=1e-3), tmp_path, loss_at=lambda step: [])
