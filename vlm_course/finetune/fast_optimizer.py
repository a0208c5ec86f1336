"""AdamW for weights kept in bfloat16 alone, and its step inside the backward pass.

bfloat16 has 8 bits: a step of 1e-5 on a weight of 0.02 lies below half a unit in the last place (6e-5), and rounding to
the nearest would lose it every time. Stochastic rounding keeps it on average: up with the probability of the remainder.
Both moments are kept in bfloat16 in the same way. Sources: Gupta et al. 2015 (arXiv 1502.02551); Loshchilov and Hutter
2019 (AdamW, arXiv 1711.05101). With float32 weights everything is float32 and nothing is rounded.

The step of a parameter can be taken as soon as its gradient is there, so that only a block's gradients ever exist at
the same time (Lv et al. 2024, LOMO, arXiv 2306.09782). The norm of all gradients is then not known: no clipping.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def _mixed(value: int) -> int:
    """A seed's bits spread over 31, which fit a signed number of 32."""
    value = (value ^ (value >> 16)) * 0x7FEB352D & MASK
    value = (value ^ (value >> 15)) * 0x846CA68B & MASK
    return (value ^ (value >> 16)) & 0x7FFFFFFF


def noise(count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """[count] numbers of 32 bits, in int64, from their places and the seed alone. Hash: C. Wellons, "lowbias32"."""
    x = (torch.arange(count, device=device) ^ _mixed(seed)) & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def rounded(values: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bfloat16: up or down at random, by 16 random bits for each value."""
    whole = values.contiguous().view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    return (whole & -65536).view(torch.float32).to(torch.bfloat16)


def plain_update(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, *, lr: float, betas: tuple[float, float], eps: float,
    decay: float, step: int, seed: int,
) -> None:  # fmt: skip
    """One AdamW step of one parameter and its moments, in place."""
    g, m, v, w = (t.detach().float().flatten() for t in (grad, first, second, weight))
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    denominator = v.sqrt() / math.sqrt(1 - betas[1] ** step) + eps
    w = w * (1 - lr * decay) - lr / (1 - betas[0] ** step) * m / denominator
    if weight.dtype == torch.bfloat16:
        bits, more = (noise(w.numel(), seed + shift, w.device) for shift in (0, 1))
        w, m, v = rounded(w, bits), rounded(m, bits >> 16), rounded(v, more)
    for target, value in ((weight, w), (first, m), (second, v)):
        target.copy_(value.view_as(target))


def _inside(optimizer: weakref.ref, group: int, parameter: Tensor) -> None:
    """What happens when a gradient is complete. The reference is weak, so that a model and its optimizer can go."""
    own = optimizer()
    if own is not None:
        own._update(parameter, own.param_groups[group])
        parameter.grad = None


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW whose bfloat16 weights and moments are rounded stochastically. Takes what torch.optim.AdamW takes.

    in_backward(): from now on each parameter's step is taken in the backward pass, when its gradient is complete, and
    the gradient is dropped; `step()` then only counts. One backward pass a step: parts cannot be accumulated.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.seed, self.hooks = seed, []
        self.numbers = {p: n for n, p in enumerate(p for group in self.param_groups for p in group["params"])}

    def in_backward(self) -> RoundingAdamW:
        """See the class. Returns itself. The moments are allocated now, so that what is free is known."""
        self.allocate()
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                hook = partial(_inside, weakref.ref(self), number)
                self.hooks.append(parameter.register_post_accumulate_grad_hook(hook))
        return self

    def allocate(self) -> None:
        """The moments of every parameter, zero."""
        for parameter in self.numbers:
            if not self.state[parameter]:
                moments = [torch.zeros_like(parameter, memory_format=torch.contiguous_format) for _ in range(2)]
                self.state[parameter].update(step=0, exp_avg=moments[0].detach(), exp_avg_sq=moments[1].detach())

    @torch.no_grad()
    def _update(self, parameter: Tensor, group: dict) -> None:
        if not self.state[parameter]:
            self.allocate()
        state = self.state[parameter]
        state["step"] += 1
        seed = self.seed + 2 * (state["step"] * len(self.numbers) + self.numbers[parameter])
        update = plain_update
        if parameter.is_cuda:
            from vlm_course.finetune.optimizer_kernel import update
        update(
            parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], lr=float(group["lr"]),
            betas=group["betas"], eps=group["eps"], decay=group["weight_decay"], step=state["step"], seed=seed,
        )  # fmt: skip

    @torch.no_grad()
    def step(self, closure=None):
        """The step of every parameter that has a gradient; inside the backward pass it was taken already."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        if not self.hooks:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)
        return value
