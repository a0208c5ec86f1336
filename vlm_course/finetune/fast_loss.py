"""Cross-entropy straight from hidden states: a part of the logits at a time, and never all of them.

The logits of 8 x 768 positions and 32,064 words are 0.8 GB in float32, with their gradient twice that. The gradient
with respect to the logits is softmax minus one-hot, so it is made from each part at once and multiplied back; what the
backward pass then does is scale. Sources: Milakov and Gimelshein 2018 (arXiv 1805.02867) for the softmax in parts; Hsu
et al. 2024 (Liger Kernel, arXiv 2410.10989), section 3.2, for gradients in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

IGNORE = -100
PART = 1 << 28  # logits of one part, at most: 1 GB in float32


def loss_and_slope(logits: Tensor, targets: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, V], targets [n] -> the sum of -log p / count, and its gradient with respect to the logits [n, V]."""
    learned = targets != IGNORE
    word = targets.clamp(min=0)
    values = logits.float()
    log_sum = values.logsumexp(dim=-1)  # [n]
    own = values.gather(1, word[:, None])[:, 0]
    loss = torch.where(learned, log_sum - own, 0.0).sum() / count
    weight = torch.where(learned, 1.0 / count, 0.0)[:, None]
    is_own = torch.arange(logits.shape[1], device=logits.device) == word[:, None]
    slope = ((values - log_sum[:, None]).exp() - is_own.float()) * weight
    return loss, slope.to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, count, part, step):
        matrix = weight.to(hidden.dtype)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        learns, grad_weight = ctx.needs_input_grad[1], None
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        for start in range(0, len(hidden), part):
            rows = slice(start, start + part)
            loss, slope = step(hidden[rows] @ matrix.T, targets[rows], count)  # [n, V]
            total += loss
            if slopes is not None:
                torch.mm(slope, matrix, out=slopes[rows])
            if learns:
                piece = slope.T @ hidden[rows]  # [V, D]
                if len(hidden) <= part:
                    grad_weight = piece
                else:  # parts are added up in float32
                    grad_weight = piece.float() if grad_weight is None else grad_weight.add_(piece)
        ctx.save_for_backward(slopes, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        slopes, grad_weight = ctx.saved_tensors
        slopes = None if slopes is None else slopes * grad.to(slopes.dtype)
        grad_weight = None if grad_weight is None else grad_weight * grad.to(grad_weight.dtype)
        return slopes, grad_weight, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    count: Tensor | float,
    *,
    part: int | None = None,
    step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = loss_and_slope,
) -> Tensor:
    """hidden [n, D], weight [V, D], targets [n] with -100 for rows that do not count -> sum of -log p / count.

    part: rows whose logits exist at the same time, by default what 1 GB of float32 holds. step: `loss_and_slope`, or
    that function compiled. Equals `loss.response_loss` of the shifted rows, value and gradients, within rounding.
    Raises ValueError when rows and targets differ in number.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and targets {tuple(targets.shape)}, expected [n, D] and [n]: "
            "shift and flatten both"
        )
    if not isinstance(count, Tensor):  # `torch.full` writes on the device; a copy from here would wait for it
        count = torch.full((), count, dtype=torch.float32, device=hidden.device)
    if part is None:  # parts of one size, as few as fit
        parts = -(-len(hidden) * len(weight) // PART)
        part = -(-len(hidden) // max(1, parts))
    return _LinearCrossEntropy.apply(hidden, weight, targets, count, part, step)
