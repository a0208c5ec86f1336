"""Training rows of benchmarks.finetune: projector, lora, full (7B), small (222M), packed, curve, two-gpus."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from benchmarks import finetune_peers
from benchmarks.finetune_inference import DEVICE, build, wait
from vlm_course.bridges import ShuffleProjection
from vlm_course.decoder import DecoderConfig
from vlm_course.finetune import fast
from vlm_course.finetune.collate import Batch
from vlm_course.finetune.fast import Options
from vlm_course.finetune.fast_optimizer import RoundingAdamW
from vlm_course.finetune.flops import Floors, median_seconds, step_flops
from vlm_course.finetune.lora import add_lora
from vlm_course.finetune.losses import plain_loss
from vlm_course.llava import LLAVA_7B, Llava, LlavaConfig
from vlm_course.packed import pack
from vlm_course.training import freeze_all_but
from vlm_course.vit import ViTConfig

RANK = 128
ROW, ROWS = 2560, 3  # tokens of a packed row, and rows of a step
STEPS = 50  # of the row `curve`

# SigLIP-B/16-224's tower, with a class token more, and SmolLM2-135M: 196 patches become 49 tokens (pixel shuffle).
SMALL_222M = LlavaConfig(
    vision=ViTConfig(
        image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_width=3072, activation="gelu", pre_norm=False
    ),
    text=DecoderConfig(
        vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536, rope_theta=100000.0,
        tie_embeddings=True, max_positions=2048,
    ),
    image_id=49151, feature_layer=-1, visual_tokens=49,
)  # fmt: skip
CURVE = LlavaConfig(
    vision=ViTConfig(image_size=112, patch_size=14, width=256, layers=4, heads=4, mlp_width=1024),
    text=DecoderConfig(
        vocab_size=8000, width=1024, layers=8, heads=16, kv_heads=8, mlp_width=2816, max_positions=1024
    ),
    image_id=7999,
)  # fmt: skip


def one_batch(config: LlavaConfig, rows: int, words: int, *, seed: int = 0, device: str = DEVICE) -> Batch:
    """Rows of an image and `words` words, of which the second half is the answer."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.full((rows, config.visual_tokens), config.image_id)
    ids = torch.cat([image, torch.randint(3, config.text.vocab_size - 100, (rows, words), generator=draw)], dim=1)
    labels = ids.clone()
    labels[:, : config.visual_tokens + words // 2] = -100
    pixels = torch.randn(rows, 3, *config.vision.image_hw, generator=draw).to(torch.bfloat16)
    return Batch(ids.to(device), labels.to(device), pixels.to(device))


def learner(config: LlavaConfig, mode: str, *, rank: int | None = None, dtype=torch.bfloat16, bridge=None) -> Llava:
    """A model of which `mode` learns; what learns beside frozen weights is float32."""
    model, rank = build(config, dtype=dtype, bridge=bridge), rank or RANK
    names = add_lora(model, rank=rank, alpha=2.0 * rank) if mode == "lora" else []
    trains = {"projector": ("bridge.",), "lora": ("bridge.", *names), "full": ("bridge.", "decoder."), "all": ("",)}
    freeze_all_but(model, trains[mode])
    if mode in ("projector", "lora"):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def optimizer_for(model: nn.Module, mode: str):
    """Float32 AdamW for thin parts; for all weights of a decoder bfloat16 moments, inside the backward pass."""
    learning = [p for p in model.parameters() if p.requires_grad]
    if mode == "full":
        return RoundingAdamW(learning, lr=1e-5).in_backward()
    return torch.optim.AdamW(learning, lr=1e-5, fused=True)


def _step(model: Llava, batch: Batch, optimizer, loss: Callable) -> Callable[[], torch.Tensor]:
    count = float((batch.labels[:, 1:] != -100).sum())

    def step() -> torch.Tensor:
        value = loss(model, batch, count)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def _attention(which: str | None):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]  # torch 2.11 takes cuDNN's first on an H100
    return nullcontext() if which is None else sdpa_kernel(others)


def measured(
    config: LlavaConfig, mode: str, rows: int, words: int, floors: Floors, *, attention: str | None = None, bridge=None,
    rank: int | None = None, dtype=torch.bfloat16, profile: bool = False, **options,
) -> dict:  # fmt: skip
    """Samples/s, share of the matrix peak and memory of our step; the loss beside the plain one's before any step."""
    model = learner(config, mode, rank=rank, dtype=dtype, bridge=bridge)
    batch = one_batch(config, rows, words)
    part = Batch(batch.ids[:2], batch.labels[:2], batch.pixels[:2])
    options = {"compiled": True} | options
    with _attention(attention):
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.float32):
            count = float((part.labels[:, 1:] != -100).sum())
            wanted = plain_loss(model, part, count).item() if dtype != torch.float32 else None
        fast.prepare(model, options=Options(dtype=torch.bfloat16, **options | {"compiled": False}))
        with torch.no_grad():
            found = fast.loss(model, part, count).item()
        forget()
        runner = fast.prepare(model, options=Options(dtype=torch.bfloat16, **options))
        step = _step(model, batch, optimizer_for(model, mode), fast.loss)
        start = time.perf_counter()
        first = step().item()
        wait()
        warm_up = time.perf_counter() - start
        seconds = median_seconds(step, runs=5, warm_up=2)
        table = _profile(step) if profile else None
    tokens = batch.ids.shape[1]
    flops = step_flops(config, mode, rows, tokens)
    result = {
        "samples_per_s": rows / seconds, "of_peak": floors.share(flops, seconds), "ms": 1e3 * seconds, "rows": rows,
        "tokens": tokens, "warm_up_s": warm_up, "memory_GB": _memory(),
        "blocks_again": max(runner.again.values(), default=options.get("recompute")), "loss": found,
        "plain_loss": wanted, "first_loss": first,
    }  # fmt: skip
    if table:
        result["profile"] = table
    return result


def forget() -> None:
    """Give memory back and begin to count it anew."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _memory() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def _profile(step: Callable) -> list[list]:
    """The kernels that take most of a step: name, milliseconds, calls."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as taken:
            step()
            wait()
    except RuntimeError as error:  # the counters are closed on some machines
        return [[f"no profile: {error}", 0.0, 0]]
    rows = [(e.key[:90], e.self_device_time_total / 1e3, e.count) for e in taken.key_averages()]
    return [[name, round(ms, 3), count] for name, ms, count in sorted(rows, key=lambda row: -row[1])[:30] if ms > 0]


def _peer(config: LlavaConfig, mode: str, rows: int, words: int, floors: Floors, settings: str) -> dict:
    batch, tuned = one_batch(config, rows, words), settings == "tuned"
    on, _ = finetune_peers.trainer(config, mode, checkpointing=mode == "full" or not tuned, compiled=tuned)
    seconds = median_seconds(on(batch.ids, batch.pixels, batch.labels))
    flops = step_flops(config, mode, rows, batch.ids.shape[1])
    return {
        "samples_per_s": rows / seconds, "of_peak": floors.share(flops, seconds), "ms": 1e3 * seconds, "rows": rows,
        "memory_GB": _memory(),
    }  # fmt: skip


def _stage(run, floors: Floors, mode: str, words: int, variants: dict[str, dict], peer_rows: dict[str, int]) -> None:
    for name, settings in variants.items():
        work = partial(measured, LLAVA_7B, mode, settings.pop("rows"), words, floors, **settings)
        run.try_(name, work, always=not any("samples_per_s" in found for found in run.results.values()))
    for settings in run.peers:
        work = partial(_peer, LLAVA_7B, mode, peer_rows[settings], words, floors, settings)
        run.try_(f"transformers, {settings}", work, always=True)
    _ratio(run)


def _ratio(run) -> None:
    ours = [r["samples_per_s"] for n, r in run.results.items() if n.startswith("ours") and "samples_per_s" in r]
    theirs = [r["samples_per_s"] for n, r in run.results.items() if n.startswith("transf") and "samples_per_s" in r]
    if ours and theirs:
        print(f"{run.name:<10} ours {max(ours):.2f} samples/s, peer {max(theirs):.2f}: {max(ours) / max(theirs):.2f}")


def projector(run, floors: Floors) -> None:
    """Stage 1: the bridge alone, 640 tokens a sample."""
    variants = {
        "ours": {"rows": 16, "profile": True}, "ours, 8 rows": {"rows": 8},
        "ours, tower not recorded": {"rows": 8, "graphs": False},
        "ours, every position": {"rows": 8, "answers_only": False},
    }  # fmt: skip
    _stage(run, floors, "projector", 64, variants, {"tuned": 8, "plain": 16})


def lora(run, floors: Floors) -> None:
    """Rank 128 on all maps of the language model, and the bridge, 768 tokens a sample."""
    variants = {
        "ours": {"rows": 8, "profile": True}, "ours, 14 rows": {"rows": 14}, "ours, 4 rows": {"rows": 4},
    }  # fmt: skip
    _stage(run, floors, "lora", 192, variants, {"tuned": 4, "plain": 8})


def full(run, floors: Floors) -> None:
    """The whole language model and the bridge, 768 tokens a sample, weights and moments in bfloat16."""
    variants = {
        "ours": {"rows": 8, "profile": True}, "ours, 8 blocks again": {"rows": 8, "recompute": 8},
        "ours, flash attention": {"rows": 8, "attention": "flash"},
    }  # fmt: skip
    _stage(run, floors, "full", 192, variants, {"tuned": 8, "plain": 8})


def small(run, floors: Floors) -> None:
    """The 222M class, everything learns, float32 weights and bfloat16 products, 256 rows of 128 tokens."""
    bridge = partial(ShuffleProjection, 768, 576, factor=2)
    work = partial(measured, SMALL_222M, "all", 256, 79, floors, bridge=bridge, dtype=torch.float32)
    run.try_("ours", partial(work, profile=True), always=True)
    run.try_("ours, flash attention", partial(work, attention="flash"))
    run.try_("ours, every position", partial(work, answers_only=False))
    run.try_("ours, not compiled", partial(work, compiled=False))


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
        batches.append(Batch(ids.to(DEVICE), labels.to(DEVICE), pixels.to(DEVICE)))
    return batches


def _packed(config: LlavaConfig, documents: list, length: int, rows: int) -> list[Batch]:
    whole = pack(documents, length, pad_id=0, image_id=config.image_id, visual_tokens=config.visual_tokens)
    batches, fill = [], {"ids": 0, "labels": -100, "positions": 0, "documents": -1}
    for at in range(0, len(whole.ids), rows):
        cut = slice(at, at + rows)
        images = int((whole.ids[cut] == config.image_id).sum()) // config.visual_tokens
        pixels = torch.randn(images, 3, *config.vision.image_hw, dtype=torch.bfloat16).to(DEVICE)
        tensors = {}
        for name, value in fill.items():  # the last batch may lack rows: empty ones, so that all have one shape
            part = getattr(whole, name)[cut]
            tensors[name] = torch.cat([part, part.new_full((rows - len(part), length), value)]).to(DEVICE)
        batches.append(Batch(**tensors, pixels=pixels))
    return batches


def _epoch(model: Llava, batches: list[Batch], samples: int, **options) -> dict:
    fast.prepare(model, options=Options(dtype=torch.bfloat16, compiled=DEVICE == "cuda", **options))
    optimizer = optimizer_for(model, "lora")
    steps = [_step(model, batch, optimizer, fast.loss) for batch in batches]
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
        on, _ = finetune_peers.trainer(LLAVA_7B, "lora", checkpointing=not compiled, compiled=compiled, dynamic=True)
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
    _ratio(run)


def curve(run, floors: Floors) -> None:
    """Fifty steps of a model of 0.1 billion weights, plain and quick, same data and start: both losses."""

    def losses(mode: str, quick: bool) -> list[float]:
        model = learner(CURVE, mode, rank=min(RANK, 32))
        if quick:
            fast.prepare(model, options=Options(dtype=torch.bfloat16, compiled=DEVICE == "cuda"))
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = RoundingAdamW(learning, lr=3e-4) if mode == "full" else torch.optim.AdamW(learning, lr=3e-4)
        if quick and mode == "full":
            optimizer.in_backward()
        found = []
        for number in range(STEPS):
            batch = one_batch(CURVE, 8, 64, seed=number % 5)
            found.append(_step(model, batch, optimizer, fast.loss if quick else plain_loss)())
        return torch.stack(found).tolist()

    def both(mode: str) -> dict:
        plain, ours = losses(mode, False), losses(mode, True)
        apart = [abs(a - b) for a, b in zip(plain, ours, strict=True)]
        return {"first": ours[0], "last": ours[-1], "plain_last": plain[-1], "most_apart": max(apart), "ours": ours,
                "plain": plain}  # fmt: skip

    for mode in ("projector", "lora", "full"):
        run.try_(mode, partial(both, mode), always=True)


def two_gpus(run, floors: Floors) -> None:
    """The same command on one GPU and on two: samples/s of LoRA and of full tuning."""
    import json
    import subprocess
    import sys

    for mode in ("lora", "full"):
        found = {}
        for count in (1, 2):

            def work(count: int = count, mode: str = mode) -> dict:
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
                command += ["-m", "benchmarks.finetune_spread", mode]
                done = subprocess.run(command, capture_output=True, text=True, timeout=240)
                lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
                if not lines:
                    raise RuntimeError(done.stderr[-600:])
                return json.loads(lines[-1])

            found[count] = run.try_(f"{mode}, {count} GPUs", work)
        if all(found.get(count) for count in (1, 2)):
            print(f"two-gpus   {mode}: {found[2]['samples_per_s'] / found[1]['samples_per_s']:.2f} times one GPU")
