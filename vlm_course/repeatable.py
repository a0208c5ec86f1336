"""The same bits from the same seed, on a GPU too.

A GPU adds in whatever order its threads finish, wherever many of them add to one place: in the gradient of an embedding
(every token adds to the row of its word), of attention, of an index. Floats are not associative, so two runs drift
apart, and after thousands of steps a table differs in its second digit. `repeatable` asks torch for its ordered
variants, and `LookUp` gives the one gradient whose ordered variant is slow another form.
Source: the page "Reproducibility" of PyTorch's documentation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .validation import checks, counts, require_shape


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, an operation of torch either gives the same bits every time or raises RuntimeError.

    Holds for one machine and one version of torch. Enter before the first product on a GPU and before anything is
    compiled: cuBLAS reads its workspace once, and a compiler that chose kernels by their speed would choose others in
    another run.
    """
    from torch._inductor import config as inductor

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # torch lets it run without gradients, where its bits vary too
    torch.utils.deterministic.fill_uninitialized_memory = False  # only for finding bugs, and it costs time
    try:
        with inductor.patch(deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


class _RowsByProduct(torch.autograd.Function):
    """weight[ids], whose gradient is a product with the one-hot ids: a sum in a fixed order, on tensor cores."""

    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)
        return F.embedding(ids, weight)  # [B, T], [V, D] -> [B, T, D]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        rows = torch.arange(ctx.rows, device=ids.device)
        with torch.autocast(ids.device.type, enabled=False):
            one_hot = (ids.flatten() == rows[:, None]).to(gradient.dtype)  # [V, B * T]
            return one_hot @ gradient.flatten(0, -2), None  # [V, B * T] @ [B * T, D] -> [V, D]


@counts(rows=1, width=1)
@checks(lambda self, ids: require_shape(ids, "ids", " ".join(f"axis{i}" for i in range(ids.dim())), floating=False))
class LookUp(nn.Embedding):
    """`nn.Embedding` with a gradient that is the same every time, and fast where the vocabulary is small.

    Torch's ordered gradient adds the tokens of a word one after the other, which is slow when half of a batch is
    <image>. A product with the one-hot ids costs 2 * rows * width multiplications a token: right for hundreds of words,
    wrong for 32,000. forward: ids [..., T] -> [..., T, width].
    """

    def __init__(self, rows: int, width: int):
        super().__init__(rows, width)

    def forward(self, ids: Tensor) -> Tensor:
        return _RowsByProduct.apply(self.weight, ids)


def with_repeatable_embeddings(model: nn.Module) -> nn.Module:
    """The same model with every `nn.Embedding` replaced by a `LookUp` that holds the same parameter; in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Embedding:
                if child.padding_idx is not None or child.max_norm is not None:
                    raise ValueError(
                        f"{name} has padding_idx {child.padding_idx} and max_norm {child.max_norm}, expected None twice"
                    )
                look_up = LookUp(*child.weight.shape)
                look_up.weight = child.weight
                setattr(module, name, look_up)
    return model
