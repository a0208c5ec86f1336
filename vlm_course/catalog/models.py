"""Real vision-language models: widths, token counts and bridges, each row with its source and the day it was checked.

A number that no source was found for is None; it is never a guess. Parameter counts marked "counted" come from building
the module on the meta device, with biases.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RealModel:
    """One published model as far as a bridge is concerned."""

    name: str
    bridge: str  # kind of bridge: "linear", "mlp", "perceiver resampler", "cross-attention", "c-abstractor"
    vision: str  # name of the vision encoder
    vision_width: int | None  # D_vision, channels of one visual feature
    image_size: int | None  # pixels along one side
    patches: int | None  # visual features for one image, N
    visual_tokens: int  # what the language model gets for one image, M
    llm: str
    llm_width: int | None  # D_llm, width of one word embedding
    bridge_parameters: int | None
    counted: bool  # True: counted on the meta device; False: quoted from the source
    source: str
    checked: str  # ISO date


CHECKED = "2026-11-23"
LLAVA_CODE = (
    "haotian-liu/LLaVA at c121f04, llava/model/multimodal_projector/builder.py and multimodal_encoder/clip_encoder.py"
)

LLAVA_V1_13B = RealModel(
    name="LLaVA v1 13B",
    bridge="linear",
    vision="CLIP ViT-L/14 at 224 px",
    vision_width=1024,
    image_size=224,
    patches=256,
    visual_tokens=256,
    llm="Vicuna-13B",
    llm_width=5120,
    bridge_parameters=5_248_000,
    counted=True,
    source="haotian-liu/LLaVA at tag v1.0.1, scripts/pretrain.sh; Liu et al. 2023, arXiv 2304.08485, section 4.1",
    checked=CHECKED,
)
LLAVA_15_7B = RealModel(
    name="LLaVA-1.5 7B",
    bridge="mlp",
    vision="CLIP ViT-L/14 at 336 px",
    vision_width=1024,
    image_size=336,
    patches=576,
    visual_tokens=576,
    llm="Vicuna-7B v1.5",
    llm_width=4096,
    bridge_parameters=20_979_712,
    counted=True,
    source=LLAVA_CODE,
    checked=CHECKED,
)
LLAVA_15_13B = RealModel(
    name="LLaVA-1.5 13B",
    bridge="mlp",
    vision="CLIP ViT-L/14 at 336 px",
    vision_width=1024,
    image_size=336,
    patches=576,
    visual_tokens=576,
    llm="Vicuna-13B v1.5",
    llm_width=5120,
    bridge_parameters=31_467_520,
    counted=True,
    source=LLAVA_CODE,
    checked=CHECKED,
)
FLAMINGO = RealModel(
    name="Flamingo 80B",
    bridge="perceiver resampler",
    vision="NFNet-F6",
    vision_width=None,
    image_size=None,
    patches=None,
    visual_tokens=64,
    llm="Chinchilla 70B",
    llm_width=None,
    bridge_parameters=194_000_000,
    counted=False,
    source="Alayrac et al. 2022, arXiv 2204.14198, sections 2.1 and B.1, quoted by the flamingo-mini project",
    checked=CHECKED,
)
QWEN_VL = RealModel(
    name="Qwen-VL",
    bridge="cross-attention",
    vision="OpenCLIP ViT-bigG/14 at 448 px",
    vision_width=1664,
    image_size=448,
    patches=1024,
    visual_tokens=256,
    llm="Qwen-7B",
    llm_width=4096,
    bridge_parameters=80_000_000,
    counted=False,
    source="Bai et al. 2023, arXiv 2308.12966, section 2.1 and table 1: one layer, 256 queries, 0.08B; from memory",
    checked=CHECKED,
)
HONEYBEE_7B = RealModel(
    name="Honeybee 7B (C-Abstractor)",
    bridge="c-abstractor",
    vision="CLIP ViT-L/14 at 224 px",
    vision_width=1024,
    image_size=224,
    patches=256,
    visual_tokens=144,
    llm="Vicuna-7B v1.5",
    llm_width=4096,
    bridge_parameters=36_808_192,
    counted=True,
    source="kakaobrain/honeybee, c-abs.yaml (depth 3, mlp_depth 2, hidden 1024, 144 queries)",
    checked=CHECKED,
)
MODELS = (LLAVA_V1_13B, LLAVA_15_7B, LLAVA_15_13B, FLAMINGO, QWEN_VL, HONEYBEE_7B)


def by_name(name: str) -> RealModel:
    """The row with this name. Raises ValueError that lists the names there are."""
    for model in MODELS:
        if model.name == name:
            return model
    raise ValueError(f"no model named {name!r} in the catalog, which has {', '.join(model.name for model in MODELS)}")
