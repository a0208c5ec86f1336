"""What the measures are made of: overlap of boxes, numbers read from an answer, the printed table."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou as reference_iou

from vlm_course.evaluation import box_iou, format_table, read_numbers
from vlm_course.tokenizer import WordTokenizer
from vlm_course.worlds.dialogs import from_grid, to_grid

TOK = WordTokenizer.small()
corner = st.floats(0, 96, width=32)
box = st.tuples(corner, corner, corner, corner).map(lambda b: (*map(min, b[:2], b[2:]), *map(max, b[:2], b[2:])))


def ids(text, length=8):
    row = TOK.encode(text)
    return torch.tensor([row + [TOK.pad_id] * (length - len(row))])


@given(st.lists(st.tuples(box, box), min_size=1, max_size=20))
def test_overlap_equals_torchvision(pairs):
    a, b = (torch.tensor(boxes) for boxes in zip(*pairs, strict=True))
    expected = reference_iou(a, b).diagonal().nan_to_num(0.0)  # torchvision divides 0 by 0 for two boxes without area
    torch.testing.assert_close(box_iou(a, b), expected, atol=1e-5, rtol=1e-5)


def test_overlap_of_boxes_that_are_none():
    good = torch.tensor([[10.0, 10, 20, 20]])
    for other in ([20.0, 20, 10, 10], [10.0, 10, 10, 20], [20.0, 10, 30, 20], [torch.nan] * 4):
        assert box_iou(torch.tensor([other]), good) == box_iou(good, torch.tensor([other])) == 0
    assert box_iou(good, good) == 1


@given(st.lists(st.integers(0, 255), min_size=4, max_size=4))
def test_numbers_are_read_as_they_were_written(numbers):
    x1, y1, x2, y2 = numbers
    got = read_numbers(ids(f"[ {x1} {y1} {x2} {y2} ]"), TOK, 4, "[]")
    assert torch.equal(got[0], from_grid(torch.tensor(numbers))) and torch.equal(to_grid(got[0]), torch.tensor(numbers))
    assert torch.equal(read_numbers(ids(f"( {x1} {y1} )"), TOK, 2, "()"), got[:, :2])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red",
        "[ ]",
        "[ 1 2 3 ]",
        "[ 1 2 3 4",
        "1 2 3 4 ]",
        "( 1 2 3 4 )",
        "[ 1 2 red 4 ]",
        "[ 1 2 ? 4 ]",
        "[ 1 2 3 4 5 ]",
        "[ 1 2 3 4 ] .",
        "[ 1 2 3 300 ]",
        "] 1 2 3 4 [",
    ],
)
def test_a_malformed_box_is_no_box_and_overlaps_nothing(text):
    for length in (len(TOK.encode(text)), 12):
        numbers = read_numbers(ids(text, length), TOK, 4, "[]")
        assert numbers.shape == (1, 4) and numbers.isnan().all()
        assert box_iou(numbers, torch.tensor([[0.0, 0, 96, 96]])) == 0


def test_a_malformed_row_spoils_no_other():
    got = read_numbers(torch.cat([ids("[ 1 2 3 4 ]"), ids("[ 1 2 3 ]")]), TOK, 4, "[]")
    assert got[0].isfinite().all() and got[1].isnan().all()


def test_the_table_shows_every_number_under_its_column():
    table = {"colour": {"model": 0.99951, "blind": 0.0}, "held-out colour": {"model": 0.929, "questions": 1789}}
    lines = format_table(table).splitlines()
    assert lines[0].split() == ["model", "blind", "questions"]
    assert lines[1].split() == ["colour", "0.9995", "0.0000"]
    assert lines[2].split() == ["held-out", "colour", "0.9290", "1,789"]
    assert lines[0].index("questions") + len("questions") == lines[2].index("1,789") + len("1,789")
