"""Our classes beside those of transformers and timm: same weights, same answer, then time."""

import timm
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlavaConfig
from transformers import LlavaForConditionalGeneration as TheirLlava

from benchmarks.timing import Row, beside, in_turn
from vlm_course.convert import clip, llama, llava
from vlm_course.convert.timm import vision_to_timm
from vlm_course.decoder import Decoder
from vlm_course.generation import generate, greedy_generate
from vlm_course.llava import Llava
from vlm_course.pretrained import load_small
from vlm_course.vit import VisionTransformer, ViTConfig

IMPLEMENTATIONS = ("eager", "sdpa")
IMAGE_ID, WORDS, PREFILL = 999, 32, 256
SHORT, LONG = 8, 72  # new tokens: the difference of their times is that of 64 tokens, without the prompt
LARGE_336 = {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096, "image_size": 336, "patch_size": 14}
BASE_16 = {"width": 768, "layers": 12, "heads": 12, "mlp_width": 3072, "image_size": 224, "patch_size": 16}


def their_vision(config: ViTConfig) -> CLIPVisionConfig:
    """transformers' config of one of our towers."""
    return CLIPVisionConfig(
        hidden_size=config.width, intermediate_size=config.mlp_width, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, image_size=config.image_size, patch_size=config.patch_size,
    )  # fmt: skip


def text_config() -> LlamaConfig:
    """A Llama of 50M parameters, embeddings aside, with grouped-query attention."""
    return LlamaConfig(
        vocab_size=1000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=1024, eos_token_id=None, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """A faster wrong answer is no result. Loose, since each may sum in its own order."""
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


@torch.no_grad()
def vision(device: str, pairs: int) -> list[Row]:
    """CLIP's ViT-L/14 at 336 pixels, one image, beside the fastest of timm and both of transformers' attentions."""
    config = ViTConfig(**LARGE_336)
    pixels = torch.randn(1, 3, 336, 336, device=device)
    ours = VisionTransformer(config).to(device).eval()
    runs = {"course": lambda: ours(pixels)}
    for implementation in IMPLEMENTATIONS:
        theirs = CLIPVisionModel._from_config(their_vision(config), attn_implementation=implementation)
        theirs.load_state_dict(clip.vision_to_transformers(ours.state_dict()))
        theirs.to(device).eval()
        same(ours(pixels), theirs(pixels).last_hidden_state)
        runs[f"transformers CLIPVisionModel, {implementation}"] = lambda tower=theirs: tower(pixels)
    tower = timm.create_model("vit_large_patch14_clip_quickgelu_336", pretrained=False, num_classes=0)
    tower.load_state_dict(vision_to_timm(ours.state_dict()))
    tower.to(device).eval()
    same(ours.post_norm(ours(pixels)), tower.forward_features(pixels))
    runs["timm"] = lambda: tower.forward_features(pixels)
    seconds = in_turn(runs, pairs)
    return [beside("vision", seconds.pop("course"), seconds, asked=1.00)]


@torch.no_grad()
def decoder(device: str, pairs: int) -> list[Row]:
    """One pass of the decoder over a prompt."""
    ids = torch.randint(3, 900, (1, PREFILL), device=device)
    ours = Decoder(llama.decoder_config(text_config())).to(device).eval()
    runs = {"course": lambda: ours(ours.embed(ids))}
    for implementation in IMPLEMENTATIONS:
        theirs = LlamaForCausalLM._from_config(text_config(), attn_implementation=implementation)
        theirs.load_state_dict(llama.to_transformers(ours.state_dict()))
        theirs.to(device).eval()
        same(ours(ours.embed(ids)), theirs(ids).logits)
        runs[f"transformers LlamaForCausalLM, {implementation}"] = lambda model=theirs: model(ids)
    seconds = in_turn(runs, pairs)
    return [beside("decoder", seconds.pop("course"), seconds)]


def _medium(device: str) -> tuple[Llava, TheirLlava]:
    """LLaVA with ViT-B/16 and the Llama above: 139M parameters."""
    config = LlavaConfig(
        vision_config=their_vision(ViTConfig(**BASE_16)), text_config=text_config(), image_token_id=IMAGE_ID,
        vision_feature_layer=-2,
    )  # fmt: skip
    theirs = TheirLlava(config).to(device).eval()
    ours = Llava(llava.llava_config(theirs.config)).to(device).eval()
    ours.load_state_dict(llava.from_transformers(theirs.state_dict()))
    return ours, theirs


def _shipped(device: str) -> tuple[Llava, TheirLlava]:
    """The model that comes with the course, and its weights in transformers' class."""
    ours = load_small(device).model
    text = ours.config.text
    config = LlavaConfig(
        vision_config=their_vision(ours.config.vision),
        text_config=LlamaConfig(
            vocab_size=text.vocab_size, hidden_size=text.width, intermediate_size=text.mlp_width,
            num_hidden_layers=text.layers, num_attention_heads=text.heads, num_key_value_heads=text.kv_heads,
            max_position_embeddings=text.max_positions, rms_norm_eps=text.norm_eps, eos_token_id=None,
            bos_token_id=1, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        ),
        image_token_id=ours.config.image_id, vision_feature_layer=ours.config.feature_layer,
    )  # fmt: skip
    theirs = TheirLlava(config).to(device).eval()
    theirs.load_state_dict(llava.to_transformers(ours.state_dict()))
    return ours, theirs


def _prompt(model: Llava, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    config = model.config
    words = torch.randint(6, config.text.vocab_size - 1, (1, WORDS))
    ids = torch.cat([torch.full((1, config.visual_tokens), config.image_id), words], dim=1).to(device)
    return ids, torch.randn(1, 3, *config.vision.image_hw, device=device)


@torch.no_grad()
def prefill(device: str, pairs: int) -> list[Row]:
    """LLaVA from pixels and words to the logits of the next token."""
    ours, theirs = _medium(device)
    ids, pixels = _prompt(ours, device)

    def course():
        return ours(ids, pixels, logits_to_keep=1)

    def peer():
        return theirs(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits

    same(course(), peer())
    seconds = in_turn({"course": course, "peer": peer}, pairs)
    return [
        beside(
            "prefill", seconds["course"], {"transformers LlavaForConditionalGeneration": seconds["peer"]}, asked=1.05
        )
    ]


def decode(device: str, pairs: int) -> list[Row]:
    """A further token with the shipped model: the plain class with its cache, and `generate`."""
    return _decode("decode", *_shipped(device), device, pairs, plain=0.80, quick=0.60)


def decode_medium(device: str, pairs: int) -> list[Row]:
    """The same with a decoder of 50M parameters, where reading the weights takes most of the time on both sides."""
    return _decode("decode-medium", *_medium(device), device, pairs, plain=None, quick=None)


@torch.no_grad()
def _decode(name: str, ours: Llava, theirs: TheirLlava, device: str, pairs: int, plain, quick) -> list[Row]:
    ids, pixels = _prompt(ours, device)

    def peer(new: int) -> torch.Tensor:
        rules = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        written = theirs.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), **rules)
        return written[:, ids.shape[1] :]

    ways = {
        "plain": lambda new: greedy_generate(ours, ids, pixels, new),
        "quick": lambda new: generate(ours, ids, pixels, max_new_tokens=new),
        "peer": peer,
    }
    for way in ("plain", "quick"):
        if not torch.equal(ways[way](LONG), peer(LONG)):
            raise RuntimeError(f"{name}: the {way} way and transformers did not write the same tokens")
    runs = {f"{way} {new}": lambda run=run, new=new: run(new) for way, run in ways.items() for new in (SHORT, LONG)}
    seconds = in_turn(runs, pairs)
    token = {
        way: [
            (long - short) / (LONG - SHORT)
            for short, long in zip(seconds[f"{way} {SHORT}"], seconds[f"{way} {LONG}"], strict=True)
        ]
        for way in ways
    }
    peers = {"transformers generate, per further token": token["peer"]}
    return [
        beside(f"{name}-plain", token["plain"], peers, asked=plain),
        beside(f"{name}-quick", token["quick"], peers, asked=quick),
    ]
