"""Training: what learns in a stage, how the learning rate moves, and a loop that can stop anywhere and go on.

A stage is one objective over one set of parts. LLaVA has two: align (only the bridge learns, on captions) and instruct
(the bridge and the language model learn, on conversations); the vision tower is frozen in both. Source: LLaVA-1.5
(Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning"), section 3 and table 9.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .loss import response_loss
from .validation import checks, counts, require_count, require_number, require_same_device, require_shape


@dataclass(frozen=True)
class Stage:
    """One stage of a training.

    Attributes:
        name: of the stage, and of its checkpoint file.
        trains: prefixes of the parameter names that learn; everything else is frozen.
        steps, batch: optimizer steps and images a step.
        lr: greatest learning rate; `lrs` overrides it by prefix.
        warmup: share of the steps in which the rate rises from zero; afterwards a cosine falls to `final` of the peak.
    """

    name: str
    trains: tuple[str, ...]
    steps: int
    batch: int
    lr: float
    lrs: tuple[tuple[str, float], ...] = ()
    weight_decay: float = 0.05
    warmup: float = 0.03
    final: float = 0.02
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not self.trains:
            raise ValueError(f"{self.name}: trains names 0 parts, expected at least 1")
        require_count(self.steps, "steps")
        require_count(self.batch, "batch")
        for prefix, rate in (("lr", self.lr), *self.lrs):
            require_number(rate, f"the rate of {prefix}" if prefix != "lr" else "lr", above=0)
        require_number(self.weight_decay, "weight_decay", low=0)
        require_number(self.warmup, "warmup", 0, 1)
        require_number(self.final, "final", 0, 1)
        require_number(self.clip, "clip", above=0)


# The two stages of LLaVA-1.5 (table 9 of its paper and the released scripts), for `Llava` of any size: 558,128 captions
# and 665,298 conversations, each seen once. `Stage` counts optimizer steps; the cosine ends at zero.
LLAVA_15_STAGES = (
    Stage("align", trains=("bridge.",), steps=2181, batch=256, lr=1e-3, weight_decay=0.0, final=0.0),
    Stage("instruct", trains=("bridge.", "decoder."), steps=5198, batch=128, lr=2e-5, weight_decay=0.0, final=0.0),
)


class Paused(Exception):
    """The time limit came first; the checkpoint is written, the same call goes on from there."""


def _check_rate(step: int, *, steps: int, peak: float, warmup: float = 0.03, final: float = 0.02) -> None:
    if step >= steps:
        raise ValueError(f"step is {step}, but the stage has {steps} steps, numbered from 0")
    require_number(peak, "peak", low=0)
    require_number(warmup, "warmup", 0, 1)
    require_number(final, "final", 0, 1)


@counts(step=0, steps=1)
@checks(_check_rate)
def learning_rate(step: int, *, steps: int, peak: float, warmup: float = 0.03, final: float = 0.02) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `final * peak`, at optimizer step 0..steps-1."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    progress = (step - rise) / max(1, steps - 1 - rise)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def freeze_all_but(model: nn.Module, trains: Iterable[str]) -> list[str]:
    """Let exactly the parameters learn whose names start with one of `trains`; frozen modules go to eval mode.

    Returns:
        the names of the parameters that learn.

    Raises:
        ValueError: a prefix fits no parameter of the model.
    """
    trains = tuple(trains)
    names = [name for name, _ in model.named_parameters()]
    for prefix in trains:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(
                f"no parameter starts with {prefix!r}; the model's parts are {sorted({n.split('.')[0] for n in names})}"
            )
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trains))
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(p.requires_grad for p in own):
            module.eval()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _check_learning(model: nn.Module, stage: Stage) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("0 parameters of the model learn, expected at least 1: call freeze_all_but first")


@checks(_check_learning)
def parameter_groups(model: nn.Module, stage: Stage) -> list[dict]:
    """Optimizer groups of the parameters that learn: one for each rate, with and without weight decay.

    Vectors (biases, norms, the class token) are not decayed; matrices are.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = next((rate for prefix, rate in stage.lrs if name.startswith(prefix)), stage.lr)
            decay = stage.weight_decay if parameter.dim() >= 2 else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    return [{"params": ps, "peak": lr, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]


def _check_micro(batch: dict[str, Tensor], size: int) -> None:
    lengths = {name: len(value) for name, value in batch.items()}
    if not lengths or len(set(lengths.values())) > 1 or min(lengths.values()) < 1:
        raise ValueError(f"the batch has rows {lengths}, expected the same number, at least 1, under every name")
    require_same_device(**batch)


@counts(size=1)
@checks(_check_micro)
def micro_batches(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """A batch in parts of at most `size` rows: each tensor [B, ...] is cut along its first axis."""
    rows = len(next(iter(batch.values())))
    return [{name: value[at : at + size] for name, value in batch.items()} for at in range(0, rows, size)]


def _check_parts(parts: Sequence[dict[str, Tensor]], forward: Callable, *, ignore: int = -100) -> None:
    if len(parts) < 1:
        raise ValueError("there are 0 parts to accumulate over, expected at least 1")
    for number, part in enumerate(parts):
        if "labels" not in part:
            raise ValueError(f"part {number} holds {sorted(part)}, expected labels among them")
        require_shape(part["labels"], f"the labels of part {number}", "B T", floating=False)
        require_same_device(first=parts[0]["labels"], **{f"part_{number}": part["labels"]})


@checks(_check_parts)
def accumulated(
    parts: Sequence[dict[str, Tensor]], forward: Callable[[dict[str, Tensor]], Tensor], *, ignore: int = -100
) -> Iterator[Tensor]:
    """The losses of micro-batches that add up to the mean over all response tokens of the batch.

    Averaging the parts' own means instead would weigh a token by how few others share its part, so that the same
    batch, cut otherwise, would teach something else. Return this from `loss_at`: `fit` goes backward through each
    part before the next is computed, which is what saves the memory.

    Args:
        parts: from `micro_batches`; each holds "labels" [b, T], unshifted, `ignore` outside the responses.
        forward: a part -> logits [b, T, V].

    Raises:
        ValueError: no part, or (looked for on the CPU only, where it costs no waiting) no response token in any.
    """
    count = sum((part["labels"][:, 1:] != ignore).sum() for part in parts)  # of the whole batch; stays on the device
    if count.device.type == "cpu" and not count:
        raise ValueError(f"all labels of {len(parts)} parts are {ignore}: 0 response tokens, expected at least 1")
    return (response_loss(forward(part), part["labels"], ignore, count) for part in parts)


def _backward(losses: Tensor | Iterable[Tensor], context: Callable) -> Tensor:
    """Backward through one loss, or through parts as they are computed; returns their sum, without a graph."""
    parts, total = iter([losses] if isinstance(losses, Tensor) else losses), None
    while True:
        with context():
            part = next(parts, None)
        if part is None:
            if total is None:
                raise ValueError("loss_at gave 0 losses, expected a tensor or at least 1 part")
            return total
        part.backward()
        total = part.detach() if total is None else total + part.detach()


def save_atomically(state: object, path: Path) -> None:
    """torch.save that never leaves half a file: written beside the target, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(path.suffix + ".part")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _check_same_plan(stored: dict, asked: dict, checkpoint: Path) -> None:
    different = [
        f"{key} {stored.get(key)} there, {value} here" for key, value in asked.items() if stored.get(key) != value
    ]
    if different:
        raise ValueError(
            f"the checkpoint {checkpoint} is of another plan: {'; '.join(different)}. Give another folder, or delete it"
        )


def fit(
    model: nn.Module,
    stage: Stage,
    loss_at: Callable[[int], Tensor | Iterable[Tensor]],
    *,
    checkpoint: Path,
    autocast: torch.dtype | None = None,
    deadline: float | None = None,
    save_every: float = 60.0,
    log: Callable[[str], None] = print,
) -> None:
    """Train one stage from its checkpoint, or from the start where there is none.

    Args:
        loss_at: the loss of optimizer step s, or the losses of its micro-batches (`accumulated`), which add up to it;
            it must draw its data from s alone, so that a resumed run sees the same.
        checkpoint: file with weights, optimizer, step and torch's random state (for dropout), replaced atomically
            every `save_every` seconds and at the end.
        autocast: e.g. torch.bfloat16 on a GPU; weights and optimizer stay in float32.
        deadline: time.monotonic() after which the stage is saved and `Paused` is raised.

    Raises:
        Paused: see `deadline`.
        ValueError: the checkpoint belongs to another plan (other steps, batch, rates), so going on would mix two runs.
        FloatingPointError: the loss is no longer finite.
    """
    freeze_all_but(model, stage.trains)
    device = next(model.parameters()).device
    groups = parameter_groups(model, stage)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=device.type == "cuda")
    learning = [p for group in groups for p in group["params"]]
    start, plan = 0, asdict(stage)
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        _check_same_plan(state.get("stage", {}), plan, checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        _set_random_state(state.get("random", {}), device)

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "stage": plan}
        state["random"] = _random_state(device)
        save_atomically(state, checkpoint)

    def context():
        return torch.autocast(device.type, dtype=autocast) if autocast else nullcontext()

    began = saved = time.monotonic()
    every = max(1, stage.steps // 10)
    for step in range(start, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, steps=stage.steps, peak=group["peak"], warmup=stage.warmup, final=stage.final
            )
        with context():
            losses = loss_at(step)
        loss = _backward(losses, context)
        torch.nn.utils.clip_grad_norm_(learning, stage.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % every == 0 or step + 1 == stage.steps:
            value, now = loss.item(), time.monotonic()
            if not math.isfinite(value):
                raise FloatingPointError(f"{stage.name}: the loss is {value} at step {step + 1}; try a lower rate")
            speed = (step + 1 - start) * stage.batch / (now - began)
            log(
                f"{stage.name:<12} step {step + 1:>6}/{stage.steps}  loss {value:.4f}  {speed:,.0f} images/s  "
                f"{now - began:.0f} s"
            )
        now = time.monotonic()
        if deadline is not None and now > deadline:
            save(step + 1)
            raise Paused(f"{stage.name} paused after step {step + 1} of {stage.steps}")
        if now - saved > save_every:
            save(step + 1)
            saved = now
    save(stage.steps)
