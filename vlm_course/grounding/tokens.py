"""Places as special tokens: Kosmos-2 spends one token on a corner, PaliGemma one on a coordinate.

| format      | a box looks like                     | rule                                       | largest error |
|-------------|--------------------------------------|--------------------------------------------|---------------|
| `Kosmos2`   | <patch_index_0044><patch_index_0863> | the cells of a 32 x 32 grid at the corners | side / 64 (*) |
| `PaliGemma` | <loc0256><loc0128><loc0767><loc0512> | n = round(1023 u), read as n / 1023; y, x  | side / 2,046  |

(*) side / 32 for a box that lies within one row or one column of cells.
Such tokens are new rows of the embedding table, which training must fill: 1,024 for coordinates in both models.
"""

import re
from math import ceil, floor

from vlm_course.grounding.regions import Format, Region, by_label, valid


class Kosmos2(Format):
    """<phrase>label</phrase><object><patch_index_UL><patch_index_LR></object>, row-major cells of a 32 x 32 grid.

    The upper left corner is in cell floor(32 u), the lower right in ceil(32 u) - 1, so a box that ends on a grid line
    does not enter the next cell. Corners are read as the middles of their cells, but a box within one row or one
    column of cells would be empty so, and is read as the whole cells. Several boxes of a phrase stand apart by
    </delimiter_of_multi_objects/>. A box of no area cannot be written.
    Source: Peng et al. 2023 (Kosmos-2, arXiv 2306.14824), section 2.
    """

    kinds = ("box",)
    unsafe = "<>"
    bins = 32
    _delimiter = "</delimiter_of_multi_objects/>"
    _object = re.compile(
        rf"(?:<phrase>([^<>]*)</phrase>\s*)?<object>((?:\s|<patch_index_[0-9]+>|{re.escape(_delimiter)})*)"
    )
    _index = re.compile(r"<patch_index_([0-9]{1,6})>")

    def half_bin(self, size: tuple[float, float]) -> tuple[float, float]:
        """Of a box at least two cells wide and high after rounding; twice as much for a thinner one."""
        return super().half_bin(size)

    def _write(self, regions: list[Region]) -> str:
        texts = []
        for label, same in by_label(regions):
            phrase = f"<phrase>{label}</phrase>" if label else ""
            pairs = ("".join(f"<patch_index_{cell:04d}>" for cell in self._cells(region)) for region in same)
            texts.append(f"{phrase}<object>{self._delimiter.join(pairs)}</object>")
        return " ".join(texts)

    def _cells(self, region: Region) -> tuple[int, int]:
        (x1, y1), (x2, y2) = region.xy
        if x1 == x2 or y1 == y2:
            raise ValueError(f"Kosmos2 cannot write a box of no area, got {x2 - x1} x {y2 - y1} of the image")
        n = self.bins
        return floor(y1 * n) * n + floor(x1 * n), (ceil(y2 * n) - 1) * n + ceil(x2 * n) - 1

    def _read(self, text: str) -> list[Region]:
        regions = []
        for label, inside in self._object.findall(text):
            for pair in inside.split(self._delimiter):
                cells = [int(cell) for cell in self._index.findall(pair)]
                if len(cells) == 2 and max(cells) < self.bins**2:
                    regions += self._box(*cells, label)
        return regions

    def _box(self, upper_left: int, lower_right: int, label: str) -> list[Region]:
        (row1, column1), (row2, column2) = divmod(upper_left, self.bins), divmod(lower_right, self.bins)
        if row2 < row1 or column2 < column1:
            return []
        thin = row1 == row2 or column1 == column2
        low, high = (0, 1) if thin else (0.5, 0.5)
        cells = (column1 + low, row1 + low, column2 + high, row2 + high)
        return valid("box", [cell / self.bins for cell in cells], label)


class PaliGemma(Format):
    """<locYYYY><locXXXX><locYYYY><locXXXX> label, y first, apart by ";".

    The mask that 16 <seg> tokens may add is the code of a trained autoencoder; `read` returns the box before them.
    The authors' preprocessing writes round(1023 u); published decoders divide by 1024, which moves the far edge of
    the image inwards by a thousandth of the side. `read` inverts the writing.
    Source: Beyer et al. 2024 (PaliGemma, arXiv 2407.07726), section 3.2; big_vision's paligemma/segmentation.py.
    """

    kinds = ("box",)
    unsafe = "<>;"
    bins = 1023
    _place = re.compile(r"((?:<loc[0-9]{4}>)+)(?:<seg[0-9]{3}>)*([^<>;]*)")

    def _write(self, regions: list[Region]) -> str:
        texts = []
        for region in regions:
            order = [(y, x) for x, y in region.xy]
            tokens = "".join(f"<loc{round(self.bins * u):04d}>" for pair in order for u in pair)
            texts.append(f"{tokens} {region.label}".strip())
        return " ; ".join(texts)

    def _read(self, text: str) -> list[Region]:
        regions = []
        for tokens, label in self._place.findall(text):
            numbers = [int(n) / self.bins for n in re.findall("[0-9]{4}", tokens)]
            if len(numbers) % 4:
                continue  # no telling which token is missing, so which number is a y
            for i in range(0, len(numbers), 4):
                y1, x1, y2, x2 = numbers[i : i + 4]
                regions += valid("box", [x1, y1, x2, y2], label)
        return regions
