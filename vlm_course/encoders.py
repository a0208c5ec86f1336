"""The vision towers that the course names, built and counted, and what one costs for an image.

Nothing here has weights: towers are built on torch's meta device, so 1 or 6 billion parameters take no memory.

Sources: Radford et al. 2021 (CLIP, arXiv 2103.00020); Zhai et al. 2023 (SigLIP, arXiv 2303.15343); Sun et al. 2023
(EVA-CLIP, arXiv 2303.15389); Oquab et al. 2023 (DINOv2, arXiv 2304.07193); Chen et al. 2023 (InternVL, arXiv
2312.14238).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from vlm_course.validation import checks, require_divisible


@dataclass(frozen=True)
class Encoder:
    """A published vision tower: how its shape is built here, and who reads it."""

    name: str
    library: str  # "timm" or "transformers": whose class is built
    built_as: str  # the model's name in timm, or the class in transformers
    training: str  # what it was trained to do
    used_by: str  # a vision-language model that reads it
    source: str  # where the last two come from
    checked: str  # ISO date


@dataclass(frozen=True)
class Measured:
    """What building and running a tower on the meta device says. Counts are for one image of the configured size."""

    parameters: int
    width: int
    layers: int
    image_size: int  # px, along one side
    patch_size: int  # px
    patches: int
    extra_tokens: int  # class token and registers, in front of the patches
    flops: int  # of matrix products, convolution and attention; a multiply-add counts as two


_CHECKED = "2026-11-23"
CLIP_L = Encoder(
    "CLIP ViT-L/14-336",
    "timm",
    "vit_large_patch14_clip_quickgelu_336",
    "match images with texts, softmax",
    "LLaVA-1.5",
    "haotian-liu/LLaVA at c121f04, scripts/v1_5/pretrain.sh: openai/clip-vit-large-patch14-336",
    _CHECKED,
)
SIGLIP_SO400M = Encoder(
    "SigLIP SO400M/14-384",
    "timm",
    "vit_so400m_patch14_siglip_384",
    "match images with texts, sigmoid",
    "PaliGemma (at 224 px)",
    "timm configuration; Beyer et al. 2024 (PaliGemma, arXiv 2407.07726), abstract",
    _CHECKED,
)
EVA_G = Encoder(
    "EVA ViT-g/14",
    "timm",
    "eva_giant_patch14_clip_224",
    "fill in masked patches, then match images with texts",
    "BLIP-2 (39 layers)",
    "timm configuration; transformers Blip2VisionConfig: hidden_size 1408, 39 layers",
    _CHECKED,
)
DINOV2_L = Encoder(
    "DINOv2 ViT-L/14",
    "timm",
    "vit_large_patch14_dinov2",
    "agree with itself, no text",
    "Prismatic, OpenVLA",
    "timm configuration; Karamcheti et al. 2024 (Prismatic VLMs, arXiv 2402.07865), abstract",
    _CHECKED,
)
INTERN_VIT_6B = Encoder(
    "InternViT-6B",
    "transformers",
    "InternVLVisionModel",
    "match images with texts, softmax",
    "InternVL",
    "OpenGVLab/InternVL, configuration_intern_vit.py: width 3200, 48 layers, 25 heads, feed-forward 12800",
    _CHECKED,
)
ENCODERS = (CLIP_L, SIGLIP_SO400M, EVA_G, DINOV2_L, INTERN_VIT_6B)


def build(encoder: Encoder) -> nn.Module:
    """The tower on the meta device, without a classifier. Raises ValueError for a library that is neither of the two.

    timm is asked with `pretrained=False`: nothing is downloaded.
    """
    if encoder.library == "timm":
        import timm

        with torch.device("meta"):
            return timm.create_model(encoder.built_as, pretrained=False, num_classes=0).eval().requires_grad_(False)
    if encoder.library == "transformers":
        return _intern_vit()
    raise ValueError(f"{encoder.name} is built by {encoder.library!r}, expected 'timm' or 'transformers'")


def _intern_vit() -> nn.Module:
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(
        hidden_size=3200, num_hidden_layers=48, num_attention_heads=25, intermediate_size=12800, image_size=[224, 224],
        patch_size=[14, 14], norm_type="rms_norm", use_qk_norm=True, attention_bias=False,
    )  # fmt: skip
    with torch.device("meta"):
        return InternVLVisionModel(config).eval().requires_grad_(False)


@cache
def measure(encoder: Encoder) -> Measured:
    """Build a tower, send one image of zeros through it and count. Under a second for each of `ENCODERS`."""
    tower = build(encoder)
    if encoder.library == "timm":
        width, layers = tower.embed_dim, len(tower.blocks)
        (image_size, _), (patch_size, _) = tower.patch_embed.img_size, tower.patch_embed.patch_size
        extra = tower.num_prefix_tokens
    else:
        width, layers = tower.config.hidden_size, tower.config.num_hidden_layers
        image_size, patch_size, extra = tower.config.image_size[0], tower.config.patch_size[0], 1
    pixels = torch.empty(1, 3, image_size, image_size, device="meta")
    return Measured(
        parameters=sum(parameter.numel() for parameter in tower.parameters()),
        width=width,
        layers=layers,
        image_size=image_size,
        patch_size=patch_size,
        patches=(image_size // patch_size) ** 2,
        extra_tokens=extra,
        flops=sum(counted_flops(tower, pixels)),
    )


@torch.no_grad()
def counted_flops(module: nn.Module, *inputs: torch.Tensor) -> tuple[int, int]:
    """FLOPs of one call by torch's counter: (linear maps and convolutions, attention between tokens).

    Attention is scores and weighted sum alone; its four linear maps count as linear. Works on the meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    counts = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for name, flops in counts.items() if "bmm" in name or "attention" in name)
    return sum(counts.values()) - attention, attention


def _check_vit_flops(tokens: int, width: int, layers: int, mlp_width: int) -> None:
    for name, value in (("tokens", tokens), ("width", width), ("layers", layers), ("mlp_width", mlp_width)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")


@checks(_check_vit_flops)
def vit_flops(tokens: int, width: int, layers: int, mlp_width: int) -> tuple[int, int]:
    """FLOPs of the blocks of a vision transformer for one image: (linear maps, attention between tokens).

    A multiply-add counts as two. Left out: the patch embedding (0.2 % of CLIP ViT-L/14), norms, biases, the softmax.
    Raises ValueError for a size below 1.
    """
    linear = 2 * tokens * (4 * width * width + 2 * width * mlp_width)
    attention = 2 * 2 * tokens * tokens * width
    return layers * linear, layers * attention


def score_entries(tokens: int) -> int:
    """Entries of one head's attention matrix in one layer: one for each pair of tokens. They are not operations."""
    return tokens * tokens


def _check_patch_budget(image_size: int, patch_size: int, width: int) -> None:
    require_divisible(image_size, patch_size, "image_size", "patch_size", hint="a strip would be dropped")
    if width < 1:
        raise ValueError(f"width is {width}, expected at least 1")


@checks(_check_patch_budget)
def patch_budget(image_size: int, patch_size: int, width: int) -> dict[str, int | float]:
    """What cutting a square RGB image into patches leaves for each token.

    Args: image_size and patch_size in pixels; width of a token. Returns "tokens" (patches), "pixels" and "values"
    (three a pixel) of a patch, and "values_per_number": values for each of the token's `width` numbers. Up to 1 the
    linear map can keep everything. Raises ValueError when the patch size does not divide the image size.
    """
    tokens = (image_size // patch_size) ** 2
    pixels = patch_size * patch_size
    values = 3 * pixels
    return {"tokens": tokens, "pixels": pixels, "values": values, "values_per_number": values / width}
