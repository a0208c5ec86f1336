"""What learns: LoRA added, the rest frozen, each in its precision, and the optimizer that moves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..llava import Llava
from ..training import Stage, freeze_all_but, parameter_groups
from .fast_optimizer import RoundingAdamW
from .lora import add_lora, lora_layers, lora_state
from .plan import FinetunePlan


def place(model: Llava, plan: FinetunePlan, device: torch.device, *, divided: bool) -> Stage:
    """Move the model to its device and precision, add LoRA if the plan says so and freeze what does not learn.

    Weights that will be divided among processes stay in float32: there is room, and no small step is rounded away.
    """
    low = plan.dtype == "bfloat16" and not divided
    model.to(device, torch.bfloat16 if low else torch.float32)
    trains: tuple[str, ...] = ("bridge.", "decoder.") if plan.mode == "full" else ("bridge.",)
    ranks = {layer.lora_a.shape[0] for _, layer in lora_layers(model)}
    if ranks - ({plan.lora_rank} if plan.mode == "lora" else set()):
        asked = f"LoRA of rank {plan.lora_rank}" if plan.mode == "lora" else f"mode {plan.mode!r}"
        raise ValueError(f"the model has LoRA of rank {max(ranks)}, but the plan asks for {asked}: merge_lora first")
    if plan.mode == "lora":
        if not ranks:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(plan.seed)
                add_lora(model, rank=plan.lora_rank, alpha=plan.lora_alpha, dropout=plan.lora_dropout)
        trains += tuple(name for name in lora_state(model) if not name.endswith(".scale"))
    freeze_all_but(model, trains)
    if low and plan.mode != "full":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return plan.stage(trains)


def optimizer(model: Llava, plan: FinetunePlan, stage: Stage, *, divided: bool) -> torch.optim.Optimizer:
    """AdamW; one that rounds stochastically where the weights that learn are kept in bfloat16 alone."""
    groups = parameter_groups(model, stage)
    if plan.dtype == "bfloat16" and plan.mode == "full" and not divided:
        return RoundingAdamW(groups, betas=plan.betas, seed=plan.seed)
    return torch.optim.AdamW(groups, betas=plan.betas, fused=True)


def may_step_inside_backward(optimizer: torch.optim.Optimizer, plan: FinetunePlan, *, processes: int) -> bool:
    """Whether each parameter's step can be taken as soon as its gradient is there.

    Clipping forbids it, since it needs the norm of all gradients, and so do parts that add up to a batch, be they
    computed one after the other or by several processes.
    """
    whole = plan.micro_batch is not None and plan.micro_batch >= plan.batch
    return isinstance(optimizer, RoundingAdamW) and plan.clip is None and whole and processes == 1


@contextmanager
def stepping(optimizer: torch.optim.Optimizer, *, inside: bool) -> Iterator[None]:
    """A context in which the optimizer takes its steps inside the backward pass, if `inside`; none stays behind."""
    if inside:
        optimizer.in_backward()
    try:
        yield
    finally:
        if inside:
            for hook in optimizer.hooks:
                hook.remove()
            optimizer.hooks.clear()
