"""Our classes beside those of transformers: same weights, same answer, then time."""

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlavaConfig
from transformers import LlavaForConditionalGeneration as TheirLlava

from benchmarks.timing import Ratio, compare
from vlm_course.convert import clip, llama, llava
from vlm_course.decoder import Decoder
from vlm_course.generation import generate
from vlm_course.llava import Llava
from vlm_course.vit import VisionTransformer

IMPLEMENTATIONS = ("eager", "sdpa")
IMAGE_ID, WORDS, PREFILL, NEW_TOKENS = 999, 32, 256, 32


def vision_config() -> CLIPVisionConfig:
    """ViT-B/16 at 224 pixels: 197 tokens, 86M parameters."""
    return CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
    )


def text_config() -> LlamaConfig:
    """A Llama of 59M parameters with grouped-query attention."""
    return LlamaConfig(
        vocab_size=1000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=1024, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """A faster wrong answer is no result. Loose, since a GPU may sum in another order."""
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


@torch.no_grad()
def vision(device: str) -> list[Ratio]:
    """CLIP's vision tower, one image."""
    pixels = torch.randn(1, 3, 224, 224, device=device)
    rows = []
    for implementation in IMPLEMENTATIONS:
        theirs = CLIPVisionModel._from_config(vision_config(), attn_implementation=implementation).to(device).eval()
        ours = VisionTransformer(clip.vision_config(theirs.config)).to(device).eval()
        ours.load_state_dict(clip.vision_from_transformers(theirs.state_dict()))
        same(ours(pixels), theirs(pixels).last_hidden_state)
        peer = f"transformers CLIPVisionModel, {implementation}"
        rows.append(compare("vision", peer, lambda o=ours: o(pixels), lambda t=theirs: t(pixels)))
    return rows


def _decoders(device: str, implementation: str) -> tuple[Decoder, LlamaForCausalLM]:
    theirs = LlamaForCausalLM._from_config(text_config(), attn_implementation=implementation).to(device).eval()
    ours = Decoder(llama.decoder_config(theirs.config)).to(device).eval()
    ours.load_state_dict(llama.from_transformers(theirs.state_dict()))
    return ours, theirs


@torch.no_grad()
def prefill(device: str) -> list[Ratio]:
    """One pass of the decoder over a prompt."""
    ids = torch.randint(3, 900, (1, PREFILL), device=device)
    rows = []
    for implementation in IMPLEMENTATIONS:
        ours, theirs = _decoders(device, implementation)
        same(ours(ours.embed(ids)), theirs(ids).logits)
        peer = f"transformers LlamaForCausalLM, {implementation}"
        rows.append(compare("prefill", peer, lambda o=ours: o(o.embed(ids)), lambda t=theirs: t(ids)))
    return rows


def _llavas(device: str) -> tuple[Llava, TheirLlava]:
    config = LlavaConfig(
        vision_config=vision_config(), text_config=text_config(), image_token_id=IMAGE_ID, vision_feature_layer=-2
    )
    theirs = TheirLlava(config).to(device).eval()
    ours = Llava(llava.llava_config(theirs.config)).to(device).eval()
    ours.load_state_dict(llava.from_transformers(theirs.state_dict()))
    return ours, theirs


def _prompt(model: Llava, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.cat([torch.full((1, model.config.visual_tokens), IMAGE_ID), torch.randint(3, 900, (1, WORDS))], dim=1)
    return ids.to(device), torch.randn(1, 3, 224, 224, device=device)


@torch.no_grad()
def decode(device: str) -> list[Ratio]:
    """Greedy decoding after an image, with a cache."""
    ours, theirs = _llavas(device)
    ids, pixels = _prompt(ours, device)
    rules = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

    def peer():
        return theirs.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), **rules)

    def course():
        return generate(ours, ids, pixels, max_new_tokens=NEW_TOKENS, eos_id=-1)

    if not torch.equal(course(), peer()[:, ids.shape[1] :]):
        raise RuntimeError("the two did not write the same tokens")
    return [compare("decode", f"transformers generate, {NEW_TOKENS} tokens", course, peer, rounds=5)]


@torch.no_grad()
def whole(device: str) -> list[Ratio]:
    """From pixels and words to the logits of the next token."""
    ours, theirs = _llavas(device)
    ids, pixels = _prompt(ours, device)

    def course():
        return ours(ids, pixels, logits_to_keep=1)

    def peer():
        return theirs(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits

    same(course(), peer())
    return [compare("llava", "transformers LlavaForConditionalGeneration", course, peer)]
