"""Row `packed` of benchmarks.finetune: LoRA of LLaVA-1.5 7B on conversations of mixed lengths."""

from __future__ import annotations

import random
import time
from functools import partial

import torch

from benchmarks import finetune_peers
from benchmarks.finetune_models import DEVICE, learner, optimizer_for, wait
from benchmarks.finetune_training import ratio, step_of
from vlm_course.finetune import fast
from vlm_course.finetune.collate import Batch
from vlm_course.finetune.fast import Options
from vlm_course.finetune.flops import Floors, median_seconds
from vlm_course.llava import LLAVA_7B, Llava, LlavaConfig
from vlm_course.packed import pack

ROW, ROWS = 2560, 3  # tokens of a packed row, and rows of a step


def conversation_lengths(count: int, seed: int = 0) -> list[int]:
    """Words beside the image: log-normal with median 160 and a long tail, 30 to 1,400, as mixed instruction data are.

    A model of the mix, not a measurement of it: short answers, descriptions and long conversations in one batch.
    """
    draw = random.Random(seed)
    return [min(1400, max(30, round(draw.lognormvariate(5.08, 0.85)))) for _ in range(count)]


def _documents(config: LlavaConfig, lengths: list[int]) -> list[tuple[list[int], list[int]]]:
    draw, found = random.Random(1), []
    for words in lengths:
        ids = [config.image_id] * config.visual_tokens + [
            draw.randrange(3, config.text.vocab_size - 100) for _ in range(words)
        ]
        found.append((ids, [-100] * (config.visual_tokens + words // 2) + ids[config.visual_tokens + words // 2 :]))
    return found


def _grouped(config: LlavaConfig, documents: list, rows: int) -> list[Batch]:
    """Sorted by length, cut into batches, each padded to its longest."""
    batches, ordered = [], sorted(documents, key=lambda document: -len(document[0]))
    for at in range(0, len(ordered), rows):
        part = ordered[at : at + rows]
        longest = max(len(ids) for ids, _ in part)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in part])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for _, row in part])
        pixels = torch.randn(len(part), 3, *config.vision.image_hw, dtype=torch.bfloat16)
        batches.append(Batch(ids, labels, pixels).to(DEVICE))
    return batches


def _packed(config: LlavaConfig, documents: list, length: int, rows: int) -> list[Batch]:
    whole = pack(documents, length, pad_id=0, image_id=config.image_id, visual_tokens=config.visual_tokens)
    batches, fill = [], {"ids": 0, "labels": -100, "positions": 0, "documents": -1}
    for at in range(0, len(whole.ids), rows):
        cut = slice(at, at + rows)
        images = int((whole.ids[cut] == config.image_id).sum()) // config.visual_tokens
        pixels = torch.randn(images, 3, *config.vision.image_hw, dtype=torch.bfloat16)
        tensors = {}
        for name, value in fill.items():  # the last batch may lack rows: empty ones, so that all have one shape
            part = getattr(whole, name)[cut]
            tensors[name] = torch.cat([part, part.new_full((rows - len(part), length), value)])
        batches.append(Batch(**tensors, pixels=pixels).to(DEVICE))
    return batches


def _epoch(model: Llava, batches: list[Batch], samples: int, **options) -> dict:
    fast.prepare(model, options=Options(dtype=torch.bfloat16, compiled=DEVICE == "cuda", **options))
    optimizer = optimizer_for(model, "lora")
    steps = [step_of(model, batch, optimizer, fast.loss) for batch in batches]
    start = time.perf_counter()
    for step in steps:  # every length once: compiled, allocated
        step()
    wait()
    warm_up = time.perf_counter() - start
    seconds = median_seconds(lambda: [step() for step in steps], runs=2, warm_up=0)
    tokens = sum(batch.ids.numel() for batch in batches)
    return {"samples_per_s": samples / seconds, "tokens": tokens, "warm_up_s": warm_up, "batches": len(batches)}


def _packed_ours(run, documents: list, grouped: list[Batch]) -> None:
    model, count = learner(LLAVA_7B, "lora"), len(documents)
    run.try_("ours, packed", lambda: _epoch(model, _packed(LLAVA_7B, documents, ROW, ROWS), count), always=True)
    run.try_("ours, grouped and padded", lambda: _epoch(model, grouped, count, settings={"dynamic": True}))


def packed(run, floors: Floors) -> None:
    """LoRA on mixed lengths: packed rows beside batches grouped by length and padded."""
    count = 96
    documents = _documents(LLAVA_7B, conversation_lengths(count))
    grouped = _grouped(LLAVA_7B, documents, 8)
    real = sum(len(ids) for ids, _ in documents)
    filled = real / sum(batch.ids.numel() for batch in grouped)
    run.results["data"] = {"samples": count, "tokens": real, "filled when grouped and padded": filled}
    _packed_ours(run, documents, grouped)

    def peer(compiled: bool) -> dict:
        # without checkpointing 8 rows of the longest conversations do not fit into 80 GB
        on, _ = finetune_peers.trainer(LLAVA_7B, "lora", checkpointing=True, compiled=compiled, dynamic=True)
        steps = []
        for batch in grouped:
            real = (batch.ids != 0).long()
            steps.append(on(batch.ids, batch.pixels, batch.labels, real))
        start = time.perf_counter()
        for step in steps:
            step()
        wait()
        warm_up = time.perf_counter() - start
        seconds = median_seconds(lambda: [step() for step in steps], runs=1, warm_up=0)
        return {"samples_per_s": count / seconds, "warm_up_s": warm_up}

    for settings in run.peers:
        run.try_(f"transformers, {settings}", partial(peer, settings == "tuned"), always=True)
    ratio(run)
