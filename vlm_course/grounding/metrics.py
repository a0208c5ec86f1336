"""Boxes and masks compared: conversions, intersection over union, and whether a point hits."""

import torch
from torch import Tensor

from vlm_course.validation import checks, readable, require_finite, require_same_device, require_shape

BOX_FORMATS = {
    "xyxy": "two corners",
    "xywh": "upper left corner, width and height",
    "cxcywh": "centre, width and height",
}


def _require_boxes(boxes: Tensor, name: str, fmt: str = "xyxy") -> None:
    require_shape(boxes, name, "N four", four=4, floating=None, empty=True, hint=f"each row is a box in {fmt}")
    require_finite(boxes, name)
    if not readable(boxes):
        return
    if fmt == "xyxy":
        for first, second, axis in ((0, 2, "x"), (1, 3, "y")):
            wrong = (boxes[:, second] < boxes[:, first]).nonzero()
            if len(wrong):
                row = wrong[0].item()
                low, high = boxes[row, first].item(), boxes[row, second].item()
                raise ValueError(f"{name}[{row}] has {axis}1 = {low} but {axis}2 = {high}; is it xywh, not xyxy?")
    elif len(boxes) and (smallest := boxes[:, 2:].min().item()) < 0:
        raise ValueError(f"{name} has a side of {smallest}, expected at least 0 in {fmt}; is it xyxy?")


def _wide(boxes: Tensor) -> Tensor:
    # Half precision ends at 65,504, less than the area of a box of 256 x 256 pixels.
    return boxes if boxes.dtype == torch.float64 else boxes.float()


def _check_convert(boxes: Tensor, source: str, target: str) -> None:
    for name in (source, target):
        if name not in BOX_FORMATS:
            raise ValueError(f"the box format is {name!r}, expected one of {', '.join(BOX_FORMATS)}")
    _require_boxes(boxes, "boxes", source)


@checks(_check_convert)
def box_convert(boxes: Tensor, source: str, target: str) -> Tensor:
    """Boxes [N, 4] from one of xyxy, xywh (upper left corner) and cxcywh (centre) to another -> [N, 4] float.

    Raises:
        ValueError: another rank or width, NaN, an unknown name, a negative side.
    """
    low, rest = _wide(boxes).split(2, dim=-1)  # [N, 4] -> [N, 2], [N, 2]
    if source == "xyxy":
        rest = rest - low
    elif source == "cxcywh":
        low = low - rest / 2
    if target == "xyxy":
        rest = low + rest
    elif target == "cxcywh":
        low = low + rest / 2
    return torch.cat([low, rest], dim=-1)  # [N, 2], [N, 2] -> [N, 4]


def _sides(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)  # [..., 4] -> [..., 2], width and height


def _check_corners(a: Tensor, b: Tensor) -> None:
    if a.shape[-1:] != (4,) or b.shape[-1:] != (4,):
        raise ValueError(f"a is {list(a.shape)} and b {list(b.shape)}, expected [..., 4] each: x1, y1, x2, y2")
    for one, other in zip(reversed(a.shape), reversed(b.shape), strict=False):
        if one != other and 1 not in (one, other):
            raise ValueError(f"a is {list(a.shape)} and b {list(b.shape)}, expected shapes that broadcast")
    require_same_device(a=a, b=b)


@checks(_check_corners)
def intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas that two boxes share and that they cover together, xyxy: [..., 4] and [..., 4] broadcast -> 2 x [...].

    Neither looks at its numbers nor waits for the device: a box with the second corner before the first has area 0,
    NaN stays NaN. `box_iou` compares all with all, `vlm_course.measures.box_iou` row by row; both are this.
    """
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)  # [..., 2] -> [...]
    return both, _sides(a).prod(-1) + _sides(b).prod(-1) - both


def share(part: Tensor, whole: Tensor, empty: float) -> Tensor:
    """part / whole, and `empty` where the whole is not above 0 or is NaN."""
    return torch.where(whole > 0, part / whole.where(whole > 0, 1), empty)


def _check_pair(a: Tensor, b: Tensor) -> None:
    for boxes, name in ((a, "a"), (b, "b")):
        _require_boxes(boxes, name)
    require_same_device(a=a, b=b)


@checks(_check_pair)
def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of one list with every box of another, xyxy: [N, 4], [M, 4] -> [N, M].

    Two boxes without area share nothing: 0. No boxes on a side give an empty table.
    Raises ValueError for another rank or width, NaN, a second corner before the first (xywh?), two devices.
    """
    both, union = intersection_and_union(_wide(a)[:, None], _wide(b)[None])  # [N, 1, 4], [1, M, 4] -> 2 x [N, M]
    return share(both, union, 0.0)


@checks(_check_pair)
def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU minus the share of the smallest enclosing box that neither covers, in (-1, 1]: [N, 4], [M, 4] -> [N, M].

    Where two boxes do not touch IoU is 0 however far they are apart; this falls with the distance. Raises as `box_iou`.
    Source: Rezatofighi et al. 2019 (arXiv 1902.09630), algorithm 1.
    """
    a, b = _wide(a)[:, None], _wide(b)[None]  # [N, 4] -> [N, 1, 4], [M, 4] -> [1, M, 4]
    both, union = intersection_and_union(a, b)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = hull.prod(-1)  # [N, M, 2] -> [N, M]
    return share(both, union, 0.0) - share(hull - union, hull, 0.0)


def _check_masks(a: Tensor, b: Tensor) -> None:
    for masks, name in ((a, "a"), (b, "b")):
        _require_masks(masks, name, empty=True)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"a has masks of {tuple(a.shape[1:])}, b of {tuple(b.shape[1:])}, expected the same (height, width)"
        )
    require_same_device(a=a, b=b)


@checks(_check_masks)
def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every mask with every other: bool [N, H, W], [M, H, W] -> [N, M].

    Two empty masks agree: 1, as in the benchmarks where an expression may name nothing (GRES, arXiv 2306.00968).
    Raises ValueError for other ranks, sizes, dtypes, devices.
    """
    flat_a, flat_b = a.flatten(1).float(), b.flatten(1).float()  # [N, H, W] -> [N, H*W]
    both = flat_a @ flat_b.T  # [N, H*W] x [H*W, M] -> [N, M]
    union = flat_a.sum(1)[:, None] + flat_b.sum(1)[None, :] - both
    return share(both, union, 1.0)


def _require_masks(masks: Tensor, name: str, *, empty: bool = False) -> None:
    require_shape(masks, name, "N H W", floating=None, empty=empty)
    if masks.dtype != torch.bool:
        raise ValueError(f"{name} is {masks.dtype}, expected torch.bool; threshold logits first (> 0)")


def _require_points(points: Tensor, targets: Tensor, name: str) -> None:
    require_shape(points, "points", "N xy", xy=2, floating=None, empty=True, hint="each row is (x, y)")
    if len(points) != len(targets):
        raise ValueError(f"there are {len(points)} points but {len(targets)} {name}, expected one each")
    require_same_device(**{"points": points, name: targets})
    require_finite(points, "points")


def _check_in_boxes(points: Tensor, boxes: Tensor) -> None:
    _require_boxes(boxes, "boxes")
    _require_points(points, boxes, "boxes")


@checks(_check_in_boxes)
def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether each point lies in its box, edges included: [N, 2] as (x, y), [N, 4] xyxy -> bool [N]."""
    return ((points >= boxes[:, :2]) & (points <= boxes[:, 2:])).all(-1)  # [N, 2] -> [N]


def _check_in_masks(points: Tensor, masks: Tensor) -> None:
    _require_masks(masks, "masks", empty=True)
    _require_points(points, masks, "masks")


@checks(_check_in_masks)
def points_in_masks(points: Tensor, masks: Tensor) -> Tensor:
    """Whether each point lies on a pixel of its mask: [N, 2] as (x, y), bool [N, H, W] -> bool [N].

    Pixel (row, column) covers [column, column + 1) x [row, row + 1); a point outside the image misses.
    """
    height, width = masks.shape[1:]
    column, row = points.floor().unbind(-1)  # [N, 2] -> [N], [N]
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row = column.clamp(0, width - 1).long(), row.clamp(0, height - 1).long()
    return inside & masks[torch.arange(len(masks), device=masks.device), row, column]


def _check_pointing(points: Tensor, targets: Tensor, *, answered: Tensor | None = None) -> None:
    if targets.dim() not in (2, 3):
        raise ValueError(f"targets have {targets.dim()} dimensions, expected 2 (boxes [N, 4]) or 3 (masks [N, H, W])")
    if targets.dim() == 3 and targets.dtype != torch.bool:
        shape = f"{targets.dim()} dimensions and are {targets.dtype}"
        raise ValueError(f"targets have {shape}, expected boxes [N, 4] or masks [N, H, W] of torch.bool")
    if not len(targets):
        raise ValueError("there are 0 targets, expected at least 1: an accuracy over nothing is no number")
    (_check_in_boxes if targets.dim() == 2 else _check_in_masks)(points, targets)
    if answered is not None:
        if answered.shape != points.shape[:1] or answered.dtype != torch.bool:
            raise ValueError(f"answered is {answered.dtype} {list(answered.shape)}, expected bool [{len(points)}]")
        require_same_device(points=points, answered=answered)


@checks(_check_pointing)
def pointing_accuracy(points: Tensor, targets: Tensor, *, answered: Tensor | None = None) -> float:
    """Share of points that hit their box [N, 4] or mask [N, H, W], in [0, 1].

    `answered` [N] bool marks the rows in which the model gave a point at all; the others count as misses, whatever
    their numbers. To leave them out instead would reward a model for silence.
    Source: Zhang et al. 2016 (the pointing game, arXiv 1608.00507), section 4.1.

    Raises:
        ValueError: no rows, unequal counts, NaN, another rank.
    """
    hits = (points_in_boxes if targets.dim() == 2 else points_in_masks)(points, targets)
    if answered is not None:
        hits = hits & answered
    return hits.float().mean().item()
