"""Triton kernels between the matrix products of a prefill, one for each step that torch would take in several.

`prefill` has the same in plain torch for other devices. All arithmetic in float32, results in the input's dtype.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x_ptr, g_ptr, y_ptr, eps, D: tl.constexpr, DP: tl.constexpr):
    """x [T, D] -> y [T, D], a program for each row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DP)
    inside = column < D
    x = tl.load(x_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    normed = (x * scale).to(y_ptr.dtype.element_ty)
    y = tl.load(g_ptr + column, mask=inside, other=0.0) * normed
    tl.store(y_ptr + row * D + column, y, mask=inside)


@triton.jit
def rope_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, capacity, tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """qkv [T, (H + 2 H_kv) d] -> q [H, T, d] turned; keys (turned) and values into places 0..T of the caches
    [H_kv, capacity, d]. Program (token, heads)."""
    token = tl.program_id(0)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, HALF_P)
    all_heads: tl.constexpr = HEADS + 2 * KV_HEADS
    inside = (head < all_heads)[:, None] & (column < HALF)[None, :]
    place = (token.to(tl.int64) * all_heads + head)[:, None] * 2 * HALF + column[None, :]
    a = tl.load(qkv_ptr + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(qkv_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + column, mask=column < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + column, mask=column < HALF, other=0.0)
    turns = (head < HEADS + KV_HEADS)[:, None]
    first = tl.where(turns, a * cos[None, :] - b * sin[None, :], a).to(qkv_ptr.dtype.element_ty)
    second = tl.where(turns, b * cos[None, :] + a * sin[None, :], b).to(qkv_ptr.dtype.element_ty)
    is_q = (head < HEADS)[:, None] & inside
    to_q = (head.to(tl.int64) * tokens + token)[:, None] * 2 * HALF + column[None, :]
    tl.store(q_ptr + to_q, first, mask=is_q)
    tl.store(q_ptr + to_q + HALF, second, mask=is_q)
    is_k = ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None] & inside
    to_k = ((head - HEADS).to(tl.int64) * capacity + token)[:, None] * 2 * HALF + column[None, :]
    tl.store(k_ptr + to_k, first, mask=is_k)
    tl.store(k_ptr + to_k + HALF, second, mask=is_k)
    is_v = (head >= HEADS + KV_HEADS)[:, None] & inside
    to_v = ((head - HEADS - KV_HEADS).to(tl.int64) * capacity + token)[:, None] * 2 * HALF + column[None, :]
    tl.store(v_ptr + to_v, first, mask=is_v)
    tl.store(v_ptr + to_v + HALF, second, mask=is_v)


@triton.jit
def silu_mul_kernel(gate_up_ptr, y_ptr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """[T, 2 F], gate before up -> silu(gate) * up, [T, F]. Program (token, part of the row)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    gate = tl.load(gate_up_ptr + row * 2 * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * HIDDEN + HIDDEN + column, mask=inside, other=0.0)
    silu = (gate * tl.sigmoid(gate)).to(up.dtype)
    tl.store(y_ptr + row * HIDDEN + column, silu * up, mask=inside)


@triton.jit
def quick_gelu_kernel(x_ptr, total, BLOCK: tl.constexpr):
    """x * sigmoid(1.702 x), in place."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < total, other=0.0).to(tl.float32)
    tl.store(x_ptr + place, (x * tl.sigmoid(1.702 * x)).to(x_ptr.dtype.element_ty), mask=place < total)
