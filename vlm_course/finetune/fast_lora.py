"""Adapters of several maps with one input (query, key and value; gate and up) in few products.

x A^T of all adapters is one product, x W^T of all frozen weights another, and each (x A^T) B^T is added into its part
of the result by the product itself, so that no sum is a pass over memory of its own. The backward pass does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _columns(parts: list[int], rank: int) -> list[tuple[slice, slice]]:
    """For every map its columns of the result and its columns of x A^T."""
    places, start = [], 0
    for number, size in enumerate(parts):
        places.append((slice(start, start + size), slice(number * rank, (number + 1) * rank)))
        start += size
    return places


@torch.library.custom_op("vlm_course::lora_group", mutates_args=())
def lora_group(
    x: Tensor, dropped: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, parts: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """x W^T + scale * (dropped A_i^T) B_i^T in the columns of map i, and dropped A^T for the backward pass.

    x, dropped [M, K], None for x itself; weight [N, K]; a [G * r, K]; b [N, r], its rows those of the maps one behind
    the other; parts, the G row counts that sum to N -> [M, N] and [M, G * r].
    """
    inner = (x if dropped is None else dropped) @ a.T  # [M, G * r]
    out = x @ weight.T  # [M, N]
    for wide, thin in _columns(parts, b.shape[1]):
        out[:, wide].addmm_(inner[:, thin], b[wide].T, alpha=scale)
    return out, inner


@lora_group.register_fake
def _(x, dropped, weight, a, b, parts, scale):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("vlm_course::lora_group_backward", mutates_args=())
def lora_group_backward(
    grad: Tensor, dropped: Tensor, weight: Tensor, a: Tensor, b: Tensor, inner: Tensor, parts: list[int], scale: float,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dropped, a and b. `shared`: x and dropped are one tensor, whose whole gradient is then x's."""
    back = torch.empty_like(inner)  # [M, G * r], of dropped A^T
    grad_b = torch.empty_like(b)
    for wide, thin in _columns(parts, b.shape[1]):
        torch.addmm(back[:, thin], grad[:, wide], b[wide], beta=0, alpha=scale, out=back[:, thin])
        torch.addmm(grad_b[wide], grad[:, wide].T, inner[:, thin], beta=0, alpha=scale, out=grad_b[wide])
    grad_x = grad @ weight  # [M, K]
    if shared:
        grad_x.addmm_(back, a)
        grad_dropped = grad_x.new_empty(0)
    else:
        grad_dropped = back @ a
    return grad_x, grad_dropped, back.T @ dropped, grad_b


@lora_group_backward.register_fake
def _(grad, dropped, weight, a, b, inner, parts, scale, shared):
    second = grad.new_empty(0) if shared else torch.empty_like(dropped)
    return torch.empty_like(dropped), second, torch.empty_like(a), torch.empty_like(b)


def _keep(ctx, inputs, output):
    x, dropped, weight, a, b, parts, scale = inputs
    ctx.save_for_backward(x if dropped is None else dropped, weight, a, b, output[1])
    ctx.parts, ctx.scale, ctx.shared = parts, scale, dropped is None


def _backward(ctx, grad, _):
    dropped, weight, a, b, inner = ctx.saved_tensors
    grad_x, grad_dropped, grad_a, grad_b = lora_group_backward(
        grad.contiguous(), dropped, weight, a, b, inner, ctx.parts, ctx.scale, ctx.shared
    )
    return grad_x, None if ctx.shared else grad_dropped, None, grad_a, grad_b, None, None


lora_group.register_autograd(_backward, setup_context=_keep)
