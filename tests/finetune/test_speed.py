"""On a CPU the engine is not slower than the plain loop of chapter 6."""

import statistics
import time

import pytest

from vlm_course.finetune.engine import Trainer
from vlm_course.finetune.plan import FinetunePlan
from vlm_course.loss import response_loss
from vlm_course.training import Stage, fit

STEPS, ROUNDS = 20, 7


@pytest.mark.serial
def test_training_of_a_tiny_model_is_not_slower_than_fit(tiny, loader, tmp_path):
    """Seconds of this process's own work, in turn, with the making of optimizer and checkpoint in both."""
    batch = loader(6)(0)
    stage = Stage("tiny", trains=("bridge.", "decoder."), steps=STEPS, batch=6, lr=1e-3, weight_decay=0.0)
    plan = FinetunePlan("full", steps=STEPS, batch=6, lr=1e-3)

    def by_fit(model, folder):
        loss_at = lambda step: response_loss(model(batch.ids, batch.pixels), batch.labels)  # noqa: E731
        fit(model, stage, loss_at, checkpoint=folder / "fit.pt", log=lambda line: None)

    def by_engine(model, folder):
        Trainer(model, plan, lambda step: batch, folder, device="cpu", log=lambda line: None).run()

    ratios = []
    for turn in range(ROUNDS + 1):
        seconds = {}
        for run in (by_fit, by_engine) if turn % 2 else (by_engine, by_fit):
            folder = tmp_path / f"{turn}"
            model = tiny()
            began = time.process_time()
            run(model, folder)
            seconds[run] = time.process_time() - began
        ratios.append(seconds[by_engine] / seconds[by_fit])
    ratio = statistics.median(ratios[1:])  # the first warms up
    print(f"engine / fit: {ratio:.2f} of the time, by round {min(ratios[1:]):.2f} to {max(ratios[1:]):.2f}")
    assert ratio < 1.1
