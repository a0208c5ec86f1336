"""Scenes: what is drawn is what the ground truth says."""

from dataclasses import fields, replace

import pytest
import torch

from vlm_course.worlds.scenes import (
    COLOURS,
    GRID,
    HELD_OUT,
    IMAGE_SIZE,
    LARGEST_ALONE,
    MAX_OBJECTS,
    RADIUS,
    SHAPES,
    held_out_table,
    render,
    sample,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def held_out(scenes):
    """Which slots hold an object of a held-out pair: [B, K]."""
    return held_out_table()[scenes.shape, scenes.colour] & scenes.present


def test_world_is_as_large_as_promised():
    assert len(set(SHAPES)) >= 6 and len(set(COLOURS)) >= 8 and len(RADIUS) == 2
    assert held_out_table().sum() == len(HELD_OUT) >= 6
    assert {shape for shape, _ in HELD_OUT} == set(SHAPES), "every shape has a pair that is held out"


def test_held_out_pairs_never_occur_in_training_and_once_in_the_held_out_split():
    assert not held_out(sample(5000, generator=seeded(), split="train")).any()
    assert (held_out(sample(5000, generator=seeded(), split="held_out")).sum(1) == 1).all()
    assert 0 < held_out(sample(5000, generator=seeded(), split="all")).float().mean() < 1


def test_every_other_pair_every_size_every_count_and_every_held_out_pair_occurs():
    scenes = sample(5000, generator=seeded())
    seen = torch.zeros(len(SHAPES), len(COLOURS), dtype=torch.bool)
    seen[scenes.shape[scenes.present], scenes.colour[scenes.present]] = True
    assert torch.equal(seen, ~held_out_table())
    assert set(scenes.count.tolist()) == set(range(1, MAX_OBJECTS + 1))
    assert scenes.size[scenes.present].unique().tolist() == [0, 1]
    scenes = sample(2000, generator=seeded(), split="held_out")
    mine = held_out(scenes)
    pairs = set(zip(scenes.shape[mine].tolist(), scenes.colour[mine].tolist(), strict=True))
    assert pairs == {(SHAPES.index(s), COLOURS.index(c)) for s, c in HELD_OUT}


@pytest.mark.parametrize("split", ["train", "held_out", "all"])
def test_no_two_objects_of_a_scene_share_shape_and_colour(split):
    scenes = sample(2000, generator=seeded(), split=split)
    pair = torch.where(scenes.present, scenes.shape * len(COLOURS) + scenes.colour, -1 - torch.arange(MAX_OBJECTS))
    ordered = pair.sort(1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()


def test_sizes_can_be_told_apart_and_only_a_single_object_is_very_large():
    scenes = sample(3000, generator=seeded())
    small, large = (scenes.radius[scenes.present & (scenes.size == s)] for s in (0, 1))
    assert small.max() <= RADIUS[0][1] < RADIUS[1][0] <= large.min()
    several = scenes.present & (scenes.count > 1)[:, None]
    assert scenes.radius[several].max() <= RADIUS[1][1]
    assert RADIUS[1][1] < scenes.radius[scenes.present].max() <= LARGEST_ALONE


def test_objects_come_in_reading_order_and_first():
    scenes = sample(2000, generator=seeded())
    assert not (scenes.present[:, 1:] & ~scenes.present[:, :-1]).any(), "empty slots are the last ones"
    both = scenes.present[:, 1:] & scenes.present[:, :-1]
    assert (scenes.cell[:, 1:] > scenes.cell[:, :-1])[both].all()
    # The centres agree with the cells once the drift, which is common to a scene, cancels.
    below = scenes.cell[:, 1:] // 3 > scenes.cell[:, :-1] // 3
    assert (scenes.centre[:, 1:, 1] > scenes.centre[:, :-1, 1])[both & below].all()
    right = scenes.cell[:, 1:] % 3 > scenes.cell[:, :-1] % 3
    assert (scenes.centre[:, 1:, 0] > scenes.centre[:, :-1, 0])[both & ~below & right].all()


def test_objects_never_overlap():
    scenes = sample(120, generator=seeded())
    ground = replace(scenes, present=torch.zeros_like(scenes.present))
    empty = render(ground, noise=0)
    touched = torch.zeros(len(scenes), IMAGE_SIZE, IMAGE_SIZE, dtype=torch.long)
    for k in range(MAX_OBJECTS):
        alone = torch.zeros_like(scenes.present)
        alone[:, k] = scenes.present[:, k]
        drawn = (render(replace(scenes, present=alone), noise=0) != empty).any(1)
        assert (drawn.flatten(1).any(1) == scenes.present[:, k]).all(), "every object can be seen"
        touched += drawn
    assert touched.max() == 1


def test_every_object_has_its_colour():
    scenes = sample(150, generator=seeded())
    image = (render(scenes, noise=0) + 1) / 2
    at = scenes.centre.round().long().clamp(0, IMAGE_SIZE - 1)  # the pixel beside the centre: inside every shape
    rows = torch.arange(len(scenes))[:, None]
    drawn = image.permute(0, 2, 3, 1)[rows, at[..., 1], at[..., 0]]
    assert torch.allclose(drawn[scenes.present], scenes.rgb[scenes.present], atol=1e-5)


SHIFTS = 8


@pytest.mark.parametrize("angle", [-0.1, 0.0, 0.07, 0.6])
@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=SHAPES)
def test_box_is_the_drawn_extent(shape, angle):
    """One object, drawn at 8 x 8 positions a fraction of a pixel apart: together they sample its outline finely."""
    one = sample(1, generator=seeded(shape), split="all", objects=(1, 1))
    n = SHIFTS * SHIFTS
    scenes = one[torch.zeros(n, dtype=torch.long)]
    shift = torch.cartesian_prod(torch.arange(SHIFTS), torch.arange(SHIFTS)) / SHIFTS  # [64, 2]
    present = torch.zeros_like(scenes.present)
    present[:, 0] = True
    rgb = torch.zeros_like(scenes.rgb)  # black on white: the share of each pixel can be read off
    ground = torch.zeros_like(scenes.ground)
    ground[:, 0] = 1.0
    centre = scenes.centre.clone()
    centre[:, 0] = 47.3 + shift
    scenes = replace(
        scenes,
        present=present,
        rgb=rgb,
        ground=ground,
        centre=centre,
        shape=torch.full_like(scenes.shape, shape),
        radius=torch.full_like(scenes.radius, 13.0),
        aspect=torch.tensor([0.7, 0.93]).expand_as(scenes.aspect),
        angle=torch.full_like(scenes.angle, angle),
    )
    inside = render(scenes, noise=0)[:, 0] <= 1e-4  # pixel centres inside the outline: at least half covered
    image, y, x = inside.nonzero().unbind(1)
    x, y = x + 0.5 - shift[image, 0], y + 0.5 - shift[image, 1]
    drawn = torch.stack([x.min(), y.min(), x.max(), y.max()])
    expected = scenes.box[0, 0]
    assert (drawn - expected).abs().max() < 0.5, (drawn, expected)
    assert (drawn[:2] >= expected[:2] - 1e-3).all() and (drawn[2:] <= expected[2:] + 1e-3).all()


def test_boxes_stay_inside_the_image_and_hold_the_centre():
    scenes = sample(3000, generator=seeded())
    box, centre = scenes.box[scenes.present], scenes.centre[scenes.present]
    assert box.min() >= 0 and box.max() <= IMAGE_SIZE
    assert ((centre > box[:, :2]) & (centre < box[:, 2:])).all()


def test_same_seed_same_scenes_other_seed_others():
    a, b, c = (sample(64, generator=seeded(s)) for s in (3, 3, 4))
    assert all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    assert not torch.equal(a.shape, c.shape)
    assert torch.equal(render(a, generator=seeded(5)), render(b, generator=seeded(5)))
    assert not torch.equal(render(a, generator=seeded(5)), render(b, generator=seeded(6)))


def test_images_have_the_range_that_models_take():
    pixels = render(sample(50, generator=seeded()), generator=seeded())
    assert pixels.shape == (50, 3, IMAGE_SIZE, IMAGE_SIZE) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() < -0.8 and 0.8 < pixels.max() <= 1


def test_selection_and_words():
    scenes = sample(10, generator=seeded())
    assert scenes[3].describe(0) == scenes.describe(3) == scenes[[3, 4]].describe(0) == scenes[2:5].describe(1)
    assert len(scenes[2:5]) == 3 and len(scenes.describe(0)) == scenes.count[0]
    assert sample(20, generator=seeded(), objects=(2, 3)).count.unique().tolist() == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "'test'"),
        ({"objects": (0, 3)}, r"\(0, 3\)"),
        ({"objects": (3, 2)}, r"\(3, 2\)"),
        ({"objects": (1, 7)}, r"\(1, 7\)"),
        ({"n": 0}, "got 0"),
    ],
)
def test_errors_name_what_was_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(**({"n": 4} | arguments))


def test_the_cell_of_a_lone_object_is_where_it_is():
    """Its place is drawn anywhere in the image, not bound to a grid."""
    scenes = sample(400, generator=torch.Generator().manual_seed(3), objects=(1, 1))
    column, row = (scenes.centre[:, 0] / (IMAGE_SIZE / GRID)).long().unbind(-1)
    assert torch.equal(scenes.cell[:, 0], row * GRID + column)
    assert len(scenes.cell[:, 0].unique()) == GRID * GRID
