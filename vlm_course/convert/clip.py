"""CLIP's weights, from and to transformers (names of version 5)."""

from collections.abc import Mapping
from typing import Any

import torch

from vlm_course.contrastive import TextTowerConfig
from vlm_course.convert import State, WeightMap, add_prefix, take_prefix
from vlm_course.vit import ViTConfig

_BLOCKS = {
    "blocks.{i}.norm1.*": "encoder.layers.{i}.layer_norm1.*",
    "blocks.{i}.attention.qkv.*": (
        "encoder.layers.{i}.self_attn.q_proj.*",
        "encoder.layers.{i}.self_attn.k_proj.*",
        "encoder.layers.{i}.self_attn.v_proj.*",
    ),
    "blocks.{i}.attention.out.*": "encoder.layers.{i}.self_attn.out_proj.*",
    "blocks.{i}.norm2.*": "encoder.layers.{i}.layer_norm2.*",
    "blocks.{i}.mlp.fc1.*": "encoder.layers.{i}.mlp.fc1.*",
    "blocks.{i}.mlp.fc2.*": "encoder.layers.{i}.mlp.fc2.*",
}

VISION = WeightMap(
    {
        "class_token": "embeddings.class_embedding",
        "patch_embedding.weight": "embeddings.patch_embedding.weight",
        "positions": "embeddings.position_embedding.weight",
        "pre_norm.*": "pre_layrnorm.*",  # the published checkpoints spell it so
        **_BLOCKS,
        "post_norm.*": "post_layernorm.*",
    }
)

TEXT = WeightMap(
    {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positions": "embeddings.position_embedding.weight",
        **_BLOCKS,
        "final_norm.*": "final_layer_norm.*",
    }
)

HEADS = WeightMap(
    {
        "image_projection.weight": "visual_projection.weight",
        "text_projection.weight": "text_projection.weight",
        "logit_scale": "logit_scale",
    }
)

_TOWERS = (("vision.", "vision_model.", VISION), ("text.", "text_model.", TEXT))


def vision_config(config: Any) -> ViTConfig:
    """transformers' CLIPVisionConfig -> ViTConfig."""
    return ViTConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_width=config.intermediate_size,
        channels=config.num_channels,
        activation=config.hidden_act,
        norm_eps=config.layer_norm_eps,
    )


def text_config(config: Any) -> TextTowerConfig:
    """transformers' CLIPTextConfig -> TextTowerConfig.

    Early published configs carry eos_token_id 2 and pool at the largest id instead, which is CLIP's end token, the
    last of its vocabulary; that is the id to give them.
    """
    return TextTowerConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_width=config.intermediate_size,
        max_length=config.max_position_embeddings,
        eos_id=config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id,
        activation=config.hidden_act,
        norm_eps=config.layer_norm_eps,
    )


def vision_from_transformers(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of CLIPVisionModel -> VisionTransformer's. Older files' `vision_model.` prefix is taken off."""
    return VISION.from_theirs(_tower(state, "vision_model."))


def vision_to_transformers(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of VisionTransformer -> CLIPVisionModel's."""
    return VISION.to_theirs(state)


def text_from_transformers(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of CLIPTextModel -> TextTower's. Older files' `text_model.` prefix is taken off."""
    return TEXT.from_theirs(_tower(state, "text_model."))


def text_to_transformers(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of TextTower -> CLIPTextModel's."""
    return TEXT.to_theirs(state)


def from_transformers(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of CLIPModel -> ContrastiveModel's."""
    state = _without_buffers(state)
    ours = HEADS.from_theirs({name: tensor for name, tensor in state.items() if "_model." not in name})
    for our_prefix, their_prefix, names in _TOWERS:
        ours |= add_prefix(names.from_theirs(take_prefix(state, their_prefix)), our_prefix)
    return ours


def to_transformers(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of ContrastiveModel -> CLIPModel's."""
    towers = tuple(our_prefix for our_prefix, _, _ in _TOWERS)
    theirs = HEADS.to_theirs({name: tensor for name, tensor in state.items() if not name.startswith(towers)})
    for our_prefix, their_prefix, names in _TOWERS:
        theirs |= add_prefix(names.to_theirs(take_prefix(state, our_prefix)), their_prefix)
    return theirs


def _tower(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    state = _without_buffers(state)
    return take_prefix(state, prefix) if any(name.startswith(prefix) for name in state) else state


def _without_buffers(state: Mapping[str, torch.Tensor]) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
