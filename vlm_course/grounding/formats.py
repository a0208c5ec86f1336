"""Places as numbers in plain text: Shikra, Qwen-VL, Qwen2.5-VL, Molmo, and this course's small model.

| format       | looks like                            | a coordinate u in [0, 1] becomes      | largest error   |
|--------------|---------------------------------------|---------------------------------------|-----------------|
| `Shikra`     | [0.123,0.456,0.500,0.900]             | three decimals                        | side / 2,000    |
| `QwenVL`     | <box>(123,456),(500,899)</box>        | n = round(999 u), read as n / 999     | side / 1,998    |
| `Qwen25VL`   | {"bbox_2d": [86, 319, 350, 630]}      | whole pixels of the resized image     | half of such    |
| `Molmo`      | <point x="12.3" y="45.6" alt="a cup"> | percent with one decimal              | side / 2,000    |
| `SmallModel` | [ 31 116 128 230 ]                    | n = floor(256 u), read as (n + ½)/256 | side / 512      |

All write x before y. `tokens.py` has the formats that spend special tokens on coordinates.
"""

import json
import re
from dataclasses import dataclass
from typing import ClassVar

from vlm_course.grounding.regions import UNIT, Format, Region, by_label, require_size, valid


class Shikra(Format):
    """Fractions of the image as words: [x1,y1,x2,y2] and [x,y], several of them after one phrase apart by ";".

    The phrase is the text before the bracket, which nothing marks: `write` puts it there, `read` gives label "".
    Source: Chen et al. 2023 (Shikra, arXiv 2306.15195), section 4.2; the authors' PlainBoxFormatter, precision 3.
    """

    kinds = ("point", "box")
    keeps_labels = False
    unsafe = "[]"
    bins = 1000
    _number = r"[01](?:\.[0-9]{0,9})?"
    _pattern = re.compile(rf"\[({_number}(?:,{_number})+(?:;{_number}(?:,{_number})+)*)\]")

    def _write(self, regions: list[Region]) -> str:
        texts = []
        for label, same in by_label(regions):
            inside = ";".join(",".join(f"{u:.3f}" for u in region.numbers) for region in same)
            texts.append(f"{label}[{inside}]")
        return " ".join(texts)

    def _read(self, text: str) -> list[Region]:
        regions = []
        for match in self._pattern.finditer(text):
            for part in match[1].split(";"):
                numbers = [float(number) for number in part.split(",")]
                kind = {2: "point", 4: "box"}.get(len(numbers))
                regions += valid(kind, numbers) if kind else []
        return regions


class QwenVL(Format):
    """Whole numbers from 0 to 999: <ref>label</ref><box>(x1,y1),(x2,y2)</box>; a <quad> has four corners.

    The range is [0, 1000) in the model's documentation and its evaluation divides by 999, so the far edge of the image
    is 999. Reading with 1000 instead shifts that edge by a thousandth of the side.
    Source: Bai et al. 2023 (Qwen-VL, arXiv 2308.12966), section 3; its repository's README and evaluate_grounding.py.
    """

    kinds = ("box", "polygon")
    unsafe = "<>"
    bins = 999
    _group = re.compile(r"(?:<ref>([^<>]*)</ref>\s*)?((?:<(?:box|quad)>[^<>]*(?:</(?:box|quad)>)?)+)")
    _place = re.compile(r"<(box|quad)>([^<>]*)")
    _pair = r"\(\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*\)"
    _pairs: ClassVar = {
        "box": re.compile(rf"\s*{_pair}\s*,\s*{_pair}\s*"),
        "quad": re.compile(rf"\s*{_pair}\s*,\s*{_pair}\s*,\s*{_pair}\s*,\s*{_pair}\s*"),
    }

    def _write(self, regions: list[Region]) -> str:
        texts = []
        for label, same in by_label(regions):
            text = f"<ref>{label}</ref>" if label else ""
            for region in same:
                if region.kind == "polygon" and len(region.xy) != 4:
                    raise ValueError(f"QwenVL writes polygons of 4 corners (<quad>), got {len(region.xy)}")
                tag = "box" if region.kind == "box" else "quad"
                pairs = ",".join(f"({round(self.bins * x)},{round(self.bins * y)})" for x, y in region.xy)
                text += f"<{tag}>{pairs}</{tag}>"
            texts.append(text)
        return " ".join(texts)  # without the space, the next box without a label would belong to this one

    def _read(self, text: str) -> list[Region]:
        regions = []
        for label, places in self._group.findall(text):
            for tag, inside in self._place.findall(places):
                if match := self._pairs[tag].fullmatch(inside):
                    numbers = [int(n) / self.bins for n in match.groups()]
                    regions += valid("box" if tag == "box" else "polygon", numbers, label)
        return regions


@dataclass(frozen=True)
class Qwen25VL(Format):
    """Pixels, in JSON: {"bbox_2d": [x1, y1, x2, y2], "label": ...} and {"point_2d": [x, y], "label": ...}.

    `seen` is the (height, width) that the processor resized the image to, whose pixels these are; `size` in `write`
    and `read` is that of the image which you hold. Taking one for the other is the format's classical mistake.
    A polygon goes into the attribute data-polygon="x1 y1 x2 y2 ..." of a paragraph, as in the model's document HTML.
    `read` takes each {...} by itself, so an unfinished list or a code fence around it does no harm.
    Source: Bai et al. 2025 (Qwen2.5-VL, arXiv 2502.13923), section 2; its repository's README and cookbooks.
    """

    seen: tuple[int, int]

    kinds = ("point", "box", "polygon")
    unsafe = "<>"
    _keys: ClassVar = {"point": "point_2d", "box": "bbox_2d"}
    _object = re.compile(r'\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}')
    _polygon = re.compile(r'data-polygon\s*=\s*"([0-9,.\s]*)"[^<>]*>([^<>]*)')

    def __post_init__(self):
        require_size(self.seen, "seen")

    def half_bin(self, size: tuple[float, float]) -> tuple[float, float]:
        height, width = require_size(size)
        return width / self.seen[1] / 2, height / self.seen[0] / 2

    def _write(self, regions: list[Region]) -> str:
        rows, paragraphs = [], []
        for region in regions:
            pixels = [round(number) for number in region.resized(UNIT, self.seen).numbers]
            label = region.label.strip()
            if region.kind == "polygon":
                paragraphs.append(f'<p data-polygon="{" ".join(map(str, pixels))}">{label}</p>')
            else:
                rows.append({self._keys[region.kind]: pixels} | ({"label": label} if label else {}))
        return "\n".join(([json.dumps(rows, ensure_ascii=False)] if rows else []) + paragraphs)

    def _read(self, text: str) -> list[Region]:
        found = []  # (position in the text, kind, numbers, label)
        for match in self._object.finditer(text):
            try:
                row = json.loads(match[0])
            except (ValueError, RecursionError):
                continue
            for kind, key in self._keys.items():
                found.append((match.start(), kind, row.get(key), row.get("label", "")))
        for match in self._polygon.finditer(text):
            words = re.split(r"[\s,]+", match[1].strip(" ,\n\t"))
            if all(re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", word) for word in words):
                found.append((match.start(), "polygon", [float(word) for word in words], match[2]))
        return [region for _, *rest in sorted(found, key=lambda row: row[0]) for region in self._region(*rest)]

    def _region(self, kind: str, pixels: object, label: object) -> list[Region]:
        if not isinstance(pixels, list) or not all(type(number) in (int, float) for number in pixels):
            return []
        height, width = self.seen
        # A comparison before any division: JSON allows integers that no float can hold.
        if len(pixels) % 2 or not all(0 <= n <= (height if i % 2 else width) for i, n in enumerate(pixels)):
            return []
        numbers = [number / (height if i % 2 else width) for i, number in enumerate(pixels)]
        return valid(kind, numbers, label if isinstance(label, str) else "")


class Molmo(Format):
    """Points in percent, one decimal: <point x="1.5" y="2.5" alt="a">a</point>, <points x1= y1= x2= y2= ... alt=>.

    A number above 100 makes the model's own evaluation drop the point, and so does `read`.
    Source: Deitke et al. 2024 (Molmo and PixMo, arXiv 2409.17146), section 3, pointing; olmo/util.py.
    """

    kinds = ("point",)
    unsafe = '<>"'
    bins = 1000
    _tag = re.compile(r"<points?\b([^<>]*)")
    _number = re.compile(r'(?<![\w-])([xy])([0-9]{0,3})\s*=\s*"\s*([0-9]{1,3}(?:\.[0-9]{0,9})?)\s*"')
    _alt = re.compile(r'(?<![\w-])alt\s*=\s*"([^"]*)"')

    def _write(self, regions: list[Region]) -> str:
        texts = []
        for label, same in by_label(regions):
            tag, numbers = ("point", [""]) if len(same) == 1 else ("points", range(1, len(same) + 1))
            places = " ".join(
                f'x{i}="{100 * x:.1f}" y{i}="{100 * y:.1f}"'
                for i, (x, y) in zip(numbers, (region.xy[0] for region in same), strict=True)
            )
            texts.append(f'<{tag} {places} alt="{label}">{label}</{tag}>')
        return " ".join(texts)

    def _read(self, text: str) -> list[Region]:
        regions = []
        for tag in self._tag.finditer(text):
            alt = self._alt.search(tag[1])
            places: dict[str, dict[str, float]] = {}
            for axis, index, number in self._number.findall(tag[1]):
                places.setdefault(index, {})[axis] = float(number) / 100
            for place in places.values():
                if len(place) == 2:
                    regions += valid("point", [place["x"], place["y"]], alt[1] if alt else "")
        return regions


class SmallModel(Format):
    """The small model of this course: a box is [ x1 y1 x2 y2 ], a point ( x y ), on a grid of 256 x 256 cells.

    A number stands for a cell and is read as the cell's middle. The answer holds nothing else: no label is written.
    Source: `vlm_course.worlds.dialogs`, whose `to_grid` and `from_grid` make the training answers.
    """

    kinds = ("point", "box")
    keeps_labels = False
    bins = 256
    _brackets: ClassVar = {"point": "( {} )", "box": "[ {} ]"}
    _numbers = r"\s*[0-9]{1,3}(?:\s+[0-9]{1,3})*\s*"
    _pattern = re.compile(rf"\[({_numbers})\]|\(({_numbers})\)")

    def _write(self, regions: list[Region]) -> str:
        texts = []
        for region in regions:
            cells = [min(int(self.bins * u), self.bins - 1) for u in region.numbers]
            texts.append(self._brackets[region.kind].format(" ".join(map(str, cells))))
        return " ".join(texts)

    def _read(self, text: str) -> list[Region]:
        regions = []
        for square, round_ in self._pattern.findall(text):
            numbers = [(int(word) + 0.5) / self.bins for word in (square or round_).split()]
            if len(numbers) == (4 if square else 2):
                regions += valid("box" if square else "point", numbers)
        return regions
