"""Packing against Pixtral and SigLIP 2: the same masks, positions and shapes, and packed equals one by one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_course.packing import (
    FactorisedPositions,
    PackedVisionTransformer,
    PackedViTConfig,
    axial_phases,
    first_fit,
    grid_positions,
    pack_images,
    stretched_positions,
    unpack_images,
)

CLOSE = {"rtol": 0, "atol": 1e-5}
SIZES = [(24, 40), (8, 8), (32, 8), (8, 48), (16, 24)]
LENGTHS = [15, 1, 4, 6, 6]


def images(sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


@pytest.fixture
def tower(redraw):
    return redraw(PackedVisionTransformer(PackedViTConfig(patch_size=8, width=32, layers=3, heads=2, mlp_width=48)))


@pytest.fixture
def pixtral(redraw):
    from transformers import PixtralVisionConfig, PixtralVisionModel

    config = PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=8,
        hidden_act="silu",
    )  # fmt: skip
    return redraw(PixtralVisionModel(config))


@pytest.fixture
def ours(tower, pixtral):
    """Our tower with Pixtral's weights."""
    names = {
        "attention_norm": "attention_norm", "ffn_norm": "mlp_norm", "attention.q_proj": "attention.query",
        "attention.k_proj": "attention.key", "attention.v_proj": "attention.value", "attention.o_proj": "attention.out",
        "feed_forward.gate_proj": "mlp.gate", "feed_forward.up_proj": "mlp.up", "feed_forward.down_proj": "mlp.down",
    }  # fmt: skip
    theirs = pixtral.state_dict()
    state = {"embedding.weight": theirs["patch_conv.weight"].flatten(1), "norm.weight": theirs["ln_pre.weight"]}
    for layer, (source, target) in itertools.product(range(3), names.items()):
        state[f"blocks.{layer}.{target}.weight"] = theirs[f"transformer.layers.{layer}.{source}.weight"]
    tower.load_state_dict(state)
    return tower


@torch.no_grad()
def pixtral_alone(model, image):
    return model(image[None], image_sizes=[tuple(image.shape[1:])]).last_hidden_state[0]


@torch.no_grad()
def test_tower_is_pixtrals_packed_and_alone(ours, pixtral):
    batch = torch.zeros(len(SIZES), 3, 32, 48)
    for image, place in zip(images(), batch, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    theirs = pixtral(batch, image_sizes=SIZES).last_hidden_state  # [1, L, D]
    packed = pack_images(images(), 8)
    torch.testing.assert_close(ours(packed), theirs, **CLOSE)
    for image, features in zip(images(), unpack_images(ours(packed), packed), strict=True):
        torch.testing.assert_close(features, pixtral_alone(pixtral, image), **CLOSE)


def test_mask_is_pixtrals():
    from transformers.models.pixtral.modeling_pixtral import generate_block_attention_mask

    packed = pack_images(images(), 8)
    theirs = generate_block_attention_mask(LENGTHS, torch.zeros(1, sum(LENGTHS), 4))
    assert torch.equal(packed.mask, theirs == 0)


def test_phases_are_pixtrals(pixtral):
    positions = pack_images(images(), 8).positions
    cos, sin = pixtral.patch_positional_embedding(torch.zeros(1), positions[0])  # [L, d], both halves alike
    ours = axial_phases(positions, 16)
    torch.testing.assert_close(torch.cat([ours[0], ours[0]], dim=-1)[0, 0], cos, **CLOSE)
    torch.testing.assert_close(torch.cat([ours[1], ours[1]], dim=-1)[0, 0], sin, **CLOSE)


sizes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=6)


@settings(max_examples=15)
@torch.no_grad()
@given(sizes, st.sampled_from([None, 20, 31]), st.integers(0, 99))
def test_packed_equals_one_by_one(grids, capacity, seed):
    torch.manual_seed(seed)
    tower = PackedVisionTransformer(PackedViTConfig(patch_size=2, width=16, layers=2, heads=2, mlp_width=24))
    for parameter in tower.parameters():
        parameter.normal_(0, 0.4)
    pictures = images([(2 * rows, 2 * columns) for rows, columns in grids], seed)
    packed = pack_images(pictures, 2, capacity=capacity)
    for picture, features in zip(pictures, unpack_images(tower(packed), packed), strict=True):
        torch.testing.assert_close(features, tower(pack_images([picture], 2))[0], **CLOSE)


@torch.no_grad()
def test_layout_does_not_matter(tower):
    one_row = unpack_images(tower(pack_images(images(), 8)), pack_images(images(), 8))
    padded = pack_images(images(), 8, rows=[[3], [0], [4], [1], [2]])
    assert padded.patches.shape == (5, 15, 192) and padded.fill == pytest.approx(32 / 75)
    for expected, features in zip(one_row, unpack_images(tower(padded), padded), strict=True):
        torch.testing.assert_close(features, expected, **CLOSE)


@torch.no_grad()
def test_no_image_sees_another(tower):
    pictures = images()
    before = unpack_images(tower(pack_images(pictures, 8)), pack_images(pictures, 8))
    pictures[2] = pictures[2] + 1
    after = unpack_images(tower(pack_images(pictures, 8)), pack_images(pictures, 8))
    changed = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    assert changed == [False, False, True, False, False]


def test_what_is_packed():
    packed = pack_images(images(), 8, capacity=16)
    assert packed.documents.tolist() == [[0] * 15 + [1], [2] * 4 + [3] * 6 + [4] * 6]
    assert packed.grids == ((3, 5), (1, 1), (4, 1), (1, 6), (2, 3))
    assert packed.positions[1, :4].tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]
    assert packed.positions[1, 10:].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert packed.fill == 1.0


def test_padding_sees_nothing_and_is_not_seen():
    packed = pack_images(images(), 8, capacity=20)
    padding = packed.documents < 0
    assert padding.sum() == 2 * 20 - 32
    assert not packed.mask[:, 0][padding].any() and not packed.mask[:, 0].transpose(1, 2)[padding].any()
    assert not packed.patches[padding].any()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 60))
def test_first_fit(lengths, capacity):
    rows = first_fit(lengths, capacity)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in row) for row in rows]
    assert max(loads) <= capacity
    assert sum(2 * load <= capacity for load in loads) <= 1
    for later, row in enumerate(rows):
        for index in row:  # no earlier row had room when the sequence came
            for earlier in rows[:later]:
                assert sum(lengths[i] for i in earlier if i < index) + lengths[index] > capacity


def test_first_fit_looks_back_and_keeps_the_order():
    assert first_fit([6, 5, 4, 5, 1], 10) == [[0, 2], [1, 3], [4]]


def test_shapes_and_patches_are_siglip2s():
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    padded = pack_images(images(), 8, rows=[[i] for i in range(5)])
    for index, image in enumerate(images()):
        theirs = convert_image_to_patches(image, 8)  # (row, column, channel) within a patch
        patches = padded.patches[index, : LENGTHS[index]].unflatten(1, (3, 8, 8)).permute(0, 2, 3, 1).flatten(1)
        assert torch.equal(patches, theirs)
    assert (padded.documents >= 0).sum(dim=1).tolist() == LENGTHS


@torch.no_grad()
def test_siglip2_on_a_packed_row_equals_siglip2_one_by_one(redraw):
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_patches=16, patch_size=8
    )
    model = redraw(Siglip2VisionModel(config))
    table = model.embeddings.position_embedding.weight.unflatten(0, (4, 4))
    packed = pack_images(images(), 8)
    patches = packed.patches.unflatten(2, (3, 8, 8)).permute(0, 1, 3, 4, 2).flatten(2)
    x = model.embeddings.patch_embedding(patches) + stretched_positions(table, packed)
    bias = torch.zeros(packed.mask.shape).masked_fill(~packed.mask, -torch.inf)
    x = model.post_layernorm(model.encoder(inputs_embeds=x, attention_mask=bias).last_hidden_state)
    for index, features in enumerate(unpack_images(x, packed)):
        alone = model(
            pixel_values=unpack_images(patches, packed)[index][None],
            pixel_attention_mask=torch.ones(1, LENGTHS[index]),
            spatial_shapes=torch.tensor([packed.grids[index]]),
        )
        torch.testing.assert_close(features, alone.last_hidden_state[0], **CLOSE)


def test_factorised_positions_are_a_sum():
    positions = FactorisedPositions(4, 6, 8)
    packed = pack_images(images(), 8)
    for index, place in enumerate(packed.positions[0].tolist()):
        expected = positions.rows[place[0]] + positions.columns[place[1]]
        torch.testing.assert_close(positions(packed.positions)[0, index], expected)


def test_less_arithmetic_than_padding():
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(4, 22, (64, 2), generator=generator)
    pictures = [torch.zeros(1, *side) for side in sides.tolist()]
    packed = pack_images(pictures, 1, capacity=int(sides.prod(dim=1).max()))
    padded = pack_images(pictures, 1, rows=[[i] for i in range(64)])
    assert packed.documents.numel() < 0.5 * padded.documents.numel()
    assert packed.fill > 0.9


ONE = [torch.zeros(3, 8, 8)]
PACKED = pack_images(ONE, 8)
BAD = {
    "no images": (lambda: pack_images([], 8), "0 images"),
    "batch": (lambda: pack_images([torch.zeros(1, 3, 8, 8)], 8), "4 dimensions.*expected 3"),
    "height": (lambda: pack_images([torch.zeros(3, 9, 8)], 8), "height of image 0 is 9.*8"),
    "width": (lambda: pack_images([*ONE, torch.zeros(3, 8, 12)], 8), "width of image 1 is 12.*8"),
    "channels": (lambda: pack_images([*ONE, torch.zeros(1, 8, 8)], 8), "C = 1.*expected 3"),
    "empty image": (lambda: pack_images([torch.zeros(3, 0, 8)], 8), "H = 0.*at least 1"),
    "patch size": (lambda: pack_images(ONE, 0), "patch_size is 0.*at least 1"),
    "dtype": (lambda: pack_images([*ONE, ONE[0].double()], 8), "float64.*float32"),
    "device": (lambda: pack_images([*ONE, ONE[0].to("meta")], 8), "meta.*cpu"),
    "too long": (lambda: pack_images([torch.zeros(3, 8, 24)], 8, capacity=2), "3 tokens.*1 to 2"),
    "rows": (lambda: pack_images(ONE * 2, 8, rows=[[0], [0]]), "0 to 1 once"),
    "rows too long": (lambda: pack_images(ONE * 3, 8, capacity=2, rows=[[0, 1, 2]]), "3 patches.*capacity is 2"),
    "no lengths": (lambda: first_fit([], 4), "0 lengths"),
    "length 0": (lambda: first_fit([0], 4), "0 tokens.*1 to 4"),
    "grid": (lambda: grid_positions(0, 3), "rows is 0.*at least 1"),
    "unpack": (lambda: unpack_images(torch.zeros(1, 2, 4), PACKED), "L = 2.*expected 1"),
    "unpack device": (lambda: unpack_images(torch.zeros(1, 1, 4, device="meta"), PACKED), "meta.*cpu"),
    "axes": (lambda: axial_phases(torch.zeros(1, 4, 3).long(), 8), "2 = 3.*expected 2"),
    "float positions": (lambda: axial_phases(torch.zeros(1, 4, 2), 8), "float32.*integer"),
    "head_dim": (lambda: axial_phases(PACKED.positions, 6), "head_dim is 6.*4"),
    "theta": (lambda: axial_phases(PACKED.positions, 8, 0.0), "theta is 0"),
    "table": (lambda: stretched_positions(torch.zeros(16, 4), PACKED), "2 dimensions.*expected 3"),
    "empty table": (lambda: stretched_positions(torch.zeros(0, 4, 4), PACKED), "rows = 0.*at least 1"),
    "table device": (lambda: stretched_positions(torch.zeros(4, 4, 4, device="meta"), PACKED), "meta.*cpu"),
    "outside": (lambda: FactorisedPositions(2, 3, 4)(torch.tensor([[[1, 3]]])), "columns 3 to 3.*3 columns"),
    "negative": (lambda: FactorisedPositions(2, 3, 4)(torch.tensor([[[-1, 0]]])), "rows -1 to -1.*2 rows"),
    "config": (lambda: PackedViTConfig(patch_size=8, width=20, layers=1, heads=2, mlp_width=8), "20.*8"),
    "patches": (
        lambda: PackedVisionTransformer(PackedViTConfig(patch_size=4, width=8, layers=1, heads=2, mlp_width=8))(PACKED),
        "192.*expected 48",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
