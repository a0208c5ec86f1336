"""What the last chapter trains on each of its three paths, as one kind of object, so that its cells are the same.

Paths 1 and 3 learn to say that a thing is not there (`absent`), from records in the published format; on path 1 any
other file of records may be given. Path 2 learns to see in LLaVA's two stages (`recipes`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..llava import SMALL, Llava
from ..validation import counts, require_one_of
from . import absent
from .checkpoint import read_log
from .choose import Choice
from .collate import Batch, Collator
from .data import read_records
from .engine import Report, Trainer
from .exams import Exam, easy_vqa_exam, scene_exam, together
from .loader import Loader
from .plan import FinetunePlan
from .tokenizers import TokenizerAdapter

Stage = tuple[FinetunePlan, Callable[[int], Batch]]
TOWERS = ("trained", "random")


@dataclass(frozen=True)
class Job:
    """A model, what it learns in which stages, and the questions it is asked before and after.

    Attributes:
        name: of the model, for reports.
        stages: a plan and the batches of its steps, each; all but one path have one.
        exam: with images as this model's tower takes them.
    """

    name: str
    model: Llava
    adapter: TokenizerAdapter
    stages: tuple[Stage, ...]
    exam: Exam

    @property
    def work(self) -> str:
        """The stages in one line."""
        how = {"lora": "LoRA of rank {}", "projector": "the bridge", "full": "language model and bridge"}
        parts = [f"{how[p.mode].format(p.lora_rank)}, {p.steps} steps of {p.batch}" for p, _ in self.stages]
        return ", then ".join(parts)

    def train(self, folder: Path | str, *, log: Callable[[str], None] = print) -> list[Report]:
        """Run every stage in a folder of its own inside `folder`; a second call goes on where one stopped."""
        return [
            Trainer(self.model, plan, batches, Path(folder) / str(number), log=log).run()
            for number, (plan, batches) in enumerate(self.stages)
        ]

    def losses(self, folder: Path | str) -> tuple[tuple[int, float], ...]:
        """(step, loss) of all stages, counted through."""
        found, before = [], 0
        for number, (plan, _) in enumerate(self.stages):
            found += [(before + line["step"], line["loss"]) for line in read_log(Path(folder) / str(number))]
            before += plan.steps
        return tuple(found)


@counts(steps=1, scenes=2, asked=2)
def job(
    choice: Choice,
    folder: Path | str,
    *,
    steps: int = 2,
    scenes: int = 32,
    asked: int = 6,
    data: Path | str | None = None,
    tower: str = "trained",
    checkpoint: Path | str | None = None,
) -> Job:
    """What to train on the chosen path.

    Args:
        folder: for the records that are written here.
        steps: optimizer steps of the last stage.
        scenes, asked: how many are written to learn from, how many the exam has.
        data: a file or folder of records to learn from in place of ours (paths 1 and 3).
        tower: "random" puts a fresh tower before the model (path 2), as a control.
        checkpoint: the folder of path 1, by default what `choice` names.
    """
    require_one_of(tower, "tower", TOWERS)
    if choice.path == 2:
        return _learn_to_see(steps, asked, tower)
    cuda = torch.cuda.is_available()
    if choice.path == 1:
        from .command import load_model

        low = torch.bfloat16 if cuda else torch.float32
        loaded = load_model(str(checkpoint or choice.model), dtype=low)
        name, model, adapter = (
            "LLaVA-1.5 7B" if checkpoint is None else Path(checkpoint).name,
            loaded.model,
            loaded.tokenizer,
        )
        rank, batch, rates = 128, 16, {}
    else:
        from ..pretrained import load_small
        from .tokenizers import for_small

        name, model, adapter = "the shipped small model", copy.deepcopy(load_small().model), for_small()
        rank, batch, rates = 8, 8, {"lr": 3e-3, "bridge_lr": 3e-4}
    widest = min(model.config.text.width, model.config.text.kv_heads * model.config.text.head_dim)
    dtype = "bfloat16" if cuda and choice.path == 1 else "float32"
    plan = FinetunePlan(
        mode="lora",
        steps=steps,
        batch=batch,
        lora_rank=min(rank, widest),
        dtype=dtype,
        compile=dtype != "float32",
        **rates,
    )
    records = read_records(absent.write_records(Path(folder) / "absent", scenes) if data is None else data)
    collator = Collator(adapter, model.config)
    exam = seen_by(absent.exam(asked), collator)
    return Job(name, model, adapter, ((plan, Loader(records, collator, batch)),), exam)


def seen_by(exam: Exam, collator: Collator) -> Exam:
    """The exam with its images prepared as the collator prepares those it learns from; for exams without places."""
    if collator.config.vision == SMALL.vision:
        return exam
    from ..images import to_pil

    return replace(exam, pixels=torch.stack([collator.preprocess(to_pil(pixels)) for pixels in exam.pixels]))


def _learn_to_see(steps: int, asked: int, tower: str) -> Job:
    """SmolLM2 behind the trained tower: align with captions, then instruct with all kinds of question."""
    from ..pretrained import load_small
    from .recipes import align_batches, instruct_batches
    from .smollm import smollm_llava
    from .tokenizers import for_smollm

    small, adapter = load_small(), for_smollm()
    model = smollm_llava(small)
    if tower == "random":
        torch.manual_seed(0)
        model.vision = type(model.vision)(model.config.vision)
    cuda = torch.cuda.is_available()
    device, rows = ("cuda", 64) if cuda else ("cpu", 2)
    how = {"batch": rows, "dtype": "autocast" if cuda else "float32", "compile": cuda}
    align = FinetunePlan(mode="projector", steps=max(1, steps // 4), **how)
    instruct = FinetunePlan(mode="full", steps=steps, lr=2e-4, bridge_lr=5e-4, **how)
    stages = (
        (align, align_batches(adapter, model.config, rows=rows, device=device)),
        (instruct, instruct_batches(adapter, model.config, rows=rows, easy_vqa=rows // 4, device=device)),
    )
    exam = together(scene_exam(asked, device=device), easy_vqa_exam(limit=4 * asked, device=device))
    return Job(f"SmolLM2-135M behind the course's tower ({tower})", model, adapter, stages, exam)
