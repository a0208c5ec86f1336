"""The claims of chapter 7: what the models' own processors write and read, and whether words find places."""

import inspect
import json
import re

import pytest
import torch

from vlm_course.grounding import (
    Kosmos2,
    Molmo,
    Qwen25VL,
    QwenVL,
    Shikra,
    box,
    box_convert,
    box_iou,
    mask_iou,
    polygon,
    polygons_to_mask,
)

UNIT = (1, 1)
DOG = (102, 384, 298, 571)  # the lesson's example, on a scale to 1000
EXAMPLE = "<box>102, 384, 298, 571</box>"


@pytest.mark.claim("7-01", kind="processor")
def test_one_text_describes_and_locates():
    """Fails if a model's answer held words or a box, but not both."""
    from transformers.models.kosmos2.processing_kosmos2 import clean_text_and_extract_entities_with_bboxes as read

    written = Kosmos2().write([box(0.1, 0.2, 0.5, 0.9, "a dog")], UNIT)
    caption, ((name, _, ((x1, y1, x2, y2),)),) = read(f"<grounding> This is {written} asleep.")
    assert (caption.split(), name) == ("This is a dog asleep.".split(), "a dog")
    assert float(box_iou(torch.tensor([[x1, y1, x2, y2]]), torch.tensor([[0.1, 0.2, 0.5, 0.9]]))) > 0.8
    text = Shikra().write([box(0.1, 0.2, 0.5, 0.9, "a dog")], UNIT)
    assert text.startswith("a dog") and Shikra().read(text, UNIT)[0].numbers == pytest.approx((0.1, 0.2, 0.5, 0.9))


@pytest.mark.claim("7-02", kind="processor")
def test_kosmos_2_writes_two_of_1024_tokens(says):
    """Fails if transformers' processor put a coordinate into the text as a number."""
    from transformers.models.kosmos2.processing_kosmos2 import Kosmos2Processor, coordinate_to_patch_index

    tokens = inspect.signature(Kosmos2Processor).parameters["num_patch_index_tokens"].default
    processor = Kosmos2Processor.__new__(Kosmos2Processor)  # the text half alone: the rest needs a tokenizer's files
    processor.num_patch_index_tokens = tokens
    text = processor._insert_patch_index_tokens("<phrase> a dog</phrase>", [[(0.102, 0.384, 0.298, 0.571)]])
    pieces = re.findall(r"<[^>]+>|[^<>\s]+", text.partition("<object>")[2].partition("</object>")[0])
    cells = coordinate_to_patch_index((0.102, 0.384, 0.298, 0.571), round(tokens**0.5))
    assert pieces == [f"<patch_index_{cell:04d}>" for cell in cells]
    assert len(pieces) == 2
    says(f"{tokens:,}", "32 x 32", "two")
    assert tokens == 32 * 32


@pytest.mark.claim("7-03", kind="function")
def test_shikra_writes_plain_fractions(says):
    """Fails if Shikra's text held anything but usual characters, or fewer or more than three decimals."""
    text = Shikra().write([box(*(n / 1000 for n in DOG))], UNIT)
    assert re.fullmatch(r"\[(0\.[0-9]{3},?){4}\]", text)
    places = torch.rand(200, 2, 2, dtype=torch.float64).sort(dim=1).values.flatten(1).tolist()
    read = [Shikra().read(Shikra().write([box(*row)], UNIT), UNIT)[0].numbers for row in places]
    worst = max(abs(a - b) for row, back in zip(places, read, strict=True) for a, b in zip(row, back, strict=True))
    assert 0.0004 < worst <= 0.0005
    says("three decimals", "half a thousandth")


@pytest.mark.claim("7-04", kind="function")
def test_qwen25_vl_numbers_depend_on_the_size_of_the_image():
    """Fails if Qwen2.5-VL's numbers were normalised: then the same place had the same numbers in every image."""
    place = box(*(n / 1000 for n in DOG))
    sizes = ((448, 448), (1036, 1932))
    boxes = [json.loads(Qwen25VL(size).write([place], UNIT))[0]["bbox_2d"] for size in sizes]
    assert boxes[0] != boxes[1]
    assert boxes[1] == [round(n / 1000 * side) for n, side in zip(DOG, (1932, 1036) * 2, strict=True)]
    assert json.loads(Qwen25VL(sizes[1]).write([box(0, 0, 1, 1)], UNIT))[0]["bbox_2d"][2] > 1000
    assert len({QwenVL().write([place.resized(UNIT, size)], size) for size in sizes}) == 1


@pytest.mark.claim("7-05", kind="function")
def test_no_reader_finds_a_box_in_the_lessons_example(says):
    """Fails if one of the named models' formats were that of the example."""
    readers = (Kosmos2(), Shikra(), QwenVL(), Qwen25VL((1000, 1000)), Molmo())
    assert [type(reader).__name__ for reader in readers if reader.read(EXAMPLE, (1000, 1000))] == []
    right = "<box>(102,384),(298,571)</box>"
    says(right)
    (found,) = QwenVL().read("<ref>the dog</ref>" + right, (999, 999))
    assert (found.label, [round(n) for n in found.numbers]) == ("the dog", list(DOG))


@pytest.mark.claim("7-06", kind="function")
def test_the_example_is_in_the_middle_third(says):
    """Fails if the middle of the example's box were in the lower third of the image."""
    x, y, _, _ = box_convert(torch.tensor([DOG]) / 1000, "xyxy", "cxcywh")[0].tolist()
    assert x < 1 / 3 < y < 2 / 3
    says(f"{100 * x:.0f} %", f"{100 * y:.0f} %")


@pytest.mark.claim("7-07", kind="function")
def test_the_far_edge_of_qwen_vls_range_is_999(says):
    """Fails if Qwen-VL's reader gave the lesson's four percentages."""
    (found,) = QwenVL().read("<box>(102,384),(298,571)</box>", (100, 100))
    read = [f"{n:.1f}" for n in found.numbers]
    assert read[:3] == ["10.2", "38.4", "29.8"] and read[3] != "57.1"
    says(read[3])
    assert QwenVL().write([box(0, 0, 1, 1)], UNIT) == "<box>(0,0),(999,999)</box>"


@pytest.mark.claim("7-08", kind="model")
def test_location_tokens_are_new_rows(real_llava, count, says):
    """Fails if 1,024 location tokens needed no new parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(tiny)
    before = model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(50 + 1024)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert len(table) == 50 + 1024
    assert torch.equal(model.get_input_embeddings().weight[:50], before)  # the old words are as they were
    more = count(real_llava("7B", 32000 + 1024)) - count(real_llava("7B"))
    says(f"{1024:,}", f"{more / 1e6:.1f} million")
    assert count(real_llava("7B", 32000 + 1024).lm_head) - count(real_llava("7B").lm_head) == more / 2


@pytest.mark.claim("7-09", kind="function")
def test_qwen25_vl_keeps_polygons_for_documents(says):
    """Fails if a polygon were written like points and boxes, under a key of the JSON."""
    writer = Qwen25VL((100, 100))
    ring = polygon([(0.1, 0.1), (0.9, 0.1), (0.5, 0.8)], "logo")
    assert "bbox_2d" in writer.write([box(0, 0, 0.5, 0.5)], UNIT)
    assert re.fullmatch(r'<p data-polygon="[0-9 ]+">logo</p>', writer.write([ring], UNIT))
    says("data-polygon")


@pytest.mark.claim("7-10", kind="processor")
def test_masks_without_a_mask_decoder(says):
    """Fails if PaliGemma had no words for masks, or a polygon read from text gave no mask."""
    from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS

    says(sum(token.startswith("<seg") for token in EXTRA_TOKENS))
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    disc = (rows - 32) ** 2 + (columns - 32) ** 2 < 20**2
    angles = torch.linspace(0, 2 * torch.pi, 25)[:-1].tolist()
    ring = [(32 + 20 * torch.cos(torch.tensor(a)).item(), 32 + 20 * torch.sin(torch.tensor(a)).item()) for a in angles]
    (read,) = Qwen25VL((64, 64)).read(Qwen25VL((64, 64)).write([polygon(ring)], (64, 64)), (64, 64))
    assert float(mask_iou(polygons_to_mask([read.xy], (64, 64))[None], disc[None])) > 0.9


@pytest.mark.claim("7-11", kind="experiment")
def test_another_image_moves_the_box_of_the_same_words(sharp, swapped):
    """Fails if the box followed from the words alone: then another image would give the same error."""
    right, other = sharp.box_error(), swapped.box_error()
    assert right < 3 and other > 3 * right + 5, (right, other)
