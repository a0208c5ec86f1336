"""Pages: how large their letters are in pixels, and where each word stands.

A page is measured in points (1/72 inch) and scanned at so many dots per inch (DPI). Page sizes are (height, width),
word boxes (left, top, right, bottom).
"""

from collections.abc import Sequence
from math import isfinite
from numbers import Real
from types import MappingProxyType

import torch
from torch import Tensor, nn

from vlm_course.validation import checks, counts, require_shape

POINTS_PER_INCH = 72

# (height, width) in points.
PAGES = MappingProxyType({"a4": (841.89, 595.28), "letter": (792.0, 612.0), "legal": (1008.0, 612.0)})

# LayoutLM's coordinates run from 0 to 1000 whatever the page's size; its tables have room for 1024.
LAYOUT_GRID = 1000

# Height of a lower-case x in a common text face, as a share of the font size (Times 0.45, Helvetica 0.52).
X_HEIGHT = 0.5


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, Real) or not isfinite(value) or value <= 0:
            raise ValueError(f"{name} is {value!r}, expected a finite number above 0")


def _require_page(page: Sequence[float], name: str) -> None:
    if len(page) != 2:
        raise ValueError(f"{name} has {len(page)} numbers, expected 2: (height, width)")
    _require_positive(**{f"the height of {name}": page[0], f"the width of {name}": page[1]})


@checks(lambda points, dpi: _require_positive(points=points, dpi=dpi))
def points_to_pixels(points: float, dpi: float) -> float:
    """Length in pixels, not rounded: a point is 1/72 inch."""
    return points * dpi / POINTS_PER_INCH


def _check_page(page: Sequence[float], dpi: float) -> None:
    _require_page(page, "page")
    _require_positive(dpi=dpi)


@checks(_check_page)
def page_pixels(page: Sequence[float], dpi: float) -> tuple[int, int]:
    """(height, width) in whole pixels of a page given in points: US letter at 300 DPI is (3300, 2550)."""
    height, width = page
    return round(points_to_pixels(height, dpi)), round(points_to_pixels(width, dpi))


def _check_scale(size: Sequence[float], canvas: Sequence[float]) -> None:
    _require_page(size, "size")
    _require_page(canvas, "canvas")


@checks(_check_scale)
def fit_scale(size: Sequence[float], canvas: Sequence[float]) -> float:
    """Factor by which a picture of size (height, width) is resized to fit whole into a canvas, its shape kept."""
    return min(canvas[0] / size[0], canvas[1] / size[1])


def _check_x_height(font_points: float, dpi: float, *, scale: float = 1.0, x_height: float = X_HEIGHT) -> None:
    _require_positive(font_points=font_points, dpi=dpi, scale=scale, x_height=x_height)


@checks(_check_x_height)
def x_height_pixels(font_points: float, dpi: float, *, scale: float = 1.0, x_height: float = X_HEIGHT) -> float:
    """Height in pixels of a lower-case x, the part of a letter that must be resolved to read it.

    Args: font_points, the font size (its em); dpi of the scan; scale, the resizing after it, from `fit_scale`;
    x_height, the share of the em. 12 points on a letter page at 300 DPI, resized to 336 px: 50 px shrink to 5.1, of
    which the x has 2.5.
    """
    return points_to_pixels(font_points, dpi) * scale * x_height


def _check_dpi(font_points: float, pixels: float, *, x_height: float = X_HEIGHT) -> None:
    _require_positive(font_points=font_points, pixels=pixels, x_height=x_height)


@checks(_check_dpi)
def dpi_for_x_height(font_points: float, pixels: float, *, x_height: float = X_HEIGHT) -> float:
    """The resolution at which a lower-case x of this font size is so many pixels high: `x_height_pixels` inverted."""
    return pixels * POINTS_PER_INCH / (font_points * x_height)


def _require_boxes(boxes: Tensor, *, width: float, height: float) -> None:
    if boxes.dim() < 1 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes has shape {list(boxes.shape)}, expected [..., 4]: left, top, right, bottom")
    if boxes.isnan().any():
        raise ValueError(f"{int(boxes.isnan().sum())} of {boxes.numel()} coordinates are NaN, expected 0")
    left, top, right, bottom = boxes.unbind(-1)
    for low, high, limit, names in ((left, right, width, "left, right"), (top, bottom, height, "top, bottom")):
        outside = ((low < 0) | (high > limit) | (low > high)).nonzero()
        if len(outside):
            worst = tuple(outside[0].tolist())
            raise ValueError(
                f"a box has ({names}) = ({low[worst]:g}, {high[worst]:g}), expected 0 <= {names.replace(', ', ' <= ')} "
                f"<= {limit:g}; boxes are (left, top, right, bottom), not (left, top, width, height)"
            )


def _check_normalise(boxes: Tensor, page: Sequence[float]) -> None:
    _require_page(page, "page")
    _require_boxes(boxes, width=page[1], height=page[0])


@checks(_check_normalise)
def normalise_boxes(boxes: Tensor, page: Sequence[float]) -> Tensor:
    """Word boxes on LayoutLM's grid: boxes [..., 4] (left, top, right, bottom) in the page's unit -> integers 0..1000.

    page (height, width) in the same unit as the boxes. Rounds down, as the published models' code does, and in float64:
    float32 puts some coordinates one too low.
    """
    height, width = page
    sides = torch.tensor([width, height, width, height], dtype=torch.float64, device=boxes.device)
    return (LAYOUT_GRID * (boxes.double() / sides)).long()  # [..., 4]


def _check_token_boxes(boxes: Tensor, words: Sequence[int | None]) -> None:
    require_shape(boxes, "boxes", "words 4", floating=None, hint="left, top, right, bottom", **{"4": 4})
    named = [word for word in words if word is not None]
    if named and not 0 <= min(named) <= max(named) < len(boxes):
        raise ValueError(f"words names {min(named)}..{max(named)}, but there are boxes for 0..{len(boxes) - 1} only")


@checks(_check_token_boxes)
def token_boxes(boxes: Tensor, words: Sequence[int | None]) -> Tensor:
    """A box for every token: all pieces of a word share the word's box.

    Args: boxes [W, 4] of the words; words, the number of each token's word, None for a special token. Returns [T, 4],
    zeros for special tokens.
    """
    padded = torch.cat([boxes, boxes.new_zeros(1, 4)])  # [W, 4] -> [W + 1, 4]
    index = [len(boxes) if word is None else word for word in words]
    return padded[torch.tensor(index, dtype=torch.long, device=boxes.device)]  # [W + 1, 4] -> [T, 4]


def _check_layout(embedding: "LayoutEmbedding", boxes: Tensor) -> None:
    require_shape(boxes, "boxes", "B T 4", floating=False, hint="use normalise_boxes first")
    if boxes.device != embedding.x.weight.device:
        raise ValueError(f"boxes is on {boxes.device}, the embedding is on {embedding.x.weight.device}")
    largest = embedding.x.num_embeddings - 1
    _require_boxes(boxes, width=largest, height=largest)


@counts(width=1, coordinates=1)
@checks(_check_layout)
class LayoutEmbedding(nn.Module):
    """Where a word stands, as a vector to add to its token embedding. forward: boxes [B, T, 4] -> [B, T, D].

    Integer boxes (left, top, right, bottom) as from `normalise_boxes`. Left and right share a table, as do top and
    bottom, so that words in one column or on one line have a vector in common. The paper sums these four; its released
    code, and `transformers` after it, adds the height and the width, as here.
    Source: Xu et al. 2020 (LayoutLM, arXiv 1912.13318), section 2.2.
    """

    def __init__(self, width: int, *, coordinates: int = 1024):
        super().__init__()
        self.x = nn.Embedding(coordinates, width)
        self.y = nn.Embedding(coordinates, width)
        self.height = nn.Embedding(coordinates, width)
        self.width = nn.Embedding(coordinates, width)
        for table in (self.x, self.y, self.height, self.width):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, boxes: Tensor) -> Tensor:
        left, top, right, bottom = boxes.unbind(-1)  # [B, T, 4] -> 4 x [B, T]
        corners = self.x(left) + self.y(top) + self.x(right) + self.y(bottom)  # [B, T] -> [B, T, D]
        return corners + self.height(bottom - top) + self.width(right - left)  # [B, T, D]
