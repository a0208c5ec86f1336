"""A language model that never saw anything learns to see, in LLaVA's two stages: what path 2 of the chapter runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vlm_course.finetune.engine import Report, Trainer
from vlm_course.finetune.plan import FinetunePlan
from vlm_course.finetune.recipes import SceneBatches, Together, align_batches, instruct_batches
from vlm_course.finetune.tokenizers import TokenizerAdapter
from vlm_course.llava import Llava
from vlm_course.validation import require_number
from vlm_course.vit import VisionTransformer

# One thread draws the next batch while a step runs; more would only wait for each other.
_GPU = {"dtype": "autocast", "compile": True, "workers": 1}
ALIGN = FinetunePlan(mode="projector", steps=200, batch=128, lr=2e-3, **_GPU)
INSTRUCT = FinetunePlan(mode="full", steps=1200, batch=128, lr=5e-4, bridge_lr=1e-3, betas=(0.9, 0.98), **_GPU)
EASY_VQA = 1 / 8  # share of the rows that show easy-VQA's training images


@dataclass(frozen=True)
class Stages:
    """Both stages of one training: their plans, data, reports and folders."""

    plans: tuple[FinetunePlan, FinetunePlan]
    batches: tuple[SceneBatches, SceneBatches | Together]
    reports: tuple[Report, Report]
    folders: tuple[Path, Path]

    @property
    def seconds(self) -> float:
        """Of both, without the making of models and data."""
        return sum(report.seconds for report in self.reports)


def on_cpu(plan: FinetunePlan) -> FinetunePlan:
    """The same plan as a CPU computes it: float32, nothing compiled, no thread."""
    return replace(plan, dtype="float32", compile=False, workers=0)


def random_tower(vision: VisionTransformer, *, seed: int = 0) -> VisionTransformer:
    """A tower of the same shape that was never trained, in eval mode: the control that says what the trained one is
    worth. It is on the same device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = VisionTransformer(vision.config)
    return tower.to(vision.class_token.device).eval().requires_grad_(False)


def data(
    model: Llava,
    adapter: TokenizerAdapter,
    align: FinetunePlan,
    instruct: FinetunePlan,
    *,
    easy_vqa: float = EASY_VQA,
    turns: int = 8,
    length: int = 384,
    images: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[SceneBatches, SceneBatches | Together]:
    """The batches of both stages; arguments as in `learn_to_see`."""
    require_number(easy_vqa, "easy_vqa", 0, 1)
    options = {"seed": seed, "device": device}
    captions = align_batches(adapter, model.config, rows=align.batch, length=max(200, length // 2), **options)
    options |= {"turns": turns, "length": length, "easy_vqa": round(easy_vqa * instruct.batch), "images": images}
    return captions, instruct_batches(adapter, model.config, rows=instruct.batch, **options)


def learn_to_see(
    model: Llava,
    adapter: TokenizerAdapter,
    folder: Path | str,
    *,
    align: FinetunePlan = ALIGN,
    instruct: FinetunePlan = INSTRUCT,
    device: torch.device | str | None = None,
    log: Callable[[str], None] = print,
    **options,
) -> Stages:
    """Train the bridge on captions, then what `instruct` says on all kinds of question; resumes where it was stopped.

    Args:
        folder: each stage keeps its running state in a folder of its own in it.
        device: by default the GPU where there is one; the plans must suit it (`on_cpu`).
        options: easy_vqa, the share of the second stage's rows that show easy-VQA's images, and images, how many of
            these are read; turns and length, its questions an image and tokens a row; seed, of the data.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sources = data(model, adapter, align, instruct, device=device, **options)
    folders, reports = (Path(folder) / "align", Path(folder) / "instruct"), []
    for plan, batches, place in zip((align, instruct), sources, folders, strict=True):
        log(f"{place.name}: {batches.fingerprint}")
        reports.append(Trainer(model, plan, batches, place, device=device, log=log).run())
    model.eval()
    return Stages((align, instruct), sources, tuple(reports), folders)
