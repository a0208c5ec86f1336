"""Our masks against those that transformers hands to its attention layers: causal, padded, packed, with a prefix."""

import pytest
import torch
from transformers import LlamaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers.masking_utils import create_causal_mask

from vlm_course.attention import block_mask, causal_mask, padding_mask, prefix_mask


def theirs(length, *, attention_mask=None, positions=None, rows=2):
    """True where transformers' Llama may attend: [B, 1, T, T]."""
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    config._attn_implementation = "eager"
    embeds = torch.zeros(rows, length, 16)
    mask = create_causal_mask(config, embeds, attention_mask, None, positions, allow_is_causal_skip=False)
    return (mask == 0).expand(rows, 1, -1, -1)


def test_causal():
    assert torch.equal(theirs(6), causal_mask(6).expand(2, 1, -1, -1))


@pytest.mark.parametrize("real", [[[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]])
def test_padding(real):
    """Compared at real queries: what a padded query sees is nobody's business, and transformers lets it see some."""
    real = torch.tensor(real)
    ours = padding_mask(real) & causal_mask(5)
    rows = real.bool()
    assert torch.equal(ours[:, 0][rows], theirs(5, attention_mask=real)[:, 0][rows])


@pytest.mark.parametrize("lengths", [[3, 2], [1, 4, 1], [6]])
def test_packed_documents(lengths):
    """transformers finds documents by positions that start again at 0."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    assert torch.equal(block_mask(documents), theirs(sum(lengths), positions=positions, rows=1))


def test_prefix_as_paligemma_has_it():
    """The mask that reaches PaliGemma's attention when it is trained: image and prompt in full, the answer causal."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "gemma", **sizes, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 40}
    vision = {"model_type": "siglip_vision_model", **sizes, "image_size": 16, "patch_size": 8}
    config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=39, projection_dim=16)
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    model = PaliGemmaForConditionalGeneration(config).train()
    caught = []
    layer = model.model.language_model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda _, args, kwargs: caught.append(kwargs["attention_mask"]), with_kwargs=True)
    ids = torch.tensor([[39] * 4 + [2, 5, 6, 7, 8, 9], [39] * 4 + [2, 5, 6, 7, 8, 9]])
    suffix = torch.tensor([[0] * 6 + [1] * 4, [0] * 7 + [1] * 3])  # the answer begins at 6 and at 7
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        model(input_ids=ids, pixel_values=pixels, token_type_ids=suffix, labels=ids)
    assert torch.equal(prefix_mask(torch.tensor([6, 7]), 10), caught[0] == 0)
