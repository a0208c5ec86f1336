"""CLIP's towers against transformers and timm: every hidden state, on small models with redrawn parameters."""

import pytest
import torch

from vlm_course.contrastive import ContrastiveModel, TextTower, contrastive_loss, sigmoid_loss
from vlm_course.convert import clip as clip_names
from vlm_course.convert import timm as timm_names
from vlm_course.vit import VisionTransformer, ViTConfig

CLOSE = {"rtol": 0, "atol": 1e-5}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60,
    "max_position_embeddings": 12, "eos_token_id": 59, "bos_token_id": 58, "pad_token_id": 0,
}  # fmt: skip


def hf_vision(redraw, **changes):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return redraw(CLIPVisionModel(CLIPVisionConfig(**{**VISION, **changes})))


def our_vision(theirs):
    ours = VisionTransformer(clip_names.vision_config(theirs.config)).eval()
    ours.load_state_dict(clip_names.vision_from_transformers(theirs.state_dict()))
    return ours


@pytest.fixture
def hf_clip(redraw):
    from transformers import CLIPConfig, CLIPModel

    return redraw(CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)))


@pytest.fixture
def our_clip(hf_clip):
    ours = ContrastiveModel(
        VisionTransformer(clip_names.vision_config(hf_clip.config.vision_config)),
        TextTower(clip_names.text_config(hf_clip.config.text_config)),
        embed_dim=24,
    ).eval()
    ours.load_state_dict(clip_names.from_transformers(hf_clip.state_dict()))
    return ours


@pytest.fixture
def captions():
    ids = torch.randint(1, 50, (3, 9))
    for row, end in enumerate((8, 4, 1)):
        ids[row, end:] = 0  # padding must not matter
        ids[row, end] = TEXT["eos_token_id"]
    ids[1, 6] = TEXT["eos_token_id"]  # the first one counts
    return ids


@pytest.mark.parametrize(
    "changes", [{}, {"hidden_act": "gelu"}, {"layer_norm_eps": 1e-3}, {"patch_size": 16}, {"num_hidden_layers": 1}]
)
@torch.no_grad()
def test_every_hidden_state_equals_transformers(redraw, changes):
    theirs = hf_vision(redraw, **changes)
    ours = our_vision(theirs)
    pixels = torch.randn(2, 3, 32, 32)
    expected = theirs(pixels, output_hidden_states=True)
    states = ours.hidden_states(pixels)
    assert len(states) == len(expected.hidden_states) == theirs.config.num_hidden_layers + 1
    for state, reference in zip(states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, reference, **CLOSE)
    torch.testing.assert_close(ours(pixels), expected.last_hidden_state, **CLOSE)
    torch.testing.assert_close(ours.pooled(pixels), expected.pooler_output, **CLOSE)
    for layer in range(-len(states), len(states)):
        reference = expected.hidden_states[layer][:, 1:]
        torch.testing.assert_close(ours.patch_features(pixels, layer), reference, **CLOSE)


@torch.no_grad()
def test_low_contrast_shows_the_epsilon(redraw):
    theirs = hf_vision(redraw)
    ours = our_vision(theirs)
    for tower in (theirs.embeddings.position_embedding.weight, theirs.embeddings.class_embedding):
        tower.mul_(1e-3)
    ours.load_state_dict(clip_names.vision_from_transformers(theirs.state_dict()))
    pixels = 1e-3 * torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(pixels), theirs(pixels).last_hidden_state, **CLOSE)
    other = VisionTransformer(ViTConfig(32, 8, 32, 3, 4, 64, norm_eps=1e-6)).eval()
    other.load_state_dict(ours.state_dict())
    assert (other(pixels) - ours(pixels)).abs().max() > 1e-3, "the test cannot see a wrong epsilon"


@torch.no_grad()
def test_interpolated_positions_equal_transformers(redraw):
    theirs = hf_vision(redraw)
    ours = our_vision(theirs)
    for size in ((48, 48), (32, 64), (16, 40), (8, 8)):
        pixels = torch.randn(1, 3, *size)
        expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(ours(pixels, interpolate=True), expected, **CLOSE)


@torch.no_grad()
def test_timm_agrees_in_the_end_and_at_every_layer(redraw):
    import timm

    theirs = redraw(
        timm.create_model(
            "vit_base_patch32_clip_quickgelu_224", pretrained=False, img_size=32, patch_size=8, embed_dim=32,
            depth=3, num_heads=4, num_classes=0,
        )
    )  # fmt: skip
    ours = VisionTransformer(ViTConfig(32, 8, 32, 3, 4, 128)).eval()
    ours.load_state_dict(timm_names.vision_from_timm(theirs.state_dict()))
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.post_norm(ours(pixels)), theirs.forward_features(pixels), **CLOSE)
    for layer in range(3):
        [(patches, prefix)] = theirs.forward_intermediates(
            pixels, indices=[layer], intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )
        torch.testing.assert_close(ours.hidden_states(pixels)[layer + 1], torch.cat([prefix, patches], 1), **CLOSE)
    [penultimate] = theirs.forward_intermediates(pixels, indices=[1], intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(ours.patch_features(pixels), penultimate, **CLOSE)
    back = timm_names.vision_to_timm(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0)


@torch.no_grad()
def test_contrastive_model_equals_transformers(hf_clip, our_clip, captions):
    pixels = torch.randn(3, 3, 32, 32)
    expected = hf_clip(input_ids=captions, pixel_values=pixels, return_loss=True)
    torch.testing.assert_close(our_clip.encode_image(pixels), expected.image_embeds, **CLOSE)
    torch.testing.assert_close(our_clip.encode_text(captions), expected.text_embeds, **CLOSE)
    logits = our_clip(pixels, captions)
    torch.testing.assert_close(logits, expected.logits_per_image, **CLOSE)
    torch.testing.assert_close(contrastive_loss(logits), expected.loss, **CLOSE)


@torch.no_grad()
def test_text_hidden_states_equal_transformers(hf_clip, our_clip, captions):
    expected = hf_clip.text_model(captions, output_hidden_states=True)
    for state, reference in zip(our_clip.text.hidden_states(captions), expected.hidden_states, strict=True):
        torch.testing.assert_close(state, reference, **CLOSE)
    torch.testing.assert_close(our_clip.text(captions), expected.pooler_output, **CLOSE)


def test_weights_survive_the_round_trip(hf_clip, our_clip):
    pairs = [
        (clip_names.to_transformers(our_clip.state_dict()), hf_clip),
        (clip_names.vision_to_transformers(our_clip.vision.state_dict()), hf_clip.vision_model),
        (clip_names.text_to_transformers(our_clip.text.state_dict()), hf_clip.text_model),
    ]
    for back, theirs in pairs:
        expected = theirs.state_dict()
        assert back.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(back[name], expected[name], rtol=0, atol=0)
    old = {f"vision_model.{name}": tensor for name, tensor in hf_clip.vision_model.state_dict().items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(17)
    ours = clip_names.vision_from_transformers(old)
    assert all(torch.equal(ours[name], tensor) for name, tensor in our_clip.vision.state_dict().items())


def test_early_configs_get_the_true_end_token():
    from transformers import CLIPTextConfig

    assert clip_names.text_config(CLIPTextConfig(vocab_size=49408, eos_token_id=2)).eos_id == 49407


def test_conversion_names_what_does_not_fit(hf_clip):
    state = hf_clip.vision_model.state_dict()
    removed = state.pop("pre_layrnorm.weight")
    with pytest.raises(ValueError, match=r"1 weights are missing .*pre_layrnorm.weight.* 0 are unknown"):
        clip_names.vision_from_transformers(state)
    with pytest.raises(ValueError, match=r"1 weights are missing .* 1 are unknown .*pre_layernorm.weight"):
        clip_names.vision_from_transformers({**state, "pre_layernorm.weight": removed})


def test_contrastive_loss_and_gradient_equal_transformers_in_double():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    logits = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(contrastive_loss(logits), image_text_contrastive_loss(logits))
    assert torch.autograd.gradcheck(contrastive_loss, logits)
    assert torch.autograd.gradcheck(sigmoid_loss, logits)


@torch.no_grad()
def test_sigmoid_loss_equals_transformers(redraw):
    from transformers import SiglipConfig, SiglipModel

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**tower, "vocab_size": 40, "max_position_embeddings": 8, "projection_size": 32}
    model = redraw(
        SiglipModel(SiglipConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8}))
    )
    out = model(input_ids=torch.randint(0, 40, (4, 8)), pixel_values=torch.randn(4, 3, 16, 16), return_loss=True)
    torch.testing.assert_close(sigmoid_loss(out.logits_per_image), out.loss, **CLOSE)
