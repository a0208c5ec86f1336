"""Masks and polygons: rasterise one, trace the other, and a small decoder that predicts masks from patch features."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.bridges import LayerNorm2d
from vlm_course.grounding.metrics import _require_masks
from vlm_course.validation import (
    checks,
    counts,
    readable,
    require_grid,
    require_number,
    require_same_device,
    require_shape,
)

Ring = Sequence[Sequence[float]]


def _check_rings(rings: Sequence[Ring], size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is {tuple(size)}, expected two numbers, (height, width), at least 1 pixel of each")
    if not len(rings):
        raise ValueError("there are 0 rings, expected at least 1")
    for ring in rings:
        corners = torch.as_tensor(ring, dtype=torch.float64)
        require_shape(corners, "a ring", "corners xy", xy=2)
        if len(corners) < 3 or not corners.isfinite().all():
            raise ValueError(f"a ring has {len(corners)} corners {corners.tolist()}, expected at least 3 finite ones")


@checks(_check_rings)
def polygons_to_mask(rings: Sequence[Ring], size: tuple[int, int]) -> Tensor:
    """Fill polygons by the even-odd rule -> bool [height, width].

    A pixel is in when a ray from its centre (column + 1/2, row + 1/2) to the right crosses the rings an odd number of
    times. So a ring within a ring is a hole, and two polygons that share an edge share no pixel.

    Args:
        rings: each at least three (x, y) corners, the last joined to the first, in pixels.
        size: (height, width).

    Raises:
        ValueError: no ring, a ring of fewer than three corners, NaN, a size that is not positive.
    """
    height, width = size
    rows, columns = torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5  # [H], [W]
    inside = torch.zeros(height, width, dtype=torch.bool)
    for ring in rings:
        corners = torch.as_tensor(ring, dtype=torch.float64)
        for (x1, y1), (x2, y2) in zip(corners.tolist(), corners.roll(-1, 0).tolist(), strict=True):
            crossed = (rows > y1) != (rows > y2)  # [H]; a horizontal edge is crossed by no ray
            if y1 != y2:
                crossing = x1 + (rows - y1) * (x2 - x1) / (y2 - y1)  # [H]
                inside ^= crossed[:, None] & (columns[None, :] < crossing[:, None])
    return inside


def _check_mask(mask: Tensor) -> None:
    require_shape(mask, "mask", "H W", floating=None)
    _require_masks(mask[None], "mask")


@checks(_check_mask)
def mask_to_polygons(mask: Tensor) -> list[list[tuple[int, int]]]:
    """The rings of (x, y) pixel corners around a mask, bool [H, W]; an empty mask has none.

    Outer borders run clockwise on the screen, holes the other way round. `polygons_to_mask` gives the very mask back.
    Pixels that touch at a corner only belong to different rings.
    """
    height, width = mask.shape
    filled = F.pad(mask.to("cpu"), (1, 1, 1, 1)).tolist()
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}  # corner -> where the border goes on, mask on its right
    for y in range(height):
        for x in range(width):
            if filled[y + 1][x + 1]:
                if not filled[y][x + 1]:
                    edges.setdefault((x, y), []).append((x + 1, y))
                if not filled[y + 1][x + 2]:
                    edges.setdefault((x + 1, y), []).append((x + 1, y + 1))
                if not filled[y + 2][x + 1]:
                    edges.setdefault((x + 1, y + 1), []).append((x, y + 1))
                if not filled[y + 1][x]:
                    edges.setdefault((x, y + 1), []).append((x, y))
    rings = []
    while edges:
        start = next(iter(edges))
        ring = [start]
        while len(ring) == 1 or ring[-1] != start:
            ring.append(_next_corner(edges, ring))
        rings.append(_without_straight(ring[:-1]))
    return rings


def _next_corner(edges: dict, ring: list[tuple[int, int]]) -> tuple[int, int]:
    (x, y), choices = ring[-1], edges[ring[-1]]
    best = 0
    if len(choices) == 2 and len(ring) > 1:
        dx, dy = x - ring[-2][0], y - ring[-2][1]
        best = choices.index((x - dy, y + dx))  # turn right, around the same pixel
    corner = choices.pop(best)
    if not choices:
        del edges[(x, y)]
    return corner


def _without_straight(ring: list[tuple[int, int]]) -> list[tuple[int, int]]:
    around = [ring[-1], *ring, ring[0]]
    turns = zip(pairwise(around), pairwise(around[1:]), strict=False)
    return [b for (a, b), (_, c) in turns if (a[0] == b[0]) != (b[0] == c[0])]


def _check_boxed(masks: Tensor) -> None:
    _require_masks(masks, "masks")
    if readable(masks) and (empty := int((~masks.flatten(1).any(1)).sum())):
        raise ValueError(f"{empty} of {len(masks)} masks are empty, expected in each at least 1 pixel")


@checks(_check_boxed)
def masks_to_boxes(masks: Tensor) -> Tensor:
    """The tightest xyxy box around every mask, far edges included: bool [N, H, W] -> [N, 4] float.

    A mask of one pixel gets a box of area 1. Raises ValueError for an empty mask, which has no box.
    """
    ends = []
    for line in (masks.any(1), masks.any(2)):  # columns [N, W], rows [N, H]
        first = line.float().argmax(1)
        ends.append((first, line.shape[1] - line.flip(1).float().argmax(1)))
    (x1, x2), (y1, y2) = ends
    return torch.stack([x1, y1, x2, y2], dim=1).float()  # 4 x [N] -> [N, 4]


def _decoder_rule(self: "MaskDecoder", features: Tensor, queries: Tensor) -> None:
    rows, columns = self.grid
    hint = f"the decoder was built for {rows} x {columns} patches: was CLS left in?"
    require_shape(features, "features", "B N D", N=rows * columns, D=self.dim, hint=hint)
    require_shape(queries, "queries", "B Q D", B=len(features), D=self.query[0].in_features)
    require_same_device(features=features, queries=queries, **{"the decoder": self.query[0].weight})


def _check_decoder(self, *, grid: tuple[int, int], **rest: object) -> None:
    require_grid(grid, "grid")


@counts(dim=1, query_dim=1, hidden=1)
@checks(_decoder_rule, init=_check_decoder)
class MaskDecoder(nn.Module):
    """One mask for every query: the dot product of the query with each place of an upsampled feature map.

    forward: features [B, N, D], queries [B, Q, D_query] -> logits [B, Q, 4 * rows, 4 * columns]; a pixel is in the mask
    where its logit is positive. The query is what a language model's hidden state of a <SEG> token would be.
    Sources: Kirillov et al. 2023 (SAM, arXiv 2304.02643), appendix A, the upscaling and the dot product, without SAM's
    attention between tokens and image; Lai et al. 2023 (LISA, arXiv 2308.00692), section 3.2, the query from an LLM.

    Args:
        dim: width D of the patch features.
        query_dim: width of the queries.
        grid: (rows, columns) of the patches, rows * columns = N.
        hidden: channels of the upsampled map.
    """

    def __init__(self, *, dim: int, query_dim: int, grid: tuple[int, int], hidden: int = 32):
        super().__init__()
        self.dim, self.grid = dim, tuple(grid)
        self.upsample = nn.Sequential(
            nn.ConvTranspose2d(dim, 2 * hidden, kernel_size=2, stride=2),
            LayerNorm2d(2 * hidden),
            nn.GELU(),
            nn.ConvTranspose2d(2 * hidden, hidden, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.query = nn.Sequential(nn.Linear(query_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        x = features.transpose(1, 2).unflatten(2, self.grid)  # [B, N, D] -> [B, D, rows, columns]
        x = self.upsample(x)  # [B, D, rows, columns] -> [B, C, 4 rows, 4 columns]
        return torch.einsum("bqc,bchw->bqhw", self.query(queries), x)  # [B, Q, C] -> [B, Q, 4 rows, 4 columns]


def _check_loss(logits: Tensor, masks: Tensor, *, bce_weight: float = 2.0, dice_weight: float = 0.5) -> None:
    require_shape(logits, "logits", "B Q H W")
    if logits.shape != masks.shape or masks.dtype != torch.bool:
        raise ValueError(f"masks are {masks.dtype} {list(masks.shape)}, expected bool {list(logits.shape)}")
    require_same_device(logits=logits, masks=masks)
    require_number(bce_weight, "bce_weight", low=0)
    require_number(dice_weight, "dice_weight", low=0)


@checks(_check_loss)
def mask_loss(logits: Tensor, masks: Tensor, *, bce_weight: float = 2.0, dice_weight: float = 0.5) -> Tensor:
    """Cross-entropy of every pixel plus 1 - Dice of every mask: [B, Q, H, W] logits and bool masks -> a number.

    Cross-entropy alone lets a small object drown in background; Dice weighs a mask by its own area. Weights: LISA's.
    Source: Milletari et al. 2016 (V-Net, arXiv 1606.04797), section 3, Dice; Lai et al. 2023, section 3.2.
    """
    target = masks.to(logits)
    bce = F.binary_cross_entropy_with_logits(logits, target)
    share = logits.sigmoid()
    both, total = (share * target).sum((-2, -1)), (share + target).sum((-2, -1))  # [B, Q, H, W] -> [B, Q]
    dice = (2 * both + 1) / (total + 1)  # the ones keep an empty mask, predicted empty, at 1
    return bce_weight * bce + dice_weight * (1 - dice).mean()
