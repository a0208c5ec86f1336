"""On another device everything is made there and no value is read back: the meta device, without any, shows both."""

import pytest
import torch

from vlm_course import attention, fusion, packing, patches, resolution
from vlm_course.bridges import CAbstractor, PerceiverResampler, ShuffleProjection

META = torch.device("meta")
IMAGE = 9


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=META)


def ids(*shape):
    return zeros(*shape, dtype=torch.long)


def made_there(build):
    with META:
        return build()


Q, K = zeros(2, 4, 3, 8), zeros(2, 2, 5, 8)
CALLS = {
    "causal_mask": (lambda: attention.causal_mask(3, offset=2, device=META), (3, 5)),
    "padding_mask": (lambda: attention.padding_mask(ids(2, 5)), (2, 1, 1, 5)),
    "prefix_mask": (lambda: attention.prefix_mask(ids(2), 4), (2, 1, 4, 4)),
    "block_mask": (lambda: attention.block_mask(ids(2, 5)), (2, 1, 5, 5)),
    "block_mask of images": (lambda: attention.block_mask(ids(2, 5), causal=False), (2, 1, 5, 5)),
    "queries_mask": (lambda: attention.queries_mask(ids(2, 3), 5, documents=ids(2, 5)), (2, 1, 3, 5)),
    "media_attention_mask": (lambda: attention.media_attention_mask(zeros(2, 5, 3), 4), (2, 1, 5, 12)),
    "attend": (lambda: attention.attend(Q, K, K), (2, 4, 3, 8)),
    "attend behind a cache": (lambda: attention.attend(Q, K, K, is_causal=True), (2, 4, 3, 8)),
    "attend with a mask": (lambda: attention.attend(Q, K, K, mask=zeros(3, 5).bool(), is_causal=True), (2, 4, 3, 8)),
    "attention_weights": (lambda: attention.attention_weights(Q, Q, mask=zeros(3, 3).bool()), (2, 4, 3, 3)),
    "splice": (lambda: fusion.splice_image_features(zeros(2, 6, 4), ids(2, 6), zeros(2, 3, 4), IMAGE), (2, 6, 4)),
    "media_mask": (lambda: fusion.media_mask(ids(2, 6), IMAGE, 3), (2, 6, 3)),
    "packed_media_mask": (lambda: fusion.packed_media_mask(ids(2, 6), IMAGE, 3, 2), (2, 6, 3)),
    "gated block": (
        lambda: made_there(lambda: fusion.GatedCrossAttention(dim=4, media_dim=6, heads=2, head_dim=3))(
            zeros(2, 5, 4), zeros(2, 3, 7, 6), zeros(2, 5, 3).bool()
        ),
        (2, 5, 4),
    ),
    "grid_positions": (lambda: packing.grid_positions(2, 3, device=META), (6, 2)),
    "axial_phases": (lambda: packing.axial_phases(ids(2, 5, 2), 8)[1], (2, 1, 5, 4)),
    "pack_images": (lambda: packing.pack_images([zeros(3, 4, 6), zeros(3, 2, 2)], 2).patches, (1, 7, 12)),
    "positions of a packing": (lambda: packing.pack_images([zeros(3, 4, 6)], 2).positions, (1, 6, 2)),
    "mask of a packing": (lambda: packing.pack_images([zeros(3, 4, 6)], 2, capacity=8).mask, (1, 1, 8, 8)),
    "factorised positions": (
        lambda: made_there(lambda: packing.FactorisedPositions(3, 4, 5))(ids(2, 6, 2)),
        (2, 6, 5),
    ),
    "packed tower": (
        lambda: made_there(
            lambda: packing.PackedVisionTransformer(
                packing.PackedViTConfig(patch_size=2, width=8, layers=1, heads=2, mlp_width=4)
            )
        )(packing.pack_images([zeros(3, 4, 6), zeros(3, 2, 2)], 2)),
        (1, 7, 8),
    ),
    "patchify": (lambda: patches.patchify(zeros(2, 3, 4, 6), 2), (2, 6, 12)),
    "interpolate_positions": (lambda: patches.interpolate_positions(zeros(7, 4), (2, 3), (3, 4)), (13, 4)),
    "resampler": (
        lambda: made_there(lambda: PerceiverResampler(dim=6, queries=3, heads=2, head_dim=3))(zeros(2, 9, 6)),
        (2, 3, 6),
    ),
    "abstractor": (
        lambda: made_there(lambda: CAbstractor(vision_dim=6, llm_dim=5, queries=4, hidden=8, depth=1, grid=4))(
            zeros(2, 16, 6)
        ),
        (2, 4, 5),
    ),
    "shuffle": (lambda: made_there(lambda: ShuffleProjection(6, 5))(zeros(2, 16, 6)), (2, 4, 5)),
    "anyres_tiles": (lambda: resolution.anyres_tiles(zeros(3, 5, 7), [(8, 8), (4, 8)], 4), (5, 3, 4, 4)),
    "pack_image_features": (
        lambda: resolution.pack_image_features(zeros(7, 9, 4), (5, 7), grid=(2, 3), newline=zeros(4)),
        (9 + 6 * 10, 4),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_shapes_without_values(name):
    call, shape = CALLS[name]
    result = call()
    assert result.is_meta and tuple(result.shape) == shape


def test_masks_and_splice_go_into_one_compiled_graph(in_one_graph):
    """What the checks read is left out there."""
    tokens = torch.tensor([[7, IMAGE, IMAGE, 2], [IMAGE, IMAGE, 7, 7]])
    embeds, features = torch.randn(2, 4, 3), torch.randn(2, 2, 3)

    def step(tokens, embeds, features):
        seen = fusion.media_mask(tokens, IMAGE, 2) | fusion.packed_media_mask(tokens, IMAGE, 2, 2)
        mask = attention.block_mask(tokens) & attention.causal_mask(4)
        return fusion.splice_image_features(embeds, tokens, features, IMAGE), seen, mask

    for ours, expected in zip(
        in_one_graph(step)(tokens, embeds, features),
        step(tokens, embeds, features),
        strict=True,
    ):
        assert torch.equal(ours, expected)
