"""Conversion: names of older files, tied heads, and checkpoints that are not what they should be."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM
from transformers import CLIPVisionConfig as TheirVision
from transformers import LlavaConfig as TheirConfig

from vlm_course.convert import clip, llama, llava, take_prefix
from vlm_course.decoder import Decoder

LLAMA = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip


def test_a_tied_head_is_stored_once_and_used_twice(redraw):
    theirs = redraw(LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)))
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    ours = Decoder(llama.decoder_config(theirs.config))
    ours.load_state_dict(llama.from_transformers(state, tied=True))
    assert ours.head.weight is ours.token_embedding.weight
    ids = torch.tensor([[3, 1, 4]])
    torch.testing.assert_close(ours(ours.embed(ids)), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="lm_head"):
        llama.from_transformers(state)


@pytest.mark.parametrize(("option", "value"), [("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True)])
def test_a_llama_that_our_decoder_is_not(option, value):
    with pytest.raises(ValueError, match=f"{option}={value!r}"):
        llama.decoder_config(LlamaConfig(**LLAMA, **{option: value}))


def test_text_tower_of_an_older_file():
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8,
    )  # fmt: skip
    state = CLIPTextModel(config).state_dict()
    bare = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    prefixed = {f"text_model.{name}": tensor for name, tensor in bare.items()}
    ours = clip.text_from_transformers(prefixed)
    assert ours.keys() == clip.text_from_transformers(bare).keys()
    back = clip.text_to_transformers(ours)
    assert back.keys() == bare.keys() and all(torch.equal(back[name], bare[name]) for name in bare)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("projector_hidden_act", "relu"),
        ("multimodal_projector_bias", False),
        ("vision_feature_select_strategy", "full"),
    ],
)
def test_a_llava_that_our_class_is_not(option, value):
    vision = TheirVision(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         image_size=16, patch_size=8)  # fmt: skip
    with pytest.raises(ValueError, match=f"{option}={value!r}"):
        llava.llava_config(TheirConfig(vision_config=vision, text_config=LlamaConfig(**LLAMA), **{option: value}))


def test_other_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'qformer\.weight' belongs to no part of LLaVA"):
        llava.from_transformers({"qformer.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"none of the 1 names starts with 'vision\.'"):
        take_prefix({"text.weight": torch.zeros(1)}, "vision.")
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file"):
        llava.load_llava(tmp_path)
