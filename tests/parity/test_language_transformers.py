"""Our decoder, LLaVA, generation and loss against transformers, on tiny random models with every parameter re-drawn."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)
from transformers import LlavaConfig as TheirLlavaConfig
from transformers.loss.loss_utils import ForCausalLMLoss

from vlm_course.convert import llama, llava
from vlm_course.decoder import Decoder
from vlm_course.generation import generate
from vlm_course.llava import Llava
from vlm_course.loss import response_loss

IMAGE = 199
N = 16  # 32 / 8 squared


def redraw(module, std=0.2, seed=0):
    """Default initialisation hides swapped norms and scales, so every parameter gets a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module.eval()


def llama_config(**changes):
    sizes = {
        "vocab_size": 200,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 500.0, "rms_norm_eps": 1e-3}
    return LlamaConfig(**(sizes | changes), eos_token_id=None, bos_token_id=None, pad_token_id=None)


@pytest.fixture(scope="module")
def llavas():
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    config = TheirLlavaConfig(vision_config=vision, text_config=llama_config(), image_token_id=IMAGE)
    theirs = redraw(LlavaForConditionalGeneration(config), seed=2)  # a seed whose answers do not repeat one word
    theirs.generation_config.eos_token_id = None
    ours = Llava(llava.llava_config(config))
    ours.load_state_dict(llava.from_transformers(theirs.state_dict()))
    return theirs, ours.eval()


def batch(images_per_row=1, rows=2, text=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, IMAGE, (rows, images_per_row * (N + text)), generator=generator)
    for image in range(images_per_row):
        start = 2 + image * (N + 3)
        words[:, start : start + N] = IMAGE
    return words, torch.randn(rows * images_per_row, 3, 32, 32, generator=generator)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"rope_theta": 1e4, "rms_norm_eps": 1e-5},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_decoder_equals_llama(changes):
    theirs = redraw(LlamaForCausalLM(llama_config(**changes)))
    ours = Decoder(llama.decoder_config(theirs.config))
    ours.load_state_dict(llama.from_transformers(theirs.state_dict()))
    ids = torch.randint(0, 200, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ours.embed(ids)), theirs(ids).logits, atol=1e-5, rtol=0)
        # A constant shift of all positions must not matter, other positions must.
        apart = torch.arange(17) * 3
        got = ours(ours.embed(ids), positions=apart)
        torch.testing.assert_close(got, theirs(ids, position_ids=apart[None]).logits, atol=1e-5, rtol=0)
        assert (got - theirs(ids).logits).abs().max() > 1e-2


def test_decoder_norm_epsilon_is_inside_the_root():
    """Inputs of 1e-3 make epsilon the larger term; with ordinary ones its place is invisible."""
    theirs = redraw(LlamaForCausalLM(llama_config()))
    ours = Decoder(llama.decoder_config(theirs.config))
    ours.load_state_dict(llama.from_transformers(theirs.state_dict()))
    embeds = 1e-3 * torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(embeds), theirs(inputs_embeds=embeds).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("images_per_row", [1, 2])
def test_llava_logits(llavas, images_per_row):
    theirs, ours = llavas
    ids, pixels = batch(images_per_row)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits
        got = ours(ids, pixels)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours(ids, pixels, logits_to_keep=2), expected[:, -2:], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours(ids, image_features=ours.encode_images(pixels)), got, atol=1e-6, rtol=0)
        swapped = ours(ids, pixels.flip(0))
    assert (swapped - got).abs().max() > 1e-2  # the images are not ignored


def test_llava_loss(llavas):
    theirs, ours = llavas
    ids, pixels = batch()
    labels = ids.clone()
    labels[:, : N + 4] = -100
    labels[0, -2:] = -100
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels, labels=labels).loss
        torch.testing.assert_close(response_loss(ours(ids, pixels), labels), expected, atol=1e-5, rtol=0)


def left_padded(ids, lengths):
    padded, mask = ids.clone(), torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padded[row, :length], mask[row, :length] = 0, 0
        padded[row, length:] = ids[row, : ids.shape[1] - length]
    return padded, mask


@pytest.mark.parametrize("padding", [(0, 0), (0, 5)])
def test_greedy_tokens_equal_generate(llavas, padding):
    theirs, ours = llavas
    ids, mask = left_padded(batch()[0], padding)
    pixels = batch()[1]
    expected = theirs.generate(
        input_ids=ids,
        pixel_values=pixels,
        attention_mask=mask,
        max_new_tokens=20,
        do_sample=False,
        suppress_tokens=[IMAGE],
        pad_token_id=0,
    )[:, ids.shape[1] :]
    for use_cache in (True, False):
        got = generate(ours, ids, pixels, attention_mask=mask, max_new_tokens=20, use_cache=use_cache)
        assert torch.equal(got, expected), f"use_cache={use_cache}"
    assert len(expected.unique()) > 5  # a model that repeats one token would hide errors


def test_state_dict_goes_there_and_back(llavas):
    theirs, ours = llavas
    state = llava.to_transformers(ours.state_dict())
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    again = llava.from_transformers(state)
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())


def test_names_of_published_files(llavas):
    """The files on the hub still carry the names of version 4.51, and old ones hold buffers."""
    theirs, ours = llavas
    older = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    older |= {"model.vision_tower.": "vision_tower.vision_model.", "model.multi_": "multi_"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        prefix = next(prefix for prefix in older if name.startswith(prefix))
        state[older[prefix] + name.removeprefix(prefix)] = tensor
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    converted = llava.from_transformers(state)
    assert all(torch.equal(converted[name], tensor) for name, tensor in ours.state_dict().items())


def test_load_llava_from_a_folder(llavas, tmp_path):
    theirs, ours = llavas
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = llava.load_llava(tmp_path)
    assert loaded.config == ours.config and not loaded.training
    ids, pixels = batch()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, pixels), ours(ids, pixels), atol=0, rtol=0)


def test_conversion_refuses_what_it_does_not_know(llavas):
    theirs, _ = llavas
    with pytest.raises(ValueError, match="attention_bias=True"):
        llama.decoder_config(llama_config(attention_bias=True))
    state = dict(theirs.state_dict())
    state["model.language_model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    with pytest.raises(ValueError, match=r"unknown.*q_proj\.bias"):
        llava.from_transformers(state)
    del state["model.language_model.layers.0.self_attn.q_proj.bias"], state["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing.*lm_head"):
        llava.from_transformers(state)


@pytest.mark.parametrize("count", [None, 7])
def test_response_loss_equals_causal_lm_loss(count):
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(3, 11, 50, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 50, (3, 11), generator=generator)
    labels[torch.rand(3, 11, generator=generator) < 0.4] = -100
    ours = logits.clone().requires_grad_()
    theirs = logits.clone().requires_grad_()
    got = response_loss(ours, labels, count=count)
    expected = ForCausalLMLoss(theirs, labels, 50, num_items_in_batch=count)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    got.backward(), expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=0)
