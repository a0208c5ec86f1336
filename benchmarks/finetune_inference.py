"""Rows `decode` and `prefill` of benchmarks.finetune: LLaVA-1.5 7B, one image and 50 words, one GPU."""

from __future__ import annotations

import time

import torch

from benchmarks import finetune_peers
from benchmarks.finetune_models import build, prompt, wait
from vlm_course.finetune.fast_generation import FastGenerator, milliseconds
from vlm_course.finetune.flops import Floors, decoder_weights, median_seconds
from vlm_course.finetune.prefill import capture, tower_features
from vlm_course.llava import LLAVA_7B, Llava


@torch.no_grad()
def _regret(model: Llava, ids, pixels, new: torch.Tensor) -> dict:
    """How far below the plain model's best logit the chosen tokens are, in one pass over prompt and answer."""
    whole = torch.cat([ids, new], dim=1)
    logits = model(whole, pixels, logits_to_keep=new.shape[1] + 1)[:, :-1].float()  # [1, n, V]
    logits[..., model.config.image_id] = -torch.inf
    gap = logits.max(dim=-1).values - logits.gather(2, new[..., None])[..., 0]
    spread = logits[0, 0][logits[0, 0].isfinite()].std().item()
    return {"worst_regret": gap.max().item(), "logit_std": spread, "equal": int((gap == 0).sum()), "of": new.shape[1]}


def _measured(model: Llava, ids, pixels, floors: Floors, **options) -> dict:
    wait()
    start = time.perf_counter()
    fast = FastGenerator(model, capacity=1024, **options)
    first = fast.generate(ids, pixels, max_new_tokens=20)
    wait()
    warm_up = time.perf_counter() - start
    long, short = (
        median_seconds(lambda n=n: fast.generate(ids, pixels, max_new_tokens=n), runs=3, warm_up=1) for n in (100, 20)
    )
    token, text = (long - short) / 80, model.config.text
    prefill = median_seconds(lambda: fast.prefill(ids[0], pixels, None))
    found = {
        "decode_ms": 1e3 * token, "of_floor": token / floors.decode_seconds(text), "warm_up_s": warm_up,
        "prefill_ms": 1e3 * prefill, "prefill_of_floor": prefill / floors.prefill_seconds(text, ids.shape[1]),
        **_regret(model, ids, pixels, first),
        "block_sizes": {k: list(v) for k, v in getattr(fast.step, "block_sizes", {}).items()},
    }  # fmt: skip
    if fast.times:
        found["kernel_ms"] = fast.times
    return found


def _cublas(model: Llava, floors: Floors) -> dict:
    """The products of a step alone, as torch does them: all layers' matrices, each times a vector."""
    from vlm_course.finetune.decode_plain import block_weights

    found = {}
    blocks = block_weights(model.decoder)
    for name in ("qkv", "out", "gate_up", "down"):
        matrices = [getattr(w, name) for w in blocks]
        x = torch.randn(matrices[0].shape[1], device="cuda", dtype=matrices[0].dtype)
        for way, product in (("mv", torch.mv), ("mm", lambda w, x: x[None] @ w.T)):
            ms = milliseconds(lambda p=product, m=matrices, x=x: [p(w, x) for w in m])
            size = sum(w.numel() * w.element_size() for w in matrices)
            found[f"{name}_{way}_ms"] = ms
            found[f"{name}_{way}_of_copy"] = size / ms * 1e3 / floors.bandwidth
    return found


def _decode_ours(run, floors: Floors, ids, pixels) -> None:
    model = build(LLAVA_7B).eval()
    run.try_("ours", lambda: _measured(model, ids, pixels, floors), always=True)
    run.try_("ours, no early start", lambda: _measured(model, ids, pixels, floors, pdl=False))
    run.try_("products by cuBLAS", lambda: _cublas(model, floors))
    run.try_("ours, tuned here", lambda: _measured(model, ids, pixels, floors, tune=True))


def decode(run, floors: Floors) -> None:
    """A further token after 626 tokens, batch 1."""
    ids, pixels = prompt(LLAVA_7B)
    _decode_ours(run, floors, ids, pixels)
    for settings in run.peers:
        run.try_(f"transformers, {settings}", lambda s=settings: _peer(ids, pixels, floors, s), always=True)
    ours = run.results.get("ours", {})
    if "decode_ms" in ours:
        floor = 1e3 * floors.decode_seconds(LLAVA_7B.text)
        print(f"decode     {ours['decode_ms']:.2f} ms a token, {ours['of_floor']:.3f} of the floor of {floor:.2f} ms")


def _peer(ids, pixels, floors: Floors, settings: str) -> dict:
    found = finetune_peers.decode(LLAVA_7B, ids, pixels, settings, median_seconds)
    return found | {"of_floor": found["decode_ms"] / 1e3 / floors.decode_seconds(LLAVA_7B.text)}


def _prefill_peer(ids, pixels, floors: Floors) -> dict:
    found = finetune_peers.prefill(LLAVA_7B, ids, pixels, median_seconds)
    return found | {"of_floor": found["prefill_ms"] / 1e3 / floors.prefill_seconds(LLAVA_7B.text, ids.shape[1])}


@torch.no_grad()
def _parts(model: Llava, ids, pixels, floors: Floors) -> dict:
    """Where a prefill's time goes: the tower, and each product at this many tokens, in share of the matrix peak."""
    from vlm_course.finetune.decode_plain import block_weights
    from vlm_course.finetune.prefill import TritonOps

    tower = capture(lambda: model.bridge(tower_features(model.vision, pixels, -2, TritonOps()))).replay
    found = {"tower_and_bridge_ms": 1e3 * median_seconds(tower)}
    T, blocks = ids.shape[1], block_weights(model.decoder)
    for name in ("qkv", "out", "gate_up", "down"):
        matrices = [getattr(w, name) for w in blocks]
        for tokens in (T, 640):
            x = torch.randn(tokens, matrices[0].shape[1], device="cuda", dtype=torch.bfloat16)
            ms = milliseconds(lambda m=matrices, x=x: [x @ w.T for w in m])
            found[f"{name}_{tokens}_ms"] = ms
            flops = 2 * tokens * sum(w.numel() for w in matrices)
            found[f"{name}_{tokens}_of_peak"] = flops / ms * 1e3 / floors.flops
    return found


def _prefill_ours(run, floors: Floors, ids, pixels) -> None:
    model = build(LLAVA_7B).eval()

    def timed(**options) -> dict:
        fast = FastGenerator(model, capacity=1024, **options)
        seconds = median_seconds(lambda: fast.prefill(ids[0], pixels, None))
        return {
            "prefill_ms": 1e3 * seconds, "of_floor": seconds / floors.prefill_seconds(LLAVA_7B.text, ids.shape[1]),
            "of_peak": 2 * decoder_weights(LLAVA_7B.text) * ids.shape[1] / seconds / floors.flops,
        }  # fmt: skip

    run.try_("ours", timed, always=True)
    run.try_("ours, no graph", lambda: timed(graphs=False))
    run.try_("parts", lambda: _parts(model, ids, pixels, floors))
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def cudnn() -> dict:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return timed()

    run.try_("ours, cuDNN attention", cudnn)


def prefill(run, floors: Floors) -> None:
    """Image and 50 words to the first token."""
    ids, pixels = prompt(LLAVA_7B)
    _prefill_ours(run, floors, ids, pixels)
    if run.peers:  # it has no faster setting for this
        run.try_("transformers", lambda: _prefill_peer(ids, pixels, floors), always=True)
