"""What the docstrings of the seven core mechanisms say in half a sentence: padding, batches, integers, corner sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vlm_course.attention import queries_mask
from vlm_course.bridges import CAbstractor, PerceiverResampler, ShuffleProjection
from vlm_course.decoder import RMSNorm
from vlm_course.fusion import (
    GatedCrossAttention,
    expand_image_placeholder,
    media_mask,
    packed_media_mask,
    splice_image_features,
)
from vlm_course.packing import (
    FactorisedPositions,
    PackedVisionTransformer,
    PackedViTConfig,
    axial_phases,
    pack_images,
    stretched_positions,
)
from vlm_course.patches import PatchEmbedding
from vlm_course.resolution import (
    anyres_grid,
    anyres_tiles,
    anyres_token_count,
    pack_image_features,
    require_size,
    resize,
    select_best_resolution,
    stitch_tiles,
)

IMAGE, EOS, WORD = 9, 2, 7
rows_of_ids = st.lists(st.lists(st.sampled_from([IMAGE, EOS, WORD]), min_size=5, max_size=5), min_size=2, max_size=4)


# ------------------------------------------------------------------------------------------------------- fusion


@given(rows_of_ids)
def test_no_row_of_a_batch_has_a_say_in_anothers_media_mask(rows):
    """An <eos> at the end of one row must not close the first document of the next."""
    batch = torch.tensor(rows)
    images = max(1, int((batch == IMAGE).sum(dim=1).max()))
    for mask in (lambda ids: media_mask(ids, IMAGE, images), lambda ids: packed_media_mask(ids, IMAGE, images, EOS)):
        alone = [mask(batch[row : row + 1]) for row in range(len(rows))]
        assert torch.equal(mask(batch), torch.cat(alone))


def test_an_image_at_the_very_start_of_a_packed_row_is_seen():
    mask = packed_media_mask(torch.tensor([[IMAGE, WORD, EOS, WORD, IMAGE]]), IMAGE, 2, EOS)
    assert mask[0].int().tolist() == [[1, 0], [1, 0], [1, 0], [0, 0], [0, 1]]


def test_every_row_is_counted_before_images_are_given_out():
    """The second row holds one image more than there are; that the first holds none does not make up for it."""
    with pytest.raises(ValueError, match="2 image tokens but n_images is 1"):
        media_mask(torch.tensor([[WORD, WORD], [IMAGE, IMAGE]]), IMAGE, 1)


def test_splice_without_checks_and_without_tokens():
    """`check=False` leaves the counting out, for who has counted: then a missing feature is the last one again."""
    ids, features = torch.tensor([[IMAGE, WORD]]), torch.tensor([[[1.0], [2.0]]])
    with pytest.raises(ValueError, match="1 placeholders but the tower gave 2"):
        splice_image_features(torch.zeros(1, 2, 1), ids, features, IMAGE)
    assert splice_image_features(torch.zeros(1, 2, 1), ids, features, IMAGE, check=False).flatten().tolist() == [1, 0]
    with pytest.raises(ValueError, match="no axis of size 0"):
        splice_image_features(torch.zeros(1, 0, 1), torch.zeros(1, 0).long(), features, IMAGE)


def test_the_gated_block_refuses_media_of_another_batch_before_it_computes():
    block = GatedCrossAttention(dim=4, media_dim=6, heads=2, head_dim=3)
    with pytest.raises(ValueError, match=r"media has B = 3.*expected 2"):
        block(torch.zeros(2, 5, 4), torch.zeros(3, 1, 7, 6), torch.ones(2, 5, 1).bool())


def test_the_gated_block_names_the_argument_that_does_not_fit():
    block = GatedCrossAttention(dim=4, media_dim=6, heads=2, head_dim=3)
    good = {"text": torch.zeros(2, 5, 4), "media": torch.zeros(2, 1, 7, 6), "mask": torch.ones(2, 5, 1).bool()}
    with pytest.raises(ValueError, match=r"mask has B = 3.*expected 2"):
        block(**good | {"mask": torch.ones(3, 5, 1).bool()})
    for name in ("media", "mask"):
        with pytest.raises(ValueError, match=f"text is on cpu, but {name} is on meta"):
            block(**good | {name: good[name].to("meta")})


def test_the_gated_blocks_own_feed_forward_has_a_gelu():
    """open_flamingo's choice is the default; others are handed in."""
    block = GatedCrossAttention(dim=4, media_dim=6, heads=2, head_dim=3)
    assert isinstance(block.feed_forward[2], nn.GELU)
    with torch.no_grad():
        block.feed_forward_gate.fill_(0.7)
        text = torch.randn(1, 3, 4)
        added = block(text, torch.randn(1, 1, 2, 6), torch.ones(1, 3, 1).bool()) - text
        norm, first, _, last = block.feed_forward
        expected = torch.tensor(0.7).tanh() * last(nn.functional.gelu(first(norm(text))))
    torch.testing.assert_close(added, expected)


LEAST = {
    "queries_mask": lambda: queries_mask(torch.zeros(1, 1).long(), 1).shape == (1, 1, 1, 1),
    "media_mask": lambda: media_mask(torch.tensor([[0, 5]]), 0, 1).all(),
    "packed_media_mask": lambda: (
        packed_media_mask(torch.tensor([[0, 5, 2, 5]]), 0, 1, 2).flatten().tolist() == [True] * 3 + [False]
    ),
    "packed_media_mask, <eos>": lambda: (
        packed_media_mask(torch.tensor([[9, 5, 0, 5]]), 9, 1, 0).flatten().tolist() == [True] * 3 + [False]
    ),
    "expand_image_placeholder": lambda: expand_image_placeholder([0, 5], 0, 1) == [0, 5],
    "GatedCrossAttention": lambda: (
        GatedCrossAttention(dim=1, media_dim=1, heads=1, head_dim=1)(
            torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1).bool()
        ).shape
        == (1, 1, 1)
    ),
    "PatchEmbedding": lambda: (
        PatchEmbedding(channels=1, patch_size=1, width=1)(torch.zeros(1, 1, 2, 3)).shape == (1, 6, 1)
    ),
    "FactorisedPositions": lambda: FactorisedPositions(1, 1, 1)(torch.zeros(1, 2, 2).long()).shape == (1, 2, 1),
    "pack_images": lambda: pack_images([torch.zeros(1, 1, 1)] * 2, 1, capacity=1).documents.tolist() == [[0], [1]],
    "PackedVisionTransformer": lambda: (
        PackedVisionTransformer(PackedViTConfig(patch_size=1, width=4, layers=1, heads=1, mlp_width=1, channels=1))(
            pack_images([torch.zeros(1, 1, 1)], 1)
        ).shape
        == (1, 1, 4)
    ),
}


@pytest.mark.parametrize("name", LEAST)
def test_the_smallest_sizes_and_ids_that_are_allowed_work(name):
    assert LEAST[name]()


# ------------------------------------------------------------------------------------------------------ bridges


@torch.no_grad()
def test_the_abstractors_positions_are_added_to_the_patches():
    sizes = {"vision_dim": 6, "llm_dim": 5, "queries": 4, "hidden": 8, "depth": 1, "grid": (3, 4)}
    placed, plain = CAbstractor(**sizes, positions=True).eval(), CAbstractor(**sizes).eval()
    state = placed.state_dict()
    plain.load_state_dict({name: tensor for name, tensor in state.items() if name != "positions"})
    placed.positions.normal_()
    features = torch.randn(2, 12, 6)
    torch.testing.assert_close(placed(features), plain(features + placed.positions))


def test_the_shuffle_bridge_refuses_a_grid_that_it_cannot_halve():
    bridge = ShuffleProjection(6, 5)
    with pytest.raises(ValueError, match=r"rows is 3.*factor = 2"):
        bridge(torch.zeros(1, 9, 6))
    with pytest.raises(ValueError, match=r"17.*16 or 25"):
        bridge(torch.zeros(1, 17, 6))


def test_the_abstractor_refuses_features_that_lie_elsewhere():
    bridge = CAbstractor(vision_dim=6, llm_dim=5, queries=4, hidden=8, depth=1, grid=4)
    with pytest.raises(ValueError, match="features is on meta, but the bridge is on cpu"):
        bridge(torch.zeros(1, 16, 6, device="meta"))


def test_the_resamplers_own_activation_is_an_exact_gelu():
    assert [type(layer.feed_forward[2]) for layer in PerceiverResampler(dim=4, queries=2, depth=2).layers] == [
        nn.GELU
    ] * 2
    assert PerceiverResampler(dim=4, queries=2).layers[0].feed_forward[2].approximate == "none"


# ------------------------------------------------------------------------------------------------------ packing


def test_integer_pictures_are_packed_like_any_others():
    packed = pack_images([torch.arange(4).reshape(1, 2, 2), torch.full((1, 1, 2), 9)], 1)
    assert packed.patches.flatten().tolist() == [0, 1, 2, 3, 9, 9] and not packed.patches.is_floating_point()


def test_padding_stands_where_any_table_has_a_row():
    """(0, 0): a table of one row and one column still holds it."""
    packed = pack_images([torch.zeros(1, 2, 2)], 2, capacity=3)
    assert packed.positions.tolist() == [[[0, 0]] * 3] and packed.documents.tolist() == [[0, -1, -1]]
    assert FactorisedPositions(1, 1, 4)(packed.positions).shape == (1, 3, 4)


def test_the_packed_towers_norms_all_have_the_configured_eps():
    config = PackedViTConfig(patch_size=2, width=8, layers=2, heads=2, mlp_width=4, norm_eps=0.25)
    norms = [part for part in PackedVisionTransformer(config).modules() if isinstance(part, RMSNorm)]
    assert len(norms) == 5 and {norm.eps for norm in norms} == {0.25}


def test_the_packed_tower_refuses_patches_that_lie_elsewhere():
    tower = PackedVisionTransformer(PackedViTConfig(patch_size=2, width=8, layers=1, heads=2, mlp_width=4))
    with pytest.raises(ValueError, match="patches is on meta, but the tower is on cpu"):
        tower(pack_images([torch.zeros(3, 2, 2, device="meta")], 2))


def test_stretched_positions_are_zero_at_padding_and_the_table_itself_at_its_own_size():
    table = torch.randn(2, 3, 4) + 5
    packed = pack_images([torch.zeros(1, 4, 6), torch.zeros(1, 2, 2)], 2, capacity=9)
    stretched = stretched_positions(table, packed)
    torch.testing.assert_close(stretched[0, :6], table.flatten(0, 1))
    assert stretched[0, 6].abs().min() > 0 and not stretched[0, 7:].any()


def test_a_tower_takes_every_theta_that_the_phases_take():
    sizes = {"patch_size": 2, "width": 8, "layers": 1, "heads": 2, "mlp_width": 4}
    assert PackedViTConfig(**sizes, rope_theta=0.5).rope_theta == 0.5
    with pytest.raises(ValueError, match=r"rope_theta is 0\.0.*above 0"):
        PackedViTConfig(**sizes, rope_theta=0.0)


def test_any_theta_above_zero_turns():
    """theta 1 turns all pairs alike, and below 1 the later ones turn faster."""
    cos, sin = axial_phases(torch.tensor([[[2, 3]]]), 8, 1.0)
    torch.testing.assert_close(torch.atan2(sin, cos).flatten(), torch.tensor([2.0, 2.0, 3.0, 3.0]))
    cos, sin = axial_phases(torch.tensor([[[1, 0]]]), 8, 0.25)
    torch.testing.assert_close(torch.atan2(sin, cos).flatten(), torch.tensor([1.0, 2.0, 0.0, 0.0]))


# --------------------------------------------------------------------------------------------------- resolution


@pytest.mark.parametrize("size", [{3, 4}, {3: 4, 5: 6}, "34", 7, (True, 4.0), (3,)])
def test_a_size_is_a_pair_in_order(size):
    with pytest.raises(ValueError, match="expected two whole numbers"):
        require_size(size, "size")


def test_a_picture_that_has_its_size_already_is_not_touched():
    picture = torch.rand(3, 4, 6)
    assert resize(picture, (4, 6)) is picture
    assert resize(picture, (5, 6)).shape == (3, 5, 6)


def test_a_resolution_is_a_pair_too_wherever_it_is_named():
    for call in (
        lambda: anyres_grid((5, 5), [(32, 64, 3)], 32),
        lambda: anyres_token_count((5, 5), [(32, 64, 3)], tile=32, patch=8),
    ):
        with pytest.raises(ValueError, match=r"a resolution is \(32, 64, 3\), expected two whole numbers"):
            call()


def test_a_newline_of_another_width_is_refused_behind_a_thumbnail_alone_as_well():
    with pytest.raises(ValueError, match=r"newline has D = 3.*expected 4"):
        pack_image_features(torch.zeros(1, 16, 4), (5, 5), grid=None, newline=torch.zeros(3))


def test_views_name_the_resolution_that_has_no_whole_tiles():
    with pytest.raises(ValueError, match="a resolution's height is 5, which is no multiple of tile = 4"):
        anyres_tiles(torch.zeros(3, 5, 7), [(8, 8), (5, 8)], 4)


def test_tiles_that_are_no_squares_of_patches_name_the_likely_cause():
    with pytest.raises(ValueError, match=r"17.*16 or 25.*CLS"):
        stitch_tiles(torch.zeros(2, 17, 3), (1, 2))


def test_a_canvas_is_given_back_as_a_tuple_whatever_held_it():
    assert select_best_resolution([10, 20], [[32, 64]]) == (32, 64)


def test_integer_features_are_laid_out_like_any_others():
    """Numbered cells show where each went; nothing here computes with them."""
    tiles = torch.arange(2 * 4).reshape(2, 4, 1)
    assert stitch_tiles(tiles, (1, 2))[..., 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    views = torch.cat([tiles[:1] - 10, tiles])
    packed = pack_image_features(views, (4, 8), grid=(1, 2), newline=torch.tensor([-1]))
    assert packed.flatten().tolist() == [-10, -9, -8, -7, 0, 1, 4, 5, -1, 2, 3, 6, 7, -1]


def test_a_thumbnail_alone_is_checked_too():
    with pytest.raises(ValueError, match=r"size is \(0, 5\)"):
        pack_image_features(torch.zeros(1, 16, 4), (0, 5), grid=None)
    with pytest.raises(ValueError, match=r"15.*9 or 16.*CLS"):
        pack_image_features(torch.zeros(1, 15, 4), (5, 5), grid=None)
