"""Pictures in: the exact preprocessing of CLIP and LLaVA, and that of the small model.

Sources: Radford et al. 2021 (CLIP), released preprocessing; Liu et al. 2024 (LLaVA-1.5, arXiv 2310.03744), section 3.3
and appendix A (padding to a square instead of cropping).
"""

import numpy as np
import torch
from PIL import Image

from vlm_course.validation import checks, counts, require_shape

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _check_picture(image: Image.Image, **_: object) -> None:
    if not isinstance(image, Image.Image):
        raise ValueError(f"image is a {type(image).__name__}, expected a picture (PIL.Image.Image)")
    if min(image.size) < 1:
        raise ValueError(f"image has (width, height) = {image.size}, expected at least 1 pixel of each")


def _check_padding(image: Image.Image, fill: tuple[int, int, int] | None = None) -> None:
    _check_picture(image)
    if fill is not None and (len(fill) != 3 or min(fill) < 0 or max(fill) > 255):
        raise ValueError(f"fill is {tuple(fill)}, expected three numbers from 0 to 255: (red, green, blue)")


@checks(_check_padding)
def pad_to_square(image: Image.Image, fill: tuple[int, int, int] | None = None) -> Image.Image:
    """Centre an RGB image on a square of its longer side. `fill` is (red, green, blue) in 0..255.

    The default fill is CLIP's mean colour, which becomes (nearly) zero after normalisation.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    colour = tuple(int(255 * mean) for mean in CLIP_MEAN) if fill is None else fill
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


@counts(size=1)
@checks(_check_picture)
def clip_preprocess(image: Image.Image, *, size: int = 336) -> torch.Tensor:
    """CLIP's preprocessing: shorter side to `size` (bicubic), centre crop, normalise. Returns [3, size, size] float32.

    What lies outside the centre square is lost; apply `pad_to_square` first to keep it, as LLaVA-1.5 does.
    """
    image = image.convert("RGB")
    width, height = image.size
    # the longer side is cut to a whole pixel, not rounded: that is what the published processor does
    scaled = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # uint8 [H, W, 3] -> [3, H, W] in [0, 1]
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]  # [3, H, W]


@checks(_check_picture)
def border_colour(image: Image.Image) -> tuple[int, int, int]:
    """Mean colour of the outermost ring of pixels, as (red, green, blue) in 0..255."""
    pixels = np.asarray(image.convert("RGB"))  # [H, W, 3]
    ring = np.ones(pixels.shape[:2], dtype=bool)
    ring[1:-1, 1:-1] = False
    return tuple(round(channel) for channel in pixels[ring].mean(axis=0, dtype=np.float64))


@counts(size=1)
@checks(_check_picture)
def small_preprocess(image: Image.Image, *, size: int = 96) -> torch.Tensor:
    """The small model's preprocessing. Returns [3, size, size] float32 in [-1, 1].

    The image is padded to a square with the mean colour of its border, so that nothing is cropped and the padding
    continues the background, then resized (bicubic).
    """
    image = image.convert("RGB")
    image = pad_to_square(image, fill=border_colour(image)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1  # uint8 [H, W, 3] -> [3, H, W]


def _check_pixels(pixels: torch.Tensor) -> None:
    require_shape(pixels, "pixels", "C H W", C=3, floating=None, hint="pick one image of a batch first")


@checks(_check_pixels)
def to_pil(pixels: torch.Tensor) -> Image.Image:
    """A picture from pixels [3, H, W] in [-1, 1]; values outside are clipped. Undoes the scaling of `small_preprocess`.

    Raises ValueError unless there are exactly three channels.
    """
    scaled = (pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5  # [3, H, W] in [0, 255]
    return Image.fromarray(scaled.round().to(torch.uint8).permute(1, 2, 0).numpy())  # [3, H, W] -> [H, W, 3]
