"""Grounding: what is written is read back within half a bin, bad text never raises, bad numbers always do."""

import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlm_course.grounding import (
    Format,
    Kosmos2,
    MaskDecoder,
    Molmo,
    PaliGemma,
    Qwen25VL,
    QwenVL,
    Region,
    Shikra,
    SmallModel,
    box,
    box_convert,
    box_iou,
    generalized_box_iou,
    mask_iou,
    mask_loss,
    mask_to_polygons,
    masks_to_boxes,
    point,
    pointing_accuracy,
    points_in_boxes,
    points_in_masks,
    polygon,
    polygons_to_mask,
)

SIZE = (480, 640)  # (height, width)
SEEN = (476, 644)  # what Qwen2.5-VL's processor makes of it: multiples of 28
FORMATS = [Kosmos2(), Shikra(), QwenVL(), Qwen25VL(SEEN), Molmo(), PaliGemma(), SmallModel()]
ids = [type(f).__name__ for f in FORMATS]
every_format = pytest.mark.parametrize("form", FORMATS, ids=ids)
unit = st.floats(0, 1)
labels = st.text("abc é中,.'\\{}", max_size=8).map(str.strip)


@st.composite
def regions_of(draw, form: Format, size=SIZE):
    height, width = size
    kind = draw(st.sampled_from(form.kinds))
    label = draw(labels)
    if kind == "point":
        return point(draw(unit) * width, draw(unit) * height, label)
    if kind == "polygon":
        corners = 4 if isinstance(form, QwenVL) else draw(st.integers(3, 7))
        return polygon([(draw(unit) * width, draw(unit) * height) for _ in range(corners)], label)
    (x1, x2), (y1, y2) = (sorted((draw(unit), draw(unit))) for _ in "xy")
    if isinstance(form, Kosmos2):  # wide and high enough not to be a thin box
        x1, y1 = 0.9 * x1, 0.9 * y1
        x2, y2 = max(x2, x1 + 0.07), max(y2, y1 + 0.07)
    return box(x1 * width, y1 * height, x2 * width, y2 * height, label)


# Text and back.


@pytest.mark.parametrize(
    ("form", "region", "text"),
    [
        (Kosmos2(), box(0, 0, 640, 240, "a"), "<phrase>a</phrase><object><patch_index_0000><patch_index_0511></object>"),  # noqa: E501
        (Shikra(), box(64, 240, 320, 480), "[0.100,0.500,0.500,1.000]"),
        (Shikra(), point(64, 240), "[0.100,0.500]"),
        (QwenVL(), box(64, 240, 320, 480, "a cup"), "<ref>a cup</ref><box>(100,500),(500,999)</box>"),
        (QwenVL(), polygon([(0, 0), (640, 0), (640, 480), (0, 48)]), "<quad>(0,0),(999,0),(999,999),(0,100)</quad>"),
        (Qwen25VL(SEEN), box(64, 240, 320, 480, "a cup"), '[{"bbox_2d": [64, 238, 322, 476], "label": "a cup"}]'),
        (Qwen25VL(SEEN), point(320, 120), '[{"point_2d": [322, 119]}]'),
        (Qwen25VL(SIZE), polygon([(1, 2), (30, 4), (5, 60)], "a"), '<p data-polygon="1 2 30 4 5 60">a</p>'),
        (Molmo(), point(64, 240, "a cup"), '<point x="10.0" y="50.0" alt="a cup">a cup</point>'),
        (PaliGemma(), box(64, 240, 320, 480, "a cup"), "<loc0512><loc0102><loc1023><loc0512> a cup"),
        (SmallModel(), box(64, 240, 320, 480), "[ 25 128 128 255 ]"),
        (SmallModel(), point(64, 240), "( 25 128 )"),
    ],
)  # fmt: skip
def test_a_place_looks_as_published(form, region, text):
    assert form.write([region], SIZE) == text
    (read,) = form.read(text, SIZE)
    assert (read.kind, read.label) == (region.kind, region.label)


@every_format
@given(data=st.data())
def test_round_trip_is_within_half_a_bin_and_in_order(form, data):
    regions = data.draw(st.lists(regions_of(form), max_size=5))
    read = form.read(form.write(regions, SIZE), SIZE)
    if isinstance(form, Qwen25VL):  # polygons are another kind of text, which follows the list
        regions = sorted(regions, key=lambda region: region.kind == "polygon")
    assert [r.kind for r in read] == [r.kind for r in regions]
    assert [r.label for r in read] == [r.label if form.keeps_labels else "" for r in regions]
    half_x, half_y = form.half_bin(SIZE)
    for before, after in zip(regions, read, strict=True):
        for (x, y), (near_x, near_y) in zip(before.xy, after.xy, strict=True):
            assert abs(x - near_x) <= half_x + 1e-9 and abs(y - near_y) <= half_y + 1e-9


@every_format
def test_half_a_bin_is_reached_so_the_bound_is_no_excuse(form):
    places = [(300 + 0.0137 * i, 200 + 0.0137 * i) for i in range(1600)]  # steps far below every bin
    box_too = "box" in form.kinds
    regions = [box(x, y, x + 100, y + 100) if box_too else point(x, y) for x, y in places]
    read = [region.xy[0] for region in form.read(form.write(regions, SIZE), SIZE)]
    for axis, half in enumerate(form.half_bin(SIZE)):
        worst = max(abs(before[axis] - after[axis]) for before, after in zip(places, read, strict=True))
        assert 0.95 * half < worst <= half + 1e-9


def test_sizes_of_half_a_bin():
    expected = {"Kosmos2": 10, "Shikra": 0.32, "QwenVL": 640 / 1998, "Qwen25VL": 320 / 644, "Molmo": 0.32,
                "PaliGemma": 640 / 2046, "SmallModel": 1.25}  # fmt: skip
    assert {type(f).__name__: f.half_bin(SIZE)[0] for f in FORMATS} == pytest.approx(expected)


@given(unit, unit, st.floats(1e-300, 1 / 32), st.floats(1e-300, 1))
@example(0.0, 0.0, 1e-300, 1e-300)
def test_a_thin_box_of_kosmos2_is_off_by_at_most_a_cell(x, y, width, height):
    x2, y2 = min(x + width, 1), min(y + height, 1)
    if x2 > x and y2 > y:
        (read,) = Kosmos2().read(Kosmos2().write([box(x, y, x2, y2)], (1, 1)), (1, 1))
        assert all(abs(a - b) <= 1 / 32 for a, b in zip(read.numbers, (x, y, x2, y2), strict=True))
        assert read.xy[0][0] < read.xy[1][0] and read.xy[0][1] < read.xy[1][1]


@every_format
def test_writing_what_was_read_changes_nothing(form):
    kind = "box" if "box" in form.kinds else "point"
    regions = [box(10, 20, 300, 400), box(0, 0, 640, 480)] if kind == "box" else [point(10, 20), point(640, 480)]
    once = form.write(regions, SIZE)
    assert form.write(form.read(once, SIZE), SIZE) == once


def test_a_box_without_a_label_does_not_inherit_the_one_before():
    text = QwenVL().write([box(0, 0, 9, 9, "cup"), box(0, 0, 9, 9), box(0, 0, 9, 9)], SIZE)
    assert [r.label for r in QwenVL().read(text, SIZE)] == ["cup", "", ""]


def test_neighbours_with_one_label_share_it():
    points = [point(64, 48, "cup"), point(320, 240, "cup"), point(640, 0, "jug")]
    assert Molmo().write(points, SIZE) == (
        '<points x1="10.0" y1="10.0" x2="50.0" y2="50.0" alt="cup">cup</points> '
        '<point x="100.0" y="0.0" alt="jug">jug</point>'
    )
    boxes = [box(0, 0, 64, 48, "cup"), box(64, 48, 640, 480, "cup")]
    assert QwenVL().write(boxes, SIZE) == "<ref>cup</ref><box>(0,0),(100,100)</box><box>(100,100),(999,999)</box>"
    assert Shikra().write(boxes, SIZE) == "cup[0.000,0.000,0.100,0.100;0.100,0.100,1.000,1.000]"
    assert Kosmos2().write(boxes, SIZE).count("<phrase>") == 1


def test_qwen25_pixels_are_those_of_the_resized_image():
    form = Qwen25VL(seen=(364, 1036))
    (read,) = form.read('{"bbox_2d": [518, 91, 1036, 364]}', (728, 1036 * 3))
    assert read.numbers == pytest.approx((518 * 3, 182, 1036 * 3, 728))


def test_a_mask_goes_through_text_unchanged():
    mask = torch.rand(12, 20) > 0.4
    form = Qwen25VL(seen=(12, 20))
    text = form.write([polygon(ring, "grass") for ring in mask_to_polygons(mask)], (12, 20))
    read = form.read(text, (12, 20))
    assert {r.label for r in read} == {"grass"}
    assert torch.equal(polygons_to_mask([r.xy for r in read], (12, 20)), mask)


# Text that models write on a bad day.

fragments = st.sampled_from(
    ["<box>", "</box>", "(", ")", ",", "[", "]", "{", "}", '"bbox_2d"', '"point_2d"', '"label"', ":", "null", "NaN",
     "1e999", "-1", "0.5", "1000", "99", "٣", "²", "9" * 5000, "<ref>", "</ref>", "<quad>", "<point ", "<points ",
     'x="', 'y1="', '"', "alt=", "<loc0001>", "<loc9999>", "<seg001>", "<patch_index_0001>", "<patch_index_9999>",
     "<object>", "</object>", "\n", "<phrase>", "</phrase>", "</delimiter_of_multi_objects/>", ";", " ", "\\",
     "data-polygon=", ">", "<", "true", "[[", "ab"]
)  # fmt: skip
messy = st.one_of(st.text(max_size=60), st.lists(fragments, max_size=25).map("".join))


@every_format
@settings(max_examples=60)
@given(messy)
@example('{"bbox_2d": ' + "[" * 100_000)
@example('{"bbox_2d": ' + "[" * 100_000 + "]" * 100_000 + "}")
@example('{"bbox_2d": [' + "9" * 5000 + ", 1, 2, 3]}")
@example('{"bbox_2d": [1, 2, ' + "9" * 400 + ", 3]}")
@example('{"bbox_2d": {"a": 1}, "point_2d": "12", "label": ["x"]}')
@example("<box>" + "(" * 20_000)
@example("<patch_index_" + "1" * 5000 + ">" * 2)
def test_bad_text_never_raises(form, text):
    for region in form.read(text, SIZE):
        assert region.kind in form.kinds
        assert all(0 <= x <= 640 and 0 <= y <= 480 for x, y in region.xy)


@every_format
@given(data=st.data(), start=st.integers(0, 40), junk=messy)
def test_a_damaged_answer_never_raises_and_a_cut_one_keeps_its_beginning(form, data, start, junk):
    text = form.write(data.draw(st.lists(regions_of(form), min_size=1, max_size=3)), SIZE)
    form.read(text[:start] + junk + text[start:], SIZE)
    whole = [r.xy for r in form.read(text, SIZE)]
    for end in range(0, len(text), 7):
        cut = [r.xy for r in form.read(text[:end], SIZE)]
        assert cut == whole[: len(cut)]


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (Molmo(), '<points x1="10.0" y1="20.0" x2="100.1" y2="5.0" x3="30" y3="40" alt="a">', [(10, 20), (30, 40)]),
        (Molmo(), '<point x="-3.0" y="5.0" alt="a">', []),
        (Molmo(), '<points x1="1.0" y2="2.0" alt="x3=4">', []),
        (Molmo(), '<points x1="10.0" y1="20.0" x2="30.0" y2="4', [(10, 20)]),
        (Shikra(), "a cup[0.100,0.200] and [1.500,0.200] and [0.1,0.2,0.3]", [(10, 20)]),
        (Shikra(), "[0.500,0.200,0.400,0.900]", []),
        (QwenVL(), "<box>(1000,0),(1001,5)</box>", []),
        (QwenVL(), "<box>(999,999),(0,0)</box><box>(0,0),(999,999)</box>", [(0, 0, 100, 100)]),
        (QwenVL(), "<box>102, 384, 298, 571</box>", []),
        (QwenVL(), "<box>(0,0),(9", []),
        (Qwen25VL((100, 100)), '```json\n[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6,', [(1, 2, 3, 4)]),
        (Qwen25VL((100, 100)), '{"bbox_2d": [1, 2, 3, 101]} {"bbox_2d": [1, 2, 3]} {"point_2d": [true, 1]}', []),
        (Qwen25VL((100, 100)), '{"label": "a {brace}", "point_2d": [7, 8.5]}', [(7, 8.5)]),
        (PaliGemma(), "<loc0000><loc0000><loc1023> cut ; <loc0000><loc0000><loc1023><loc1023> cat", [(0, 0, 100, 100)]),
        (PaliGemma(), "<loc1024><loc0000><loc1023><loc1023> cat", []),
        (Kosmos2(), "<object><patch_index_0000><patch_index_1024></object>", []),
        (Kosmos2(), "<object><patch_index_0033><patch_index_0000></object>", []),
        (Kosmos2(), "<object><patch_index_0000></object>", []),
        (SmallModel(), "[1 2 3] (4 5 6) [256 0 0 0] [9 9 1 1] (300 1)", []),
        (SmallModel(), "it is at (0 255) .", [(100 / 512, 100 - 100 / 512)]),
    ],
)  # fmt: skip
def test_what_is_valid_is_kept_and_the_rest_dropped(form, text, expected):
    read = [r.numbers for r in form.read(text, (100, 100))]
    assert read == [pytest.approx(numbers) for numbers in expected]


# Programmers' errors.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: box(30, 40, 10, 50), "x1 = 30.0 but x2 = 10.0.*xywh"),
        (lambda: box(30, 40, 50, 20), "y1 = 40.0 but y2 = 20.0.*xywh"),
        (lambda: point(math.nan, 1), "finite"),
        (lambda: box(0, 0, math.inf, 1), "finite"),
        (lambda: polygon([(0, 0), (1, 1)]), "at least 3.*got 2"),
        (lambda: Region("box", ((0, 0),)), "exactly 2.*got 1"),
        (lambda: Region("point", ((0, 0, 0),)), "pairs"),
        (lambda: Region("circle", ((0, 0),)), "circle.*point, box, polygon"),
        (lambda: Molmo().write([box(0, 0, 1, 1)], SIZE), "Molmo writes point, got a box"),
        (lambda: QwenVL().write([box(0, 0, 500, 600)], SIZE), "y = 600.0.*height is 480"),
        (lambda: QwenVL().write([point(0, 0)], SIZE), "box and polygon, got a point"),
        (lambda: QwenVL().write([polygon([(0, 0), (1, 0), (1, 1)])], SIZE), "4 corners.*got 3"),
        (lambda: Shikra().write([point(-1, 0)], SIZE), "x = -1.0.*width is 640"),
        (lambda: Kosmos2().write([box(5, 5, 5, 9)], SIZE), "no area"),
        (lambda: Molmo().write([point(0, 0, 'a "cup"')], SIZE), "label"),
        (lambda: Qwen25VL((0, 28)), "seen is"),
        (lambda: SmallModel().read("(1 2)", (0, 5)), "size is"),
        (lambda: SmallModel().read(None, SIZE), "NoneType.*str"),
        (lambda: SmallModel().half_bin((5,)), "size is"),
    ],
)
def test_what_cannot_be_written_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


BOX = torch.tensor([[0.0, 0.0, 4.0, 2.0]])
MASK = torch.ones(1, 3, 5, dtype=torch.bool)
META = torch.zeros(1, 4, device="meta")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: box_iou(BOX[0], BOX), r"a has 1 dimensions \[4\], expected 2"),
        (lambda: box_iou(BOX, BOX[None]), "b has 3 dimensions.*expected 2"),
        (lambda: box_iou(BOX[:, :3], BOX), "four = 3.*expected 4"),
        (lambda: box_iou(BOX, BOX * math.nan), "b has 4 of 4 numbers"),
        (lambda: generalized_box_iou(torch.tensor([[9.0, 9, 5, 20]]), BOX), r"a\[0\] has x1 = 9.0 but x2 = 5.0.*xywh"),
        (lambda: box_iou(torch.tensor([[10.0, 30, 50, 20]]), BOX), "y1 = 30.0 but y2 = 20.0"),
        (lambda: box_convert(BOX, "xyxy", "yxyx"), "'yxyx'.*xyxy, xywh, cxcywh"),
        (lambda: box_convert(torch.tensor([[5.0, 5, -1, 2]]), "xywh", "xyxy"), "side of -1.0.*xyxy"),
        (lambda: box_convert(BOX[0], "xywh", "xyxy"), "expected 2"),
        (lambda: mask_iou(MASK, MASK[:, :2]), r"\(3, 5\).*\(2, 5\)"),
        (lambda: mask_iou(MASK.float(), MASK), "float32.*bool"),
        (lambda: mask_iou(MASK[0], MASK), "2 dimensions.*expected 3"),
        (lambda: points_in_boxes(BOX[:, :2].repeat(2, 1), BOX), "2 points but 1 boxes"),
        (lambda: points_in_boxes(BOX, BOX), "xy = 4.*expected 2"),
        (lambda: points_in_masks(BOX[:, :2] * math.nan, MASK), "NaN"),
        (lambda: points_in_masks(BOX[:0, :2], MASK), "0 points but 1 masks"),
        (lambda: pointing_accuracy(BOX[:0, :2], BOX[:0]), "0 targets.*at least 1"),
        (lambda: pointing_accuracy(BOX[:, :2], BOX[0]), "1 dimensions.*2.*3"),
        (lambda: pointing_accuracy(BOX[:, :2], BOX, answered=torch.ones(2) > 0), r"\[2\].*\[1\]"),
        (lambda: masks_to_boxes(torch.cat([MASK, ~MASK])), "1 of 2 masks"),
        (lambda: masks_to_boxes(MASK[:0]), "N = 0.*at least 1"),
        (lambda: polygons_to_mask([], (3, 3)), "0 rings"),
        (lambda: polygons_to_mask([[(0, 0), (1, 1)]], (3, 3)), "2 corners.*at least 3"),
        (lambda: polygons_to_mask([[(0, 0), (1, 1), (math.nan, 0)]], (3, 3)), "finite"),
        (lambda: polygons_to_mask([[(0, 0, 0), (1, 1, 0), (2, 0, 0)]], (3, 3)), "xy = 3.*expected 2"),
        (lambda: polygons_to_mask([[(0, 0), (1, 1), (2, 0)]], (0, 3)), r"\(0, 3\)"),
        (lambda: mask_to_polygons(MASK), "expected 2"),
        (lambda: mask_to_polygons(MASK[0].int()), "bool"),
        (lambda: mask_loss(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 3, 2) > 0), r"\[1, 1, 3, 2\].*\[1, 1, 2, 3\]"),
        (lambda: mask_loss(torch.zeros(1, 0, 2, 3), torch.zeros(1, 0, 2, 3) > 0), "Q = 0.*at least 1"),
    ],
)  # fmt: skip
def test_bad_numbers_are_refused_with_both_sides(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_two_devices_are_refused():
    # A meta tensor stands for another device; it has no values to check.
    with pytest.raises(ValueError, match=r"cpu.*meta"):
        box_iou(BOX, META)


# Boxes, points and masks compared.


def test_iou_by_hand():
    a = torch.tensor([[0.0, 0, 4, 2], [0, 0, 2, 4]])
    b = torch.tensor([[2.0, 0, 6, 2], [10, 10, 12, 11], [3, 3, 3, 3]])
    assert box_iou(a, b).tolist() == [pytest.approx([4 / 12, 0, 0]), pytest.approx([0, 0, 0])]
    assert box_iou(b[2:], b[2:]).item() == 0
    apart = generalized_box_iou(a[:1], b[1:2]).item()
    assert apart == pytest.approx(0 - (12 * 11 - 10) / (12 * 11))
    assert generalized_box_iou(a, a).diagonal().tolist() == [1, 1]


xyxy = st.lists(st.integers(0, 60), min_size=4, max_size=4).map(
    lambda n: [min(n[0], n[2]), min(n[1], n[3]), max(n[0], n[2]), max(n[1], n[3])]
)


@given(st.lists(xyxy, min_size=1, max_size=4), st.lists(xyxy, min_size=1, max_size=4))
def test_iou_counts_pixels_and_is_symmetric(a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    rows, columns = torch.arange(60)[:, None], torch.arange(60)
    masks = [
        torch.stack([(columns >= x1) & (columns < x2) & (rows >= y1) & (rows < y2) for x1, y1, x2, y2 in boxes])
        for boxes in (a, b)
    ]
    iou = box_iou(a, b)
    torch.testing.assert_close(iou, mask_iou(*masks).where(masks[0].any((1, 2))[:, None] | masks[1].any((1, 2)), 0.0))
    assert torch.equal(iou, box_iou(b, a).T)
    general = generalized_box_iou(a, b)
    assert (general <= iou + 1e-6).all() and (general > -1).all()


@given(st.lists(xyxy, min_size=1, max_size=4), st.sampled_from(["xywh", "cxcywh"]))
def test_conversions_undo_each_other(boxes, name):
    boxes = torch.tensor(boxes).float()
    assert torch.equal(box_convert(box_convert(boxes, "xyxy", name), name, "xyxy"), boxes)


def test_a_point_hits_by_x_then_y():
    boxes = torch.tensor([[10.0, 0, 20, 5], [10, 0, 20, 5], [10, 0, 20, 5], [10, 0, 20, 5]])
    points = torch.tensor([[15.0, 2], [2, 15], [20, 5], [20.1, 5]])
    assert points_in_boxes(points, boxes).tolist() == [True, False, True, False]
    masks = torch.zeros(4, 6, 30, dtype=torch.bool)
    masks[:, 0:5, 10:20] = True
    assert points_in_masks(points, masks).tolist() == [True, False, False, False]
    edge = torch.tensor([[19.99, 4.99], [-0.5, 0.5], [30, 2], [10, 6]])
    assert points_in_masks(edge, torch.ones_like(masks)).tolist() == [True, False, False, False]
    assert pointing_accuracy(points, boxes) == 0.5 and pointing_accuracy(points, masks) == 0.25
    silent = torch.tensor([False, True, True, True])
    assert pointing_accuracy(points, boxes, answered=silent) == 0.25


def test_mask_iou_by_hand():
    masks = torch.zeros(3, 2, 4, dtype=torch.bool)
    masks[0, :, :2], masks[1, :, 1:] = True, True
    expected = torch.tensor([[1, 2 / 8, 0], [2 / 8, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(mask_iou(masks, masks), expected)


# Polygons and masks.


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_traced_mask_is_filled_back_exactly(height, width, data):
    cells = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = torch.tensor(cells).view(height, width)
    rings = mask_to_polygons(mask)
    assert bool(rings) == bool(mask.any())
    if rings:
        assert torch.equal(polygons_to_mask(rings, (height, width)), mask)
        for ring in rings:  # every corner is a turn
            around = [ring[-1], *ring, ring[0]]
            for a, b, c in zip(around, around[1:], around[2:], strict=False):
                assert (a[0] == b[0]) != (b[0] == c[0])


def test_polygons_that_share_an_edge_share_no_pixel():
    size = (11, 17)
    cut = [(3.3, 0.0), (9.7, 11.0)]
    left, right = [(0, 0), *cut, (0, 11)], [cut[0], (17, 0), (17, 11), cut[1]]
    a, b = polygons_to_mask([left], size), polygons_to_mask([right], size)
    assert not (a & b).any() and (a | b).all()
    through_centres = [[(0.5, 0.5), (4.5, 0.5), (4.5, 4.5), (0.5, 4.5)]]
    assert polygons_to_mask(through_centres, (6, 6)).sum() == 16


def test_even_odd_makes_a_hole_whatever_the_direction():
    outer, inner = [(0, 0), (6, 0), (6, 6), (0, 6)], [(2, 2), (4, 2), (4, 4), (2, 4)]
    for ring in (inner, inner[::-1]):
        mask = polygons_to_mask([outer, ring], (6, 6))
        assert mask.sum() == 32 and not mask[2:4, 2:4].any()


def test_size_is_height_then_width_and_corners_are_x_then_y():
    mask = polygons_to_mask([[(0, 0), (5, 0), (5, 2), (0, 2)]], (3, 8))
    assert mask.shape == (3, 8) and mask[:2, :5].all() and mask.sum() == 10
    assert masks_to_boxes(mask[None]).tolist() == [[0, 0, 5, 2]]


# The mask decoder.


def test_the_decoder_learns_two_masks_of_one_image_by_their_queries():
    rows, columns = 3, 5
    features, queries = torch.randn(1, rows * columns, 16), torch.randn(1, 2, 8)
    rings = [[(1, 1), (18, 1), (4, 11)]], [[(12, 0), (20, 0), (20, 12), (10, 9)]]
    masks = torch.stack([polygons_to_mask(ring, (4 * rows, 4 * columns)) for ring in rings])  # [2, 12, 20]
    decoder = MaskDecoder(dim=16, query_dim=8, grid=(rows, columns))
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        mask_loss(decoder(features, queries), masks[None]).backward()
        optimizer.step()
    predicted = decoder(features, queries) > 0
    assert predicted.shape == (1, 2, 12, 20)
    assert mask_iou(predicted[0], masks).diagonal().min() > 0.95
    assert torch.equal(decoder(features, queries.flip(1)) > 0, predicted.flip(1))


@torch.no_grad()
def test_the_decoder_keeps_places_and_batches_apart():
    decoder = MaskDecoder(dim=6, query_dim=4, grid=(3, 5)).eval()
    features, queries = torch.randn(2, 15, 6), torch.randn(2, 3, 4)
    logits = decoder(features, queries)
    for row in range(2):
        torch.testing.assert_close(decoder(features[row : row + 1], queries[row : row + 1])[0], logits[row])
    features[0, 8] += 1  # row 1, column 3; the middle patch 7 would not tell row- from column-major
    changed = (decoder(features, queries) - logits).abs().amax(1) > 1e-6  # [B, 12, 20]
    assert masks_to_boxes(changed[:1]).tolist() == [[12, 4, 16, 8]] and not changed[1].any()


@pytest.mark.parametrize(
    ("features", "queries", "words"),
    [
        ((2, 16, 6), (2, 1, 4), "N = 16.*expected 15.*CLS"),
        ((2, 15, 7), (2, 1, 4), "D = 7.*expected 6"),
        ((15, 6), (2, 1, 4), "expected 3"),
        ((2, 15, 6), (1, 1, 4), "B = 1.*expected 2"),
        ((2, 15, 6), (2, 1, 5), "D = 5.*expected 4"),
    ],
)
def test_the_decoder_refuses_other_shapes(features, queries, words):
    decoder = MaskDecoder(dim=6, query_dim=4, grid=(3, 5))
    with pytest.raises(ValueError, match=words):
        decoder(torch.zeros(features), torch.zeros(queries))


def test_mask_loss_by_hand():
    masks = torch.tensor([[[[True, False], [False, False]]]])
    sure = torch.where(masks, 50.0, -50.0)
    assert mask_loss(sure, masks).item() == pytest.approx(0, abs=1e-6)
    half = torch.zeros(1, 1, 2, 2)
    dice = (2 * 0.5 + 1) / (3 + 1)
    assert mask_loss(half, masks).item() == pytest.approx(2 * math.log(2) + 0.5 * (1 - dice))
    assert mask_loss(half, masks, bce_weight=0, dice_weight=1).item() == pytest.approx(1 - dice)


def test_qwen25_text_is_json():
    rows = json.loads(Qwen25VL(SEEN).write([box(0, 0, 640, 480, 'a "red" cup\n'), point(0, 0)], SIZE))
    assert rows == [{"bbox_2d": [0, 0, 644, 476], "label": 'a "red" cup'}, {"point_2d": [0, 0]}]
