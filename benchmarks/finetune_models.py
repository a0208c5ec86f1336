"""Models and batches of benchmarks.finetune: real sizes, random weights."""

from __future__ import annotations

import torch
from torch import nn

from vlm_course.decoder import DecoderConfig
from vlm_course.finetune.collate import Batch
from vlm_course.finetune.fast_optimizer import RoundingAdamW
from vlm_course.finetune.lora import add_lora
from vlm_course.llava import Llava, LlavaConfig
from vlm_course.training import freeze_all_but
from vlm_course.vit import ViTConfig

WORDS = 50
RANK = 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the rows want a GPU; their code is tested without one


# SigLIP-B/16-224's tower, with a class token more, and SmolLM2-135M: 196 patches become 49 tokens (pixel shuffle).
SMALL_222M = LlavaConfig(
    vision=ViTConfig(
        image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_width=3072, activation="gelu", pre_norm=False
    ),
    text=DecoderConfig(
        vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536, rope_theta=100000.0,
        tie_embeddings=True, max_positions=2048,
    ),
    image_id=49151, feature_layer=-1, visual_tokens=49,
)  # fmt: skip
CURVE = LlavaConfig(
    vision=ViTConfig(image_size=112, patch_size=14, width=256, layers=4, heads=4, mlp_width=1024),
    text=DecoderConfig(
        vocab_size=8000, width=1024, layers=8, heads=16, kv_heads=8, mlp_width=2816, max_positions=1024
    ),
    image_id=7999,
)  # fmt: skip


def build(config: LlavaConfig, *, dtype: torch.dtype = torch.bfloat16, bridge=None) -> Llava:
    """Random weights at real size, made on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            return Llava(config, bridge=None if bridge is None else bridge())
    finally:
        torch.set_default_dtype(before)


def prompt(config: LlavaConfig, words: int = WORDS, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [rows, M + words] and pixels, on the GPU."""
    torch.manual_seed(1)
    image = torch.full((rows, config.visual_tokens), config.image_id)
    ids = torch.cat([image, torch.randint(3, config.text.vocab_size - 1000, (rows, words))], dim=1).to(DEVICE)
    return ids, torch.randn(rows, 3, *config.vision.image_hw, device=DEVICE, dtype=torch.bfloat16)


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def one_batch(config: LlavaConfig, rows: int, words: int, *, seed: int = 0, device: str = DEVICE) -> Batch:
    """Rows of an image and `words` words, of which the second half is the answer."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.full((rows, config.visual_tokens), config.image_id)
    ids = torch.cat([image, torch.randint(3, config.text.vocab_size - 100, (rows, words), generator=draw)], dim=1)
    labels = ids.clone()
    labels[:, : config.visual_tokens + words // 2] = -100
    pixels = torch.randn(rows, 3, *config.vision.image_hw, generator=draw).to(torch.bfloat16)
    return Batch(ids, labels, pixels).to(device)


def learner(config: LlavaConfig, mode: str, *, rank: int | None = None, dtype=torch.bfloat16, bridge=None) -> Llava:
    """A model of which `mode` learns; what learns beside frozen weights is float32."""
    model, rank = build(config, dtype=dtype, bridge=bridge), rank or RANK
    names = add_lora(model, rank=rank, alpha=2.0 * rank) if mode == "lora" else []
    trains = {"projector": ("bridge.",), "lora": ("bridge.", *names), "full": ("bridge.", "decoder."), "all": ("",)}
    freeze_all_but(model, trains[mode])
    if mode in ("projector", "lora"):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def optimizer_for(model: nn.Module, mode: str):
    """Float32 AdamW for thin parts; for all weights of a decoder bfloat16 moments, inside the backward pass."""
    learning = [p for p in model.parameters() if p.requires_grad]
    if mode == "full":
        return RoundingAdamW(learning, lr=1e-5).in_backward()
    return torch.optim.AdamW(learning, lr=1e-5, fused=True)
