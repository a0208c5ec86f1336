"""`fast_optimizer.plain_update` as one Triton kernel: weight, gradient and both moments pass through memory once."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_course.finetune.fast_optimizer import _mixed


@triton.jit
def _noise(place, mixed):
    x = (place.to(tl.uint32)) ^ mixed.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _rounded(value, bits):
    """float32 -> the bfloat16 above or below, as a float32 that has no more bits."""
    whole = value.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)
    return (whole & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["mixed1", "mixed2"])
def adamw_kernel(
    w_ptr, g_ptr, m_ptr, v_ptr, total, keep, rate, beta1, beta2, root, eps, mixed1, mixed2,
    ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """keep = 1 - lr * decay; rate = lr / (1 - beta1^t); root = 1 / sqrt(1 - beta2^t)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    g = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
    m = beta1 * tl.load(m_ptr + place, mask=inside, other=0.0).to(tl.float32) + (1 - beta1) * g
    v = beta2 * tl.load(v_ptr + place, mask=inside, other=0.0).to(tl.float32) + (1 - beta2) * g * g
    w = tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)
    w = w * keep - rate * m / (tl.sqrt(v) * root + eps)
    if ROUND:
        bits = _noise(place, mixed1)
        w = _rounded(w, bits)
        m = _rounded(m, bits >> 16)
        v = _rounded(v, _noise(place, mixed2))
    tl.store(w_ptr + place, w.to(w_ptr.dtype.element_ty), mask=inside)
    tl.store(m_ptr + place, m.to(m_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + place, v.to(v_ptr.dtype.element_ty), mask=inside)


def update(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, *, lr: float, betas: tuple[float, float], eps: float,
    decay: float, step: int, seed: int,
) -> None:  # fmt: skip
    """See `fast_optimizer.plain_update`."""
    total, block = weight.numel(), 2048
    if not (weight.is_contiguous() and first.is_contiguous() and second.is_contiguous()):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has strides {weight.stride()}, expected contiguous")
    adamw_kernel[(-(-total // block),)](
        weight, grad.contiguous(), first, second, total, 1 - lr * decay, lr / (1 - betas[0] ** step),
        betas[0], betas[1], 1 / math.sqrt(1 - betas[1] ** step), eps,
        _mixed(seed), _mixed(seed + 1), ROUND=weight.dtype == torch.bfloat16, BLOCK=block, num_warps=8,
    )  # fmt: skip
