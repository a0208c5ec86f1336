"""The loss of a batch, at its plainest: what every faster way must equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attention import block_mask
from ..fusion import splice_image_features
from ..llava import Llava
from ..loss import response_loss
from .collate import Batch


def image_features(model: Llava, pixels: Tensor) -> Tensor:
    """[I, 3, H, W] -> [I, M, D_llm]; a bridge in float32 behind a tower in bfloat16 multiplies in bfloat16."""
    patches = model.vision.patch_features(pixels, layer=model.config.feature_layer)  # [I, N, D_vision]
    other = patches.dtype != parameter_dtype(model.bridge)
    with torch.autocast(
        pixels.device.type, dtype=torch.bfloat16, enabled=other or torch.is_autocast_enabled(pixels.device.type)
    ):
        return model.bridge(patches)  # [I, N, D_vision] -> [I, M, D_llm]


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """Of its first parameter."""
    return next(module.parameters()).dtype


def plain_loss(model: Llava, batch: Batch, count: float) -> Tensor:
    """Sum over the answer tokens of -log p, / `count`, in nats: logits in full, from the first answer on."""
    embeds = model.decoder.embed(batch.ids)  # [B, T] -> [B, T, D]
    if batch.pixels is not None:
        features = image_features(model, batch.pixels)
        look = batch.ids.device.type == "cpu"  # elsewhere it would wait for the device
        embeds = splice_image_features(embeds, batch.ids, features, model.config.image_id, check=look)
    mask = None if batch.documents is None else block_mask(batch.documents)  # [B, 1, T, T]
    keep = 0 if batch.first is None else batch.ids.shape[1] - max(batch.first, 1) + 1
    logits = model.decoder(embeds, mask=mask, positions=batch.positions, logits_to_keep=keep)  # [B, keep or T, V]
    return response_loss(logits, batch.labels[:, -keep:], count=torch.as_tensor(count))
