"""The claims of chapter 0, held to account by the models that they are about."""

import pytest
import torch
from torch import nn


@pytest.mark.claim("0-02", kind="model")
def test_fuyu_has_one_linear_layer_where_llava_has_a_tower(real_llava):
    """Fails if Fuyu had an encoder or a second layer for pixels, or if LLaVA lacked one of its three parts."""
    from transformers import FuyuConfig, FuyuModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    with torch.device("meta"):
        fuyu = FuyuModel(FuyuConfig(**sizes, patch_size=30, text_config={"model_type": "persimmon", **sizes}))
    parts = dict(fuyu.named_children())
    assert [name for name in parts if "vision" in name] == ["vision_embed_tokens"]
    assert isinstance(parts["vision_embed_tokens"], nn.Linear)
    assert parts["vision_embed_tokens"].in_features == 30 * 30 * 3  # pixels, not features
    assert {"vision_tower", "multi_modal_projector", "language_model"} <= dict(
        real_llava("7B").model.named_children()
    ).keys()


@pytest.mark.claim("0-03", kind="model")
def test_the_tower_has_304_million_parameters(real_llava, count, says):
    """Fails if transformers' tower, built at LLaVA-1.5's sizes, had another number of parameters or another input."""
    tower = real_llava("13B").model.vision_tower
    assert tower.config.image_size == 336 and tower.config.num_channels == 3
    says(f"{count(tower):,}", tower.config.image_size)


@pytest.mark.claim("0-04", kind="model")
def test_the_tower_gives_577_vectors_and_llava_keeps_576(real_llava, says):
    """Fails if there were no class token to drop, or if LLaVA kept it."""
    model = real_llava("7B").model
    pixels = torch.empty(1, 3, 336, 336, device="meta")
    hidden = model.vision_tower(pixels).last_hidden_state
    kept = model.get_image_features(pixels, vision_feature_layer=-2, vision_feature_select_strategy="default")
    kept = kept.pooler_output if hasattr(kept, "pooler_output") else kept
    assert hidden.shape[2] == 1024
    assert kept[0].shape[0] == hidden.shape[1] - 1 == 576
    says(hidden.shape[1])


@pytest.mark.claim("0-05", kind="model")
def test_the_bridge_follows_the_width_of_its_language_model(real_llava, count, says):
    """Fails if one bridge served both models: then the counts were equal and its tokens fitted into either sequence."""
    for name in ("7B", "13B"):
        model = real_llava(name).model
        width = model.get_input_embeddings().weight.shape[1]
        assert model.multi_modal_projector.linear_2.out_features == width
        says(width, f"{count(model.multi_modal_projector):,}")
    with pytest.raises(RuntimeError, match="4096"):
        torch.cat([torch.empty(576, 4096, device="meta"), torch.empty(50, 5120, device="meta")])


@pytest.mark.claim("0-06", kind="model")
def test_fifty_words_and_an_image_make_626_positions(says):
    """Fails if LLaVA read another number of tokens than 576 beside 50 of text."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaModel

    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "hidden_size": 16}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**heads, image_size=336, patch_size=14),
        text_config=LlamaConfig(**heads, vocab_size=99),
        image_token_index=98,
    )
    model = LlavaModel(config).eval()
    pixels = torch.randn(1, 3, 336, 336)
    with torch.no_grad():
        for visual in (575, 577):
            with pytest.raises(ValueError):
                model(input_ids=torch.tensor([[98] * visual + [1] * 50]), pixel_values=pixels)
        out = model(input_ids=torch.tensor([[98] * 576 + [1] * 50]), pixel_values=pixels).last_hidden_state
    says(576, out.shape[1])


@pytest.mark.claim("0-07", kind="experiment")
@torch.no_grad()
def test_words_and_pixels_meet_in_one_sequence(small, exam, seen):
    """Fails if image and text did not interact: then another image could not move the words, at any layer."""
    model, row = small.model, slice(0, 4)
    states = []
    for features in (seen[row], seen[row].roll(1, dims=0)):
        kept = []
        hooks = [
            block.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
            for block in model.decoder.blocks
        ]
        model(exam.ids[row], image_features=features)
        for hook in hooks:
            hook.remove()
        states.append(torch.stack(kept))  # [layers, B, T, D]
    words = exam.ids[row] != model.config.image_id  # [B, T]
    words[:, 0] = False  # <bos> stands before the image
    moved = (states[0] - states[1]).norm(dim=-1)[:, words].mean(1) / states[0].norm(dim=-1)[:, words].mean(1)
    assert seen.shape[-1] == model.decoder.token_embedding.weight.shape[1]  # one representation
    assert moved[0] == 0  # before the first layer a word is a word, whatever the image
    assert (moved[1:] > 0.02).all()  # from then on it knows of the image
