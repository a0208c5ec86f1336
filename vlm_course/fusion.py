"""How visual features meet text: spliced in at <image> (LLaVA), or read through gated cross-attention (Flamingo)."""

import functools
import math

import torch
from torch import Tensor


def _cause(placeholders: int, features: int) -> str:
    if placeholders == 0:
        return "does the prompt lack its <image>?"
    if placeholders == 1:
        return "was <image> not expanded to one placeholder per feature?"
    if features == placeholders + 1 and math.isqrt(placeholders) ** 2 == placeholders:
        return "is the CLS token still among the features?"
    if abs(features - placeholders) == 1:
        return "was a patch token dropped with CLS?"
    if placeholders < features:
        return "did truncation cut the prompt inside the image?"
    return "does the prompt hold more images than were given?"


def _checks_placeholders(function):
    """Compares the placeholders of every row with the features. This reads values back from the device, so training
    passes `check=False`, and a compiled graph or the meta device never does it."""

    @functools.wraps(function)
    def checked(embeds, ids, features, image_id, *, check=True):
        if embeds.shape[:2] != ids.shape or features.dim() != 3 or features.shape[-1] != embeds.shape[-1]:
            raise ValueError(
                f"embeds {tuple(embeds.shape)}, ids {tuple(ids.shape)}, features {tuple(features.shape)}: expected "
                "[B, T, D], [B, T] and [images, M, D]; does the bridge end in another width than the language model's?"
            )
        if check and not (ids.is_meta or torch.compiler.is_compiling()):
            images, per_image = features.shape[:2]
            counts = (ids == image_id).sum(dim=1).tolist()
            for row, count in enumerate(counts):
                if count % per_image:
                    raise ValueError(
                        f"image has {count} placeholders but the tower gave {per_image} features (row {row}): "
                        + _cause(count, per_image)
                    )
            if sum(counts) != images * per_image:
                raise ValueError(
                    f"the batch has {sum(counts)} placeholders but the tower gave {images} x {per_image} = "
                    f"{images * per_image} features: {_cause(sum(counts), images * per_image)}"
                )
        return function(embeds, ids, features, image_id)

    return checked


@_checks_placeholders
def splice_image_features(embeds: Tensor, ids: Tensor, features: Tensor, image_id: int) -> Tensor:
    """Puts the visual features where the placeholders are; every other token keeps its embedding.

    embeds [B, T, D]; ids [B, T]; features [n_images, M, D] in the order in which the images appear, row after row
    (n_images = B with one image per row) -> [B, T, D], with the embeddings' dtype. Waits for no device value.
    Raises ValueError when a row's placeholders are not whole images (`check=False` leaves that out).
    Source: LLaVA (Liu et al. 2023), section 4.1.
    """
    is_image = ids == image_id  # [B, T]
    order = is_image.flatten().cumsum(0).sub(1).clamp(min=0)  # [B * T], the feature that each placeholder takes
    chosen = features.flatten(0, 1)[order].view_as(embeds)  # [n_images * M, D] -> [B, T, D]
    return torch.where(is_image[..., None], chosen.to(embeds.dtype), embeds)


def expand_image_placeholder(ids: list[int], image_id: int, count: int) -> list[int]:
    """Repeats every <image> `count` times, one placeholder per visual token. Apply it once, before padding."""
    if count < 1:
        raise ValueError(f"count is {count}, but an image takes at least one placeholder")
    return [token for token in ids for _ in range(count if token == image_id else 1)]
