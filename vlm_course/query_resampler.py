"""Qwen-VL's bridge: one cross-attention of learned queries to the patches, both with two-dimensional positions.

Unlike Flamingo's resampler it has no second layer, no feed-forward net and no residual, and its queries do not read
each other: 1,024 patches of a 448 px image become 256 tokens in one step.
Sources: Bai et al. 2023 (Qwen-VL, arXiv 2308.12966), section 2.1, position-aware vision-language adapter;
Yuliang-Liu/Monkey at 8e6d525, monkey_model/text_monkey/visual_text.py, Resampler, which is Qwen-VL's code;
facebookresearch/mae, util/pos_embed.py, for the positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.attention import attend
from vlm_course.validation import (
    checks,
    counts,
    method_checks,
    require_count,
    require_divisible,
    require_same_device,
    require_shape,
    require_square,
)


def _check_dim(side: int, dim: int) -> None:
    require_divisible(dim, 4, "dim", "4", hint="a sine and a cosine for the column, and for the row")


@counts(side=1, dim=4)
@checks(_check_dim)
def sincos_positions(side: int, dim: int) -> Tensor:
    """Fixed positions of a square grid: [side * side, dim], row by row.

    The first half of the channels holds the column, the second the row (MAE's code names them the other way round),
    each as sines and then cosines of the place times 1 / 10000**(i / (dim / 4)).
    """
    quarter = dim // 4
    frequencies = 10000 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)  # [dim / 4]
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # [side, dim / 4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # [side, dim / 2]
    columns, rows = line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)  # [side, side, dim / 2] each
    return torch.cat([columns, rows], dim=2).flatten(0, 1)  # [side * side, dim]


def _check_features(self: "QueryResampler", features: Tensor) -> None:
    hint = "was the bridge built for another vision tower?"
    require_shape(features, "features", "B N D", D=self.widen.in_features, hint=hint)
    require_square(features.shape[1], "N", hint="was CLS left in?")
    require_same_device(features=features, bridge=self.queries)


def _check_patches(self: "QueryResampler", patches: int) -> None:
    require_count(patches, "patches")
    require_square(patches, "patches", hint="was CLS counted?")


def _check_sizes(self, vision_dim: int, llm_dim: int, *, queries: int = 256, heads: int | None = None) -> None:
    require_square(queries, "queries", hint="they have the positions of a square grid")
    _check_dim(1, llm_dim)
    require_divisible(llm_dim, heads or max(llm_dim // 128, 1), "llm_dim", "heads")


@counts(vision_dim=1, llm_dim=4, queries=1, heads=1)
@method_checks(key_positions=_check_patches)
@checks(_check_features, init=_check_sizes)
class QueryResampler(nn.Module):
    """`queries` tokens for an image. forward: features [B, N, D_vision] of a square grid, without CLS ->
    [B, queries, D_llm].

    Positions go onto queries and keys, not onto values. There is one table of them, for the queries' grid; the patches'
    is drawn from it by bicubic interpolation. It is fixed, yet stored with the weights. `heads` is D_llm / 128 where it
    is not given.
    """

    def __init__(self, vision_dim: int, llm_dim: int, *, queries: int = 256, heads: int | None = None):
        super().__init__()
        self.heads = heads or max(llm_dim // 128, 1)
        self.queries = nn.Parameter(torch.randn(queries, llm_dim) * 0.02)
        self.positions = nn.Parameter(sincos_positions(math.isqrt(queries), llm_dim), requires_grad=False)
        self.widen = nn.Linear(vision_dim, llm_dim, bias=False)
        self.norm_queries, self.norm_keys, self.norm = (nn.LayerNorm(llm_dim, eps=1e-6) for _ in range(3))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(llm_dim, llm_dim) for _ in range(4))
        self.project = nn.Linear(llm_dim, llm_dim, bias=False)

    def key_positions(self, patches: int) -> Tensor:
        """The table, stretched or shrunk to the grid of the patches: [patches, D_llm]."""
        if patches == len(self.positions):
            return self.positions
        old, new = math.isqrt(len(self.positions)), math.isqrt(patches)
        table = self.positions.unflatten(0, (old, old)).permute(2, 0, 1)[None]  # [M, D] -> [1, D, old, old]
        table = F.interpolate(table, size=(new, new), mode="bicubic", align_corners=False)  # [1, D, new, new]
        return table[0].permute(1, 2, 0).flatten(0, 1)  # [N, D]

    def forward(self, features: Tensor) -> Tensor:
        values = self.norm_keys(self.widen(features))  # [B, N, D_vision] -> [B, N, D_llm]
        keys = values + self.key_positions(features.shape[1])  # [B, N, D_llm] + [N, D_llm]
        queries = (self.norm_queries(self.queries) + self.positions).expand(len(features), -1, -1)  # -> [B, M, D_llm]
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, T, D] -> [B, H, T, d]
            for x in (self.to_q(queries), self.to_k(keys), self.to_v(values))
        )
        read = self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))  # [B, H, M, d] -> [B, M, D_llm]
        return self.project(self.norm(read))  # [B, M, D_llm]
