"""Pictures of any size for a tower of one size: LLaVA-NeXT's AnyRes, from the picture to the tokens.

Sizes and canvases are (height, width), grids (rows, columns). A picture is fitted into the best of a few canvases, cut
into square tiles, read row by row, and shown once more as a whole, as a thumbnail that comes first. `dynamic_tiling`
has InternVL's variant.
"""

from collections.abc import Sequence
from math import ceil
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_course.validation import checks, require_divisible, require_shape, require_square

Size = tuple[int, int]

# The canvases of LLaVA-1.6 at 336 px. LLaVA's own configuration lists the same ones as (width, height).
LLAVA_NEXT_RESOLUTIONS: tuple[Size, ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def require_size(size: Size, name: str) -> None:
    """Raise ValueError unless `size` is two whole numbers of at least 1."""
    whole = isinstance(size, Sequence) and all(isinstance(side, Integral) for side in size)
    if not whole or len(size) != 2 or min(size) < 1:
        hint = "give (height, width) in plain numbers; a tensor has .tolist() for that"
        raise ValueError(f"{name} is {size!r}, expected two whole numbers of at least 1; {hint}")


def _check_choice(size: Size, resolutions: Sequence[Size]) -> None:
    require_size(size, "size")
    if len(resolutions) < 1:
        raise ValueError("there are 0 resolutions to choose from, expected at least 1")
    for resolution in resolutions:
        require_size(resolution, "a resolution")


@checks(_check_choice)
def select_best_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """The canvas that keeps most of the picture's own pixels; of equals the smallest, then the first.

    Args: size (height, width) of the picture; resolutions, the canvases to choose from. Returns one of them.
    Source: Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge" (section on dynamic high
    resolution) and its released code.
    """
    height, width = size

    def fit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)  # enlarging adds no information
        return kept, kept - canvas[0] * canvas[1]

    return tuple(max(resolutions, key=fit))


def _check_fit(size: Size, canvas: Size) -> None:
    require_size(size, "size")
    require_size(canvas, "canvas")


@checks(_check_fit)
def fit_inside(size: Size, canvas: Size) -> Size:
    """Size (height, width) of a picture enlarged or shrunk to touch the canvas from inside, its shape kept."""
    height, width = size
    scale_h, scale_w = canvas[0] / height, canvas[1] / width
    if scale_w < scale_h:
        return min(ceil(height * scale_w), canvas[0]), canvas[1]
    return canvas[0], min(ceil(width * scale_h), canvas[1])


def _check_tiling(size: Size, resolutions: Sequence[Size], tile: int) -> None:
    _check_choice(size, resolutions)
    for height, width in resolutions:
        require_divisible(height, tile, "a resolution's height", "tile")
        require_divisible(width, tile, "a resolution's width", "tile")


@checks(_check_tiling)
def anyres_grid(size: Size, resolutions: Sequence[Size], tile: int) -> Size:
    """(rows, columns) of tiles that a picture of this size is cut into, without the thumbnail."""
    height, width = select_best_resolution(size, resolutions)
    return height // tile, width // tile


def _check_division(image: Tensor, tile: int) -> None:
    require_shape(image, "image", "C H W", floating=None, hint="one picture at a time: each has its own grid")
    require_divisible(image.shape[1], tile, "the image's height", "tile", hint="resize or pad the image first")
    require_divisible(image.shape[2], tile, "the image's width", "tile", hint="resize or pad the image first")


@checks(_check_division)
def divide_to_tiles(image: Tensor, tile: int) -> Tensor:
    """Cut into squares, read row by row: image [C, H, W] -> [rows * columns, C, tile, tile]."""
    C, H, W = image.shape
    x = image.reshape(C, H // tile, tile, W // tile, tile)  # [C, H, W] -> [C, rows, tile, cols, tile]
    return x.permute(1, 3, 0, 2, 4).flatten(0, 1)  # -> [rows, cols, C, tile, tile] -> [rows * cols, C, tile, tile]


def _check_resize(image: Tensor, size: Size) -> None:
    require_shape(image, "image", "C H W", hint="one picture at a time")
    require_size(size, "size")


@checks(_check_resize)
def resize(image: Tensor, size: Size) -> Tensor:
    """Bicubic with antialiasing: [C, H, W] -> [C, *size]; a picture that has this size already stays as it is."""
    if image.shape[1:] == tuple(size):
        return image
    return F.interpolate(image[None], size=tuple(size), mode="bicubic", antialias=True, align_corners=False)[0]


def _check_anyres_tiles(image: Tensor, resolutions: Sequence[Size], tile: int) -> None:
    require_shape(image, "image", "C H W", hint="one picture at a time: each has its own grid")
    _check_tiling(tuple(image.shape[1:]), resolutions, tile)


@checks(_check_anyres_tiles)
def anyres_tiles(image: Tensor, resolutions: Sequence[Size], tile: int) -> Tensor:
    """The views that LLaVA-NeXT's tower sees: image [C, H, W] in [0, 1] -> [1 + rows * columns, C, tile, tile].

    The thumbnail, squeezed to a square, comes first. The tiles come from the picture resized into its canvas and
    centred on black, which is why this runs before the colours are normalised.
    """
    size = tuple(image.shape[1:])
    canvas = select_best_resolution(size, resolutions)
    resized = resize(image, fit_inside(size, canvas))  # [C, H, W] -> [C, h, w]
    spare_h, spare_w = canvas[0] - resized.shape[1], canvas[1] - resized.shape[2]
    top, left = spare_h // 2, spare_w // 2
    padded = F.pad(resized, (left, spare_w - left, top, spare_h - top))  # [C, h, w] -> [C, *canvas]
    return torch.cat([resize(image, (tile, tile))[None], divide_to_tiles(padded, tile)])


def _check_unpadded(grid: Size, size: Size) -> None:
    require_size(grid, "grid")
    require_size(size, "size")


@checks(_check_unpadded)
def unpadded_grid(grid: Size, size: Size) -> Size:
    """What is left of a grid of feature cells once the rows or columns of padding are cut off.

    Args: grid (rows, columns) of cells over the whole canvas; size (height, width) of the picture.
    The same number of cells goes on both sides, so an odd one of padding stays, and a picture thinner than one cell can
    lose every row. Rounding to 7 decimals undoes float errors: 49 px * (4 / 98) must count as 2 cells, not as 1.9999.
    """
    rows, cols = grid
    height, width = size
    if width / height > cols / rows:
        kept = int(round(height * (cols / width), 7))
        return rows - 2 * ((rows - kept) // 2), cols
    kept = int(round(width * (rows / height), 7))
    return rows, cols - 2 * ((cols - kept) // 2)


def _check_unpad(features: Tensor, size: Size) -> None:
    require_shape(features, "features", "rows cols D", floating=None, hint="stitch the tiles together first")


@checks(_check_unpad)
def unpad(features: Tensor, size: Size) -> Tensor:
    """Cut the padding off: features [rows, cols, D] of a canvas, size of the picture -> [rows', cols', D].

    Source: LLaVA-NeXT's released code; the shapes are those of `unpadded_grid`.
    """
    grid = tuple(features.shape[:2])
    rows, cols = unpadded_grid(grid, size)
    top, left = (grid[0] - rows) // 2, (grid[1] - cols) // 2
    return features[top : top + rows, left : left + cols]  # [rows, cols, D] -> [rows', cols', D]


def _check_stitch(tiles: Tensor, grid: Size) -> None:
    require_size(grid, "grid")
    hint = f"a grid of {grid[0]} x {grid[1]} tiles has {grid[0] * grid[1]}: was the thumbnail left in?"
    require_shape(tiles, "tiles", "tiles N D", floating=None, tiles=grid[0] * grid[1], hint=hint)
    require_square(tiles.shape[1], "the number of patches in a tile", hint="was CLS left in?")


@checks(_check_stitch)
def stitch_tiles(tiles: Tensor, grid: Size) -> Tensor:
    """Lay the tiles' patches out as one map: tiles [rows * columns, N, D] -> [rows * n, columns * n, D], n * n = N.

    A plain reshape would keep each tile's patches together and so tear every row of the picture apart.
    """
    rows, cols = grid
    n = require_square(tiles.shape[1], "the number of patches in a tile")
    x = tiles.reshape(rows, cols, n, n, -1)  # [rows * cols, N, D] -> [rows, cols, n, n, D]
    return x.transpose(1, 2).reshape(rows * n, cols * n, -1)  # -> [rows, n, cols, n, D] -> [rows * n, cols * n, D]


def _check_newlines(features: Tensor, newline: Tensor) -> None:
    require_shape(features, "features", "rows cols D", floating=None, empty=True)
    if features.shape[2] == 0:  # unpadding may leave no row, or no column, of a thin picture
        raise ValueError(f"features has D = 0 in its shape {list(features.shape)}, expected at least 1")
    _require_newline(features, newline)


def _require_newline(features: Tensor, newline: Tensor) -> None:
    require_shape(newline, "newline", "D", floating=None, D=features.shape[-1], hint="it sits beside the features")
    if newline.device != features.device:
        raise ValueError(f"newline is on {newline.device}, the features are on {features.device}")


@checks(_check_newlines)
def add_newlines(features: Tensor, newline: Tensor) -> Tensor:
    """End every row with the learned newline: features [rows, cols, D], newline [D] -> [rows * (cols + 1), D]."""
    column = newline.to(features).expand(len(features), 1, -1)  # [D] -> [rows, 1, D]
    return torch.cat([features, column], dim=1).flatten(0, 1)  # [rows, cols + 1, D] -> [rows * (cols + 1), D]


def _check_pack(features: Tensor, size: Size, *, grid: Size | None, newline: Tensor | None = None) -> None:
    require_size(size, "size")
    if grid is not None:
        require_size(grid, "grid")
    tiles = 0 if grid is None else grid[0] * grid[1]
    hint = f"the thumbnail and the tiles of grid {grid}"
    require_shape(features, "features", "views N D", floating=None, views=1 + tiles, hint=hint)
    require_square(features.shape[1], "the number of patches in a tile", hint="was CLS left in?")
    if newline is not None:
        _require_newline(features, newline)


@checks(_check_pack)
def pack_image_features(features: Tensor, size: Size, *, grid: Size | None, newline: Tensor | None = None) -> Tensor:
    """One picture's views -> the tokens that the language model reads: the thumbnail, then the picture row by row.

    Args: features [1 + rows * columns, N, D], thumbnail first, without CLS; size (height, width) of the picture; grid
    from `anyres_grid`, or None for a picture sent as its thumbnail alone (it gets a single newline); newline [D].
    Returns [tokens, D], where tokens is what `anyres_token_count` says.
    """
    thumbnail, tiles = features[0], features[1:]
    if grid is None:
        return thumbnail if newline is None else torch.cat([thumbnail, newline.to(features)[None]])
    rows = unpad(stitch_tiles(tiles, grid), size)  # [tiles, N, D] -> [rows, cols, D]
    rows = rows.flatten(0, 1) if newline is None else add_newlines(rows, newline)  # -> [tokens, D]
    return torch.cat([thumbnail, rows])  # [N, D], [tokens, D] -> [N + tokens, D]


def _check_count(size: Size, resolutions: Sequence[Size], *, tile: int, patch: int, newline: bool = True) -> None:
    require_divisible(tile, patch, "tile", "patch")


@checks(_check_count)
def anyres_token_count(size: Size, resolutions: Sequence[Size], *, tile: int, patch: int, newline: bool = True) -> int:
    """Tokens that a picture costs, from its size alone: thumbnail, cells left after unpadding, a newline per row."""
    n = tile // patch
    rows, cols = anyres_grid(size, resolutions, tile)
    rows, cols = unpadded_grid((rows * n, cols * n), size)
    return n * n + rows * (cols + newline)
