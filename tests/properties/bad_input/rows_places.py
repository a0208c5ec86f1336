"""Chapter 7: places as text, boxes, points and masks."""

import math

import torch
from bad_input_table import NO_ROW, Bool, F, row

from vlm_course.grounding import MaskDecoder, Molmo, Qwen25VL, Region, masks, regions

NAN = float("nan")
NOTHING = "a list of nothing compares with nothing: an empty table, as in torchvision"
SIZES = [({"size": (0, 5)}, "(0, 5)", "positive"), ({"size": (5,)}, "(5,)", "positive"), ({"size": (NAN, 5)}, "nan")]


def boxes(letter):
    """Random corners, in order."""
    return F(f"{letter} 4", lambda s: torch.rand(getattr(s, letter), 2, 2).sort(dim=1).values.flatten(1))


def spoilt(name):
    """NaN, infinity and corners in the wrong order."""
    return [
        ({name: torch.full((3, 4), NAN)}, name, "12 of 12", "NaN"),
        ({name: torch.full((3, 4), math.inf)}, name, "12 of 12", "infinite"),
        ({name: torch.tensor([[5.0, 0, 4, 9]] * 3)}, "x1 = 5.0", "x2 = 4.0", "xywh"),
        ({name: torch.tensor([[0.0, 7, 4, 6]] * 3)}, "y1 = 7.0", "y2 = 6.0", "xywh"),
    ]


PAIRS = {
    "a": boxes("N"), "b": boxes("M"), "_free": {"a.N=0": NOTHING, "b.M=0": NOTHING},
    "_bad": [*spoilt("a"), *spoilt("b")],
}  # fmt: skip

for name in ("Shikra", "QwenVL", "Molmo", "SmallModel"):
    NO_ROW[f"grounding.formats.{name}"] = "takes no arguments; its methods are those of Format, tested there"
for name in ("Kosmos2", "PaliGemma"):
    NO_ROW[f"grounding.tokens.{name}"] = "takes no arguments; its methods are those of Format, tested there"
row("grounding.formats.Qwen25VL", seen=(4, 6), _bad=[({"seen": (0, 6)}, "(0, 6)", "positive")])
row("grounding.formats.Qwen25VL.half_bin", _on=lambda s: Qwen25VL((4, 6)), size=(4, 6), _bad=SIZES)
row("grounding.tokens.Kosmos2.half_bin", _on=lambda s: regions_format("Kosmos2"), size=(4, 6), _bad=SIZES)


def regions_format(name):
    import vlm_course.grounding as grounding

    return getattr(grounding, name)()


row("grounding.regions.Region", kind="point", xy=((1, 2),),
    _bad=[({"kind": "circle"}, "circle", "point, box, polygon"), ({"xy": ((1, 2), (3, 4))}, "exactly 1", "2"),
          ({"xy": ((NAN, 2),)}, "finite", "nan"), ({"xy": ((1, 2, 3),)}, "pairs", "(1, 2, 3)"),
          ({"kind": "box", "xy": ((5, 0), (4, 9))}, "x1 = 5.0", "x2 = 4.0")])  # fmt: skip
row("grounding.regions.Region.resized", _on=lambda s: Region("point", ((1, 2),)), old=(4, 6), new=(8, 9),
    _bad=[({"old": (0, 5)}, "old", "(0, 5)"), ({"new": (5, -1)}, "new", "(5, -1)")])  # fmt: skip
ANYWHERE = "a coordinate may be any finite number; write asks for the image's size"
row("grounding.regions.point", x=1.0, y=2.0, _free={"x=-1": ANYWHERE, "y=-1": ANYWHERE})
row("grounding.regions.box", x1=1.0, y1=2.0, x2=3.0, y2=4.0,
    _free={"x1=-1": ANYWHERE, "y1=-1": ANYWHERE},
    _bad=[({"x2": 0.5}, "x1 = 1.0", "x2 = 0.5", "xywh"), ({"y2": 1.5}, "y1 = 2.0", "y2 = 1.5", "xywh")])  # fmt: skip
row(
    "grounding.regions.polygon",
    xy=[(0, 0), (1, 0), (1, 1)],
    _bad=[({"xy": [(0, 0), (1, 1)]}, "at least 3", "2"), ({"xy": [(0, 0), (1, 1), (NAN, 1)]}, "finite", "nan")],
)
row("grounding.regions.require_size", size=(4, 6), _bad=[*SIZES, ({"size": (math.inf, 6)}, "inf", "positive")])
NO_ROW["grounding.regions.Format"] = "a base class without a constructor of its own"
ON_MOLMO = {"_on": lambda s: Molmo()}
row("grounding.regions.Format.half_bin", **ON_MOLMO, size=(4, 6), _bad=SIZES)
row("grounding.regions.Format.write", **ON_MOLMO, regions=lambda s: [regions.point(1, 2)], size=(4, 6),
    _bad=[*SIZES, ({"regions": [regions.box(0, 0, 1, 1)]}, "box", "point"),
          ({"regions": [regions.point(1, 5)]}, "y = 5.0", "4"), ({"regions": [regions.point(-1, 2)]}, "x = -1.0", "6"),
          ({"regions": [regions.point(1, 2, '"')]}, "label")])  # fmt: skip
row(
    "grounding.regions.Format.read",
    **ON_MOLMO,
    text="",
    size=(4, 6),
    _bad=[*SIZES, ({"text": None}, "NoneType", "str")],
)
NO_ROW["grounding.regions.by_label"] = "sorts regions, which are checked when they are made"
NO_ROW["grounding.regions.valid"] = "reads what a model wrote: it drops what is bad and never raises"

row("grounding.metrics.box_convert", boxes=boxes("N"), source="xyxy", target="xywh",
    _free={"boxes.N=0": NOTHING},
    _bad=[*spoilt("boxes"), ({"source": "yxyx"}, "yxyx", "xyxy, xywh"), ({"target": "yxyx"}, "yxyx", "xyxy, xywh"),
          ({"source": "xywh", "boxes": torch.tensor([[5.0, 5, -1, 2]])}, "-1.0", "at least 0")])  # fmt: skip
row("grounding.metrics.intersection_and_union", a=F("N 4"), b=F("N 4"), _low={"N": 2},
    _free={f"{x}.{how}": "any axes before the last broadcast, and nothing overlaps nothing"
           for x in "ab" for how in ("rank", "N=0")})  # fmt: skip
NO_ROW["grounding.metrics.share"] = "a quotient, number by number, of what the functions above it have checked"
row("grounding.metrics.box_iou", **PAIRS)
row("grounding.metrics.generalized_box_iou", **PAIRS)
row("grounding.metrics.mask_iou", a=Bool("N H W"), b=Bool("M H W"), _free=PAIRS["_free"] | {
    f"{x}.{axis}=0": "masks without pixels are compared as sets without elements" for x in "ab" for axis in "HW"},
    _bad=[({"a": torch.zeros(2, 3, 4)}, "float32", "bool")])  # fmt: skip
POINT_FREE = {"points.N=0": "no points, no answers", "boxes.N=0": "no points, no answers",
              "masks.N=0": "no points, no answers", "masks.H=0": "an image of no pixels, which every point misses",
              "masks.W=0": "an image of no pixels, which every point misses"}  # fmt: skip
NO_NUMBER = ({"points": torch.full((3, 2), NAN)}, "6 of 6", "NaN")
THREE = {"_fix": {"N": 3}}
row("grounding.metrics.points_in_boxes", points=F("N 2"), boxes=boxes("N"), **THREE, _bad=[NO_NUMBER, *spoilt("boxes")])
row(
    "grounding.metrics.points_in_masks",
    points=F("N 2"),
    masks=Bool("N H W"),
    **THREE,
    _free={"masks.H=0": POINT_FREE["masks.H=0"], "masks.W=0": POINT_FREE["masks.W=0"]},
    _bad=[NO_NUMBER],
)
row(
    "grounding.metrics.pointing_accuracy",
    points=F("N 2"),
    targets=boxes("N"),
    answered=Bool("N"),
    **THREE,
    _bad=[
        NO_NUMBER,
        ({"targets": torch.full((3, 4), NAN)}, "12 of 12", "NaN"),
        ({"targets": torch.zeros(0, 4), "points": torch.zeros(0, 2)}, "0 targets"),
    ],
)

SQUARE = [[(0, 0), (2, 0), (2, 2), (0, 2)]]
row("grounding.masks.polygons_to_mask", rings=SQUARE, size=(3, 4),
    _bad=[({"rings": []}, "0 rings", "at least 1"), ({"size": (0, 4)}, "(0, 4)", "at least 1"),
          ({"rings": [[(0, 0), (1, 1)]]}, "2 corners", "at least 3"), ({"rings": [[(0, 0), (1, 1), (NAN, 0)]]}, "nan"),
          ({"rings": [[(0, 0, 0)] * 3]}, "3", "expected 2"), ({"size": (3, 4, 5)}, "(3, 4, 5)", "two")])  # fmt: skip
row("grounding.masks.mask_to_polygons", mask=Bool("H W"), _bad=[({"mask": torch.zeros(2, 3)}, "float32", "bool")])
row(
    "grounding.masks.masks_to_boxes",
    masks=Bool("N H W"),
    _bad=[({"masks": torch.zeros(2, 3, 4) > 0}, "2 of 2", "empty"), ({"masks": torch.zeros(2, 3, 4)}, "float32")],
)
DECODER = {"dim": 6, "query_dim": 4, "grid": (2, 3), "hidden": 2}
row("grounding.masks.MaskDecoder", **DECODER, _bad=[({"grid": (0, 3)}, "(0, 3)", "at least 1")])
row(
    "grounding.masks.MaskDecoder.forward",
    _on=lambda s: MaskDecoder(**DECODER),
    features=F("B 6 D"),
    queries=F("B Q C"),
    _fix={"D": 6, "C": 4},
)
row(
    "grounding.masks.mask_loss",
    logits=F("B Q H W"),
    masks=Bool("B Q H W"),
    _bad=[({"masks": torch.zeros(3, 2, 4, 5)}, "float32", "bool")],
)
assert masks
