"""AnyRes against LLaVA-NeXT in transformers, dynamic tiles against the processor of InternVL, over many sizes."""

import random
import sys
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, GotOcr2ImageProcessor, LlamaConfig, LlavaNextConfig, LlavaNextImageProcessor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_transforms import divide_to_patches
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from vlm_course import dynamic_tiling, resolution
from vlm_course.resolution import LLAVA_NEXT_RESOLUTIONS as RELEASED

TILE, PATCH, WIDTH = 32, 8, 16
SMALL = [(32, 64), (64, 32), (64, 64), (96, 32), (32, 96)]
ODD = [(24, 24), (24, 72), (72, 24), (48, 48), (24, 48)]  # tiles of 24 px make grids with an odd number of cells
NAMED = [(49, 98), (98, 49), (249, 996), (996, 249), (100, 180), (180, 100), (768, 767), (400, 900), (50, 60)]
ROUNDED = [
    (47, 1128),
    (55, 176),
    (88, 99),
    (235, 1128),
    (376, 799),
]  # on the released grids a float error costs two rows
HALF = [(64, 72), (72, 64)]  # exactly half the pixels of the 2 x 2 grid of 48-pixel tiles that ties with 1 x 1
PRIMES = [2, 3, 7, 13, 97, 101, 331, 337, 673, 1009, 2003]


def sweep():
    """800 sizes or so: those of known bugs, sides of one pixel, primes, exact canvases, and random ones."""
    draw = random.Random(0)
    sizes = [*NAMED, *ROUNDED, *HALF, (1, 1), *RELEASED, (336, 336), (1344, 672)]
    sizes += [(1, side) for side in (2, 5, 100, 336, 5000)] + [(side, 1) for side in (2, 5, 100, 336, 5000)]
    sizes += [(a, b) for a in PRIMES for b in PRIMES]
    sizes += [(draw.randint(1, 2000), draw.randint(1, 2000)) for _ in range(450)]
    sizes += [(draw.randint(1, 120), draw.randint(1, 120)) for _ in range(200)]
    return sorted(set(sizes))


SIZES = sweep()


@pytest.fixture(scope="module")
def model():
    return LlavaNextModel(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(
                image_size=TILE,
                patch_size=PATCH,
                hidden_size=WIDTH,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
            ),
            text_config=LlamaConfig(
                vocab_size=32,
                hidden_size=WIDTH,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
            ),
            image_grid_pinpoints=[list(size) for size in SMALL],
            image_token_id=31,
        )
    )


def views(size):
    """Features that number themselves: view, patch and channel can all be read off."""
    rows, cols = resolution.anyres_grid(size, SMALL, TILE)
    shape = (1 + rows * cols, (TILE // PATCH) ** 2, 3)
    return torch.arange(shape[0] * shape[1] * shape[2], dtype=torch.float32).reshape(shape), (rows, cols)


def test_the_sweep_is_wide():
    assert len(SIZES) >= 500
    assert set(NAMED) <= set(SIZES)


# ------------------------------------------------------------------------------------------------- the canvas


@pytest.mark.parametrize("canvases", [RELEASED, SMALL, ODD], ids=["released", "small", "odd"])
def test_canvas_grid_and_tile_count_for_every_size(canvases):
    tile = 336 if canvases is RELEASED else min(min(canvases))
    pinpoints = [list(canvas) for canvas in canvases]
    for size in SIZES:
        assert resolution.select_best_resolution(size, canvases) == select_best_resolution(size, pinpoints), size
        grid = resolution.anyres_grid(size, canvases, tile)
        assert grid == get_anyres_image_grid_shape(size, pinpoints, tile), size
        assert 1 + grid[0] * grid[1] == image_size_to_num_patches(size, pinpoints, tile), size


def test_of_equal_canvases_the_smallest_then_the_first_wins():
    assert resolution.select_best_resolution((10, 10), [(64, 64), (32, 32), (96, 32)]) == (32, 32)
    assert resolution.select_best_resolution((10, 10), [(32, 64), (64, 32)]) == (32, 64)
    assert resolution.select_best_resolution((10, 10), [(64, 32), (32, 64)]) == (64, 32)


def test_a_landscape_picture_gets_a_landscape_canvas():
    assert resolution.select_best_resolution((400, 900), RELEASED) == (336, 1008)
    assert resolution.select_best_resolution((900, 400), RELEASED) == (1008, 336)


def test_fit_inside_for_every_size():
    for size in SIZES:
        for canvas in RELEASED:
            expected = get_patch_output_size(torch.empty(3, *size, device="meta"), canvas, ChannelDimension.FIRST)
            assert resolution.fit_inside(size, canvas) == expected, (size, canvas)


# -------------------------------------------------------------------------------------------------- the tiles


@given(rows=st.integers(1, 4), cols=st.integers(1, 4), tile=st.integers(1, 5))
def test_tiles_are_read_row_by_row(rows, cols, tile):
    image = torch.arange(2 * rows * cols * tile**2).reshape(2, rows * tile, cols * tile)
    tiles = resolution.divide_to_tiles(image, tile)
    assert torch.equal(tiles, torch.stack(divide_to_patches(image, tile)))


@pytest.mark.parametrize("size", [(50, 60), (40, 90), (90, 40), (33, 64), (7, 61), (1, 5), (200, 130)])
def test_views_equal_those_of_the_image_processor(size):
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[list(canvas) for canvas in SMALL],
        do_rescale=False,
        do_normalize=False,
    )
    image = torch.rand(3, *size)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(resolution.anyres_tiles(image, SMALL, TILE), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------- unpadding, packing


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (24, 24), (24, 48), (48, 24), (7, 5), (5, 9), (24, 72), (1, 3)])
def test_the_slicer_and_the_counter_for_every_size(grid):
    cells = torch.arange(grid[0] * grid[1]).reshape(*grid, 1)
    for size in SIZES:
        expected = unpad_image(cells.permute(2, 0, 1), size)[0]
        assert torch.equal(resolution.unpad(cells, size)[..., 0], expected), size
        assert resolution.unpadded_grid(grid, size) == tuple(expected.shape), size


@pytest.mark.parametrize(
    "grid, size, left",
    [
        ((4, 4), (249, 996), (2, 4)),  # exactly 1 row of picture, and 1 of 3 rows of padding stays; 0.9999 lost both
        ((24, 72), (47, 1128), (4, 72)),
        ((24, 48), (55, 176), (16, 48)),
        ((24, 48), (88, 99), (24, 28)),
        ((24, 24), (100, 180), (14, 24)),  # 13.3 rows hold picture; the odd row of padding stays
        ((24, 24), (180, 100), (24, 14)),
        ((24, 24), (1, 5000), (0, 24)),  # thinner than a cell: nothing is left but the thumbnail
        ((24, 24), (336, 336), (24, 24)),
    ],
)
def test_unpadding_of_sizes_with_a_history(grid, size, left):
    assert resolution.unpadded_grid(grid, size) == left


def test_packing_and_counting_for_every_size(model):
    newline = torch.tensor([-1.0, -2.0, -3.0])
    count = partial(resolution.anyres_token_count, resolutions=SMALL, tile=TILE, patch=PATCH)
    for size in SIZES:
        features, grid = views(size)
        for end in (newline, None):
            (expected,), lengths = model.pack_image_features([features], [size], "default", image_newline=end)
            packed = resolution.pack_image_features(features, size, grid=grid, newline=end)
            assert torch.equal(packed, expected), size
            assert count(size, newline=end is not None) == len(packed) == lengths.item(), size


def test_a_picture_sent_as_its_thumbnail_alone(model):
    features, newline = torch.arange(48.0).reshape(1, 16, 3), torch.tensor([-1.0, -2.0, -3.0])
    for end in (newline, None):
        (expected,), _ = model.pack_image_features([features], [(50, 60)], "default", image_newline=end)
        packed = resolution.pack_image_features(features, (50, 60), grid=None, newline=end)
        assert torch.equal(packed, expected)


def test_every_row_ends_with_the_newline():
    features, newline = torch.zeros(3, 2, 4), torch.ones(4)
    rows = resolution.add_newlines(features, newline).reshape(3, 3, 4)
    assert rows[..., 0].tolist() == [[0, 0, 1]] * 3


def test_released_token_counts():
    count = partial(resolution.anyres_token_count, resolutions=RELEASED, tile=336, patch=14)
    assert count((672, 672)) == 576 + 48 * 49 == 2928
    assert count((336, 672)) == 576 + 24 * 49
    assert count((672, 336)) == 576 + 48 * 25
    assert max(count(size) for size in SIZES) == 2928
    assert resolution.anyres_token_count((50, 60), SMALL, tile=TILE, patch=PATCH) == 70


# ---------------------------------------------------------------------------------------------- dynamic tiles


@pytest.mark.parametrize("low, high", [(1, 12), (1, 6), (2, 9), (7, 7), (1, 1)])
def test_dynamic_tile_count_for_every_size(low, high):
    processor = GotOcr2ImageProcessor(crop_to_patches=True, min_patches=low, max_patches=high)
    for tile in (448, 48):
        processor.size = {"height": tile, "width": tile}
        for size in SIZES:
            count = dynamic_tiling.dynamic_token_count(
                size, tile=tile, patch=4, shuffle=2, min_tiles=low, max_tiles=high
            )
            assert count == processor.get_number_of_image_patches(*size) * (tile // 8) ** 2, (size, tile)


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (50, 50), (20, 20), (200, 130), (1, 70), (64, 97), (100, 300)])
def test_dynamic_views_equal_those_of_the_image_processor(size):
    processor = GotOcr2ImageProcessor(
        size={"height": TILE, "width": TILE}, crop_to_patches=True, do_rescale=False, do_normalize=False
    )
    image = torch.rand(3, *size)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(dynamic_tiling.dynamic_tiles(image, tile=TILE), expected, rtol=0, atol=1e-5)


def test_dynamic_grid_for_every_size():
    canvas = sys.modules[GotOcr2ImageProcessor.__module__].get_optimal_tiled_canvas
    for high in (4, 12):
        for size in SIZES:
            cols, rows = canvas(size, (48, 48), 1, high)
            assert dynamic_tiling.closest_grid(size, tile=48, max_tiles=high) == (rows, cols), size


def test_dynamic_grids_in_internvl():
    assert dynamic_tiling.tile_grids(max_tiles=4)[:4] == [(1, 1), (2, 1), (1, 2), (3, 1)]
    assert dynamic_tiling.closest_grid((448, 1344)) == (1, 3)
    assert dynamic_tiling.closest_grid((1344, 448)) == (3, 1)
    assert dynamic_tiling.closest_grid((300, 300)) == (1, 1)  # too few pixels for 2 x 2
    assert dynamic_tiling.closest_grid((900, 900)) == (2, 2)
    assert dynamic_tiling.closest_grid((1400, 1400)) == (3, 3)
    assert dynamic_tiling.dynamic_token_count((448, 1344)) == 4 * 256
    assert dynamic_tiling.dynamic_token_count((300, 300)) == 256


# -------------------------------------------------------------------------------------------------- bad input

IMAGE = torch.zeros(3, 64, 64)
VIEWS = torch.zeros(3, 16, 4)


@pytest.mark.parametrize(
    "call, numbers",
    [
        (lambda: resolution.select_best_resolution((0, 5), SMALL), r"\(0, 5\).*at least 1"),
        (lambda: resolution.select_best_resolution((5, 5, 3), SMALL), r"\(5, 5, 3\).*two"),
        (lambda: resolution.select_best_resolution((5.5, 5), SMALL), r"5\.5.*whole"),
        (lambda: resolution.select_best_resolution(torch.tensor([5, 5]), SMALL), "tolist"),
        (lambda: resolution.select_best_resolution((5, 5), []), "0 resolutions.*at least 1"),
        (lambda: resolution.select_best_resolution((5, 5), [(32, 0)]), r"\(32, 0\).*at least 1"),
        (lambda: resolution.fit_inside((5, 0), (32, 32)), r"size.*\(5, 0\)"),
        (lambda: resolution.fit_inside((5, 5), (32, -1)), r"canvas.*\(32, -1\)"),
        (lambda: resolution.anyres_grid((5, 5), [(33, 32)], 32), "height is 33.*32"),
        (lambda: resolution.anyres_grid((5, 5), [(32, 40)], 32), "width is 40.*32"),
        (lambda: resolution.anyres_grid((5, 5), SMALL, 0), "tile = 0"),
        (lambda: resolution.divide_to_tiles(IMAGE[None], 32), "4 dimensions.*expected 3"),
        (lambda: resolution.divide_to_tiles(IMAGE[:, :63], 32), "height is 63.*32"),
        (lambda: resolution.divide_to_tiles(IMAGE[:, :, :60], 32), "width is 60.*32"),
        (lambda: resolution.resize(IMAGE[0], (5, 5)), "2 dimensions.*expected 3"),
        (lambda: resolution.resize(IMAGE[:, :0], (5, 5)), "H = 0.*at least 1"),
        (lambda: resolution.resize(IMAGE, (5, 0)), r"\(5, 0\).*at least 1"),
        (lambda: resolution.anyres_tiles(IMAGE.byte(), SMALL, 32), "uint8.*floating"),
        (lambda: resolution.anyres_tiles(IMAGE[None], SMALL, 32), "4 dimensions.*expected 3"),
        (lambda: resolution.anyres_tiles(IMAGE[:, :0], SMALL, 32), "H = 0.*at least 1"),
        (lambda: resolution.unpadded_grid((0, 4), (5, 5)), r"grid is \(0, 4\)"),
        (lambda: resolution.unpadded_grid((4, 4), (5, 0)), r"size is \(5, 0\)"),
        (lambda: resolution.unpad(torch.zeros(4, 4), (5, 5)), "2 dimensions.*expected 3"),
        (lambda: resolution.unpad(torch.zeros(4, 4, 3), (0, 5)), r"\(0, 5\)"),
        (lambda: resolution.stitch_tiles(VIEWS, (1, 2)), "tiles = 3.*expected 2.*thumbnail"),
        (lambda: resolution.stitch_tiles(VIEWS[:, :15], (1, 3)), "15.*9 or 16"),
        (lambda: resolution.stitch_tiles(VIEWS[0], (1, 3)), "2 dimensions.*expected 3"),
        (lambda: resolution.stitch_tiles(VIEWS, (3, 0)), r"\(3, 0\)"),
        (lambda: resolution.add_newlines(VIEWS, torch.zeros(5)), "D = 5.*expected 4"),
        (lambda: resolution.add_newlines(VIEWS, torch.zeros(1, 4)), "2 dimensions.*expected 1"),
        (lambda: resolution.add_newlines(VIEWS[0], torch.zeros(4)), "2 dimensions.*expected 3"),
        (lambda: resolution.add_newlines(VIEWS, torch.zeros(4, device="meta")), "meta.*cpu"),
        (lambda: resolution.pack_image_features(VIEWS, (5, 5), grid=(1, 3)), "views = 3.*expected 4"),
        (lambda: resolution.pack_image_features(VIEWS, (5, 5), grid=None), "views = 3.*expected 1"),
        (lambda: resolution.pack_image_features(VIEWS[:, :15], (5, 5), grid=(1, 2)), "15.*CLS"),
        (lambda: resolution.pack_image_features(VIEWS, (5, 0), grid=(1, 2)), r"\(5, 0\)"),
        (lambda: resolution.pack_image_features(VIEWS, (5, 5), grid=(-1, -2)), r"\(-1, -2\)"),
        (lambda: resolution.pack_image_features(VIEWS, (5, 5), grid=(1, 2), newline=torch.zeros(3)), "3.*expected 4"),
        (lambda: resolution.anyres_token_count((5, 5), SMALL, tile=32, patch=7), "32.*7"),
        (lambda: resolution.anyres_token_count((5, -5), SMALL, tile=32, patch=8), r"\(5, -5\)"),
        (lambda: dynamic_tiling.tile_grids(min_tiles=0), "min_tiles is 0"),
        (lambda: dynamic_tiling.tile_grids(min_tiles=5, max_tiles=4), "min_tiles is 5 and max_tiles is 4"),
        (lambda: dynamic_tiling.tile_grids(max_tiles=2.5), "2.5"),
        (lambda: dynamic_tiling.closest_grid((0, 4)), r"\(0, 4\)"),
        (lambda: dynamic_tiling.closest_grid((4, 4), tile=0), r"\(0, 0\)"),
        (lambda: dynamic_tiling.closest_grid((4, 4), min_tiles=13), "min_tiles is 13 and max_tiles is 12"),
        (lambda: dynamic_tiling.dynamic_tiles(IMAGE[0]), "2 dimensions.*expected 3"),
        (lambda: dynamic_tiling.dynamic_tiles(IMAGE, tile=0), r"\(0, 0\)"),
        (lambda: dynamic_tiling.dynamic_token_count((4, 4), tile=450), "450.*28"),
        (lambda: dynamic_tiling.dynamic_token_count((4, 4), shuffle=0), r"\(14, 0\)"),
        (lambda: dynamic_tiling.dynamic_token_count((4, 0)), r"\(4, 0\)"),
    ],
)
def test_bad_input_names_both_sides(call, numbers):
    with pytest.raises(ValueError, match=numbers):
        call()
