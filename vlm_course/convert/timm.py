"""The vision tower's weights, from and to timm's VisionTransformer (its `*_clip_quickgelu_*` models)."""

from collections.abc import Mapping

import torch

from vlm_course.convert import State, WeightMap

VISION = WeightMap(
    {
        "class_token": "cls_token",
        "patch_embedding.weight": "patch_embed.proj.weight",
        "positions": "pos_embed",
        "pre_norm.*": "norm_pre.*",
        "blocks.{i}.norm1.*": "blocks.{i}.norm1.*",
        "blocks.{i}.attention.qkv.*": "blocks.{i}.attn.qkv.*",
        "blocks.{i}.attention.out.*": "blocks.{i}.attn.proj.*",
        "blocks.{i}.norm2.*": "blocks.{i}.norm2.*",
        "blocks.{i}.mlp.fc1.*": "blocks.{i}.mlp.fc1.*",
        "blocks.{i}.mlp.fc2.*": "blocks.{i}.mlp.fc2.*",
        "post_norm.*": "norm.*",
    }
)


def vision_from_timm(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of a timm CLIP tower without a classifier (num_classes=0) -> VisionTransformer's."""
    ours = VISION.from_theirs(state)
    ours["class_token"] = ours["class_token"].flatten()  # [1, 1, D] -> [D]
    ours["positions"] = ours["positions"].flatten(0, 1)  # [1, 1+N, D] -> [1+N, D]
    return ours


def vision_to_timm(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of VisionTransformer -> a timm CLIP tower's (num_classes=0)."""
    theirs = VISION.to_theirs(state)
    theirs["cls_token"] = theirs["cls_token"][None, None]  # [D] -> [1, 1, D]
    theirs["pos_embed"] = theirs["pos_embed"][None]  # [1+N, D] -> [1, 1+N, D]
    return theirs
