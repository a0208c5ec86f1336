"""The engine: one loop for two steps of the small model on a laptop and for days of a 7B model on many GPUs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from ..llava import Llava
from ..training import learning_rate
from . import checkpoint, distributed, fast, learning, memory
from .collate import Batch
from .loader import Loader, ahead, shared
from .lora import merge_lora
from .losses import plain_loss
from .plan import FinetunePlan, Report


class Trainer:
    """Trains `model` in place by `plan`, from the running state in `folder` or from the start where there is none.

    Args:
        model: loses nothing but its former values: what is frozen stays bit for bit as it was.
        batches: the `Batch` of step s, from s alone (see `loader.Loader`); `share(rank, world)` is called if it has it.
        folder: for the running state and the log; see `checkpoint`.
        device: by default this process's GPU, or the CPU.
        loss: (model, batch, count) -> sum of the answer tokens' losses / count; by default `fast.loss` where it
            knows the model and the weights are not divided among processes, else `losses.plain_loss`.
        log: takes each line that is said; only the first process says any.

    Raises:
        ValueError: the running state is of another plan, other data or another model.
    """

    def __init__(
        self,
        model: Llava,
        plan: FinetunePlan,
        batches: Callable[[int], Batch],
        folder: Path | str,
        *,
        device: torch.device | str | None = None,
        loss: Callable[[Llava, Batch, float], Tensor] | None = None,
        log: Callable[[str], None] = print,
    ):
        self.model, self.plan, self.folder = model, plan, Path(folder)
        self.world = distributed.join(device)
        self.say = log if self.world.first else lambda line: None
        if getattr(batches, "batch", plan.batch) != plan.batch:
            raise ValueError(f"the batches have {batches.batch} records, but the plan's batch is {plan.batch}")
        self.batches = shared(batches, self.world.rank, self.world.size)
        self.folder.mkdir(parents=True, exist_ok=True)
        cuda = self.world.device.type == "cuda"
        self.log_every = plan.log_every or (10 if cuda else 1)
        reads = cuda and isinstance(batches, Loader)
        self.workers = plan.workers if plan.workers is not None else (4 if reads else 0)
        self.micro = plan.micro_batch  # rows at once; None until it is known what there is
        self.divided = self.world.size > 1 and plan.mode == "full" and plan.divide
        stage = learning.place(model, plan, self.world.device, divided=self.divided)
        data = getattr(batches, "fingerprint", None)
        frozen = checkpoint.frozen_fingerprint(model)
        self.identity = plan.identity() | {"frozen weights": frozen, "data": data}
        mixed = self.divided and plan.dtype != "float32"
        if loss is None:
            loss = plain_loss if self.divided else fast.ready(model, plan)
        compiled = plan.compile and cuda
        whole = distributed.LossModule(model, loss)
        self.module = distributed.share(whole, self.world, divide=self.divided, mixed=mixed, compiled=compiled)
        self.autocast = plan.dtype == "autocast" and not self.divided
        low = plan.dtype == "bfloat16" or mixed
        self.pixels = torch.bfloat16 if low else torch.float32
        self.learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = learning.optimizer(model, plan, stage, divided=self.divided)
        self.step = self._resume()
        self.inside = learning.may_step_inside_backward(self.optimizer, plan, processes=self.world.size)

    def _resume(self) -> int:
        torch.manual_seed(self.plan.seed + self.world.rank)
        checkpoint.allocate(self.optimizer)
        state = checkpoint.load_state(self.folder, self.identity)
        if state is None:
            return 0
        checkpoint.restore(state, self.learning, self.optimizer)
        if len(state["random"]) == self.world.size:
            checkpoint.set_random_state(state["random"][self.world.rank], self.world.device)
        self.micro = self.plan.micro_batch or state["micro_batch"]
        self.say(f"goes on from step {state['step']} of {self.plan.steps} in {self.folder}")
        return state["step"]

    def save(self) -> None:
        """Write the running state; every process must call it."""
        state = {"step": self.step, "identity": self.identity, "micro_batch": self.micro}
        state["random"] = self.world.gather(checkpoint.random_state(self.world.device))
        done = self.step == self.plan.steps  # then the moments, twice as large as the weights, are of no more use
        state |= checkpoint.capture(self.learning, None if done else self.optimizer, keep=self.world.first)
        if self.world.first:
            checkpoint.save_state(self.folder, state)
        self.world.wait()

    def run(self, *, minutes: float | None = None) -> Report:
        """Train to the end of the plan, or until `minutes` have passed; either way the state is saved.

        Raises:
            OutOfMemory: a step does not fit; one sentence says which micro-batch does.
            FloatingPointError: the loss is no longer finite; the running state is that of the last save.
        """
        plan, began = self.plan, time.monotonic()
        lines = checkpoint.Log(self.folder, after=self.step) if self.world.first else None
        pending: list[tuple[int, Tensor, float, float]] = []
        saved, start, warm, value = began, self.step, began, math.nan  # `warm` moves on while a state is written

        def flush() -> float:
            """Look at the losses that were not looked at yet and write them down."""
            nonlocal pending
            rate, out = self._speed(start, warm), []
            for step, loss, tokens, lr in pending:
                out.append({"step": step, "loss": loss.item(), "lr": lr, "tokens": int(tokens), "samples_per_s": rate})
            pending = []
            if lines is not None:
                lines.write(out)
            if out and not math.isfinite(out[-1]["loss"]):
                where = f"the loss is {out[-1]['loss']} at step {out[-1]['step']} of {plan.steps}"
                raise FloatingPointError(f"{where}; the state before it is kept: try a lower rate than {plan.lr:g}")
            return out[-1]["loss"] if out else value

        try:
            for batch in ahead(self.batches, self.step, plan.steps, workers=self.workers):
                rate = self._set_rates()
                loss, tokens = self._update(batch)
                self.step += 1
                pending.append((self.step, loss, tokens, rate))
                now = time.monotonic()
                if self.step == start + 1:
                    warm = now  # the first step compiles and warms up
                out_of_time = minutes is not None and self.world.greatest(now - began)[0] > 60 * minutes
                due = plan.save_every is not None and now - saved > plan.save_every
                if self.world.size > 1:
                    due = bool(self.world.greatest(float(due))[0])  # all processes must decide alike
                last = self.step == plan.steps or out_of_time
                if last or due or self.step % self.log_every == 0:
                    value = flush()
                    self._tell(value, start, warm, last)
                if (last or due) and plan.save_every is not None:
                    now = time.monotonic()  # behind the look at the losses, which waits for the device
                    if lines is not None:
                        lines.sync()
                    self.save()
                    saved = time.monotonic()
                    warm += saved - now
                if out_of_time:
                    break
        finally:
            if lines is not None:
                lines.close()
        used = torch.cuda.max_memory_allocated(self.world.device) if self.world.device.type == "cuda" else 0
        seconds = time.monotonic() - began
        return Report(self.step, plan.steps, value, seconds, self._speed(start, warm), used, self.micro or 0)

    def trained(self) -> Llava | None:
        """The model as it is now, whole and without LoRA, in eval mode; a copy where it is divided among processes or
        has LoRA. Every process must call it; None on all but the first.
        """
        if not self.divided and self.plan.mode != "lora":
            return self.model.eval() if self.world.first else None
        if self.divided:
            with torch.device("meta"):
                model = Llava(self.model.config)
            state = {k: distributed.whole(v, keep=self.world.first) for k, v in self.model.state_dict().items()}
            if self.world.first:
                model.load_state_dict(state, assign=True)
        elif self.world.first:
            model = copy.deepcopy(self.model)
            merge_lora(model)
        return model.eval() if self.world.first else None

    def _speed(self, start: int, warm: float) -> float:
        """Conversations a second since the first step of this call, without the writing of states."""
        done, seconds = self.step - start - 1, time.monotonic() - warm
        return done * self.plan.batch / seconds if done > 0 and seconds > 0 else 0.0

    def _tell(self, loss: float, start: int, warm: float, last: bool) -> None:
        every = max(1, self.plan.steps // 20)
        if last or self.step // every > (self.step - self.log_every) // every:
            rate = self._speed(start, warm)
            self.say(
                f"step {self.step:>6}/{self.plan.steps}  loss {loss:.4f}" + (f"  {rate:,.1f} samples/s" if rate else "")
            )

    def _set_rates(self) -> float:
        plan, groups = self.plan, self.optimizer.param_groups
        for group in groups:
            group["lr"] = learning_rate(
                self.step, steps=plan.steps, peak=group["peak"], warmup=plan.warmup, final=plan.final
            )
        return max(group["lr"] for group in groups)

    def _update(self, batch: Batch) -> tuple[Tensor, float]:
        """One optimizer step -> (loss, the mean over all answer tokens of all processes; their number)."""
        (tokens,) = self.world.add(batch.answer_tokens)
        if not tokens:
            raise ValueError(f"step {self.step + 1}: 0 answer tokens in {len(batch)} rows, expected at least 1")
        with learning.stepping(self.optimizer, inside=self.inside):
            loss = self._gradients(batch, tokens)
            if self.plan.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.learning.values(), self.plan.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return self.world.add_(loss), tokens

    def _gradients(self, batch: Batch, tokens: float) -> Tensor:
        """Gradients of the whole batch; when memory is exhausted, in smaller parts or with a sentence (`memory`)."""
        rows = min(self.micro or len(batch), len(batch))
        before = checkpoint.random_state(self.world.device)
        clean = lambda: self.optimizer.zero_grad(set_to_none=True)  # noqa: E731

        def again(size: int) -> Tensor:
            checkpoint.set_random_state(before, self.world.device)  # the same dropout, however often it is tried
            return self._accumulate(batch, size, tokens)

        loss, fits = memory.attempt(lambda: self._accumulate(batch, rows, tokens), clean)
        if fits:
            self.micro = self.micro or rows
            return loss
        length = batch.ids.shape[1]
        said = f"Out of memory: {rows} rows of {length} tokens do not fit at once"
        if self.world.size > 1 or self.inside:  # the others wait, or weights have moved already: nothing can be tried
            half = max(1, rows // 2)
            raise memory.OutOfMemory(f"{said} on process {self.world.rank}: give micro_batch={half} and call again.")
        loss, size = memory.halve_until_it_fits(again, rows, clean)
        if size is None:
            raise memory.no_fit(length, self.plan.mode)
        if self.plan.micro_batch is not None:
            clean()
            what = f"but {size} do: give micro_batch={size} and call again; the loss stays the same."
            raise memory.OutOfMemory(f"{said}, {what}", size)
        self.say(f"{said}, but {size} do: it goes on with micro_batch={size}, and the loss stays the same.")
        self.micro = size
        return loss

    def _accumulate(self, batch: Batch, size: int, tokens: float) -> Tensor:
        """Backward through the parts of a batch -> this process's share of the loss, without a graph.

        Every part's loss is divided by the tokens of the whole batch (`training.accumulated` says why), and multiplied
        by the number of processes, since gradients are averaged over them.
        """
        device, world = self.world.device, self.world.size
        parts = batch.micro(size)
        weights = [1.0] * len(parts)
        if self.divided:  # all processes must run as many parts: who has fewer repeats one that counts nothing
            missing = int(self.world.greatest(len(parts))[0]) - len(parts)
            parts, weights = parts + parts[-1:] * missing, weights + [0.0] * missing
        total = torch.zeros((), device=device)
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            last = number == len(parts) - 1
            if device.type == "cuda" and part.ids.device.type == "cpu":
                part = part.pinned()
            part = part.to(device, dtype=self.pixels)
            with nullcontext() if last else distributed.unsynchronised(self.module):
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.autocast):
                    loss = self.module(part, tokens)
                (loss * (weight * world)).backward()
            total += weight * loss.detach()
        return total
