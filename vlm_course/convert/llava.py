"""LLaVA-1.5's weights and config, from and to transformers' `LlavaForConditionalGeneration`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm_course.convert import State, WeightMap, add_prefix, clip, llama, take_prefix
from vlm_course.llava import Llava, LlavaConfig

BRIDGE = WeightMap({"mlp.0.*": "linear_1.*", "mlp.2.*": "linear_2.*"})

_VISION = "model.vision_tower."
_BRIDGE = "model.multi_modal_projector."
_TEXT = "model.language_model."
_HEAD = "lm_head."

# The published files carry the names of transformers 4.51 and earlier; the model in memory has those of version 5.
_FILE_PREFIXES = {
    "vision_tower.": _VISION,
    "multi_modal_projector.": _BRIDGE,
    "language_model.model.": _TEXT,
    "language_model.lm_head.": _HEAD,
}


def from_transformers(state: Mapping[str, torch.Tensor], *, tied: bool = False) -> State:
    """State dict of LlavaForConditionalGeneration, in memory or as published -> Llava's. `tied` as in `llama`.

    Raises ValueError when a weight is missing or one has no place in our model.
    """
    parts: dict[str, State] = {_VISION: {}, _BRIDGE: {}, _TEXT: {}, _HEAD: {}}
    for name, tensor in state.items():
        name = _current_name(name)
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"{name!r} belongs to no part of LLaVA: is this another model's checkpoint?")
        parts[prefix][name.removeprefix(prefix)] = tensor
    text = add_prefix(parts[_TEXT], "model.") | add_prefix(parts[_HEAD], _HEAD)
    return (
        add_prefix(clip.vision_from_transformers(parts[_VISION]), "vision.")
        | add_prefix(BRIDGE.from_theirs(parts[_BRIDGE]), "bridge.")
        | add_prefix(llama.from_transformers(text, tied=tied), "decoder.")
    )


def to_transformers(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of Llava with its MLP bridge -> LlavaForConditionalGeneration's (names of version 5)."""
    text = llama.to_transformers(take_prefix(state, "decoder."))
    return (
        add_prefix(clip.vision_to_transformers(take_prefix(state, "vision.")), _VISION)
        | add_prefix(BRIDGE.to_theirs(take_prefix(state, "bridge.")), _BRIDGE)
        | add_prefix(take_prefix(text, "model."), _TEXT)
        | add_prefix(take_prefix(text, _HEAD), _HEAD)
    )


def _current_name(name: str) -> str:
    for older, current in _FILE_PREFIXES.items():
        if name.startswith(older):
            return current + name.removeprefix(older)
    return name


def llava_config(config: Any) -> LlavaConfig:
    """transformers' LlavaConfig -> LlavaConfig. Raises ValueError for an option that our model does not have."""
    options = {
        "projector_hidden_act": (config.projector_hidden_act, "gelu"),
        "multimodal_projector_bias": (config.multimodal_projector_bias, True),
        "vision_feature_select_strategy": (config.vision_feature_select_strategy, "default"),
    }
    for option, (theirs, ours) in options.items():
        if theirs != ours:
            raise ValueError(f"the checkpoint has {option}={theirs!r}, but our model only knows {ours!r}")
    return LlavaConfig(
        vision=clip.vision_config(config.vision_config),
        text=llama.decoder_config(config.text_config),
        image_id=config.image_token_id,
        feature_layer=config.vision_feature_layer,
    )


def transformers_config(config: LlavaConfig) -> Any:
    """LlavaConfig -> transformers' LlavaConfig, so that their class can hold our weights; undoes `llava_config`.

    Raises ValueError for an option that their model does not have.
    """
    from transformers import CLIPVisionConfig
    from transformers import LlavaConfig as TheirConfig

    vision, text = config.vision, config.text
    if not vision.pre_norm or vision.image_hw[0] != vision.image_hw[1]:
        raise ValueError(
            f"the tower has pre_norm={vision.pre_norm} and images of {vision.image_hw}, but CLIP's in transformers "
            "always has the norm and square images"
        )
    if config.bridge != "mlp" or config.visual_tokens != vision.n_patches:
        raise ValueError(
            f"the bridge is {config.bridge!r} with {config.visual_tokens} tokens for {vision.n_patches} patches, but "
            "transformers' has two layers and keeps every patch"
        )
    return TheirConfig(
        vision_config=CLIPVisionConfig(
            image_size=vision.image_hw[0],
            patch_size=vision.patch_size,
            hidden_size=vision.width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            intermediate_size=vision.mlp_width,
            num_channels=vision.channels,
            hidden_act=vision.activation,
            layer_norm_eps=vision.norm_eps,
        ),
        text_config=llama.transformers_config(text),
        image_token_id=config.image_id,
        image_seq_length=config.visual_tokens,
        vision_feature_layer=config.feature_layer,
        tie_word_embeddings=text.tie_embeddings,
    )


def as_transformers(model: Llava) -> Any:
    """Our model as a LlavaForConditionalGeneration with the same weights, in eval mode. The tensors are copied."""
    from transformers import LlavaForConditionalGeneration

    theirs = LlavaForConditionalGeneration(transformers_config(model.config))
    theirs.load_state_dict(to_transformers(model.state_dict()))
    return theirs.eval()


def load_llava(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Llava:
    """A downloaded checkpoint folder (config.json, *.safetensors) -> a Llava in eval mode.

    The model is built without memory and filled tensor by tensor, so the peak is one copy of the weights in `dtype`:
    14 GB for 7B in float16. Raises FileNotFoundError when the folder has no weights, ValueError when they do not fit.
    """
    from safetensors import safe_open
    from transformers import LlavaConfig as TheirConfig

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file: was the download complete?")
    state: State = {}
    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as weights:
            for name in weights.keys():
                state[name] = weights.get_tensor(name).to(dtype)
    config = llava_config(TheirConfig.from_pretrained(folder))
    with torch.device("meta"):
        model = Llava(config)
    model.load_state_dict(from_transformers(state, tied=config.text.tie_embeddings), assign=True)
    if config.text.tie_embeddings:
        model.decoder.head.weight = model.decoder.token_embedding.weight  # `assign` makes two parameters of one tensor
    return model.eval()
