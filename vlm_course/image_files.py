"""Image files as learners have them: any common format and pixel mode in, 8-bit RGB out, or one sentence why not."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000  # 256 MB as RGBA while it is decoded; the largest common phone photo has 50 million
MAX_SIDE = 16_384  # a strip one pixel high would grow to its square when it is padded

# Formats that Pillow decodes by itself; EPS, for one, would start another program. The usual ones come first, because
# Pillow imports all its plugins when it meets a name that it has not registered yet.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "DIB", "PPM", "WEBP", "TIFF", "ICO")
_ADVICE = "open it in an image viewer and save it again as PNG or JPEG"


class ImageFileError(ValueError):
    """A file that cannot be used as an image. The message is one sentence that says what is wrong and what to do."""


def load_image(path: str | os.PathLike, *, max_side: int | None = None) -> Image.Image:
    """Read an image file as RGB, upright, its transparent parts composited on white.

    The size is read from the header and checked before any pixel is decoded. Of an animation the first frame is
    taken. 16-bit grey is scaled from 0..65535, 32-bit integers and floats from the range of their values.

    Args:
        path: the file; `~` is the home folder. The extension does not matter, the content does.
        max_side: shrink so that neither side is longer (JPEG is then decoded at a coarser scale); None keeps the size.

    Returns:
        A PIL image of mode "RGB"; `image.info["file_size"]` is the upright (width, height) before it was shrunk.

    Raises:
        ImageFileError: missing, not a regular file, empty, text, of an unknown format, truncated or too large.
    """
    file = _regular_file(path)
    name = repr(file.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit, below, is the lower one
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise _too_large(name, f"{int(pixels[0]):,} pixels" if pixels else "too many pixels") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ImageFileError(_not_an_image(file, error)) from error
    with image:
        width, height = size = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise _too_large(name, f"{width:,} x {height:,} pixels")
        try:
            if max_side is not None and max(width, height) > max_side:
                image.draft("RGB", (max_side, max_side))  # JPEG only; still at least max_side long
            image.load()
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            rgb = _to_rgb(ImageOps.exif_transpose(image))
        except MemoryError as error:
            raise ImageFileError(f"{name} does not fit into memory: make it smaller first.") from error
        # Decoders meet damaged data with exceptions of every kind; here each of them means the same.
        except Exception as error:
            reason = str(error).rstrip(".") or type(error).__name__
            raise ImageFileError(f"{name} is damaged or incomplete ({reason}): copy or download it again.") from error
    rgb.info = {"file_size": size[::-1] if turned else size}
    if max_side is not None:
        rgb.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return rgb


def _regular_file(path: str | os.PathLike) -> Path:
    text = os.fspath(path).strip()
    if not text:
        raise ImageFileError("The path of the image is empty: name a PNG or JPEG file.")
    if re.match(r"(https?|ftp):/", text):  # one slash: pathlib drops the other
        raise ImageFileError(f"{text!r} is a web address: download the image and give the path of the file.")
    try:
        file = Path(text).expanduser()
        if file.is_file():
            return file
        is_dir, exists = file.is_dir(), file.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).split(":")[0].rstrip(".")
        raise ImageFileError(f"{text[:200]!r} cannot be used as a path ({reason}): check how it is written.") from error
    if is_dir:
        raise ImageFileError(f"{text!r} is a directory: name one image file inside it.")
    if exists:
        raise ImageFileError(f"{text!r} is not a regular file: name a PNG or JPEG file.")
    raise ImageFileError(f"There is no file {text!r}: {_similar(file)}.")


def _similar(file: Path) -> str:
    if not file.parent.is_dir():
        return f"there is no directory {str(file.parent)!r} either, so check the path"
    names = {name.lower(): name for name in sorted(os.listdir(file.parent))[:5000]}
    close = difflib.get_close_matches(file.name.lower(), names, n=1, cutoff=0.75)
    return f"did you mean {names[close[0]]!r}" if close else "check the path and the spelling"


def _too_large(name: str, size: str) -> ImageFileError:
    return ImageFileError(
        f"{name} is too large ({size}): at most {MAX_PIXELS / 1e6:.0f} million pixels and {MAX_SIDE:,} pixels "
        "a side are read, so make it smaller first."
    )


def _not_an_image(file: Path, error: Exception) -> str:
    """Why Pillow did not open `file`, from its first bytes."""
    name = repr(file.name)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name} cannot be read ({error.strerror}): check its permissions."
    with open(file, "rb") as stream:
        head = stream.read(4096)
    if not head:
        return f"{name} is empty (0 bytes): copy or download it again."
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return f"{name} is a HEIC photo, which is not read here: export it as JPEG."
    if head.startswith(b"%PDF"):
        return f"{name} is a PDF, not an image: export the page as PNG."
    if b"<svg" in head:
        return f"{name} is an SVG drawing, not pixels: export it as PNG."
    if head.startswith((b"\x89PNG", b"\xff\xd8", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")):
        return f"{name} is damaged or incomplete: copy or download it again."
    if _is_text(head):
        return f"{name} is a text file, not an image: name a PNG or JPEG file."
    return f"{name} is no image in a format that is read here: {_ADVICE}."


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # unless a character was cut at the end of what was read
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character.isspace() for character in text)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float32), 0, 65535)
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        low, high = float(values.min()), float(values.max())
        if low >= 0:  # the usual ranges keep their meaning: 0..1, 8 bits, 16 bits
            low, high = 0, next((top for top in (1, 255, 65535) if high <= top), high)
        return _grey(values, low, high)
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _grey(values: np.ndarray, low: float, high: float) -> Image.Image:
    scaled = (values - low) * (255 / max(high - low, 1e-12))
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")
