"""Grounding: places in an image written as text, read back, drawn as masks, and compared.

>>> from vlm_course.grounding import QwenVL, box
>>> text = QwenVL().write([box(64, 48, 320, 240, "a cup")], size=(480, 640))
>>> text
'<ref>a cup</ref><box>(100,100),(500,500)</box>'
>>> [round(number) for number in QwenVL().read(text, size=(480, 640))[0].numbers]
[64, 48, 320, 240]
"""

from vlm_course.grounding.formats import Molmo, Qwen25VL, QwenVL, Shikra, SmallModel
from vlm_course.grounding.masks import MaskDecoder, mask_loss, mask_to_polygons, masks_to_boxes, polygons_to_mask
from vlm_course.grounding.metrics import (
    box_convert,
    box_iou,
    generalized_box_iou,
    mask_iou,
    pointing_accuracy,
    points_in_boxes,
    points_in_masks,
)
from vlm_course.grounding.regions import Format, Region, box, point, polygon
from vlm_course.grounding.tokens import Kosmos2, PaliGemma

__all__ = [
    "Format",
    "Kosmos2",
    "MaskDecoder",
    "Molmo",
    "PaliGemma",
    "Qwen25VL",
    "QwenVL",
    "Region",
    "Shikra",
    "SmallModel",
    "box",
    "box_convert",
    "box_iou",
    "generalized_box_iou",
    "mask_iou",
    "mask_loss",
    "mask_to_polygons",
    "masks_to_boxes",
    "point",
    "pointing_accuracy",
    "points_in_boxes",
    "points_in_masks",
    "polygon",
    "polygons_to_mask",
]
