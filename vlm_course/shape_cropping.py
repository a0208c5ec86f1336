"""UReader's shape-adaptive cropping, which DocOwl 1.5 keeps: a page becomes crops by the grid that fits its shape best.

Two overlaps (intersection over union) judge a grid: with the page stretched to the grid's width, which sees shape
alone, and with the page as it is, which sees size. Sizes are (height, width), grids (rows, columns), and the whole
page, squeezed to a square, comes before its crops.
Sources: Ye et al. 2023 (UReader, arXiv 2310.05126), the sections on the shape-adaptive cropping module and on the crop
position encoding; X-PLUG/mPLUG-DocOwl at cd7b635, UReader/pipeline/data_utils/processors/doc_processor.py and
UReader/configs/sft/release.yaml (20 cells); at 665af06, DocOwl1.5/mplug_docowl/processor.py (9 cells, words in front of
crops); LukeForeverYoung/UReader at 978ac69, mplug_owl/modeling_mplug_owl.py (embeddings of places).
"""

from fractions import Fraction

import torch
from torch import Tensor, nn

from vlm_course.resolution import Size, divide_to_tiles, require_size, resize
from vlm_course.validation import checks, counts, readable, require_grid, require_same_device, require_shape

UREADER = {"tile": 224, "max_cells": 20, "max_side": 11}
DOCOWL_15 = {"tile": 448, "max_cells": 9, "max_side": 9}


@counts(max_cells=1, max_side=1)
def crop_grids(*, max_cells: int = 20, max_side: int = 11) -> list[Size]:
    """Every (rows, columns) of at most `max_cells` cells and sides of at most `max_side`, in UReader's order: the
    fewest cells first, of as many the fewest rows first. The defaults are its 48 grids; 9 and 9 give DocOwl 1.5's 23.
    """
    side = range(1, max_side + 1)
    grids = [(rows, cols) for rows in side for cols in side if rows * cols <= max_cells]
    return sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))


def _check_overlap(one: Size, other: Size) -> None:
    require_size(one, "one")
    require_size(other, "other")


@checks(_check_overlap)
def corner_overlap(one: Size, other: Size) -> Fraction:
    """Intersection over union of two rectangles (height, width) that share their top left corner, from 0 to 1."""
    both = min(one[0], other[0]) * min(one[1], other[1])
    return Fraction(both, one[0] * one[1] + other[0] * other[1] - both)


def _check_scores(size: Size, grid: Size, *, tile: int = 224, whole_pixels: bool = True) -> None:
    require_size(size, "size")
    require_grid(grid, "grid")


@counts(tile=1)
@checks(_check_scores)
def grid_scores(size: Size, grid: Size, *, tile: int = 224, whole_pixels: bool = True) -> tuple[Fraction, Fraction]:
    """How well a grid of square crops suits a page: (overlap in shape, overlap in size), each from 0 to 1.

    For the first the page is stretched or shrunk to the width of the grid's canvas. The released code then drops the
    fraction of its height, so grids of one shape can differ in this score; `whole_pixels=False` keeps it, as the
    paper's formula does. A page that is thinner than one pixel there has shape 0.
    """
    canvas = (grid[0] * tile, grid[1] * tile)
    height = Fraction(size[0] * canvas[1], size[1])
    if whole_pixels:
        height = Fraction(int(height))
    low, high = sorted((height, Fraction(canvas[0])))  # both rectangles are as wide as the canvas
    return low / high, corner_overlap(canvas, size)


def _check_choice(
    size: Size, *, tile: int = 224, max_cells: int = 20, max_side: int = 11, whole_pixels: bool = True
) -> None:
    require_size(size, "size")


@counts(tile=1, max_cells=1, max_side=1)
@checks(_check_choice)
def choose_grid(
    size: Size, *, tile: int = 224, max_cells: int = 20, max_side: int = 11, whole_pixels: bool = True
) -> Size:
    """(rows, columns) for a page of this size: the largest 100 * shape + size, of equals the first of `crop_grids`.

    With so large a weight the shape decides, and the size only among grids whose shape is (nearly) the same.
    """

    def score(grid: Size) -> Fraction:
        shape, extent = grid_scores(size, grid, tile=tile, whole_pixels=whole_pixels)
        return 100 * shape + extent

    return max(crop_grids(max_cells=max_cells, max_side=max_side), key=score)


def _check_places(grid: Size, *, whole: int = 11) -> None:
    require_grid(grid, "grid")
    if max(grid) > whole:
        raise ValueError(
            f"a side of the grid {tuple(grid)} is {max(grid)}, but the whole page has place {whole}: it must lie "
            "behind every row and column"
        )


@counts(whole=1)
@checks(_check_places)
def crop_places(grid: Size, *, whole: int = 11) -> Tensor:
    """(row, column) of every view of a page: [1 + rows * columns, 2], the whole page first, at (`whole`, `whole`).

    `whole` is the longest side of any grid: 11 in UReader, 9 in DocOwl 1.5.
    """
    rows, cols = grid
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).reshape(-1, 2)  # [rows * cols, 2], row by row
    return torch.cat([torch.full((1, 2), whole), cells])


def _check_crops(image: Tensor, *, tile: int = 224, max_cells: int = 20, max_side: int = 11) -> None:
    require_shape(image, "image", "C H W", hint="one page at a time: each has its own grid")


@counts(tile=1, max_cells=1, max_side=1)
@checks(_check_crops)
def shape_adaptive_crops(
    image: Tensor, *, tile: int = 224, max_cells: int = 20, max_side: int = 11
) -> tuple[Tensor, Tensor]:
    """The views that the tower sees, and their places: image [C, H, W] -> [1 + rows * columns, C, tile, tile] and
    [1 + rows * columns, 2]. The page is stretched to fill its grid, so there is no padding to cut off again.

    The whole page is there even when the grid is a single crop, the same picture then: so the released code has it.
    """
    rows, cols = choose_grid(tuple(image.shape[1:]), tile=tile, max_cells=max_cells, max_side=max_side)
    crops = divide_to_tiles(resize(image, (rows * tile, cols * tile)), tile)  # [C, H, W] -> [rows * cols, C, t, t]
    views = torch.cat([resize(image, (tile, tile))[None], crops])
    return views, crop_places((rows, cols), whole=min(max_cells, max_side)).to(image.device)


def _check_count(size: Size, *, tokens: int = 65, tile: int = 224, max_cells: int = 20, max_side: int = 11) -> None:
    require_size(size, "size")


@counts(tokens=1, tile=1, max_cells=1, max_side=1)
@checks(_check_count)
def crop_token_count(size: Size, *, tokens: int = 65, tile: int = 224, max_cells: int = 20, max_side: int = 11) -> int:
    """Visual tokens of a page, from its size alone: `tokens` for every view. 65 are UReader's, 257 DocOwl 1.5's."""
    rows, cols = choose_grid(size, tile=tile, max_cells=max_cells, max_side=max_side)
    return tokens * (1 + rows * cols)


def _check_words(places: Tensor, *, whole: int = 9) -> None:
    require_shape(places, "places", "views 2", floating=False, **{"2": 2})


@counts(whole=1)
@checks(_check_words)
def crop_words(places: Tensor, *, whole: int = 9) -> list[str]:
    """DocOwl 1.5's words in front of each view's tokens: places [views, 2] -> "<global_img>", "<crop_img_row0_col0>",
    and so on, one a view.

    They tell the language model in its own tokens where a crop lies; UReader has `CropPositions` for that.
    """
    return [
        "<global_img>" if (row, col) == (whole, whole) else f"<crop_img_row{row}_col{col}>"
        for row, col in places.tolist()
    ]


def _check_positions(self: "CropPositions", tokens: Tensor, places: Tensor) -> None:
    require_shape(tokens, "tokens", "views M D", D=self.rows.embedding_dim, hint="was it built for another width?")
    require_shape(places, "places", "views 2", floating=False, views=tokens.shape[0], **{"2": 2})
    require_same_device(tokens=tokens, places=places, **{"the embeddings": self.rows.weight})
    if readable(places):
        low, high = (int(end) for end in places.aminmax())
        if low < 0 or high >= self.rows.num_embeddings:
            raise ValueError(
                f"places run from {low} to {high}, but there are {self.rows.num_embeddings} rows and columns: "
                f"expected 0 to {self.rows.num_embeddings - 1}"
            )


@counts(dim=1, places=1)
@checks(_check_positions)
class CropPositions(nn.Module):
    """UReader's crop position encoding: half the sum of a row's and a column's embedding goes onto every token of a
    crop. forward: tokens [views, M, D], places [views, 2] -> [views, M, D].

    The released model has 15 of each. Half the sum, not the sum: so its code has it.
    """

    def __init__(self, dim: int, *, places: int = 15):
        super().__init__()
        self.rows = nn.Embedding(places, dim)
        self.columns = nn.Embedding(places, dim)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        place = (self.rows(places[:, 0]) + self.columns(places[:, 1])) / 2  # [views, 2] -> [views, D]
        return tokens + place[:, None]  # [views, M, D] + [views, 1, D]
