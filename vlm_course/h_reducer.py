"""DocOwl 1.5's bridge: patches side by side in a row become one token, since text runs from left to right.

Sources: Hu et al. 2024 (mPLUG-DocOwl 1.5, arXiv 2403.12895), the section on the H-Reducer; X-PLUG/mPLUG-DocOwl at
8e23e72, DocOwl1.5/mplug_docowl/model/visual_encoder.py, MplugDocOwlHReducerModel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.validation import (
    checks,
    counts,
    require_divisible,
    require_grid,
    require_same_device,
    require_shape,
    require_square,
)


def _check_features(self: "HReducer", features: Tensor, *, grid: tuple[int, int] | None = None) -> None:
    hint = "was the bridge built for another vision tower?"
    require_shape(features, "features", "B N D", D=self.reduce.in_channels, hint=hint)
    require_same_device(features=features, bridge=self.end)
    N = features.shape[1]
    if grid is None:
        side = require_square(N, "N", hint="was CLS left in? For another shape pass grid=(rows, columns)")
        grid = (side, side)
    require_grid(grid, "grid")
    if grid[0] * grid[1] != N:
        cells = grid[0] * grid[1]
        raise ValueError(f"features has N = {N} patches, but the grid {tuple(grid)} has {cells} cells")
    require_divisible(grid[1], self.merge, "the grid's number of columns", "merge", hint="resize the image first")


@counts(vision_dim=1, llm_dim=1, merge=1)
@checks(_check_features)
class HReducer(nn.Module):
    """`merge` patches of a row become one token; an end token closes the image. forward: features [B, N, D_vision]
    without CLS, grid (rows, columns), by default the square of N -> [B, N / merge + 1, D_llm].

    Rows stay apart and tokens keep the reading order, so a line of text stays a line: 448 px in patches of 14 px give
    32 x 32 patches and 32 x 8 + 1 = 257 tokens. One convolution of 1 x `merge` and a linear map do it. Before them the
    released code has a second convolution (`mix`): from the same `merge` patches it makes as many new ones, each of
    which has seen all of them. `mix=False` leaves that out.
    """

    def __init__(self, vision_dim: int, llm_dim: int, *, merge: int = 4, mix: bool = True):
        super().__init__()
        self.merge = merge
        self.mix = nn.Conv2d(vision_dim, merge * vision_dim, (1, merge), stride=(1, merge)) if mix else None
        self.reduce = nn.Conv2d(vision_dim, vision_dim, (1, merge), stride=(1, merge))
        self.project = nn.Linear(vision_dim, llm_dim)
        self.end = nn.Parameter(torch.randn(1, 1, llm_dim))

    def forward(self, features: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        rows, _ = grid or (round(features.shape[1] ** 0.5), None)
        x = features.transpose(1, 2).unflatten(2, (rows, -1))  # [B, N, D] -> [B, D, rows, columns]
        if self.mix is not None:
            x = F.gelu(self.mix(x))  # [B, D, rows, columns] -> [B, merge * D, rows, columns / merge]
            x = x.unflatten(1, (self.merge, -1)).permute(0, 2, 3, 4, 1).flatten(3)  # -> [B, D, rows, columns]
        x = self.reduce(x).flatten(2).transpose(1, 2)  # [B, D, rows, columns / merge] -> [B, N / merge, D]
        tokens = self.project(x)  # [B, N / merge, D] -> [B, N / merge, D_llm]
        return torch.cat([tokens, self.end.expand(len(tokens), -1, -1)], dim=1)  # [B, N / merge + 1, D_llm]
