"""One process of the row `two-gpus`, started by torchrun: the engine's own step, equally many rows a GPU."""

from __future__ import annotations

import json
import sys
import tempfile
import time

import torch

from benchmarks.finetune_models import build, one_batch
from vlm_course.finetune import distributed
from vlm_course.finetune.engine import Trainer
from vlm_course.finetune.plan import FinetunePlan
from vlm_course.llava import LLAVA_7B

ROWS, WORDS, STEPS, WARM = 8, 192, 8, 3


def main(mode: str) -> None:
    """Prints one line of JSON from the first process."""
    world = distributed.join()
    plan = FinetunePlan(
        mode=mode, steps=100, batch=ROWS * world.size, micro_batch=ROWS, dtype="bfloat16", compile=True,
        lora_dropout=0.0, save_every=1e9, log_every=1000,
    )  # fmt: skip
    model = build(LLAVA_7B)
    batch = one_batch(LLAVA_7B, ROWS, WORDS, seed=world.rank, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, plan, lambda step: batch, folder, log=lambda line: None)
        for number in range(WARM + STEPS):
            if number == WARM:
                torch.cuda.synchronize()
                world.wait()
                start = time.perf_counter()
            trainer._set_rates()
            loss, _ = trainer._update(batch)
        torch.cuda.synchronize()
        world.wait()
        seconds = (time.perf_counter() - start) / STEPS
    if world.first:
        rate = ROWS * world.size / seconds
        memory = torch.cuda.max_memory_allocated() / 1e9
        print(json.dumps({"gpus": world.size, "samples_per_s": rate, "memory_GB": memory, "loss": loss.item()}))
    distributed.leave()


if __name__ == "__main__":
    main(sys.argv[1])
