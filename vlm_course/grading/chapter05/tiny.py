"""The model that chapter 5's exercises are checked on: a LLaVA of a few thousand numbers, drawn from a seed.

It is made anew in the answer's process and in the checker's, from the seed alone, since models do not travel.
"""

import torch
from torch import nn

from vlm_course.bridges import VisionProjection
from vlm_course.decoder import Decoder, DecoderConfig
from vlm_course.llava import LlavaConfig
from vlm_course.vit import VisionTransformer, ViTConfig

IMAGE_ID, EOS_ID, VOCABULARY, PATCHES = 3, 2, 24, 6


class Parts(nn.Module):
    """The three parts of a LLaVA, under their names, and no forward: an answer may not lean on the package's."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.bridge = VisionProjection(config.vision.width, config.text.width)
        self.decoder = Decoder(config.text)


def tiny_llava(seed: int, feature_layer: int = -2) -> Parts:
    """The parts with their weights: six patches in a grid of 2 x 3, every parameter redrawn far from its start.

    Zero biases, unit norms and small weights would hide exchanged layers and masks.
    """
    vision = ViTConfig(image_size=(8, 12), patch_size=4, width=8, layers=3, heads=2, mlp_width=16)
    text = DecoderConfig(
        vocab_size=VOCABULARY, width=12, layers=2, heads=2, kv_heads=1, mlp_width=20, max_positions=128
    )
    model = Parts(LlavaConfig(vision=vision, text=text, image_id=IMAGE_ID, feature_layer=feature_layer))
    generator = torch.Generator().manual_seed(1_000 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = 1.0 if "embedding" in name or name == "decoder.head.weight" else 0.4
            parameter.copy_(1 + 0.3 * drawn if "norm" in name and name.endswith("weight") else scale * drawn)
        model.decoder.head.weight[IMAGE_ID] = 0.0  # <image> is never the best word
    return model.eval().requires_grad_(False)


def prompt(seed: int, *, text: tuple[int, int], images: int = 1) -> list[int]:
    """Ids with expanded placeholders: `text[0]` words before each image, `text[1]` behind it, an <eos> among them."""
    generator = torch.Generator().manual_seed(seed)
    words = lambda n: torch.randint(4, VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    ids: list[int] = []
    for _ in range(images):
        ids += words(text[0]) + [IMAGE_ID] * PATCHES + words(text[1])
    return ids


def pictures(seed: int, count: int) -> torch.Tensor:
    """Pixels [count, 3, 8, 12]."""
    return torch.randn(count, 3, 8, 12, generator=torch.Generator().manual_seed(2_000 + seed))


def read_alone(model: Parts, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one row without padding, one token at a time put together: the oracle's way.

    Features are taken from the list of all hidden states; the decoder sees one row alone and needs no mask.
    """
    features = []
    for picture in pixels:
        state = model.vision.hidden_states(picture[None])[model.config.feature_layer][0]  # [1 + N, D_vision]
        features += [model.bridge(state[i][None, None])[0, 0] for i in range(1, len(state))]
    waiting = iter(features)
    rows = [next(waiting) if i == model.config.image_id else model.decoder.token_embedding.weight[i] for i in ids]
    return model.decoder(torch.stack(rows)[None])[0]  # [1, T, D] -> [T, V]
