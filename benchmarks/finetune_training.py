"""Training rows of benchmarks.finetune: projector, lora, full (7B), small (222M), curve, two-gpus."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch

from benchmarks import finetune_models, finetune_peers
from benchmarks.finetune_models import CURVE, DEVICE, SMALL_222M, learner, one_batch, optimizer_for, wait
from vlm_course.bridges import ShuffleProjection
from vlm_course.finetune import fast
from vlm_course.finetune.collate import Batch
from vlm_course.finetune.fast import Options
from vlm_course.finetune.fast_optimizer import RoundingAdamW
from vlm_course.finetune.flops import Floors, median_seconds, step_flops
from vlm_course.finetune.losses import plain_loss
from vlm_course.llava import LLAVA_7B, Llava, LlavaConfig

STEPS = 50  # of the row `curve`


def step_of(model: Llava, batch: Batch, optimizer, loss: Callable) -> Callable[[], torch.Tensor]:
    """One optimizer step on a batch, as a function that gives its loss."""
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
        step = step_of(model, batch, optimizer_for(model, mode), fast.loss)
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
    rows.append(("all kernels", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return [[name, round(ms, 3), count] for name, ms, count in sorted(rows, key=lambda row: -row[1])[:31] if ms > 0]


def _found(rows: int, seconds: float, share: float) -> dict:
    """What a peer's step is reported by."""
    found = {"samples_per_s": rows / seconds, "of_peak": share, "ms": 1e3 * seconds, "rows": rows}
    return found | {"memory_GB": _memory()}


def _peer(config: LlavaConfig, mode: str, rows: int, words: int, floors: Floors, settings: str) -> dict:
    batch, tuned = one_batch(config, rows, words), settings == "tuned"
    on, _ = finetune_peers.trainer(config, mode, checkpointing=mode == "full" or not tuned, compiled=tuned)
    seconds = median_seconds(on(batch.ids, batch.pixels, batch.labels))
    flops = step_flops(config, mode, rows, batch.ids.shape[1])
    return _found(rows, seconds, floors.share(flops, seconds))


def _stage(run, floors: Floors, mode: str, words: int, variants: dict[str, dict], peer_rows: dict[str, int]) -> None:
    for name, settings in variants.items():
        work = partial(measured, LLAVA_7B, mode, settings.pop("rows"), words, floors, **settings)
        run.try_(name, work, always=not any("samples_per_s" in found for found in run.results.values()))
    for settings in run.peers:
        work = partial(_peer, LLAVA_7B, mode, peer_rows[settings], words, floors, settings)
        run.try_(f"transformers, {settings}", work, always=True)
    ratio(run)


def ratio(run) -> None:
    """Ours against the faster of the peers, a line."""
    ours = [r["samples_per_s"] for n, r in run.results.items() if n.startswith("ours") and "samples_per_s" in r]
    theirs = [r["samples_per_s"] for n, r in run.results.items() if n.startswith("transf") and "samples_per_s" in r]
    if ours and theirs:
        print(f"{run.name:<10} ours {max(ours):.2f} samples/s, peer {max(theirs):.2f}: {max(ours) / max(theirs):.2f}")


def projector(run, floors: Floors) -> None:
    """Stage 1: the bridge alone, 640 tokens a sample."""
    variants = {
        "ours": {"rows": 16, "profile": True}, "ours, 8 rows": {"rows": 8},
        "ours, every position": {"rows": 8, "answers_only": False},
    }  # fmt: skip
    _stage(run, floors, "projector", 64, variants, {"tuned": 8, "plain": 16})


def lora(run, floors: Floors) -> None:
    """Rank 128 on all maps of the language model, and the bridge, 768 tokens a sample."""
    variants = {
        "ours": {"rows": 16, "profile": True}, "ours, 8 rows": {"rows": 8}, "ours, 4 rows": {"rows": 4},
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
    for settings in run.peers:
        run.try_(f"transformers, {settings}", partial(_small_peer, floors, settings), always=True)
    ratio(run)


def _small_peer(floors: Floors, settings: str, rows: int = 256, words: int = 79) -> dict:
    batch = one_batch(SMALL_222M, rows, words)
    on, _ = finetune_peers.small_trainer(SMALL_222M, compiled=settings == "tuned")
    seconds = median_seconds(on(batch.ids, batch.pixels, batch.labels))
    flops = step_flops(SMALL_222M, "all", rows, batch.ids.shape[1])
    return _found(rows, seconds, floors.share(flops, seconds))


def curve(run, floors: Floors) -> None:
    """Fifty steps of a model of 0.1 billion weights, plain and quick, same data and start: both losses."""

    def losses(mode: str, quick: bool) -> list[float]:
        model = learner(CURVE, mode, rank=min(finetune_models.RANK, 32))
        if quick:
            fast.prepare(model, options=Options(dtype=torch.bfloat16, compiled=DEVICE == "cuda"))
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = RoundingAdamW(learning, lr=3e-4) if mode == "full" else torch.optim.AdamW(learning, lr=3e-4)
        if quick and mode == "full":
            optimizer.in_backward()
        found = []
        for number in range(STEPS):
            batch = one_batch(CURVE, 8, 64, seed=number % 5)
            found.append(step_of(model, batch, optimizer, fast.loss if quick else plain_loss)())
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
