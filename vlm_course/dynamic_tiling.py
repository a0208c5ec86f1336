"""InternVL's dynamic tiles: the grid whose shape is closest to the picture's, which is stretched to fill it.

There is no padding, so nothing is cut off again and every tile costs the same. Sizes are (height, width), grids
(rows, columns). Source: Chen et al. 2024 (InternVL 1.5, arXiv 2404.16821), section 3.1, and its released code.
"""

from numbers import Integral

import torch
from torch import Tensor

from vlm_course.resolution import Size, divide_to_tiles, require_size, resize
from vlm_course.validation import checks, require_divisible, require_shape


def _check_range(*, min_tiles: int = 1, max_tiles: int = 12) -> None:
    whole = isinstance(min_tiles, Integral) and isinstance(max_tiles, Integral)
    if not whole or not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"min_tiles is {min_tiles} and max_tiles is {max_tiles}, expected 1 <= min_tiles <= max_tiles")


@checks(_check_range)
def tile_grids(*, min_tiles: int = 1, max_tiles: int = 12) -> list[Size]:
    """Every (rows, columns) with that many tiles, the fewest tiles first, of as many the most rows first."""
    side = range(1, max_tiles + 1)
    grids = [(rows, cols) for cols in side for rows in side if min_tiles <= rows * cols <= max_tiles]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def _check_grid(size: Size, *, tile: int = 448, min_tiles: int = 1, max_tiles: int = 12) -> None:
    require_size(size, "size")
    require_size((tile, tile), "(tile, tile)")
    _check_range(min_tiles=min_tiles, max_tiles=max_tiles)


@checks(_check_grid)
def closest_grid(size: Size, *, tile: int = 448, min_tiles: int = 1, max_tiles: int = 12) -> Size:
    """(rows, columns) whose width over height is closest to that of a picture of size (height, width).

    Of equals a later one, with more tiles, wins only if the picture has more than half as many pixels as its tiles.
    """
    height, width = size
    best, best_gap = (1, 1), float("inf")
    for rows, cols in tile_grids(min_tiles=min_tiles, max_tiles=max_tiles):
        gap = abs(width / height - cols / rows)
        if gap < best_gap or (gap == best_gap and height * width > 0.5 * tile * tile * rows * cols):
            best, best_gap = (rows, cols), gap
    return best


def _check_tiles(image: Tensor, *, tile: int = 448, min_tiles: int = 1, max_tiles: int = 12) -> None:
    require_shape(image, "image", "C H W", hint="one picture at a time: each has its own grid")
    _check_grid(tuple(image.shape[1:]), tile=tile, min_tiles=min_tiles, max_tiles=max_tiles)


@checks(_check_tiles)
def dynamic_tiles(image: Tensor, *, tile: int = 448, min_tiles: int = 1, max_tiles: int = 12) -> Tensor:
    """The views that InternVL's tower sees: image [C, H, W] -> [rows * columns, C, tile, tile], and a last one, the
    whole picture squeezed to a square, unless a single tile shows it already."""
    rows, cols = closest_grid(tuple(image.shape[1:]), tile=tile, min_tiles=min_tiles, max_tiles=max_tiles)
    tiles = divide_to_tiles(resize(image, (rows * tile, cols * tile)), tile)
    if len(tiles) == 1:
        return tiles
    return torch.cat([tiles, resize(image, (tile, tile))[None]])


def _check_count(
    size: Size, *, tile: int = 448, patch: int = 14, shuffle: int = 2, min_tiles: int = 1, max_tiles: int = 12
) -> None:
    _check_grid(size, tile=tile, min_tiles=min_tiles, max_tiles=max_tiles)
    require_size((patch, shuffle), "(patch, shuffle)")
    require_divisible(tile, patch * shuffle, "tile", "patch * shuffle")


@checks(_check_count)
def dynamic_token_count(
    size: Size, *, tile: int = 448, patch: int = 14, shuffle: int = 2, min_tiles: int = 1, max_tiles: int = 12
) -> int:
    """Visual tokens of a picture, from its size alone: every view costs (tile / patch / shuffle)**2 of them.

    `shuffle` is the factor of `bridges.pixel_shuffle`. The tokens around the picture (<img>, </img>) are not counted.
    """
    rows, cols = closest_grid(size, tile=tile, min_tiles=min_tiles, max_tiles=max_tiles)
    views = rows * cols + (rows * cols > 1)
    return views * (tile // (patch * shuffle)) ** 2
