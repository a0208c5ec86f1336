"""Two processes under torchrun learn what one learns from the whole batch; one goes on where two have stopped."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from vlm_course.finetune.checkpoint import read_log
from vlm_course.finetune.engine import Trainer
from vlm_course.finetune.plan import FinetunePlan

# A batch of 7 does not divide by 2, and packed rows divide otherwise than conversations: shares are uneven.
PLAN = FinetunePlan("lora", steps=5, batch=7, lr=3e-3, bridge_lr=1e-2, lora_rank=4, lora_dropout=0.0)
RUNS = {
    "projector": (replace(PLAN, mode="projector"), False),
    "lora": (PLAN, False),
    "lora-parts": (replace(PLAN, micro_batch=2), True),
    "full": (replace(PLAN, mode="full"), False),
    "full-parts": (replace(PLAN, mode="full", micro_batch=1), True),
    "full-low": (replace(PLAN, mode="full", dtype="bfloat16"), False),
    "full-whole": (replace(PLAN, mode="full", divide=False), False),
}

PROGRAM = """
import json, pickle, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from vlm_course.finetune import distributed
from vlm_course.finetune.engine import Trainer
here = Path(sys.argv[1])
jobs = pickle.loads((here / "jobs.pickle").read_bytes())
for name, (plan, loader, config, stop) in jobs.items():
    from vlm_course.llava import Llava
    torch.manual_seed(1)
    model = Llava(config)
    trainer = Trainer(model, plan, loader, here / name, device="cpu", log=lambda line: None)
    trainer.run(minutes=0 if stop else None)
    whole = trainer.trained()
    if trainer.world.first:
        torch.save(whole.state_dict(), here / name / "whole.pt")
    else:
        assert whole is None
    kinds = sorted({type(p).__name__ for p in model.parameters()})
    (here / name / f"rank{trainer.world.rank}.json").write_text(json.dumps(kinds))
from vlm_course.finetune.command import finetune
finetune(sys.argv[2], model="small", mode="full", steps=2, batch=4, device="cpu", out=here / "command")
"""


def one(model, folder, batches, plan):
    trainer = Trainer(model, plan, batches, folder, log=lambda line: None)
    trainer.run()
    return trainer.trained().state_dict()


def losses(folder):
    return [line["loss"] for line in read_log(folder)]


@pytest.fixture(scope="module")
def two(tmp_path_factory, loader, tiny_config, talk_file):
    """The folder in which two processes ran every plan, and one more that they stopped after its first step."""
    import pickle

    here = tmp_path_factory.mktemp("two")
    jobs = {name: (plan, loader(7, pack=pack), tiny_config, False) for name, (plan, pack) in RUNS.items()}
    for mode in ("lora", "full"):
        jobs[f"{mode}-stopped"] = (replace(PLAN, mode=mode), loader(7), tiny_config, True)
    (here / "jobs.pickle").write_bytes(pickle.dumps(jobs))
    (here / "program.py").write_text(PROGRAM, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(here / "program.py"), str(here), str(talk_file)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    (here / "said").write_text(run.stdout, encoding="utf-8")
    return here


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_have_the_curve_of_one(two, tiny, loader, tmp_path, name):
    plan, pack = RUNS[name]
    low = plan.dtype == "bfloat16"  # divided: float32 weights, which are multiplied in bfloat16
    plan = replace(plan, dtype="float32")
    state = one(tiny(), tmp_path, loader(7, pack=pack), plan)
    assert losses(two / name) == pytest.approx(losses(tmp_path), rel=2e-2 if low else 2e-5)
    assert [line["tokens"] for line in read_log(two / name)] == [line["tokens"] for line in read_log(tmp_path)]
    there = torch.load(two / name / "whole.pt", weights_only=True)
    assert there.keys() == state.keys() == tiny().state_dict().keys()
    for key, value in state.items():
        assert there[key].dtype == torch.float32
        if not low:  # five steps of Adam follow the signs of gradients, however small these are
            torch.testing.assert_close(there[key], value, rtol=1e-3, atol=2e-5, msg=key)
    kinds = {json.loads((two / name / f"rank{rank}.json").read_text())[0] for rank in range(2)}
    assert kinds == {"DTensor" if plan.mode == "full" and plan.divide else "Parameter"}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_one_process_goes_on_where_two_stopped(two, tiny, loader, tmp_path, mode):
    plan, folder = replace(PLAN, mode=mode), two / f"{mode}-stopped"
    assert len(losses(folder)) == 1
    state = one(tiny(), folder, loader(7), plan)
    expected = one(tiny(), tmp_path, loader(7), plan)
    assert losses(folder) == pytest.approx(losses(tmp_path), rel=2e-5)
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=2e-5, msg=key)


def test_only_the_first_process_writes(two):
    for name in RUNS:
        assert {path.name for path in (two / name).iterdir()} == {
            "log.jsonl", "state.pt", "whole.pt", "rank0.json", "rank1.json",
        }  # fmt: skip


def test_the_command_says_things_once_and_writes_a_whole_model(two, talk_file, tmp_path):
    from vlm_course.finetune.command import finetune
    from vlm_course.pretrained import load_small

    said = (two / "said").read_text(encoding="utf-8")
    assert said.count("24 conversations with 48 questions") == 1 and said.count("the trained model is in") == 1
    assert "full: " in said and "parameters learn on 2 x cpu, 2 steps of 4 conversations" in said
    options = {"model": "small", "mode": "full", "steps": 2, "batch": 4, "device": "cpu", "log": lambda line: None}
    finetune(talk_file, out=tmp_path, **options)
    assert losses(two / "command") == pytest.approx(losses(tmp_path), rel=2e-5)
    ours, theirs = (load_small(folder=folder / "model").model.state_dict() for folder in (two / "command", tmp_path))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=2e-4, msg=key)
