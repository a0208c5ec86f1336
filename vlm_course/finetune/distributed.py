"""One process or many, by the same command: who am I, what is the sum over all, and how a model is shared.

`torchrun --nproc-per-node 2 -m vlm_course finetune ...` starts one process a GPU. With LoRA or the projector alone each
holds the whole model and gradients are averaged (DistributedDataParallel); with full tuning weights, gradients and
optimizer are divided among them (FSDP2, `torch.distributed.fsdp.fully_shard`), unless the plan says otherwise.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process among `size`: its number and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def add(self, *numbers: float) -> list[float]:
        """The sum over all processes of each number."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def greatest(self, *numbers: float) -> list[float]:
        """The greatest over all processes of each number."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def _reduced(self, numbers: tuple[float, ...], operation) -> list[float]:
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def add_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: object) -> list:
        """What every process gave, in order of their numbers."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


def join(device: torch.device | str | None = None) -> World:
    """The world that torchrun describes in the environment (then the process group is opened), or this process alone.

    `device` is by default this process's GPU where there is one, else the CPU.
    """
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    if size == 1:
        return World(0, 1, device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), device)


def leave() -> None:
    """Close the process group, if `join` opened one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class LossModule(nn.Module):
    """The loss as a module, since what shares a model among processes watches a module's forward and backward."""

    def __init__(self, model: nn.Module, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch, count: float) -> Tensor:
        """Sum of the answer tokens' losses / `count`."""
        loss = self.loss(self.model, batch, count)
        if batch.pixels is None:  # a text alone: the bridge gets a gradient of zeros, so that all processes agree
            vision = self.model.config.vision
            empty = self.model.bridge(
                batch.ids.new_zeros(1, vision.n_patches, vision.width, dtype=_dtype(self.model.bridge))
            )
            loss = loss + 0 * empty.float().sum()
        return loss


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def share(module: LossModule, world: World, *, divide: bool, mixed: bool = False, compiled: bool = False) -> nn.Module:
    """The module as all processes run it: as it is for one, else divided or repeated.

    `mixed`: float32 weights that are divided are sent, and multiplied, in bfloat16. `compiled`: divided blocks are
    compiled one by one, each between the hooks that collect its weights.
    """
    if world.size == 1:
        return module
    if not divide:
        return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True, broadcast_buffers=False)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if mixed else None, reduce_dtype=torch.float32)
    for parameter in module.parameters():  # weights laid out for quick answers may lie by columns
        parameter.data = parameter.data.contiguous()
    for block in module.model.decoder.blocks:
        if compiled:
            block.forward = torch.compile(block.forward)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(module, mesh=mesh, mp_policy=policy)


def unsynchronised(module: nn.Module):
    """A context in which gradients stay with this process, for all but the last part of a batch."""
    return module.no_sync() if isinstance(module, nn.parallel.DistributedDataParallel) else nullcontext()


def whole(tensor: Tensor, *, keep: bool) -> Tensor | None:
    """A tensor that may be divided among processes, whole and on the CPU; None unless `keep`. All must call it."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().to("cpu", copy=True) if keep else None


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """Put a whole tensor into one that may be divided among processes: each takes its own part of it."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)
