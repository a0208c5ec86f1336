"""One look for every figure of the course: colours, axes, scenes with boxes, and pictures that carry their own words.

Blue is always vision and brown is always text. The two stay apart for readers with a colour vision deficiency and in
grey print. A figure is made from `matplotlib.figure.Figure`, never from pyplot, so that no drawing leaves a trace in
the next one.
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VISION = "#2166ac"
VISION_LIGHT = "#92c5de"
TEXT = "#b35806"
TEXT_LIGHT = "#fdb863"
GREY = "#767676"
BLACK = "#1a1a1a"
SEQUENTIAL = "cividis"  # for quantities from low to high
DIVERGING = "PuOr_r"  # for quantities around zero

PIXEL = 1 / 96  # inch: what a browser takes a pixel of a page for
DPI = 144  # one and a half dots a pixel, so that lines and small words stay sharp on screens with fine dots
WEBP = {"lossless": True, "quality": 50, "method": 2}  # effort, not loss: more of it saves nothing and takes longer
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "font.family": "DejaVu Sans",
    "text.color": BLACK,
    "axes.labelcolor": BLACK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "image.cmap": SEQUENTIAL,
}


def axes(rows: int = 1, columns: int = 1, *, width: float = 6.0, height: float = 2.6, **subplots):
    """A figure and its axes: one, or an array of them.

    Sizes in inches; `subplots` as for `Figure.subplots`. The style becomes matplotlib's setting of the process, like
    `matplotlib.style.use`: titles and legends take their size when they are drawn, later than the axes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, **subplots)


def draw_scene(ax: Axes, pixels: torch.Tensor, title: str = "") -> None:
    """Show pixels [3, H, W] in [-1, 1] without ticks. Raises ValueError for any other shape."""
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(
            f"a scene is drawn from pixels [3, H, W], these are {list(pixels.shape)}: is a batch dimension left?"
        )
    ax.imshow(((pixels.detach().cpu().clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=title)
    ax.spines[:].set_visible(False)


def draw_box(ax: Axes, box, label: str = "", colour: str = TEXT, dashed: bool = False) -> None:
    """Draw a box (left, top, right, bottom) in pixels over an image, with a label above it."""
    from matplotlib.patches import Rectangle

    left, top, right, bottom = (float(value) for value in box)
    style = "--" if dashed else "-"
    ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linewidth=3.5))
    ax.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.8, linestyle=style)
    )
    if label:
        ax.text(
            left,
            top - 2,
            label,
            color="white",
            fontsize=8,
            va="bottom",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
        )


@dataclass(frozen=True)
class Picture:
    """An image that cannot be separated from its description. `data` is an image file of the kind "webp" or "png".

    Notebooks show it as an HTML image with an alt text; where no image can be shown, and under `print`, the description
    stands in.
    """

    data: bytes
    alt: str
    width: int
    kind: str

    def __post_init__(self):
        if len(self.alt.split()) < 5:
            raise ValueError(f"an alt text says what the figure shows in at least five words, this one is {self.alt!r}")

    def html(self) -> str:
        data = base64.b64encode(self.data).decode()
        fit = "max-width:100%;height:auto"  # a widget clips what is wider than the notebook
        alt = html.escape(self.alt)
        return f'<img alt="{alt}" width="{self.width}" style="{fit}" src="data:image/{self.kind};base64,{data}">'

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": f"Figure: {self.alt}"}

    def __str__(self) -> str:
        return f"Figure: {self.alt}"


def picture(figure: Figure, alt: str) -> Picture:
    """Render a figure together with the words for a reader who does not see it.

    As WebP without loss, half the bytes of a PNG; as PNG where Pillow was built without WebP. The same figure gives the
    same bytes.
    """
    from PIL import features

    kind = "webp" if features.check("webp") else "png"
    options = {"pil_kwargs": WEBP} if kind == "webp" else {"metadata": {"Software": None}}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, **options)
    return Picture(buffer.getvalue(), alt, round(figure.get_figwidth() / PIXEL), kind)


def show(figure: Figure, alt: str) -> None:
    """Display a figure with its alt text in a notebook."""
    from IPython.display import display

    display(picture(figure, alt))
