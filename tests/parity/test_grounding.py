"""Grounding against transformers' processors (Kosmos-2, PaliGemma), torchvision's boxes, scikit-image's polygons."""

import pytest
import torch

from vlm_course.grounding import (
    Kosmos2,
    PaliGemma,
    SmallModel,
    box,
    box_convert,
    box_iou,
    generalized_box_iou,
    mask_to_polygons,
    masks_to_boxes,
    point,
    polygons_to_mask,
)

UNIT = (1, 1)


def random_boxes(n, size=(100, 300)):
    height, width = size
    corners = torch.rand(n, 2, 2, dtype=torch.float64).sort(dim=1).values * torch.tensor([width, height])
    return corners.flatten(1).float()


def test_kosmos2_cells_equal_the_processors():
    from transformers.models.kosmos2.processing_kosmos2 import coordinate_to_patch_index, patch_index_to_coordinate

    boxes = random_boxes(300, UNIT).double()
    on_lines = torch.tensor([[0, 0, 1, 1], [0.25, 0.5, 0.5, 0.75], [0.5, 0.5, 0.53125, 0.53125], [0.5, 0, 0.52, 1]])
    narrow = boxes[:40].clone()
    narrow[:, 2] = narrow[:, 0] + 0.01 * torch.rand(40)
    for row in torch.cat([boxes, on_lines.double(), narrow.clamp(max=1)]).tolist():
        text = Kosmos2().write([box(*row)], UNIT)
        upper_left, lower_right = coordinate_to_patch_index(row, 32)
        assert text == f"<object><patch_index_{upper_left:04d}><patch_index_{lower_right:04d}></object>"
        (ours,) = Kosmos2().read(text, UNIT)
        assert ours.numbers == pytest.approx(patch_index_to_coordinate(upper_left, lower_right, 32), abs=1e-12)


def test_kosmos2_text_is_read_as_the_processor_reads_it():
    from transformers.models.kosmos2.processing_kosmos2 import clean_text_and_extract_entities_with_bboxes

    text = (
        "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object> by"
        "<phrase> two fires</phrase><object><patch_index_0005><patch_index_0911></delimiter_of_multi_objects/>"
        "<patch_index_0100><patch_index_0204></object>."
    )
    entities = clean_text_and_extract_entities_with_bboxes(text)[1]
    theirs = [(label, corners) for label, _, boxes in entities for corners in boxes]
    assert len(theirs) == 3
    assert [(r.label, r.numbers) for r in Kosmos2().read(text, UNIT)] == theirs
    again = Kosmos2().write([box(*corners, label) for label, corners in theirs], UNIT)
    read = clean_text_and_extract_entities_with_bboxes(again)[1]
    assert [(label, boxes) for label, _, boxes in read] == [(label, boxes) for label, _, boxes in entities]


def test_kosmos2_tokens_with_spaces_as_the_processor_puts_them_into_a_prompt():
    from transformers.models.kosmos2.processing_kosmos2 import Kosmos2Processor

    processor = Kosmos2Processor.__new__(Kosmos2Processor)  # only the text half: the rest needs a tokenizer's files
    processor.num_patch_index_tokens = 1024
    boxes = [(0.25, 0.5, 0.75, 1.0), (0.0, 0.0, 0.5, 0.5)]
    prompt = processor._insert_patch_index_tokens("<phrase> a cup</phrase> stands.", [boxes])
    ours = Kosmos2().read(prompt, UNIT)
    assert [r.label for r in ours] == ["a cup", "a cup"]
    assert ours == Kosmos2().read(Kosmos2().write([box(*b, "a cup") for b in boxes], UNIT), UNIT)


def test_paligemma_spends_the_processors_tokens():
    from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS

    corners = [box(0, 0, 1, 1), box(0.1, 0.2, 0.3, 0.4), box(1, 1, 1, 1)]
    used = PaliGemma().write(corners, UNIT).replace("><", "> <").replace(";", "").split()
    assert len(used) == 12 and set(used) <= set(EXTRA_TOKENS[:1024])
    assert used[:4] == [EXTRA_TOKENS[0], EXTRA_TOKENS[0], EXTRA_TOKENS[1023], EXTRA_TOKENS[1023]]
    # The authors' preprocessing rounds 1023 u of (y1, x1, y2, x2).
    assert used[4:8] == [EXTRA_TOKENS[round(1023 * u)] for u in (0.2, 0.1, 0.4, 0.3)]
    every = "".join(f"{t * 2}{EXTRA_TOKENS[1023] * 2};" for t in EXTRA_TOKENS[:1024])
    assert [r.xy[0][0] for r in PaliGemma().read(every, UNIT)] == [n / 1023 for n in range(1024)]
    masked = PaliGemma().read(
        "".join(EXTRA_TOKENS[i] for i in (1, 2, 3, 4)) + "".join(EXTRA_TOKENS[1030:1046]) + " cat", UNIT
    )
    assert [(r.label, [round(1023 * n) for n in r.numbers]) for r in masked] == [("cat", [2, 1, 4, 3])]


def test_the_small_models_grid_is_the_worlds():
    from vlm_course.tokenizer import WordTokenizer
    from vlm_course.worlds.dialogs import from_grid, to_grid

    places = torch.rand(200, 2) * 96
    places = torch.cat([places, torch.tensor([[0.0, 96.0], [95.999, 0.374], [0.376, 48.0]])])
    tokenizer = WordTokenizer.small()
    for (x, y), cells in zip(places.tolist(), to_grid(places), strict=True):
        text = SmallModel().write([point(x, y)], (96, 96))
        assert text == "( {} {} )".format(*cells.tolist())
        decoded = tokenizer.decode(tokenizer.encode(text))
        (read,) = SmallModel().read(decoded, (96, 96))
        assert read.numbers == pytest.approx(from_grid(cells).tolist(), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
def test_boxes_compare_as_in_torchvision(dtype):
    from torchvision import ops

    a, b = random_boxes(30).to(dtype), random_boxes(40).to(dtype)
    assert box_iou(a, b).shape == (30, 40)
    for ours, theirs in ((box_iou, ops.box_iou), (generalized_box_iou, ops.generalized_box_iou)):
        wide = (a, b) if dtype == torch.float64 else (a.float(), b.float())
        torch.testing.assert_close(ours(a, b), theirs(*wide), rtol=0, atol=1e-5)
    assert box_iou(a[:0], b).shape == ops.box_iou(a[:0], b).shape == (0, 40)


@pytest.mark.parametrize("source", ["xyxy", "xywh", "cxcywh"])
@pytest.mark.parametrize("target", ["xyxy", "xywh", "cxcywh"])
def test_boxes_convert_as_in_torchvision(source, target):
    from torchvision.ops import box_convert as theirs
    from transformers.image_transforms import center_to_corners_format

    boxes = theirs(random_boxes(50), "xyxy", source)
    torch.testing.assert_close(box_convert(boxes, source, target), theirs(boxes, source, target), rtol=0, atol=1e-4)
    if (source, target) == ("cxcywh", "xyxy"):
        torch.testing.assert_close(box_convert(boxes, source, target), center_to_corners_format(boxes))


def test_masks_to_boxes_reach_one_pixel_further_than_torchvisions():
    from torchvision.ops import masks_to_boxes as theirs

    masks = torch.rand(20, 9, 13) > 0.93
    masks = masks[masks.flatten(1).any(1)]
    shift = torch.tensor([0, 0, 1, 1])  # theirs name the last pixel, ours its far edge
    assert len(masks) > 5 and torch.equal(masks_to_boxes(masks), theirs(masks) + shift)


def test_polygons_fill_as_in_scikit_image():
    from skimage.measure import grid_points_in_poly

    height, width = 17, 29
    for _ in range(40):
        corners = torch.rand(6, 2, dtype=torch.float64) * torch.tensor([width, height])  # often crosses itself
        ours = polygons_to_mask([corners.tolist()], (height, width))
        rows_columns = corners.flip(1).numpy() - 0.5  # theirs: pixel centres at whole numbers, (row, column)
        theirs = torch.from_numpy(grid_points_in_poly((height, width), rows_columns).copy())
        assert torch.equal(ours, theirs)


def test_traced_rings_count_components_and_holes():
    from skimage.measure import euler_number, label

    for _ in range(30):
        mask = torch.rand(8, 11) > 0.4
        rings = mask_to_polygons(mask)
        area = [sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(r, r[1:] + r[:1], strict=True)) / 2 for r in rings]
        assert sum(area) == mask.sum()  # clockwise on the screen is positive, a hole negative
        components = label(mask.numpy(), connectivity=1).max()
        assert sum(a > 0 for a in area) == components
        assert sum(a < 0 for a in area) == components - euler_number(mask.numpy(), connectivity=1)
