"""Gated cross-attention and its mask against transformers' Idefics, with the gates open."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids_pt,
    incremental_to_binary_attention_mask,
)

from vlm_course.decoder import RMSNorm, SwiGLU
from vlm_course.fusion import GatedCrossAttention, media_mask, packed_media_mask

IMAGE, EOS = 99, 98
DIM, MEDIA_DIM, HEADS, M = 32, 24, 4, 5


@pytest.fixture
def layers():
    vision = {
        "embed_dim": MEDIA_DIM,
        "image_size": 32,
        "patch_size": 8,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
    }
    config = IdeficsConfig(
        vocab_size=100,
        hidden_size=DIM,
        intermediate_size=48,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        alpha_initializer="zeros",
        alpha_type="float",
        qk_layer_norms=False,
        dropout=0.0,
        vision_config=vision,
    )
    config._attn_implementation = "eager"
    theirs = IdeficsGatedCrossAttentionLayer(config, layer_idx=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        theirs.alpha_cross_attn.fill_(0.7)
        theirs.alpha_dense.fill_(-0.4)
    norm = partial(RMSNorm, eps=config.rms_norm_eps)
    ours = GatedCrossAttention(
        dim=DIM,
        media_dim=MEDIA_DIM,
        heads=HEADS,
        head_dim=DIM // HEADS,
        norm=norm,
        feed_forward=nn.Sequential(norm(DIM), SwiGLU(DIM, 48)),
    )
    ours.load_state_dict(
        {
            "norm.weight": theirs.input_layernorm.weight,
            "to_q.weight": theirs.cross_attn.q_proj.weight,
            "to_k.weight": theirs.cross_attn.k_proj.weight,
            "to_v.weight": theirs.cross_attn.v_proj.weight,
            "to_out.weight": theirs.cross_attn.o_proj.weight,
            "attention_gate": theirs.alpha_cross_attn,
            "feed_forward.0.weight": theirs.post_attention_layernorm.weight,
            "feed_forward.1.gate.weight": theirs.mlp.gate_proj.weight,
            "feed_forward.1.up.weight": theirs.mlp.up_proj.weight,
            "feed_forward.1.down.weight": theirs.mlp.down_proj.weight,
            "feed_forward_gate": theirs.alpha_dense,
        }
    )
    return theirs, ours


def inputs():
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 9, DIM, generator=generator)
    media = torch.randn(2, 2, M, MEDIA_DIM, generator=generator)
    ids = torch.tensor([[1, 2, IMAGE, 3, 4, IMAGE, 5, 6, 7], [1, IMAGE, 2, 3, 4, 5, 6, 7, 8]])
    return text, media, media_mask(ids, IMAGE, 2)


@pytest.mark.parametrize("half", ["attention", "whole"])
def test_gated_cross_attention(layers, half):
    theirs, ours = layers
    if half == "attention":
        with torch.no_grad():
            theirs.alpha_dense.zero_(), ours.feed_forward_gate.zero_()
    text, media, mask = inputs()
    wide = mask.repeat_interleave(M, dim=-1)[:, None]
    additive = torch.zeros(wide.shape).masked_fill(~wide, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = theirs(
            text,
            image_hidden_states=media.flatten(1, 2),
            image_attention_mask=additive,
            cross_attention_gate=mask.any(-1).float(),
        )
        got = ours(text, media, mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert (got - text).abs().max() > 1e-2


def test_tokens_before_the_first_image_keep_only_their_feed_forward(layers):
    _, ours = layers
    text, media, mask = inputs()
    with torch.no_grad():
        ours.feed_forward_gate.zero_()
        got = ours(text, media, mask)
    assert torch.equal(got[0, :2], text[0, :2])
    assert (got[0, 2:] - text[0, 2:]).abs().amax(-1).min() > 1e-4


def test_a_token_reads_only_the_last_image_before_it(layers):
    _, ours = layers
    text, media, mask = inputs()
    other = media.clone()
    other[0, 1] += 1.0
    with torch.no_grad():
        moved = (ours(text, other, mask) - ours(text, media, mask)).abs().amax(-1) > 1e-6
    assert moved[0].tolist() == [False] * 5 + [True] * 4
    assert not moved[1].any()


def test_new_block_is_the_identity_and_only_its_gates_learn():
    block = GatedCrossAttention(dim=DIM, media_dim=MEDIA_DIM, heads=2, head_dim=8)
    text, media, mask = inputs()
    got = block(text, media, mask)
    assert torch.equal(got, text)
    (got * torch.randn(got.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    touched = {name for name, parameter in block.named_parameters() if parameter.grad.abs().sum() > 0}
    assert touched == {"attention_gate", "feed_forward_gate"}


def idefics_mask(ids, n_images):
    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda token: IMAGE, eos_token_id=EOS)
    incremental, _ = image_attention_mask_for_packed_input_ids_pt(ids, tokenizer)
    return incremental_to_binary_attention_mask(incremental, "pt", num_classes=n_images).bool()


@pytest.mark.parametrize("seed", range(5))
def test_media_masks(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(4, 20, generator=generator)
    images = torch.where(draw < 0.2, IMAGE, 1)
    n_images = max(2, int((images == IMAGE).sum(1).max()))
    expected = idefics_mask(images, n_images)
    assert torch.equal(media_mask(images, IMAGE, n_images), expected)
    assert torch.equal(packed_media_mask(images, IMAGE, n_images, EOS), expected)

    packed = torch.where(draw > 0.8, EOS, images)
    expected = idefics_mask(packed, n_images)
    assert torch.equal(packed_media_mask(packed, IMAGE, n_images, EOS), expected)
    assert not torch.equal(media_mask(packed, IMAGE, n_images), expected)


def test_media_mask_names_expanded_placeholders():
    with pytest.raises(ValueError, match="has 4 image tokens but n_images is 1: was <image> expanded"):
        media_mask(torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 2]]), IMAGE, 1)
