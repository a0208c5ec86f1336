"""Scenes: one to six coloured shapes on a light ground, drawn in vectorised torch with exact ground truth.

Everything is a tensor with a leading batch dimension and lives on one device, so a GPU draws its own training data.
Images are 96 x 96 pixels. Coordinates are (x right, y down) in pixels, the origin at the upper left corner of the
image; boxes are xyxy. Six pairs of shape and colour (`HELD_OUT`) never occur in the "train" split, so that a test can
ask whether a model combines a shape and a colour that it never saw together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

IMAGE_SIZE = 96
MAX_OBJECTS = 6
GRID = 3  # objects sit in the cells of a 3 x 3 grid, so that they never hide each other

SHAPES = ("circle", "rectangle", "triangle", "diamond", "cross", "star")
COLOURS = (
    "red", "green", "blue", "yellow", "black", "gray", "teal", "brown", "orange", "purple", "pink", "cyan"
)  # fmt: skip
SIZES = ("small", "large")
RADIUS = ((6.5, 8.0), (11.5, 13.0))  # pixels, per size
LARGEST_ALONE = 24.0  # a large object that is alone in its scene may be this big

HELD_OUT = (
    ("circle", "brown"),
    ("rectangle", "yellow"),
    ("triangle", "gray"),
    ("diamond", "green"),
    ("cross", "blue"),
    ("star", "black"),
)

# Each colour is a segment in RGB between two named colours: what people call green is not one point.
_PALETTE = torch.tensor(
    [
        [[255, 0, 0], [205, 25, 30]],
        [[0, 255, 0], [30, 150, 40]],
        [[0, 0, 255], [40, 80, 220]],
        [[255, 255, 0], [240, 205, 20]],
        [[0, 0, 0], [35, 35, 35]],
        [[128, 128, 128], [150, 150, 150]],
        [[0, 128, 128], [10, 150, 145]],
        [[165, 42, 42], [135, 75, 25]],
        [[255, 140, 0], [245, 120, 30]],
        [[128, 0, 160], [110, 40, 180]],
        [[255, 105, 200], [240, 80, 170]],
        [[0, 240, 255], [60, 215, 245]],
    ],
    dtype=torch.float32,
) / 255  # fmt: skip


# Outlines at radius 1.
STAR_INNER = 0.42
CROSS_ARM = 0.36
TRIANGLE_HALF_BASE, TRIANGLE_FOOT = 0.92, 0.76
DIAMOND_HALF_WIDTH = 0.78


def _outlines() -> Tensor:
    """Corner points of every shape but the circle at radius 1, padded by repetition: [6 shapes, 12, 2]."""
    star = [
        (r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)) for k, r in enumerate([1.0, STAR_INNER] * 5)
    ]
    a = CROSS_ARM
    cross = [(a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a), (-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
    corners = {
        "circle": [(0, 0)],
        "rectangle": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (TRIANGLE_HALF_BASE, TRIANGLE_FOOT), (-TRIANGLE_HALF_BASE, TRIANGLE_FOOT)],
        "diamond": [(0, -1), (DIAMOND_HALF_WIDTH, 0), (0, 1), (-DIAMOND_HALF_WIDTH, 0)],
        "cross": cross,
        "star": star,
    }
    return torch.tensor([(corners[s] * 12)[:12] for s in SHAPES], dtype=torch.float32)


_OUTLINES = _outlines()


@cache
def _on(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Outlines, palette and radii on a device. Copied once: every copy would make the processor wait for the GPU."""
    return _OUTLINES.to(device), _PALETTE.to(device), torch.tensor(RADIUS, device=device)


@dataclass(frozen=True)
class Scenes:
    """A batch of B scenes with K = 6 object slots; slots without an object have `present` False.

    Slots are sorted in reading order (row of the grid, then column), the order in which captions name the objects.
    """

    present: Tensor  # [B, K] bool
    shape: Tensor  # [B, K] long, index into SHAPES
    colour: Tensor  # [B, K] long, index into COLOURS
    size: Tensor  # [B, K] long, index into SIZES
    cell: Tensor  # [B, K] long, 0..8, row-major
    centre: Tensor  # [B, K, 2] float, pixels (x, y)
    radius: Tensor  # [B, K] float, pixels
    aspect: Tensor  # [B, K, 2] float, half width and half height over the radius (rectangles)
    angle: Tensor  # [B, K] float, radians
    rgb: Tensor  # [B, K, 3] float in 0..1
    ground: Tensor  # [B, 3, 3] float: ground colour, its change along x, along y

    def __len__(self) -> int:
        return self.present.shape[0]

    def __getitem__(self, rows) -> Scenes:
        """Some of the scenes: a slice, an index tensor or a list of row numbers."""
        rows = [rows] if isinstance(rows, int) else rows
        return Scenes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @property
    def device(self) -> torch.device:
        return self.present.device

    @property
    def count(self) -> Tensor:
        """Objects in each scene: [B]."""
        return self.present.sum(1)

    @property
    def box(self) -> Tensor:
        """Exact bounding boxes, clipped to the image: [B, K, 4], xyxy in pixels."""
        corners = _on(self.device)[0][self.shape]  # [B, K, 12, 2]
        corners = corners * torch.where((self.shape == 1)[..., None], self.aspect, 1.0)[:, :, None]
        x, y = corners.unbind(-1)
        cos, sin = self.angle.cos()[..., None], self.angle.sin()[..., None]
        turned = torch.stack([x * cos - y * sin, x * sin + y * cos], -1)  # [B, K, 12, 2]
        low, high = turned.amin(2), turned.amax(2)
        circle = (self.shape == 0)[..., None]
        low, high = torch.where(circle, -1.0, low), torch.where(circle, 1.0, high)
        low, high = (self.centre + self.radius[..., None] * edge for edge in (low, high))
        return torch.cat([low, high], -1).clamp(0, IMAGE_SIZE)

    def describe(self, row: int) -> list[str]:
        """The objects of one scene in words, in reading order."""
        return [
            f"{SIZES[self.size[row, k]]} {COLOURS[self.colour[row, k]]} {SHAPES[self.shape[row, k]]}"
            for k in range(MAX_OBJECTS)
            if self.present[row, k]
        ]


@cache
def held_out_table(device="cpu") -> Tensor:
    """True where a pair is kept out of training, [6 shapes, 12 colours] bool: one tensor a device."""
    table = torch.zeros(len(SHAPES), len(COLOURS), dtype=torch.bool)
    for shape, colour in HELD_OUT:
        table[SHAPES.index(shape), COLOURS.index(colour)] = True
    return table.to(device)


def _uniform(shape, low: float, high: float, generator, device) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=device)


def shades(colour: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """A shade of each named colour: indices into COLOURS [...] -> [..., 3] in 0..1."""
    ends, options = _on(colour.device)[1][colour], {"generator": generator, "device": colour.device}  # [..., 2 ends, 3]
    rgb = ends[..., 0, :] + (ends[..., 1, :] - ends[..., 0, :]) * torch.rand(*colour.shape, 1, **options)
    return (rgb + _uniform((*colour.shape, 3), -0.03, 0.03, **options)).clamp(0, 1)


def sample(
    n: int,
    *,
    generator: torch.Generator | None = None,
    device="cpu",
    split: str = "train",
    objects: tuple[int, int] = (1, MAX_OBJECTS),
) -> Scenes:
    """Draw `n` scenes.

    Args:
        generator: source of randomness, on the same device; None uses torch's global one.
        split: "train" has no held-out pair; "held_out" has one held-out object in every scene; "all" ignores the table.
        objects: least and most objects in a scene, both included, 1..6.

    Raises:
        ValueError: unknown split, or a range of objects outside 1..6.
    """
    if split not in ("train", "held_out", "all"):
        raise ValueError(f'split must be "train", "held_out" or "all", not {split!r}')
    least, most = objects
    if not 1 <= least <= most <= MAX_OBJECTS:
        raise ValueError(f"objects must satisfy 1 <= least <= most <= {MAX_OBJECTS}, got {objects}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    k, options = MAX_OBJECTS, {"generator": generator, "device": device}
    _, _, radii = _on(torch.device(device))

    count = torch.randint(least, most + 1, (n,), **options)
    present = torch.arange(k, device=device) < count[:, None]
    pairs = len(SHAPES) * len(COLOURS)
    # Distinct (shape, colour) pairs inside a scene: the k largest of one random number per pair.
    draw = torch.rand(n, pairs, **options)
    table = held_out_table(device).flatten()
    if split != "all":
        draw = draw.masked_fill(table, -1.0)
    pair = draw.topk(k, dim=1).indices  # [n, k]
    if split == "held_out":
        which = torch.randint(len(HELD_OUT), (n,), **options)
        slot = (torch.rand(n, **options) * count).long()
        pair = pair.scatter(1, slot[:, None], table.nonzero()[which])
    shape, colour = pair // len(COLOURS), pair % len(COLOURS)

    # Cells: a random set, then sorted so that slots are in reading order; empty slots come last.
    cell = torch.rand(n, GRID * GRID, **options).topk(k, dim=1).indices
    cell = torch.where(present, cell, GRID * GRID).sort(1).values.clamp(max=GRID * GRID - 1)
    size = torch.randint(len(SIZES), (n, k), **options)
    low, high = radii[size].unbind(-1)  # [n, k]
    high = torch.where((count == 1)[:, None] & (size == 1), LARGEST_ALONE, high)
    radius = low + (high - low) * torch.rand(n, k, **options)

    step = IMAGE_SIZE / GRID
    middle = torch.stack([cell % GRID, cell // GRID], -1) * step + step / 2
    slack = (step / 2 - 1 - radius)[..., None]  # stays inside its cell
    jitter = slack * _uniform((n, k, 2), -1, 1, **options)
    drift = _uniform((n, 1, 2), -4, 4, **options)  # the whole grid moves, so that cell borders are no landmarks
    centre = middle + jitter + drift
    anywhere = _uniform((n, k, 2), 0, IMAGE_SIZE, **options)
    centre = torch.where((count == 1)[:, None, None], anywhere, centre)
    centre = torch.maximum(torch.minimum(centre, IMAGE_SIZE - radius[..., None]), radius[..., None])
    found = (centre / step).long()  # a lone object chose its place first, its cell follows
    cell = torch.where((count == 1)[:, None], found[..., 1] * GRID + found[..., 0], cell)

    rgb = shades(colour, generator=generator)
    light = _uniform((n, 1), 0.80, 1.0, **options)
    ground = torch.stack(
        [(light + _uniform((n, 3), -0.08, 0.08, **options)).clamp(0.72, 1)]
        + [_uniform((n, 3), -0.04, 0.04, **options) for _ in range(2)],
        1,
    )
    return Scenes(
        present=present,
        shape=shape,
        colour=colour,
        size=size,
        cell=cell,
        centre=centre,
        radius=radius,
        aspect=_uniform((n, k, 2), 0.68, 0.95, **options),
        angle=_uniform((n, k), -0.1, 0.1, **options),
        rgb=rgb,
        ground=ground,
    )


def _distances(x: Tensor, y: Tensor, aspect: Tensor) -> Tensor:
    """Signed distance (negative inside, exact near straight edges) to every shape at radius 1.

    x, y: [B, P] coordinates in units of the radius; aspect: [B, 2]. Returns [6, B, P].
    """
    ax, ay = x.abs(), y.abs()
    circle = torch.hypot(x, y) - 1
    rectangle = torch.maximum(ax - aspect[:, :1], ay - aspect[:, 1:])
    slope = math.hypot(TRIANGLE_HALF_BASE, 1 + TRIANGLE_FOOT)
    side = (ax * (1 + TRIANGLE_FOOT) - (y + 1) * TRIANGLE_HALF_BASE) / slope
    triangle = torch.maximum(side, y - TRIANGLE_FOOT)
    diamond = (ax + ay * DIAMOND_HALF_WIDTH - DIAMOND_HALF_WIDTH) / math.hypot(1, DIAMOND_HALF_WIDTH)
    cross = torch.minimum(
        torch.maximum(ax - 1, ay - CROSS_ARM),
        torch.maximum(ax - CROSS_ARM, ay - 1),
    )
    # Star: fold the plane into one tenth of it, where the outline is a single straight line from a tip to a notch.
    sector = 2 * math.pi / 5
    turn = torch.atan2(x, -y)
    turn = (turn - sector * (turn / sector).round()).abs()
    along, across = torch.hypot(x, y) * turn.cos(), torch.hypot(x, y) * turn.sin()
    notch_along, notch_across = STAR_INNER * math.cos(sector / 2), STAR_INNER * math.sin(sector / 2)
    length = math.hypot(1 - notch_along, notch_across)
    star = ((along - 1) * notch_across + across * (1 - notch_along)) / length
    return torch.stack([circle, rectangle, triangle, diamond, cross, star])


def render(scenes: Scenes, *, noise: float = 0.03, generator: torch.Generator | None = None) -> Tensor:
    """Draw scenes. Every image has its own level of pixel noise and its own sharpness of edges.

    Args:
        noise: greatest standard deviation of the pixel noise on the 0..1 scale; 0 draws clean images of one sharpness.
        generator: source of noise and sharpness, on the scenes' device.

    Returns:
        [B, 3, 96, 96] float in [-1, 1], what the shipped model takes.
    """
    n, device = len(scenes), scenes.device
    axis = (torch.arange(IMAGE_SIZE, device=device) + 0.5).float()
    gy, gx = (t.reshape(1, -1) for t in torch.meshgrid(axis, axis, indexing="ij"))  # [1, P]
    unit = (torch.stack([gx, gy]) / IMAGE_SIZE - 0.5)[:, None]  # [2, 1, 1, P]
    ground, sharpness = scenes.ground, 1.0
    if noise:
        sharpness = _uniform((n, 1), 0.6, 2.0, generator, device)
    image = ground[:, 0, :, None] + ground[:, 1, :, None] * unit[0] + ground[:, 2, :, None] * unit[1]  # [B, 3, P]
    for k in range(MAX_OBJECTS):
        radius = scenes.radius[:, k, None]
        dx, dy = gx - scenes.centre[:, k, :1], gy - scenes.centre[:, k, 1:]
        cos, sin = scenes.angle[:, k, None].cos(), scenes.angle[:, k, None].sin()
        x, y = (dx * cos + dy * sin) / radius, (-dx * sin + dy * cos) / radius
        distance = _distances(x, y, scenes.aspect[:, k])  # [6, B, P]
        mine = distance.gather(0, scenes.shape[:, k].view(1, n, 1).expand(1, n, distance.shape[2]))[0]
        cover = (0.5 - mine * radius * sharpness).clamp(0, 1)  # share of each pixel: [B, P]
        cover = cover * scenes.present[:, k, None]
        image = image + cover[:, None] * (scenes.rgb[:, k, :, None] - image)
    if noise:
        level = _uniform((n, 1, 1), 0, noise, generator, device)
        image = image + level * torch.randn(image.shape, generator=generator, device=device)
    return (image.clamp(0, 1) * 2 - 1).view(n, 3, IMAGE_SIZE, IMAGE_SIZE)
