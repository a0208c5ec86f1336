"""What a model points to, drawn on the picture: boxes and points with a label."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Mark:
    """A place in an image, in pixels from its upper left corner: a box `xyxy`, or a point if both corners are equal."""

    label: str
    xyxy: tuple[float, float, float, float]

    @property
    def is_point(self) -> bool:
        return self.xyxy[:2] == self.xyxy[2:]


def draw_marks(image: Image.Image, marks: Iterable[Mark], *, least_side: int = 384) -> Image.Image:
    """A copy of `image` with every mark on it, enlarged to `least_side` so that thin lines and labels can be read.

    Every line is drawn twice, wide and white below, thin and black above: it can be seen on any ground.
    """
    scale = max(1, -(-least_side // min(image.size)))
    canvas = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    unit = max(1, min(canvas.size) // 300)
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=11 * unit)
    for mark in marks:
        box = [value * scale for value in mark.xyxy]
        arm = 8 * unit if mark.is_point else 0
        for colour, width in (("white", 5 * unit), ("black", 2 * unit)):
            if mark.is_point:
                x, y = box[:2]
                pen.line([x - arm, y, x + arm, y], fill=colour, width=width)
                pen.line([x, y - arm, x, y + arm], fill=colour, width=width)
            else:
                low, high = (box[0], box[1]), (max(box[0], box[2]), max(box[1], box[3]))
                pen.rectangle([*low, *high], outline=colour, width=width)
        left, _, right, bottom = pen.textbbox((0, 0), mark.label, font=font)
        x = min(max(0, box[0]), max(0, canvas.width - (right - left) - 4 * unit))
        above = box[1] - arm - (bottom + 4 * unit)
        y = above if above >= 0 else min(box[3] + arm + 2 * unit, canvas.height - bottom - 4 * unit)
        pen.rectangle([x, y, x + right + 4 * unit, y + bottom + 4 * unit], fill="white")
        pen.text((x + 2 * unit, y + unit), mark.label, fill="black", font=font)
    return canvas
