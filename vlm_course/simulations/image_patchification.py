"""Chapter 1's simulation: cut a picture into patches and see what each choice costs and keeps.

The tower is CLIP ViT-L in all but its patch size and resolution. What it calculates comes from `encoders.vit_flops`,
which the tests compare with torch's own counter on that tower. What a patch keeps is real, too: the picture is cut by
`patchify`, squeezed through one linear map to the tower's width, and put together again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm_course.encoders import patch_budget, score_entries, vit_flops
from vlm_course.patches import patchify, unpatchify
from vlm_course.simulations import figures
from vlm_course.simulations.interactive import Frame, Simulation
from vlm_course.validation import require_shape

if TYPE_CHECKING:
    from PIL import Image

WIDTH, LAYERS, MLP_WIDTH = 1024, 24, 4096  # CLIP ViT-L
IMAGE_SIZES = (224, 336, 448, 672)
PATCH_SIZES = (7, 8, 14, 16, 28, 56, 112)  # each divides every image size
USUAL = (336, 14)  # LLaVA-1.5


def photograph() -> Image.Image:
    """Astronaut Eileen Collins, 512 x 512 pixels: a NASA picture, in the public domain, from scikit-image."""
    from PIL import Image
    from skimage.data import astronaut

    return Image.fromarray(astronaut())


def scene(seed: int = 3) -> Image.Image:
    """A scene of the course's world with five objects, 96 x 96 pixels."""
    from vlm_course.images import to_pil
    from vlm_course.worlds.scenes import render, sample

    drawn = sample(1, generator=torch.Generator().manual_seed(seed), objects=(5, 5))
    return to_pil(render(drawn, generator=torch.Generator().manual_seed(seed + 1))[0])


def resized(picture: Image.Image, size: int) -> Tensor:
    """A square picture at another size, bicubic: [1, 3, size, size] in [0, 1]."""
    import numpy as np
    from PIL import Image

    if picture.width != picture.height:
        raise ValueError(f"the picture is {picture.width} x {picture.height} pixels, expected a square: crop it first")
    small = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255  # [H, W, 3] -> [1, 3, H, W]


@lru_cache
def cosine_waves(patch_size: int, numbers: int) -> Tensor:
    """A linear map that suits pictures: the smoothest two-dimensional cosine waves of each colour, orthonormal.

    Args: numbers, the width of a token; a third of it goes to each colour, at most all p*p waves.
    Returns [k, p*p] with k = min(numbers // 3, p*p). Source: Ahmed, Natarajan and Rao 1974, the DCT-II.
    """
    p = patch_size
    steps = (torch.arange(p, dtype=torch.float64) + 0.5) * math.pi / p
    waves = torch.cos(torch.arange(p, dtype=torch.float64)[:, None] * steps)  # [p, p], a wave a row
    waves = waves / waves.norm(dim=1, keepdim=True)
    frequency = torch.arange(p)[:, None] ** 2 + torch.arange(p)[None] ** 2  # [p, p]
    smoothest = frequency.flatten().argsort(stable=True)[: min(numbers // 3, p * p)]
    planes = torch.einsum("ur,vc->uvrc", waves, waves).reshape(p * p, p * p)  # [p, p] x [p, p] -> [p*p, p*p]
    return planes[smoothest].float()


def squeezed(image: Tensor, patch_size: int, numbers: int = WIDTH) -> Tensor:
    """The picture after every patch went through a linear map to `numbers` numbers and back.

    Args: image [1, 3, H, W]. Returns the same shape; equal to the image where 3*p*p <= numbers.
    """
    require_shape(image, "image", "B 3 H W", **{"3": 3})
    waves = cosine_waves(patch_size, numbers)  # [k, p*p]
    if len(waves) == patch_size**2:
        return image
    grid = (image.shape[2] // patch_size, image.shape[3] // patch_size)
    patches = patchify(image, patch_size).unflatten(-1, (3, -1))  # [1, 3, H, W] -> [1, N, 3, p*p]
    kept = patches @ waves.T @ waves  # [1, N, 3, p*p] -> [1, N, 3, k] -> [1, N, 3, p*p]
    return unpatchify(kept.flatten(2), patch_size, grid).clamp(0, 1)


@dataclass(frozen=True)
class Cut:
    """The costs of one setting, with the class token counted in everything but `patches`."""

    image_size: int
    patch_size: int

    @property
    def patches(self) -> int:
        return self._budget["tokens"]

    @property
    def tokens(self) -> int:
        return 1 + self.patches

    @property
    def entries(self) -> int:
        """Score entries of one head in one layer."""
        return score_entries(self.tokens)

    @property
    def values(self) -> int:
        """Numbers in a patch."""
        return self._budget["values"]

    @property
    def flops(self) -> tuple[int, int, int]:
        """Of the whole encoder: (patch embedding, linear maps of the blocks, attention between tokens)."""
        linear, attention = vit_flops(self.tokens, WIDTH, LAYERS, MLP_WIDTH)
        return 2 * self.patches * self.values * WIDTH, linear, attention

    @property
    def _budget(self) -> dict:
        return patch_budget(self.image_size, self.patch_size, WIDTH)


def patchification_simulation(
    pictures: dict[str, Image.Image] | None = None, *, image_size: int = 672, patch_size: int = 14
) -> Simulation:
    """Three controls: the picture, the size at which the tower gets it, and the side of a patch.

    Args: pictures, square ones by name; the photograph and a scene by default.
    """
    import ipywidgets

    shown = {"photograph": photograph(), "scene": scene()} if pictures is None else pictures
    controls = {
        "picture": ipywidgets.Dropdown(options=list(shown), description="Picture"),
        "image_size": ipywidgets.SelectionSlider(
            options=IMAGE_SIZES, value=image_size, description="Image (px)", continuous_update=False
        ),
        "patch_size": ipywidgets.SelectionSlider(
            options=PATCH_SIZES, value=patch_size, description="Patch (px)", continuous_update=False
        ),
    }

    def draw(picture: str, image_size: int, patch_size: int) -> Frame:
        return patchification_frame(shown[picture], picture, Cut(image_size, patch_size))

    return Simulation(draw, controls, title="Image patchification")


def patchification_frame(picture: Image.Image, name: str, cut: Cut) -> Frame:
    """The grid over the picture, a detail, the same detail after the linear map, and the operations."""
    usual = Cut(*USUAL)
    image = resized(picture, cut.image_size)  # [1, 3, H, W]
    kept = squeezed(image, cut.patch_size)
    figure, axes = figures.axes(1, 4, width=9.6, height=2.75, width_ratios=(1, 1, 1, 1.15))
    window = _window(cut.image_size)
    _draw_grid(axes[0], image, cut, window)
    _draw_detail(axes[1], image, cut, window, "a detail, as pixels")
    _draw_detail(axes[2], kept, cut, window, f"after {WIDTH} numbers a patch")
    _draw_flops(axes[3], usual, cut)
    error = (kept - image).square().mean().sqrt().item()
    return Frame(figure, _alt(name, usual, cut), _text(picture, usual, cut, error))


def _window(size: int) -> tuple[int, int, int]:
    """A detail: left, top and side in pixels, the same part of the picture at every size."""
    return round(0.33 * size), round(0.06 * size), round(0.25 * size)


def _draw_grid(ax, image: Tensor, cut: Cut, window: tuple[int, int, int]) -> None:
    from matplotlib.patches import Rectangle

    ax.imshow(image[0].permute(1, 2, 0).numpy(), interpolation="nearest")
    rows = cut.image_size // cut.patch_size
    for line in range(1, rows):
        where, thin = line * cut.patch_size - 0.5, min(0.7, 16 / rows)
        ax.axhline(where, color="white", linewidth=thin)
        ax.axvline(where, color="white", linewidth=thin)
    left, top, side = window
    ax.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=figures.TEXT_LIGHT, linewidth=1.8))
    ax.set(xticks=[], yticks=[], title=f"{rows} x {rows} = {cut.patches:,} patches")
    ax.spines[:].set_visible(False)


def _draw_detail(ax, image: Tensor, cut: Cut, window: tuple[int, int, int], title: str) -> None:
    left, top, side = window
    ax.imshow(image[0].permute(1, 2, 0).numpy(), interpolation="nearest")
    for line in range(0, cut.image_size + 1, cut.patch_size):
        ax.axhline(line - 0.5, color="white", linewidth=0.5)
        ax.axvline(line - 0.5, color="white", linewidth=0.5)
    ax.set(xlim=(left - 0.5, left + side - 0.5), ylim=(top + side - 0.5, top - 0.5), xticks=[], yticks=[], title=title)
    ax.spines[:].set_color(figures.TEXT_LIGHT)
    ax.spines[:].set_linewidth(1.8)
    ax.spines[:].set_visible(True)


def _draw_flops(ax, usual: Cut, cut: Cut) -> None:
    labels = ["336 px,\npatch 14", f"{cut.image_size} px,\npatch {cut.patch_size}"]
    if (cut.image_size, cut.patch_size) == USUAL:
        labels[1] += "\n(the same)"
    bottom = [0.0, 0.0]
    parts = list(zip(usual.flops, cut.flops, strict=True))
    rows = [
        ("linear maps", [sum(pair) for pair in zip(*parts[:2], strict=True)], figures.VISION_LIGHT),
        ("attention", list(parts[2]), figures.VISION),
    ]
    for name, values, colour in rows:
        values = [value / 1e9 for value in values]
        ax.bar(labels, values, bottom=bottom, color=colour, label=name, width=0.6)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    for place, total in enumerate(bottom):
        ax.text(place, total, f"{total:,.0f}", ha="center", va="bottom", fontsize=8)
    ax.set(title="GFLOPs for one image", ylim=(0, 1.35 * max(bottom)), yticks=[])
    ax.spines["left"].set_visible(False)
    ax.legend(loc="upper left", ncols=2, handlelength=1, columnspacing=0.8)


def _times(ratio: float) -> str:
    """16 times, 0.25 times, or 1/13,000 where a decimal would be unreadable."""
    return f"{ratio:.3g} times" if ratio >= 0.01 else f"1/{float(f'{1 / ratio:.2g}'):,.0f}"


def _text(picture: Image.Image, usual: Cut, cut: Cut, error: float) -> str:
    now, before = cut.flops, usual.flops
    times = [cut.tokens / usual.tokens, cut.entries / usual.entries, sum(now) / sum(before)]
    lines = [
        f"{cut.image_size} px in patches of {cut.patch_size}: {cut.patches:,} patches, {cut.tokens:,} tokens "
        f"with the class token, {cut.entries:,} score entries for each head and layer.",
        f"Against 336 px and 14: tokens {_times(times[0])}, score entries {_times(times[1])}, "
        f"operations of the whole encoder {_times(times[2])}.",
        f"Attention between tokens: {now[2] / sum(now):.1%} of them (at 336 px and 14: {before[2] / sum(before):.1%}). "
        f"The linear maps grow with the tokens alone.",
    ]
    if cut.values <= WIDTH:
        lines.append(f"A patch has {cut.values:,} values: {WIDTH} numbers can hold them all.")
    else:
        lines.append(
            f"A patch has {cut.values:,} values for {WIDTH} numbers: even the smoothest {WIDTH // 3} waves of each "
            f"colour lose detail (error {255 * error:.1f} of 255 steps of brightness)."
        )
    if cut.image_size > picture.width:
        lines.append(f"The picture has {picture.width} pixels a side: a larger size adds pixels, not detail.")
    return "\n".join(lines)


def _alt(name: str, usual: Cut, cut: Cut) -> str:
    ratio = sum(cut.flops) / sum(usual.flops)
    lost = "unchanged" if cut.values <= WIDTH else "blurred"
    return (
        f"The {name} under a grid of {cut.patches:,} patches; a detail of it as pixels; the detail {lost} after a "
        f"linear map of each patch to {WIDTH} numbers; bars of the operations, {ratio:.3g} times those at 336 pixels "
        f"and patch 14."
    )
