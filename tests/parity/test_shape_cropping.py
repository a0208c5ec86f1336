"""UReader's and DocOwl 1.5's crops against the rule of their released code, written anew here, and against loops."""

import random

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vlm_course.catalog import find
from vlm_course.resolution import resize
from vlm_course.shape_cropping import (
    DOCOWL_15,
    UREADER,
    CropPositions,
    choose_grid,
    corner_overlap,
    crop_grids,
    crop_places,
    crop_token_count,
    crop_words,
    grid_scores,
    shape_adaptive_crops,
)

# UReader/configs/sft/release.yaml at cd7b635, and grid_9 of DocOwl1.5/mplug_docowl/processor.py at 665af06
RELEASED = [
    (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1), (1, 5), (5, 1), (1, 6), (2, 3), (3, 2), (6, 1),
    (1, 7), (7, 1), (1, 8), (2, 4), (4, 2), (8, 1), (1, 9), (3, 3), (9, 1), (1, 10), (2, 5), (5, 2), (10, 1), (1, 11),
    (11, 1), (2, 6), (3, 4), (4, 3), (6, 2), (2, 7), (7, 2), (3, 5), (5, 3), (2, 8), (4, 4), (8, 2), (2, 9), (3, 6),
    (6, 3), (9, 2), (2, 10), (4, 5), (5, 4), (10, 2),
]  # fmt: skip
GRID_9 = [
    (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 4), (4, 1), (1, 5), (5, 1), (1, 6), (6, 1), (2, 3), (3, 2),
    (1, 7), (7, 1), (4, 2), (2, 4), (1, 8), (8, 1), (3, 3), (1, 9), (9, 1),
]  # fmt: skip
SIDES = st.integers(1, 4000)


def published_choice(size, grids, tile):
    """The released rule in its own arithmetic: boxes of whole pixels, scores in float32, the first of the best."""
    height, width = size
    canvas = torch.tensor([[rows * tile, cols * tile] for rows, cols in grids])
    stretched = torch.stack([(height / width * canvas[:, 1]).long(), canvas[:, 1]], dim=1)  # long() drops the fraction

    def overlap(other):
        shared = torch.minimum(canvas, other).prod(dim=1)
        return shared / (canvas.prod(dim=1) + other.prod(dim=1) - shared + 1e-5)

    return grids[int((overlap(stretched) * 100 + overlap(torch.tensor([[height, width]]))).argmax())]


def sizes():
    draw = random.Random(0)
    drawn = [(draw.randint(1, 4000), draw.randint(1, 4000)) for _ in range(700)]
    small = [(draw.randint(1, 300), draw.randint(1, 300)) for _ in range(200)]
    thin = [(1, side) for side in (1, 2, 224, 5000)] + [(side, 1) for side in (2, 224, 5000)]
    pages = [(3300, 2550), (2550, 3300), (1654, 1169), (792, 612), (224, 224), (448, 448), (672, 1344)]
    return drawn + small + thin + pages


def test_grids_are_those_of_the_released_files():
    assert crop_grids() == RELEASED
    assert sorted(crop_grids(max_cells=9, max_side=9)) == sorted(GRID_9)
    assert (len(RELEASED), len(GRID_9)) == (48, 23)


@pytest.mark.parametrize(("settings", "grids"), [(UREADER, RELEASED), (DOCOWL_15, GRID_9)], ids=["ureader", "docowl"])
def test_the_released_rule_chooses_the_same_grid(settings, grids):
    for size in sizes():
        assert choose_grid(size, **settings) == published_choice(size, grids, settings["tile"]), size


def test_dropped_fractions_decide_some_pages():
    """The released code and the paper's formula differ for about one page in sixty: shape alone is then not equal."""
    differ = [size for size in sizes() if choose_grid(size) != choose_grid(size, whole_pixels=False)]
    assert 0 < len(differ) < len(sizes()) / 20
    for size in differ:
        (exact, _), (released, _) = (grid_scores(size, choose_grid(size, whole_pixels=flag), whole_pixels=False)
                                     for flag in (False, True))  # fmt: skip
        assert exact - released < 0.01, size


@given(height=SIDES, width=SIDES, rows=st.integers(1, 11), cols=st.integers(1, 11), tile=st.integers(1, 448))
def test_scores_are_overlaps(height, width, rows, cols, tile):
    shape, extent = grid_scores((height, width), (rows, cols), tile=tile, whole_pixels=False)
    assert 0 < shape <= 1 and 0 < extent <= 1
    sides = sorted((height * cols, width * rows))
    assert abs(float(shape) - sides[0] / sides[1]) < 1e-12
    assert extent == corner_overlap((height, width), (rows * tile, cols * tile))  # the order does not matter
    twice = grid_scores((2 * height, 2 * width), (rows, cols), tile=tile, whole_pixels=False)
    assert twice[0] == shape  # shape knows no size
    released, _ = grid_scores((height, width), (rows, cols), tile=tile)
    assert abs(released - shape) <= 1 / (rows * tile)  # a pixel of the canvas's height, at most


@given(height=st.integers(1, 9), width=st.integers(1, 9), other=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_overlap_is_the_share_of_counted_pixels(height, width, other):
    pixels = lambda size: {(row, col) for row in range(size[0]) for col in range(size[1])}  # noqa: E731
    one, two = pixels((height, width)), pixels(other)
    assert corner_overlap((height, width), other) * len(one | two) == len(one & two)


@pytest.mark.parametrize("grid", crop_grids())
@pytest.mark.parametrize("tile", [224, 37])
def test_a_page_that_fills_a_grid_gets_it(grid, tile):
    rows, cols = grid
    assert choose_grid((rows * tile, cols * tile), tile=tile) == grid


@given(height=SIDES, width=SIDES)
@example(height=1, width=1)
def test_a_turned_page_gets_the_turned_grid(height, width):
    rows, cols = choose_grid((height, width), whole_pixels=False)
    best = grid_scores((height, width), (rows, cols), whole_pixels=False)
    turned = choose_grid((width, height), whole_pixels=False)
    assert grid_scores((width, height), turned, whole_pixels=False) == best  # ties may turn another way


@given(height=st.integers(1, 60), width=st.integers(1, 60), tile=st.integers(1, 9), cells=st.integers(1, 6))
@example(height=1, width=1, tile=1, cells=1)
def test_crops_lie_where_their_places_say(height, width, tile, cells):
    page = torch.rand(2, height, width)
    views, places = shape_adaptive_crops(page, tile=tile, max_cells=cells, max_side=5)
    rows, cols = choose_grid((height, width), tile=tile, max_cells=cells, max_side=5)
    assert views.shape == (1 + rows * cols, 2, tile, tile) and places.shape == (1 + rows * cols, 2)
    stretched = resize(page, (rows * tile, cols * tile))
    for view, (row, col) in zip(views[1:], places[1:].tolist(), strict=True):
        torch.testing.assert_close(
            view, stretched[:, row * tile : (row + 1) * tile, col * tile : (col + 1) * tile], rtol=0, atol=0
        )
    torch.testing.assert_close(views[0], resize(page, (tile, tile)), rtol=0, atol=0)
    assert places[0].tolist() == [min(cells, 5)] * 2
    assert crop_token_count((height, width), tokens=3, tile=tile, max_cells=cells, max_side=5) == 3 * len(views)


def test_a_page_of_letter_paper_in_both_models():
    """2550 x 3300 pixels, 300 dots an inch: 4 x 3 crops in UReader; in DocOwl 1.5, with 9 at most, 3 x 2."""
    page = (3300, 2550)
    assert choose_grid(page) == (4, 3)
    assert choose_grid(page, **DOCOWL_15) == (3, 2)
    assert crop_token_count(page) == 13 * find("ureader")["visual_tokens"] == 845
    assert crop_token_count(page, tokens=257, **DOCOWL_15) == 7 * find("docowl-1.5")["visual_tokens"] == 1799


def test_settings_are_the_catalogs():
    assert UREADER["tile"] == find("ureader")["image_size"] == 224
    assert DOCOWL_15["tile"] == find("docowl-1.5")["image_size"] == 448
    assert DOCOWL_15["max_cells"] == 9


def test_places_are_row_by_row_behind_the_whole():
    assert crop_places((2, 3)).tolist() == [[11, 11], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert crop_places((1, 1), whole=9).tolist() == [[9, 9], [0, 0]]


def test_words_name_the_places():
    assert crop_words(crop_places((2, 1), whole=9)) == ["<global_img>", "<crop_img_row0_col0>", "<crop_img_row1_col0>"]
    assert crop_words(crop_places((1, 2), whole=11), whole=11)[1:] == ["<crop_img_row0_col0>", "<crop_img_row0_col1>"]


@given(views=st.integers(1, 5), tokens=st.integers(1, 4), dim=st.integers(1, 6))
@torch.no_grad()
def test_positions_are_half_a_row_and_half_a_column(views, tokens, dim):
    positions = CropPositions(dim, places=12)
    x, places = torch.randn(views, tokens, dim), torch.randint(0, 12, (views, 2))
    out = positions(x, places)
    for view, (row, col) in enumerate(places.tolist()):
        for token in range(tokens):
            expected = x[view, token] + 0.5 * positions.rows.weight[row] + 0.5 * positions.columns.weight[col]
            torch.testing.assert_close(out[view, token], expected, rtol=0, atol=1e-6)


def test_a_whole_page_inside_its_grid_is_refused():
    with pytest.raises(ValueError, match=r"\(12, 1\) is 12.*place 11"):
        crop_places((12, 1))
    with pytest.raises(ValueError, match=r"from 0 to 11.*15|from 0 to 15.*15"):
        CropPositions(4)(torch.zeros(1, 1, 4), torch.tensor([[0, 15]]))
