"""What the last chapter trains on each of its three paths, as one kind of object, so that its cells are the same.

Paths 1 and 3 learn to say that a thing is not there (`absent`), from records in the published format; on path 1 any
other file of records may be given. Path 2 learns to see in LLaVA's two stages (`path_two`).

    python -m vlm_course.finetune.lesson --steps 2000      runs this machine's path and keeps what it found
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..llava import SMALL, Llava
from ..measures import Table
from ..validation import counts, require_one_of
from . import absent, choose, report
from .choose import Choice
from .collate import Batch, Collator
from .data import read_records
from .engine import Report, Trainer
from .exams import Exam, easy_vqa_exam, grade, scene_exam, together
from .flops import measure_floors
from .loader import Loader
from .plan import FinetunePlan
from .stored import FOLDER, StoredRun, keep
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
        how = {"lora": "LoRA of rank {} and the bridge", "projector": "the bridge", "full": "language model and bridge"}
        parts = [f"{how[p.mode].format(p.lora_rank)}, {p.steps} steps of {p.batch}" for p, _ in self.stages]
        return ", then ".join(parts)

    def train(self, folder: Path | str, *, log: Callable[[str], None] = print) -> list[Report]:
        """Run every stage in a folder of its own inside `folder`; a second call goes on where one stopped."""
        return [
            Trainer(self.model, plan, batches, Path(folder) / str(number), log=log).run()
            for number, (plan, batches) in enumerate(self.stages)
        ]

    def losses(self, folder: Path | str) -> tuple[tuple[int, float], ...]:
        """(step, loss) of all stages, counted through; of a long run about 120 points."""
        return report.losses(*(Path(folder) / str(number) for number in range(len(self.stages))))


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
    mode: str = "lora",
) -> Job:
    """What to train on the chosen path.

    Args:
        folder: for the records that are written here.
        steps: optimizer steps of the last stage.
        scenes, asked: how many are written to learn from, how many the exam has.
        data: a file or folder of records to learn from in place of ours (paths 1 and 3).
        tower: "random" puts a fresh tower before the model (path 2), as a control.
        mode: what learns on paths 1 and 3, "projector", "lora" or "full"; `choice.mode` says what the memory holds.
    """
    require_one_of(tower, "tower", TOWERS)
    if choice.path == 2:
        return _learn_to_see(steps, asked, tower)
    cuda = torch.cuda.is_available()
    if choice.path == 1:
        from .command import load_model

        loaded = load_model(choice.model, dtype=torch.bfloat16 if cuda else torch.float32)
        name, adapter = "LLaVA-1.5 from " + Path(choice.model).name, loaded.tokenizer
        model = loaded.model.to("cuda" if cuda else "cpu")  # its answers before are asked for there too
        rank, batch, rates = 128, 16, {}
    else:
        from ..pretrained import load_small
        from .tokenizers import for_small

        name, model, adapter = "the shipped small model", copy.deepcopy(load_small().model), for_small()
        rank, batch, rates = 8, 8, {"lr": 3e-3, "bridge_lr": 3e-4}
    widest = min(model.config.text.width, model.config.text.kv_heads * model.config.text.head_dim)
    dtype = "bfloat16" if cuda and choice.path == 1 else "float32"
    plan = FinetunePlan(
        mode=mode,
        steps=steps,
        batch=batch,
        lora_rank=min(rank, widest),
        dtype=dtype,
        compile=dtype != "float32",
        **rates,
    )
    records = read_records(absent.write_records(Path(folder) / "absent", scenes) if data is None else data)
    collator = Collator(adapter, model.config, pad_to=64 if plan.compile else 1)  # few lengths for the compiler
    exam = seen_by(absent.exam(asked), collator)
    return Job(name, model, adapter, ((plan, Loader(records, collator, batch)),), exam)


def seen_by(exam: Exam, collator: Collator) -> Exam:
    """The exam with its images prepared as the collator prepares those it learns from; for exams without places."""
    if collator.config.vision == SMALL.vision:
        return exam
    from ..images import to_pil

    return replace(exam, pixels=torch.stack([collator.preprocess(to_pil(pixels)) for pixels in exam.pixels]))


def _learn_to_see(steps: int, asked: int, tower: str) -> Job:
    """SmolLM2 behind the trained tower: align with captions, then instruct with all kinds of question (`path_two`)."""
    from ..pretrained import load_small
    from . import path_two
    from .smollm import smollm_llava
    from .tokenizers import for_smollm

    small, adapter = load_small(), for_smollm()
    model = smollm_llava(small)
    if tower == "random":
        model.vision = path_two.random_tower(model.vision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plans = replace(path_two.ALIGN, steps=max(1, steps // 6)), replace(path_two.INSTRUCT, steps=steps)
    if device == "cpu":
        plans = tuple(replace(path_two.on_cpu(plan), batch=2) for plan in plans)
    stages = tuple(zip(plans, path_two.data(model, adapter, *plans, device=device), strict=True))
    exam = together(scene_exam(asked, device=device), easy_vqa_exam(limit=4 * asked, device=device))
    return Job(f"SmolLM2-135M behind the course's tower ({tower})", model, adapter, stages, exam)


def numbers(job: Job, reports: Sequence[Report], *, dollars_an_hour: float | None = None) -> dict[str, float]:
    """What the last stage cost, by `report.numbers`; the machine's peak is measured here.

    The peak is that of the largest matrix product that is timed: bfloat16 on a GPU, float32 on a CPU.
    """
    (plan, batches), device = job.stages[-1], next(job.model.parameters()).device
    sizes = {} if device.type == "cuda" else {"size": 1024, "elements": 1 << 22, "dtype": torch.float32}
    batch = batches(0)
    tokens = int((batch.ids != job.adapter.pad_id).sum()) / len(batch)
    return report.numbers(
        reports[-1],
        plan,
        job.model.config,
        learning=report.learning_parameters(job.model),
        tokens=tokens,
        floors=measure_floors(device, **sizes),
        price_per_hour=dollars_an_hour,
    )


def found(
    path: int,
    job: Job,
    cost: dict[str, float],
    losses: Sequence[tuple[int, float]],
    before: tuple[Table, list[str]],
    after: tuple[Table, list[str]],
    *,
    notes: Sequence[str] = (),
    **more: Table,
) -> StoredRun:
    """Everything that a run of the chapter found, to be printed and kept. before, after: what `exams.grade` gave.

    more: tables of models trained as controls, as in `report.accuracy`.
    """
    table = report.accuracy(before[0], after[0], **more)
    answers = report.side_by_side(job.exam, before[1], after[1], job.exam.few(2))
    return StoredRun(path, job.name, job.work, cost, tuple(losses), table, answers, tuple(notes))


def main(arguments: list[str] | None = None) -> int:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m vlm_course.finetune.lesson", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=None, help="folder of a LLaVA-1.5 checkpoint (path 1)")
    parser.add_argument("--data", default=None, help="records to learn from in place of the chapter's (paths 1 and 3)")
    for name, value in (("steps", 2), ("scenes", 2000), ("asked", 60)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--random-tower", action="store_true", help="a control of path 2: behind a fresh tower")
    parser.add_argument("--mode", default="lora", help="what learns on paths 1 and 3: projector, lora or full")
    parser.add_argument("--dollars-an-hour", type=float, default=None)
    parser.add_argument("--note", action="append", default=[], help="such as: the weights are random")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the run is kept; by default in the package")
    given = parser.parse_args(arguments)
    machine = choose.look(given.checkpoint)
    choice = choose.decide(machine)
    print(choose.said(machine, choice), flush=True)
    options = {
        "steps": given.steps,
        "scenes": given.scenes,
        "asked": given.asked,
        "data": given.data,
        "mode": given.mode,
    }
    with tempfile.TemporaryDirectory() as name:
        work = job(choice, name, **options)
        before = grade(work.model, work.adapter, work.exam, controls=False)
        reports = work.train(Path(name) / "run")
        cost = numbers(work, reports, dollars_an_hour=given.dollars_an_hour)
        losses = work.losses(Path(name) / "run")
        after = grade(work.model, work.adapter, work.exam)
        more = {}
        if given.random_tower and choice.path == 2:
            other = job(choice, name, tower="random", **options)
            other.train(Path(name) / "random")
            more["random_tower"] = grade(other.model, other.adapter, other.exam, controls=False)[0]
    notes = [*given.note, *report.price_notes(given.dollars_an_hour)]
    run = found(choice.path, work, cost, losses, before, after, notes=notes, **more)
    variant = "lesson" if choice.path == 3 else ""
    print("\n\n".join([run.title, run.numbers_table(), run.accuracy_table(), run.answers_text()]))
    print(keep(run, given.folder, variant=variant).name, "kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
