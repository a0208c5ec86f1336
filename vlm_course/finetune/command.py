"""What `vlm-course finetune` does: read, check, train, save; the same under torchrun, where it runs once a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..llava import Llava
from ..validation import require_number
from . import distributed, hub, memory
from .collate import Collator, fitting
from .data import Records, read_records
from .engine import Report, Trainer
from .loader import Loader
from .plan import FinetunePlan
from .tokenizers import TokenizerAdapter, for_folder, for_small

SMALL = "small"
WEIGHTS = "model"  # the folder, inside the run's, that holds the trained model


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and how to write what became of it into a new folder."""

    model: Llava
    tokenizer: TokenizerAdapter
    save: Callable[[Llava, Path], Any]


def load_model(name: str, *, dtype: torch.dtype = torch.float32) -> Loaded:
    """`small` for the shipped model, or a LLaVA-1.5 checkpoint in the published layout: its folder, or `owner/name` of
    the hub, which is then downloaded.

    Raises:
        ValueError: there is no such folder, or the hub does not give it.
        FileNotFoundError: the folder lacks weights or a tokenizer.
    """
    if name == SMALL:
        from ..pretrained import load_small, save_small

        small = load_small()

        def save(model: Llava, folder: Path) -> None:
            small.contrastive.vision = model.vision  # one tower for both; where it was divided, this is it as a whole
            save_small(small.contrastive, model, folder)

        return Loaded(small.model, for_small(), save)
    folder = hub.checkpoint(name) if hub.is_checkpoint(name) else Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {name!r}: give {SMALL!r} or a folder with a LLaVA-1.5 checkpoint")
    from ..convert.llava import load_llava
    from .published import save_published

    tokenizer = for_folder(folder)
    save = partial(save_published, adapter=tokenizer, like=folder, replace=True)
    return Loaded(load_llava(folder, dtype=dtype), tokenizer, save)


def steps_for(records: int, batch: int, epochs: float) -> int:
    """Optimizer steps in which every record is read `epochs` times, rounded up."""
    require_number(epochs, "epochs", above=0)
    return max(1, -int(-records * epochs // batch))


def finetune(
    data: Path | str,
    *,
    model: str,
    out: Path | str,
    images: Path | str | None = None,
    skip_bad: bool = False,
    epochs: float = 1.0,
    pack: bool = False,
    max_tokens: int | None = None,
    check_images: bool = True,
    device: str | None = None,
    minutes: float | None = None,
    log: Callable[[str], None] = print,
    **plan: Any,
) -> Report:
    """Train `model` on `data` and write it to the folder `model` in `out`; a second call goes on where one stopped.

    Args:
        data: as in `data.read_records`, or `hub:owner/name/file.json`, a dataset's file, which needs `images`.
        images, skip_bad: as in `data.read_records`.
        model: as in `load_model`.
        out: folder of the running state, the log and, in the end, the trained model.
        epochs: how often each record is read, if `steps` is not given.
        pack, max_tokens: as in `collate.Collator`.
        check_images: decode every image before training.
        plan: fields of `FinetunePlan`; dtype is by default bfloat16 on a GPU.

    Raises:
        ValueError, OSError: the input cannot be used, in one sentence.
        OutOfMemory: what fits, in one sentence.
    """
    memory.let_segments_grow()
    world = distributed.join(device)
    say = log if world.first else lambda line: None
    try:
        if str(data).startswith("hub:"):
            if images is None:
                raise ValueError(f"{data} holds no images: give the folder that its image names start from")
            data = hub.records(str(data))
        records = read_records(data, images=images, skip_bad=skip_bad, check="decode" if check_images else "exists")
        cuda = world.device.type == "cuda"
        plan = {"dtype": "bfloat16" if cuda else "float32", "compile": cuda, "batch": 128} | plan
        loaded = load_model(model, dtype=torch.bfloat16 if plan["dtype"] == "bfloat16" else torch.float32)
        pad_to = 64 if cuda else 1  # few lengths, since a compiled model is made anew for some of them
        collator = Collator(loaded.tokenizer, loaded.model.config, max_tokens=max_tokens, pack=pack, pad_to=pad_to)
        records: Records = fitting(records, collator, skip_bad=skip_bad)
        say(str(records))
        plan.setdefault("steps", steps_for(len(records), plan["batch"], epochs))
        done = FinetunePlan(**plan)
        loader = Loader(records, collator, done.batch, done.seed)
        trainer = Trainer(loaded.model, done, loader, out, device=world.device, log=log)
        count = sum(parameter.numel() for parameter in trainer.learning.values())
        where = f"{world.size} x {world.device.type}"
        say(f"{done.mode}: {count:,} parameters learn on {where}, {done.steps} steps of {done.batch} conversations")
        report = trainer.run(minutes=minutes)
        if report.done:
            trained = trainer.trained()
            if trained is not None:
                loaded.save(trained, Path(out) / WEIGHTS)
            say(f"the trained model is in {Path(out) / WEIGHTS}")
        else:
            say(f"stopped after step {report.step} of {report.steps}; the same command goes on from here")
        world.wait()
        return report
    finally:
        distributed.leave()
