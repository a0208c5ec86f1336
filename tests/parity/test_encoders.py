"""Encoder table, position interpolation and feature selection against timm and transformers, without any weights."""

import pytest
import torch

from vlm_course import encoders
from vlm_course.convert import clip as clip_names
from vlm_course.patches import interpolate_positions
from vlm_course.vit import VisionTransformer, ViTConfig, add_class_and_positions, select_features

CLOSE = {"rtol": 0, "atol": 1e-5}
COUNTED = [
    (encoders.CLIP_L, 303_507_456, 1024, 24, 336, 576, 1),
    (encoders.SIGLIP_SO400M, 428_225_600, 1152, 27, 384, 729, 0),
    (encoders.EVA_G, 1_011_146_112, 1408, 40, 224, 256, 1),
    (encoders.DINOV2_L, 304_367_616, 1024, 24, 518, 1369, 1),
]


@pytest.mark.parametrize("encoder, parameters, width, layers, size, patches, extra", COUNTED, ids=lambda x: str(x)[:30])
def test_timm_builds_the_table(encoder, parameters, width, layers, size, patches, extra):
    found = encoders.measure(encoder)
    assert (found.parameters, found.width, found.layers) == (parameters, width, layers)
    assert (found.image_size, found.patch_size, found.patches, found.extra_tokens) == (size, 14, patches, extra)


def test_our_tower_is_clips_to_the_last_parameter_and_operation():
    with torch.device("meta"):
        ours = VisionTransformer(ViTConfig(336, 14, 1024, 24, 16, 4096))
    assert sum(p.numel() for p in ours.parameters()) == encoders.measure(encoders.CLIP_L).parameters
    linear, attention = encoders.counted_flops(ours, torch.empty(1, 3, 336, 336, device="meta"))
    assert (linear - 2 * 576 * 588 * 1024, attention) == encoders.vit_flops(577, 1024, 24, 4096)
    # timm brings the class token and the patches through the same layers; its convolution counts as ours
    assert linear + attention == encoders.measure(encoders.CLIP_L).flops


def test_intern_vit_has_six_billion_and_another_width():
    found = encoders.measure(encoders.INTERN_VIT_6B)
    assert 5.8e9 < found.parameters < 6.0e9
    assert (found.width, found.layers) == (3200, 48)


@pytest.mark.parametrize(
    "encoder, name",
    [
        (encoders.CLIP_L, "clip-vit-l-14-336"),
        (encoders.EVA_G, "eva-vit-g-14"),
        (encoders.DINOV2_L, "dinov2-vit-l-14"),
        (encoders.INTERN_VIT_6B, "internvit-6b-224"),
    ],
)
def test_the_catalog_says_the_same(encoder, name):
    from vlm_course.catalog.records import find

    facts = {field: fact.value for field, fact in find(name).facts.items()}
    found = encoders.measure(encoder)
    for field, value in (("parameters", found.parameters), ("vision_width", found.width), ("layers", found.layers)):
        assert facts[field] == value
    assert (facts["image_size"], facts["patches"]) == (found.image_size, found.patches)


def test_an_unknown_library_is_named():
    row = encoders.Encoder("X", "jax", "x", "", "", "", "2026-11-23")
    with pytest.raises(ValueError, match="jax"):
        encoders.build(row)


@pytest.mark.parametrize("new", [(7, 7), (4, 9), (2, 3), (11, 5)])
def test_interpolated_positions_equal_timm_without_its_antialiasing(new):
    """timm's default smooths before it shrinks (antialias=True) and uses another cubic kernel; CLIP's users do not."""
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1 + 5 * 4, 6)
    theirs = resample_abs_pos_embed(positions[None], new, (5, 4), num_prefix_tokens=1, antialias=False)[0]
    torch.testing.assert_close(interpolate_positions(positions, (5, 4), new), theirs, **CLOSE)
    smooth = resample_abs_pos_embed(positions[None], new, (5, 4), num_prefix_tokens=1)[0]
    assert (smooth - theirs).abs().max() > 0.01


@torch.no_grad()
def test_class_token_and_positions_equal_transformers(redraw):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    theirs = redraw(CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)))
    pixels = torch.randn(2, 3, 32, 32)
    embeddings = theirs.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    ours = add_class_and_positions(patches, embeddings.class_embedding, embeddings.position_embedding.weight)
    torch.testing.assert_close(ours, embeddings(pixels), **CLOSE)


@pytest.mark.parametrize("layer", [-2, -1, 1, 2, [-2, -3], [3, -1, 0]])  # transformers 5.23 refuses a bare 0
@pytest.mark.parametrize("strategy", ["default", "full"])
@torch.no_grad()
def test_selected_features_equal_what_llava_takes(redraw, layer, strategy):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaModel

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=20)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=19, vision_feature_layer=layer,
                         vision_feature_select_strategy=strategy)  # fmt: skip
    theirs = redraw(LlavaModel(config))
    seen = []
    theirs.multi_modal_projector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels = torch.randn(2, 3, 16, 16)
    theirs.get_image_features(pixel_values=pixels, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    ours = VisionTransformer(clip_names.vision_config(vision)).eval()
    ours.load_state_dict(clip_names.vision_from_transformers(theirs.vision_tower.state_dict()))
    torch.testing.assert_close(select_features(ours.hidden_states(pixels), layer, strategy), seen[0], **CLOSE)
    if strategy == "default" and isinstance(layer, int):
        torch.testing.assert_close(ours.patch_features(pixels, layer), seen[0], **CLOSE)


def test_a_mismatch_names_both_numbers():
    states = [torch.randn(1, 5, 4) for _ in range(3)]
    with pytest.raises(ValueError, match=r"layer is -4, but there are 3 hidden states"):
        select_features(states, -4)
    with pytest.raises(ValueError, match="'cls'"):
        select_features(states, -2, "cls")
    with pytest.raises(ValueError, match=r"1\+N = 4 .* expected 5.*4 patches"):
        add_class_and_positions(torch.randn(1, 4, 6), torch.randn(6), torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"D = 5.*expected 6"):
        add_class_and_positions(torch.randn(1, 4, 6), torch.randn(5), torch.randn(5, 6))
    with pytest.raises(ValueError, match=r"image_size is 336.*patch_size = 32"):
        encoders.patch_budget(336, 32, 1024)
    with pytest.raises(ValueError, match="width is 0"):
        encoders.patch_budget(336, 14, 0)
    with pytest.raises(ValueError, match="layers is 0"):
        encoders.vit_flops(577, 1024, 0, 4096)


def test_a_patch_budget_is_that_of_the_patches_themselves():
    from vlm_course.patches import patchify

    for size, patch in ((336, 14), (672, 28), (96, 8)):
        patches = patchify(torch.zeros(1, 3, size, size), patch)
        budget = encoders.patch_budget(size, patch, 1024)
        assert patches.shape[1:] == (budget["tokens"], budget["values"])
        assert budget["values_per_number"] == patches.shape[2] / 1024
    assert encoders.score_entries(577) == torch.zeros(577, 577).numel()
