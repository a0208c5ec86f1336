"""A decoder block and a vision block as functions of tensors alone, so that one compiled graph serves all layers.

`Layout` holds what is the same for all blocks; the weights come as tuples. What a map multiplies with depends on its
kind: "frozen" (W), "full" (W and the parameters that are views of it), "lora" (W, then every A, then every B).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_course.finetune.fast_lora import lora_group
from vlm_course.vit import ACTIVATIONS

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Map:
    """One product: its kind, the rows of each map in it, and the adapters' scale and dropout."""

    kind: str
    parts: tuple[int, ...]
    scale: float = 1.0
    dropout: float = 0.0


@dataclass(frozen=True)
class Layout:
    """What all blocks of a decoder share."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qkv: Map
    out: Map
    gate_up: Map
    down: Map
    training: bool = True


class FusedLinear(torch.autograd.Function):
    """x W^T for a W whose rows are several parameters: one product, and one for all their gradients."""

    @staticmethod
    def forward(ctx, x, whole, *parts):
        ctx.save_for_backward(x, whole)
        ctx.sizes = [len(part) for part in parts]
        return F.linear(x, whole.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, whole = ctx.saved_tensors
        grad_whole = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(whole.dtype)
        return grad @ whole.to(x.dtype), None, *grad_whole.split(ctx.sizes)


def product(x: Tensor, tensors: Tensors, m: Map, training: bool) -> Tensor:
    """[..., K] -> [..., sum of parts]"""
    if m.kind == "frozen":
        return F.linear(x, tensors[0].to(x.dtype))
    if m.kind == "full":
        if len(m.parts) == 1:
            return F.linear(x, tensors[1].to(x.dtype))
        return FusedLinear.apply(x, *tensors)
    count = len(m.parts)
    a = torch.cat([t.to(x.dtype) for t in tensors[1 : 1 + count]])  # [G * r, K]
    b = torch.cat([t.to(x.dtype) for t in tensors[1 + count :]])  # [N, r]
    rows = x.flatten(0, -2)
    dropped = F.dropout(rows, m.dropout) if m.dropout and training else None
    out, _ = lora_group(rows, dropped, tensors[0].to(x.dtype), a, b, list(m.parts), m.scale)
    return out.unflatten(0, x.shape[:-1])


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`decoder.RMSNorm`, for a weight that may be kept in another dtype than x."""
    scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)
    if weight.dtype == x.dtype:
        return weight * (x.float() * scale).to(x.dtype)
    return (weight * (x.float() * scale)).to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`decoder.apply_rotary`: [B, H, T, d], cos and sin broadcast to [B, H, T, d / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def varlen() -> Callable | None:
    """torch's variable-length attention, causal, for q, k, v [tokens, H, d] and cumulative lengths; None without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, longest: int) -> Tensor:
        return varlen_attn(q, k, v, lengths, lengths, longest, longest, **causal)

    return attend


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None, packed: Callable | None):
    """q [B, H, T, d], k and v [B, H_kv, S, d] -> [B, T, H * d]: causal; by the mask; or within documents by lengths."""
    grouped = q.shape[1] // k.shape[1]
    if lengths is not None:
        T = q.shape[2]
        if grouped > 1:
            k, v = k.repeat_interleave(grouped, dim=1), v.repeat_interleave(grouped, dim=1)
        flat = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # 3 x [B * T, H, d]
        return packed(*flat, lengths, T).unflatten(0, (-1, T)).flatten(2)
    read = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=grouped > 1
    )
    return read.transpose(1, 2).flatten(2)


@cache  # one function for a layout, so that it is compiled once
def decoder_block(layout: Layout) -> Callable[..., Tensor]:
    """forward(x [B, T, D], cos, sin, mask, lengths, weights) -> [B, T, D], the same as `DecoderBlock`'s.

    mask: None for causal. lengths: cumulative lengths of the documents in all rows, for packed rows instead of a mask.
    rows [B, S]: only these positions go on (they still see all keys); then mask [B, 1, S, T] is theirs -> [B, S, D].
    """
    heads, kv_heads, d, eps = layout.heads, layout.kv_heads, layout.head_dim, layout.eps
    training, packed = layout.training, varlen()

    def forward(
        x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, lengths: Tensor | None,
        weights: tuple[Tensor, Tensors, Tensors, Tensor, Tensors, Tensors], rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        norm1, qkv, out, norm2, gate_up, down = weights
        projected = product(norm(x, norm1, eps), qkv, layout.qkv, training).unflatten(-1, (-1, d)).transpose(1, 2)
        q, k, v = projected.split([heads, kv_heads, kv_heads], dim=1)  # [B, H, T, d]
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        if rows is not None:
            x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))  # [B, S, D]
            q = q.gather(2, rows[:, None, :, None].expand(-1, heads, -1, d))  # [B, H, S, d]
        x = x + product(attend(q, k, v, mask, lengths, packed), out, layout.out, training)
        gate, up = product(norm(x, norm2, eps), gate_up, layout.gate_up, training).chunk(2, dim=-1)
        return x + product(F.silu(gate) * up, down, layout.down, training)

    return forward


@cache
def vision_block(heads: int, eps: float, activation: str) -> Callable[[Tensor, Tensors], Tensor]:
    """forward(x [n, T, D], weights) -> [n, T, D], the same as `vit.TransformerBlock`'s."""
    act = ACTIVATIONS[activation]
    if activation == "quick_gelu":
        act = _quick_gelu

    def forward(x: Tensor, weights: Tensors) -> Tensor:
        g1, b1, qkv_w, qkv_b, out_w, out_b, g2, b2, w1, c1, w2, c2 = (w.to(x.dtype) for w in weights)
        n, T, D = x.shape
        h = F.layer_norm(x, (D,), g1, b1, eps)
        q, k, v = F.linear(h, qkv_w, qkv_b).view(n, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, T, D)
        x = x + F.linear(read, out_w, out_b)
        h = F.linear(F.layer_norm(x, (D,), g2, b2, eps), w1, c1)
        return x + F.linear(act(h), w2, c2)

    return forward


def _quick_gelu(x: Tensor) -> Tensor:
    """`vit.quick_gelu` without its step in place, which a compiler cannot fuse any better and autograd must copy."""
    return x * torch.sigmoid(1.702 * x)
