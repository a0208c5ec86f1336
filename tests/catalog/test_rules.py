"""The catalog's rules in words, held against the course's own functions: formats of places, tokens of an image."""

import pytest

from vlm_course import grounding
from vlm_course.catalog import find
from vlm_course.dynamic_tiling import dynamic_token_count
from vlm_course.grounding import PaliGemma
from vlm_course.resolution import anyres_token_count

DOG = (0.102, 0.384, 0.298, 0.571)  # the lesson's box, as fractions of the image
FORMATS = {
    "kosmos-2": grounding.Kosmos2(),
    "shikra-7b": grounding.Shikra(),
    "qwen-vl": grounding.QwenVL(),
    "paligemma-3b": PaliGemma(),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_example_is_the_dog_of_the_lesson_in_that_format(name):
    ours = FORMATS[name]
    (region,) = ours.read(find(name)["example"], (1, 1))
    limits = ours.half_bin((1, 1))
    for index, (found, true) in enumerate(zip(region.numbers, DOG, strict=True)):
        assert abs(found - true) <= 2 * limits[index % 2] + 1e-9
    written = ours.write([grounding.box(*DOG, "dog")], (1, 1))
    assert len(ours.read(written, (1, 1))) == 1


def test_qwen25_writes_pixels_of_the_resized_image():
    ours = grounding.Qwen25VL((1000, 1000))
    (region,) = ours.read(find("qwen2.5-vl-7b")["example"], (1, 1))
    assert tuple(round(number, 3) for number in region.numbers) == DOG
    assert region.label == "dog"


def test_molmo_points_in_per_cent():
    (region,) = grounding.Molmo().read(find("molmo")["example"], (1, 1))
    assert tuple(round(number, 3) for number in region.numbers) == (0.2, 0.478)  # the centre of the box


def test_llava_nexts_tokens_at_672_by_672():
    grids = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    assert find("llava-next")["visual_tokens"] == anyres_token_count((672, 672), grids, tile=336, patch=14) == 2928


@pytest.mark.parametrize("name", ["internvl-1.5", "internvl-2.5-8b"])
def test_internvl_spends_256_tokens_on_a_tile(name):
    model = find(name)
    assert model["visual_tokens"] == dynamic_token_count((448, 448), tile=model["image_size"])
    assert dynamic_token_count((896, 1344)) == 7 * model["visual_tokens"]


@pytest.mark.parametrize(
    "name", ["llava-1.5-7b", "llava-v1-13b", "shikra-7b", "paligemma-3b", "openvla-7b", "internvl-1.0-7b"]
)
def test_one_token_per_patch(name):
    model = find(name)
    assert model["visual_tokens"] == model["patches"] == (model["image_size"] // model["patch_size"]) ** 2


@pytest.mark.parametrize(("name", "factor"), [("qwen-vl", 4), ("molmo", 4), ("internvl-1.5", 4)])
def test_bridges_that_leave_a_quarter_of_the_patches(name, factor):
    model = find(name)
    assert model["visual_tokens"] * factor == model["patches"]


def test_swin_halves_the_grid_three_times():
    for name in ("nougat-base", "donut-base"):
        model = find(name)
        height, width = map(int, model["image_size"].split(" x "))
        assert model["visual_tokens"] == (height // 32) * (width // 32)
