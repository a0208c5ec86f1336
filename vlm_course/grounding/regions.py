"""What every text format of a place in an image writes and reads: a `Region`, and the base class of the formats."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

UNIT = (1, 1)
CORNERS = {"point": "exactly 1", "box": "exactly 2", "polygon": "at least 3"}


@dataclass(frozen=True)
class Region:
    """A place in an image, with what is there.

    Args:
        kind: "point", "box" or "polygon".
        xy: (x, y) pairs: one for a point, upper left and lower right for a box, the ring's corners for a polygon.
            x grows to the right, y downwards; a whole number is the edge between two pixels.
        label: the words that the place belongs to; "" for none.

    Raises:
        ValueError: an unknown kind, a wrong number of pairs, NaN or infinity, or a box whose second corner is not
            below and to the right of its first.
    """

    kind: str
    xy: tuple[tuple[float, float], ...]
    label: str = ""

    def __post_init__(self):
        if self.kind not in CORNERS:
            raise ValueError(f"kind is {self.kind!r}, expected one of {', '.join(CORNERS)}")
        if any(len(pair) != 2 for pair in self.xy):
            raise ValueError(f"a {self.kind} is made of (x, y) pairs, got {self.xy}")
        object.__setattr__(self, "xy", tuple((float(x), float(y)) for x, y in self.xy))
        count = len(self.xy)
        if not {"point": count == 1, "box": count == 2, "polygon": count >= 3}[self.kind]:
            raise ValueError(f"a {self.kind} has {CORNERS[self.kind]} (x, y) pairs, got {count}")
        if not all(math.isfinite(number) for number in self.numbers):
            raise ValueError(f"a {self.kind} has the numbers {self.numbers}, expected finite ones")
        if self.kind == "box":
            (x1, y1), (x2, y2) = self.xy
            for name, low, high in (("x", x1, x2), ("y", y1, y2)):
                if high < low:
                    raise ValueError(f"the box has {name}1 = {low} but {name}2 = {high}; is it xywh, not xyxy?")

    @property
    def numbers(self) -> tuple[float, ...]:
        """x and y in turn: two numbers of a point, four (xyxy) of a box, 2n of a polygon."""
        return tuple(number for pair in self.xy for number in pair)

    def resized(self, old: tuple[float, float], new: tuple[float, float]) -> "Region":
        """The same place after the image went from the size `old` to `new`, both (height, width)."""
        (old_height, old_width), (height, width) = require_size(old, "old"), require_size(new, "new")
        xy = tuple((x / old_width * width, y / old_height * height) for x, y in self.xy)
        return Region(self.kind, xy, self.label)


def point(x: float, y: float, label: str = "") -> Region:
    """A `Region` that is one place."""
    return Region("point", ((x, y),), label)


def box(x1: float, y1: float, x2: float, y2: float, label: str = "") -> Region:
    """A `Region` between two corners. Raises ValueError when the second is not below and to the right of the first."""
    return Region("box", ((x1, y1), (x2, y2)), label)


def polygon(xy: Iterable[Sequence[float]], label: str = "") -> Region:
    """A `Region` inside a closed ring; the last corner joins the first, so do not repeat it."""
    return Region("polygon", tuple(tuple(pair) for pair in xy), label)


def require_size(size: tuple[float, float], name: str = "size") -> tuple[float, float]:
    """(height, width), both positive and finite, or ValueError."""
    if len(size) != 2 or not all(math.isfinite(side) and side > 0 for side in size):
        raise ValueError(f"{name} is {tuple(size)}, expected a positive (height, width)")
    return size


class Format:
    """One way to write regions as text.

    `write` and `read` take the image's size as (height, width); coordinates are in its units, so size=(1, 1) gives
    fractions of the image. `write` refuses what the format cannot say; `read` never raises on a text: models write
    broken ones, so it returns the regions that are well formed and inside the image, in order.

    A subclass works in fractions of the image: `_write` gets regions in the unit square, `_read` returns such.
    """

    kinds: tuple[str, ...]  # what the format can write
    keeps_labels = True  # whether `read` can tell a label from the text around it
    unsafe = ""  # characters that a label must not hold, because they end it
    bins: int  # steps from 0 to 1

    def half_bin(self, size: tuple[float, float]) -> tuple[float, float]:
        """Largest distance in (x, y) between a coordinate and what is read back, in the units of `size`."""
        height, width = require_size(size)
        return width / self.bins / 2, height / self.bins / 2

    def write(self, regions: Sequence[Region], size: tuple[float, float]) -> str:
        """Regions as text; neighbours with the same label are written together where the format has a way to.

        Raises:
            ValueError: a kind or a label that the format cannot write, or a coordinate outside the image.
        """
        height, width = require_size(size)
        for region in regions:
            if region.kind not in self.kinds:
                raise ValueError(f"{type(self).__name__} writes {' and '.join(self.kinds)}, got a {region.kind}")
            if any(character in region.label for character in self.unsafe):
                raise ValueError(f"the label {region.label!r} holds one of {self.unsafe!r}, which end a label here")
            for x, y in region.xy:
                for name, value, side, limit in (("x", x, "width", width), ("y", y, "height", height)):
                    if not 0 <= value <= limit:
                        raise ValueError(
                            f"the {region.kind} has {name} = {value}, but the image's {side} is {limit}; "
                            "are width and height swapped, or the coordinates those of another size?"
                        )
        return self._write([region.resized(size, UNIT) for region in regions])

    def read(self, text: str, size: tuple[float, float]) -> list[Region]:
        """The regions in a text, in the units of `size`; [] where there are none. Never raises on a text."""
        require_size(size)
        if not isinstance(text, str):
            raise ValueError(f"text is a {type(text).__name__}, expected a str")
        return [region.resized(UNIT, size) for region in self._read(text)]

    def _write(self, regions: list[Region]) -> str:
        raise NotImplementedError

    def _read(self, text: str) -> list[Region]:
        raise NotImplementedError


def by_label(regions: list[Region]) -> list[tuple[str, list[Region]]]:
    """Neighbours with the same kind and label together: [(label, regions)]; unlabelled ones stay alone."""
    groups = []
    for (_, label), same in groupby(regions, key=lambda region: (region.kind, region.label.strip())):
        same = list(same)
        groups += [(label, same)] if label else [("", [region]) for region in same]
    return groups


def valid(kind: str, numbers: Sequence[float], label: str = "") -> list[Region]:
    """A region from numbers that a model wrote, as a list: empty unless they are well formed and in the unit square."""
    if not all(0 <= number <= 1 for number in numbers):
        return []
    try:
        return [Region(kind, tuple(zip(numbers[::2], numbers[1::2], strict=True)), label.strip())]
    except ValueError:
        return []
