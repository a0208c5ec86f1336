"""Several weights side by side in one piece of memory, so that one product serves them all.

The parameters keep their names, their place in the model and their values: they become views of the common piece.
Optimizers, `state_dict` and the model's own forward go on as before. Moving the model to another device or dtype
makes new tensors and undoes it, which `intact` notices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm_course.decoder import DecoderBlock


def intact(whole: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether the parts [n_i, K] still lie in `whole` [sum n_i, K], one behind the other."""
    place = whole.data_ptr()
    for part in parts:
        if part.data_ptr() != place or part.dtype != whole.dtype or part.device != whole.device:
            return False
        place += part.numel() * part.element_size()
    return place == whole.data_ptr() + whole.numel() * whole.element_size()


def _already(parts: Sequence[Tensor]) -> Tensor | None:
    """The common piece of parts that were fused before, None where they lie apart."""
    first, rows = parts[0], sum(len(part) for part in parts)
    room = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
    if not all(part.is_contiguous() for part in parts) or room < rows * first.shape[1]:
        return None
    if any(part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for part in parts):
        return None
    whole = torch.as_strided(first.detach(), (rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())
    return whole if intact(whole, parts) else None


@torch.no_grad()
def fuse(parts: Sequence[nn.Parameter]) -> Tensor:
    """Lay matrices [n_i, K] into one piece [sum n_i, K] and make them views of it; returns it, without a gradient."""
    if len(parts) == 1:
        return parts[0].detach()
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1 or len({(part.dtype, part.device) for part in parts}) > 1:
        raise ValueError(f"the weights have inputs {sorted(widths)}: expected one width, one dtype and one device")
    whole = _already(parts)
    if whole is None:
        whole = torch.cat([part.detach() for part in parts])  # [sum n_i, K]
        start = 0
        for part in parts:
            part.data = whole[start : start + len(part)]
            start += len(part)
    return whole


def qkv_parts(block: DecoderBlock) -> list[nn.Parameter]:
    """Weights of query, key and value; of the frozen layers where LoRA stands."""
    return [getattr(block.attention, name).weight for name in ("query", "key", "value")]


def gate_up_parts(block: DecoderBlock) -> list[nn.Parameter]:
    """Weights of gate and up."""
    return [block.mlp.gate.weight, block.mlp.up.weight]
