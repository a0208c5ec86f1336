"""`load_image`: every mode that Pillow writes comes out as the same RGB picture, and every bad file as one sentence."""

import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from vlm_course.image_files import MAX_SIDE, ImageFileError, load_image

RED, BLUE, GREY = (255, 0, 0), (0, 0, 255), (128, 128, 128)


def picture() -> Image.Image:
    """32 wide, 16 high: left half red, right half blue."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste(BLUE, (16, 0, 32, 16))
    return image


def assert_is_picture(image: Image.Image, tolerance: int = 3) -> None:
    assert image.mode == "RGB"
    assert image.size == (32, 16)
    difference = np.asarray(image).astype(int) - np.asarray(picture())
    assert np.abs(difference).max() <= tolerance


def write_png(path, width: int, height: int, row: bytes) -> None:
    """A greyscale 1-bit PNG of equal rows, whatever its size, without holding its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze = zlib.compressobj(9)
    data = b"".join(squeeze.compress(b"\0" + row) for _ in range(height)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.bmp", "a.gif", "a.tiff", "a.webp", "a.ppm", "no_extension"])
def test_lossless_formats(tmp_path, name):
    extension = os.path.splitext(name)[1].lower()
    path = tmp_path / name
    options = {"lossless": True} if extension == ".webp" else {}
    picture().save(path, format=None if extension else "PNG", **options)
    assert_is_picture(load_image(path))


def test_wrong_extension_does_not_matter(tmp_path):
    picture().save(tmp_path / "photo.jpg", format="PNG")
    assert_is_picture(load_image(tmp_path / "photo.jpg"))


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "YCbCr"])
def test_colour_modes(tmp_path, mode):
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    picture().convert(mode).save(path)
    with Image.open(path) as saved:
        if mode == "YCbCr" and saved.mode == "RGB":
            pytest.skip("before Pillow 13 such a TIFF is written but cannot be read back")
        assert saved.mode == mode
    assert_is_picture(load_image(path))


def test_cmyk_jpeg(tmp_path):
    picture().convert("CMYK").save(tmp_path / "a.jpg", quality=98, subsampling=0)
    assert_is_picture(load_image(tmp_path / "a.jpg"), tolerance=20)


def test_transparent_pixels_become_white(tmp_path):
    rgba = picture().convert("RGBA")
    rgba.paste((0, 0, 0, 0), (0, 0, 8, 16))
    rgba.save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image.getpixel((2, 2)) == (255, 255, 255)
    assert image.getpixel((12, 2)) == RED
    palette = picture().quantize(4)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    assert load_image(tmp_path / "p.png").getpixel((2, 2)) == (255, 255, 255)
    Image.new("LA", (4, 4), (10, 0)).save(tmp_path / "la.png")
    assert load_image(tmp_path / "la.png").getpixel((0, 0)) == (255, 255, 255)
    picture().save(tmp_path / "key.png", transparency=RED)
    assert load_image(tmp_path / "key.png").getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize("case", ["1", "L", "I;16", "I", "F"])
def test_grey_modes_keep_mid_grey(tmp_path, case):
    values = np.zeros((4, 6))
    values[:, 2:4], values[:, 4:] = 0.5, 1
    path = tmp_path / "a.tiff"
    match case:
        case "1":
            Image.fromarray(values >= 0.5).save(path)
        case "L":
            Image.fromarray((values * 255).astype(np.uint8)).save(path)
        case "I;16":
            path = tmp_path / "a.png"
            Image.fromarray((values * 65535).astype(np.uint16)).save(path)
        case "I":
            Image.fromarray((values * 65535).astype(np.int32)).save(path)
        case "F":
            Image.fromarray(values.astype(np.float32)).save(path)
    row = [load_image(path).getpixel((x, 1)) for x in (0, 2, 5)]
    middle = 255 if case == "1" else 128
    assert row[0] == (0, 0, 0)
    assert row[2] == (255, 255, 255)
    assert all(abs(channel - middle) <= 1 for channel in row[1])


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show it
    picture().save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png")
    assert image.size == (16, 32)
    assert image.getpixel((8, 2)) == RED
    assert image.getpixel((8, 30)) == BLUE
    assert load_image(tmp_path / "a.png", max_side=8).info["file_size"] == (16, 32)


def test_animation_gives_its_first_frame(tmp_path):
    picture().save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (32, 16), GREY)])
    assert_is_picture(load_image(tmp_path / "a.gif"))


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture().save(tmp_path / "a.png")
    assert_is_picture(load_image("~/a.png"))


def test_max_side_shrinks_and_keeps_the_ratio(tmp_path):
    Image.new("RGB", (1200, 600), RED).save(tmp_path / "a.jpg")
    image = load_image(tmp_path / "a.jpg", max_side=300)
    assert image.size == (300, 150)
    assert load_image(tmp_path / "a.jpg").size == (1200, 600)


def bad_files(folder):
    png = folder / "whole.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(png)
    jpeg = folder / "whole.jpg"
    Image.open(png).save(jpeg)
    cases = {
        "missing.png": (None, "no file"),
        "text.png": (b"not an image at all\n" * 30, "text file"),
        "empty.png": (b"", "0 bytes"),
        "cut.png": (png.read_bytes()[:4000], "damaged or incomplete"),
        "cut.jpg": (jpeg.read_bytes()[:1500], "damaged or incomplete"),
        "header.png": (png.read_bytes()[:20], "damaged or incomplete"),
        "broken.png": (png.read_bytes()[:100] + bytes(200) + png.read_bytes()[300:], "damaged or incomplete"),
        "noise.png": (rng.integers(128, 256, 5000, dtype=np.uint8).tobytes(), "no image"),
        "photo.heic": (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC"),
        "page.pdf": (b"%PDF-1.7\n" + bytes(100), "PDF"),
        "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        "figure.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "text file"),
        "page.html": ("<html>Übung</html>".encode(), "text file"),
    }
    for name, (data, _) in cases.items():
        if data is not None:
            (folder / name).write_bytes(data)
    return {name: phrase for name, (_, phrase) in cases.items()}


def one_sentence(message: str) -> bool:
    return "\n" not in message and message.endswith(".") and ". " not in message and len(message) < 400


def test_bad_files_are_one_sentence(tmp_path):
    for name, phrase in bad_files(tmp_path).items():
        with pytest.raises(ImageFileError, match=phrase) as caught:
            load_image(tmp_path / name)
        assert one_sentence(str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    "path, phrase",
    [
        ("", "empty"),
        ("a\0b.png", "no file|cannot be used"),
        ("x" * 5000, "cannot be used as a path"),
        ("~nobody_has_this_name/a.png", "cannot be used|no file"),
        ("https://example.org/a.png", "web address"),
        (os.devnull, "not a regular file"),
    ],
)
def test_bad_paths_are_one_sentence(path, phrase):
    with pytest.raises(ImageFileError, match=phrase) as caught:
        load_image(path)
    assert one_sentence(str(caught.value)), str(caught.value)


def test_directory_and_near_miss(tmp_path):
    picture().save(tmp_path / "Holiday.PNG")
    with pytest.raises(ImageFileError, match="directory"):
        load_image(tmp_path)
    with pytest.raises(ImageFileError, match=r"did you mean 'Holiday\.PNG'"):
        load_image(tmp_path / "holiday.png")


@pytest.mark.parametrize("width, height", [(30_000, 30_000), (MAX_SIDE + 1, 1), (8_400, 8_400)])
def test_huge_image_costs_no_memory(tmp_path, width, height):
    path = tmp_path / "huge.png"
    write_png(path, width, height, bytes((width + 7) // 8))
    code = f"""
import resource
from vlm_course.image_files import ImageFileError, load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_image({str(path)!r})
except ImageFileError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    message, grown = result.stdout.strip().splitlines()
    assert "too large" in message
    assert one_sentence(message)
    assert int(grown) < 30, f"refusing a {width} x {height} image took {grown} MiB"


def test_largest_allowed_image_loads(tmp_path):
    """The limit is not so low that it stops what it promises to read."""
    write_png(tmp_path / "large.png", 8_000, 8_000, b"\xff" * 1_000)
    assert load_image(tmp_path / "large.png", max_side=200).getpixel((100, 100)) == (255, 255, 255)
