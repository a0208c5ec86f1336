"""Every count of the catalog, recomputed from the module on the meta device, and equal to the published size."""

import dataclasses
import re

import pytest

from vlm_course.catalog import all_models, find, select
from vlm_course.catalog.building import build, count, resolve

BUILDABLE = [model for model in all_models() if model.build]
FACTS = {"vision_parameters": "vision", "bridge_parameters": "bridge", "language_parameters": "language"}

# the lesson's tables: the open systems must be runnable
OPEN_SYSTEMS = """CLIP ViT-L/14, SigLIP, EVA-CLIP, DINOv2, PaliGemma, LLaVA, LLaVA-1.5, Flamingo, Qwen-VL, Honeybee,
Fuyu, InternVL, InternVL 1.5, Kosmos-2, Shikra, DocOwl, DocOwl 1.5, UReader, TextMonkey, Nougat, LLaVA-NeXT,
InternVL 2.5, Qwen2.5-VL, Molmo, OpenVLA, Emu, Emu3, Donut, BLIP-2, InstructBLIP, Qwen2-VL""".replace("\n", " ").split(
    ", "
)


@pytest.mark.parametrize("model", BUILDABLE, ids=lambda model: model.name)
def test_counts_are_those_of_the_module(model):
    counted = count(model)
    if model["parameters"] is not None:
        assert counted["total"] == model["parameters"]
    for name, part in FACTS.items():
        if isinstance(model[name], int):
            assert counted[part] == model[name], name
    if "vision" in counted:
        assert counted["vision"] + counted["bridge"] + counted["language"] == counted["total"]


# deviations of the counted from the published size that are known and explained in the model's facts or modules
APART = {
    "flamingo-80b": 0.02,  # the paper's table rounds to 80B, and does not say how its 10B of new layers divide
    "flamingo-3b": 0.02,
    "siglip-so400m-14-224": 0.04,  # "400M" is the name of the shape, not a count
    "eva-vit-g-14": 0.02,
    "dinov2-vit-l-14": 0.02,
    "llava-v1-13b": 0.03,  # the name of the language model
}


@pytest.mark.parametrize("model", [m for m in BUILDABLE if m["published"] and m["parameters"]], ids=lambda m: m.name)
def test_the_count_equals_the_published_size_to_its_last_digit(model):
    digits, unit = re.fullmatch(r"([\d.]+)([MB])", model["published"]).groups()
    unit = {"M": 10**6, "B": 10**9}[unit]
    published = float(digits) * unit
    half = 0.5 * unit * 10 ** -len(digits.partition(".")[2])
    tolerance = max(half, APART.get(model.name, 0) * published)
    assert abs(model["parameters"] - published) <= tolerance


@pytest.mark.parametrize("name", OPEN_SYSTEMS)
def test_every_open_system_of_the_lessons_tables_can_be_built(name):
    assert find(name).build


def test_a_closed_model_is_refused_in_one_sentence():
    for model in select(access="closed"):
        with pytest.raises(ValueError, match=r"architecture is not public[^.]*$"):
            build(model)


def test_every_open_model_can_be_built():
    assert [model.name for model in all_models() if model.access != "closed" and not model.build] == []


def test_a_model_that_no_library_has_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"UReader is described in public[^.]*$"):
        build(dataclasses.replace(find("ureader"), build=None))


def test_nothing_is_allocated():
    assert all(weight.is_meta for weight in build(find("llava-v1-13b")).parameters())


def test_shared_configurations_are_filled_in_and_unknown_ones_refused():
    assert resolve({"@": "@vicuna-7b", "vocab_size": 9})["vocab_size"] == 9
    assert resolve(["@clip-l-14-224"])[0]["image_size"] == 224
    with pytest.raises(ValueError, match="@nothing"):
        resolve("@nothing")


def test_chinchilla_is_70_billion_with_the_relative_positions_of_its_time():
    assert round(count(find("flamingo-80b"))["language"] / 1e9) == 70
