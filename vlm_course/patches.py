"""An image as a sequence of patches, and the positions that go with them.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (arXiv 2010.11929), section 3.1.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.validation import checks, counts, require_divisible, require_grid, require_shape, takes


def _check_image(image: torch.Tensor, patch_size: int) -> None:
    require_shape(image, "image", "B C H W", floating=None, hint="a single image needs a batch axis: image[None]")
    hint = "resize or pad the image first; a strided convolution would silently drop the rest"
    require_divisible(image.shape[2], patch_size, "the image's height", "patch_size", hint=hint)
    require_divisible(image.shape[3], patch_size, "the image's width", "patch_size", hint=hint)


@counts(patch_size=1)
@checks(_check_image)
def patchify(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut an image into square patches, read row by row, each flattened in the order (channel, row, column).

    Args: image [B, C, H, W]; patch_size in pixels. Returns [B, N, C*p*p] with N = (H/p) * (W/p).
    Raises ValueError when the patch size does not divide the height or the width.
    """
    B, C, H, W = image.shape
    p = patch_size
    x = image.reshape(B, C, H // p, p, W // p, p)  # [B, C, H, W] -> [B, C, rows, p, cols, p]
    x = x.permute(0, 2, 4, 1, 3, 5)  # [B, C, rows, p, cols, p] -> [B, rows, cols, C, p, p]
    return x.reshape(B, (H // p) * (W // p), C * p * p)  # [B, rows, cols, C, p, p] -> [B, N, C*p*p]


def _check_patches(patches: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> None:
    require_grid(grid, "grid")
    require_shape(patches, "patches", "B N C*p*p", floating=None, N=grid[0] * grid[1], hint=f"the grid is {grid}")
    require_divisible(patches.shape[2], patch_size**2, "a patch's length", "patch_size**2")


@counts(patch_size=1)
@checks(_check_patches)
def unpatchify(patches: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """Undo `patchify`.

    Args: patches [B, N, C*p*p]; patch_size in pixels; grid (rows, columns) with rows * columns = N.
    Returns [B, C, rows*p, columns*p]. Raises ValueError when the grid has another number of cells.
    """
    B, _, length = patches.shape
    rows, cols = grid
    p = patch_size
    C = length // (p * p)
    x = patches.reshape(B, rows, cols, C, p, p)  # [B, N, C*p*p] -> [B, rows, cols, C, p, p]
    x = x.permute(0, 3, 1, 4, 2, 5)  # [B, rows, cols, C, p, p] -> [B, C, rows, p, cols, p]
    return x.reshape(B, C, rows * p, cols * p)  # [B, C, rows, p, cols, p] -> [B, C, H, W]


@counts(channels=1, patch_size=1, width=1)
@checks(takes("B C H W", lambda self: self.weight, width=lambda self: self.weight.shape[1], at=1, name="image"))
class PatchEmbedding(nn.Module):
    """One linear map for every patch: what a convolution with stride = kernel = patch size computes.

    The weight has the convolution's shape [D, C, p, p], so published weights load as they are.
    forward: image [B, C, H, W] -> [B, N, D].
    """

    def __init__(self, *, channels: int, patch_size: int, width: int, bias: bool = False):
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        nn.init.normal_(self.weight, std=(channels * patch_size**2) ** -0.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        patches = patchify(image, self.patch_size)  # [B, C, H, W] -> [B, N, C*p*p]
        return F.linear(patches, self.weight.flatten(1), self.bias)  # [B, N, C*p*p] -> [B, N, D]


def _check_positions(positions: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> None:
    require_grid(old_grid, "the old grid")
    require_grid(new_grid, "the new grid")
    cells = old_grid[0] * old_grid[1]
    require_shape(positions, "positions", "1+N D", **{"1+N": 1 + cells}, hint=f"grid {old_grid} plus one row for CLS")


@checks(_check_positions)
def interpolate_positions(
    positions: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> torch.Tensor:
    """Stretch learned positions to another grid: bicubic over the cells, the CLS row kept as it is.

    Args: positions [1+N, D] with CLS first; both grids (rows, columns). Returns [1 + new rows * new columns, D].
    Source: Dosovitskiy et al. 2021, section 3.2 (fine-tuning at a higher resolution).
    """
    cls, cells = positions[:1], positions[1:]
    image = cells.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # [N, D] -> [1, D, rows, cols]
    image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False)  # -> [1, D, new rows, new cols]
    return torch.cat([cls, image.flatten(2)[0].T])  # [1, D, new rows, new cols] -> [1 + new N, D]
