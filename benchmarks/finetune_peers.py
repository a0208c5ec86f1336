"""What a user would run today for the same work: transformers' LLaVA and PEFT, random weights at real size.

"plain": eager, dynamic cache, gradient checkpointing. "tuned": the strongest stock settings, static compiled cache for
decoding, and layers compiled for training, without checkpointing where it fits.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.finetune_models import DEVICE
from vlm_course.llava import LlavaConfig

ADAPTED = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def their_model(config: LlavaConfig):
    """transformers' LlavaForConditionalGeneration of the same sizes, in bfloat16 on the GPU."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration
    from transformers import LlavaConfig as TheirConfig

    v, t = config.vision, config.text
    vision = CLIPVisionConfig(
        hidden_size=v.width, intermediate_size=v.mlp_width, num_hidden_layers=v.layers, num_attention_heads=v.heads,
        image_size=v.image_hw[0], patch_size=v.patch_size, projection_dim=v.width,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=t.vocab_size, hidden_size=t.width, intermediate_size=t.mlp_width, num_hidden_layers=t.layers,
        num_attention_heads=t.heads, num_key_value_heads=t.kv_heads, max_position_embeddings=t.max_positions,
    )  # fmt: skip
    theirs = TheirConfig(
        vision_config=vision, text_config=text, image_token_id=config.image_id,
        vision_feature_layer=config.feature_layer, vision_feature_select_strategy="default",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlavaForConditionalGeneration(theirs)
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode()
def decode(config: LlavaConfig, ids, pixels, settings: str, median: Callable) -> dict:
    """Milliseconds of a further token (100 tokens less 20, by 80), and the seconds until it is quick."""
    model = their_model(config).eval()
    if settings == "tuned":
        model.generation_config.cache_implementation = "static"

    def generate(count: int):
        return model.generate(
            input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=count,
            min_new_tokens=count, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    began = time.perf_counter()
    if settings == "tuned":
        generate(20)
        generate(20)
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - began
    long, short = (median(lambda n=n: generate(n), runs=3, warm_up=1) for n in (100, 20))
    return {"decode_ms": 1e3 * (long - short) / 80, "warm_up_s": warm_up}


@torch.inference_mode()
def prefill(config: LlavaConfig, ids, pixels, median: Callable) -> dict:
    """Milliseconds of a pass over image and prompt."""
    model = their_model(config).eval()
    seconds = median(lambda: model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1))
    return {"prefill_ms": 1e3 * seconds}


def trainer(config: LlavaConfig, mode: str, *, checkpointing: bool, compiled: bool, dynamic: bool | None = None):
    """(ids, pixels, labels, attention_mask=None) -> a function that takes one step; and the model."""
    model = their_model(config).train()
    inner = model
    if mode != "full":
        model.requires_grad_(False)
    if mode == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=128, lora_alpha=256, target_modules=ADAPTED))
        inner = model.base_model.model
    inner.model.vision_tower.requires_grad_(False)
    inner.model.multi_modal_projector.requires_grad_(True)
    if checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled:
        for layer in inner.model.language_model.layers:
            layer.compile(dynamic=dynamic)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)

    def on(ids, pixels, labels, attention_mask=None):
        def step():
            out = model(
                input_ids=ids, pixel_values=pixels, labels=labels, attention_mask=attention_mask, use_cache=False
            )
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return on, model


def small_model(config: LlavaConfig, *, factor: int = 2):
    """transformers' Idefics3, SmolVLM's class: a SigLIP tower, pixel shuffle, a tied Llama; float32."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    v, t = config.vision, config.text
    vision = {
        "hidden_size": v.width, "intermediate_size": v.mlp_width, "num_hidden_layers": v.layers,
        "num_attention_heads": v.heads, "image_size": v.image_hw[0], "patch_size": v.patch_size,
    }  # fmt: skip
    text = LlamaConfig(
        vocab_size=t.vocab_size, hidden_size=t.width, intermediate_size=t.mlp_width, num_hidden_layers=t.layers,
        num_attention_heads=t.heads, num_key_value_heads=t.kv_heads, max_position_embeddings=t.max_positions,
        rope_theta=t.rope_theta, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=factor, image_token_id=config.image_id, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(DEVICE):
        return Idefics3ForConditionalGeneration(theirs)


def small_trainer(config: LlavaConfig, *, compiled: bool):
    """(ids, pixels, labels) -> a function that takes one step in which everything learns; and the model."""
    model = small_model(config).train()
    if compiled:
        for layer in [*model.model.text_model.layers, *model.model.vision_model.encoder.layers]:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def on(ids, pixels, labels):
        images = pixels.float()[:, None]  # [B, 1, 3, H, W]: one image a row

        def step():
            with torch.autocast(DEVICE, torch.bfloat16):
                out = model(input_ids=ids, pixel_values=images, labels=labels, use_cache=False)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return on, model
