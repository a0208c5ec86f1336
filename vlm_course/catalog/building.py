"""A model of the catalog as a module on the meta device: its parameters are counted, never allocated.

Where transformers has the architecture, its class is built with the published configuration; else the module is put
together from timm's towers, the course's own classes and the few parts in `modules`.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import torch
from torch import nn

from vlm_course.catalog.records import Model

# class -> how the names of its parameters begin in the tower and in the bridge; everything else is language model
_PARTS = {
    "LlavaForConditionalGeneration": (r"model\.vision_tower\.", r"model\.multi_modal_projector\."),
    "LlavaNextForConditionalGeneration": (r"model\.vision_tower\.", r"model\.(multi_modal_projector\.|image_newline)"),
    "Qwen2VLForConditionalGeneration": (r"model\.visual\.(?!merger)", r"model\.visual\.merger\."),
    "Qwen2_5_VLForConditionalGeneration": (r"model\.visual\.(?!merger)", r"model\.visual\.merger\."),
    "InternVLForConditionalGeneration": (r"model\.vision_tower\.", r"model\.multi_modal_projector\."),
    "FuyuForCausalLM": (r"(?!)", r"model\.vision_embed_tokens\."),
    "Kosmos2ForConditionalGeneration": (r"vision_model\.", r"image_to_text_projection\."),
    "PaliGemmaForConditionalGeneration": (r"model\.vision_tower\.", r"model\.multi_modal_projector\."),
    "Blip2ForConditionalGeneration": (r"vision_model\.", r"(qformer|language_projection|query_tokens)"),
    "InstructBlipForConditionalGeneration": (r"vision_model\.", r"(qformer|language_projection|query_tokens)"),
    "IdeficsForVisionText2Text": (r"model\.vision_model\.", r"model\.(perceiver_resampler|gated_cross_attn_layers)\."),
    "VisionEncoderDecoderModel": (r"encoder\.", r"enc_to_dec_proj"),
    "Emu3ForConditionalGeneration": (r"model\.vqmodel\.", r"(?!)"),
    "Llava": (r"vision\.", r"bridge\."),
    "Assembled": (r"vision\.", r"bridge\."),
    "Flamingo": (r"vision\.", r"(resampler|gated)\."),
}


@functools.cache
def _shared() -> Mapping[str, Any]:
    return json.loads(files("vlm_course.catalog").joinpath("data", "parts.json").read_text(encoding="utf-8"))


def resolve(value: Any) -> Any:
    """Fills in shared configurations: "@clip-l-14-336" stands for that part, {"@": "@vicuna-7b", ...} for one with
    changes. Raises ValueError for a part that does not exist."""
    if isinstance(value, str) and value.startswith("@"):
        if value[1:] not in _shared():
            raise ValueError(f"no shared configuration {value!r}; there are {', '.join(_shared())}")
        return resolve(_shared()[value[1:]])
    if isinstance(value, Mapping):
        base = resolve(value["@"]) if "@" in value else {}
        return {**base, **{key: resolve(item) for key, item in value.items() if key != "@"}}
    return [resolve(item) for item in value] if isinstance(value, list) else value


class Assembled(nn.Module):
    """A tower or two, a bridge and a language model from different libraries. Two towers are joined along the width."""

    def __init__(self, vision: list[nn.Module], bridge: nn.Module, language: nn.Module):
        super().__init__()
        self.vision = nn.ModuleList(vision)
        self.bridge = bridge
        self.language = language


def _module(spec: Mapping[str, Any]) -> nn.Module:
    """One module from {"transformers" | "timm" | "class": name, "config" | "arguments": {...}}."""
    if "transformers" in spec:
        import transformers

        kind = getattr(transformers, spec["transformers"])
        return kind(kind.config_class(**spec["config"]))
    if "timm" in spec:
        import timm

        return timm.create_model(spec["timm"], pretrained=False, **{"num_classes": 0, **spec.get("arguments", {})})
    if "parts" in spec:
        parts = spec["parts"]
        return Assembled([_module(v) for v in parts["vision"]], _module(parts["bridge"]), _module(parts["language"]))
    if "llava" in spec:
        return _llava(spec["llava"])
    home, name = spec["class"].rsplit(".", 1)
    return getattr(importlib.import_module(f"vlm_course.{home}"), name)(**spec.get("arguments", {}))


def _llava(spec: Mapping[str, Any]) -> nn.Module:
    from vlm_course.decoder import DecoderConfig
    from vlm_course.llava import Llava, LlavaConfig
    from vlm_course.vit import ViTConfig

    config = LlavaConfig(
        vision=ViTConfig(**spec["vision"]),
        text=DecoderConfig(**spec["text"]),
        image_id=0,
        bridge=spec.get("bridge", "mlp"),
        visual_tokens=spec.get("visual_tokens"),
    )
    return Llava(config, bridge=_module(spec["bridge_module"]) if "bridge_module" in spec else None)


def build(model: Model) -> nn.Module:
    """The model without weights, on the meta device, in evaluation mode.

    Raises ValueError, one sentence, where the architecture is not public or no library here has it.
    """
    if model.access == "closed":
        raise ValueError(f"{model.title} is closed: its architecture is not public, so there is nothing to build")
    if model.build is None:
        raise ValueError(
            f"{model.title} is described in public, but neither transformers, timm nor this course has its architecture"
        )
    with torch.device("meta"):
        return _module(resolve(model.build)).eval()


def count(model: Model) -> dict[str, int]:
    """Parameters by part: vision, bridge, language and their sum, total. Shared embeddings count once.

    A tower alone has only a total. Raises ValueError as `build` does.
    """
    module = build(model)
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    total = sum(sizes.values())
    if type(module).__name__ not in _PARTS:
        return {"total": total}
    parts = {"vision": 0, "bridge": 0, "language": 0}
    vision, bridge = _PARTS[type(module).__name__]
    for name, size in sizes.items():
        part = "bridge" if re.match(bridge, name) else "vision" if re.match(vision, name) else "language"
        parts[part] += size
    return {**parts, "total": total}
