"""The whole model and its decoding at their plainest, as chapter 5 builds them: everything needed, no options.

`llava.Llava`, `cache.KVCache` and `generation.generate` do the same with options, and faster; the tests hold the two
to equal answers. `PlainLlava` has the parts and names of `Llava`: the same weights fit, from the shipped ones to 13B.
"""

import torch
from torch import Tensor, nn

from vlm_course.attention import causal_mask, padding_mask
from vlm_course.bridges import VisionProjection
from vlm_course.decoder import Decoder
from vlm_course.fusion import splice_image_features
from vlm_course.llava import LlavaConfig
from vlm_course.vit import VisionTransformer


class PlainLlava(nn.Module):
    """Vision tower, MLP bridge, decoder. forward: ids [B, T] with expanded placeholders, pixels [images, 3, H, W] in
    the order of the placeholders, attention_mask [B, T] (True = real token; None: all are) -> logits [B, T, V].

    Raises ValueError where placeholders and features differ in number. Logits at padding mean nothing.
    Source: LLaVA-1.5 (Liu et al. 2024, arXiv 2310.03744), section 3.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.bridge = VisionProjection(config.vision.width, config.text.width)
        self.decoder = Decoder(config.text)

    def embed(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """What the decoder reads: ids [B, T], pixels [images, 3, H, W] -> [B, T, D_llm]."""
        patches = self.vision.patch_features(pixels, layer=self.config.feature_layer)  # -> [images, N, D_vision]
        visual = self.bridge(patches)  # [images, N, D_vision] -> [images, N, D_llm]
        words = self.decoder.embed(ids)  # [B, T] -> [B, T, D_llm]
        return splice_image_features(words, ids, visual, self.config.image_id)  # -> [B, T, D_llm]

    def forward(self, ids: Tensor, pixels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        embeds = self.embed(ids, pixels)  # [B, T] -> [B, T, D_llm]
        if attention_mask is None:
            return self.decoder(embeds)  # causal by itself: [B, T, D_llm] -> [B, T, V]
        mask = padding_mask(attention_mask) & causal_mask(ids.shape[1], device=ids.device)  # [B, 1, T, T]
        return self.decoder(embeds, mask=mask)  # [B, T, D_llm] -> [B, T, V]


@torch.no_grad()
def greedy_decode(model: nn.Module, ids: Tensor, pixels: Tensor, max_new_tokens: int, eos_id: int) -> Tensor:
    """The best token each time, the whole sequence read again for every one: ids [1, T] -> the new ids [1, n].

    Ends with `eos_id`, which belongs to the answer, or after `max_new_tokens`.
    """
    start = ids.shape[1]
    for _ in range(max_new_tokens):
        logits = model(ids, pixels)  # [1, T] -> [1, T, V]
        token = logits[:, -1].argmax(dim=-1, keepdim=True)  # [1, V] -> [1, 1]
        ids = torch.cat([ids, token], dim=1)  # [1, T] -> [1, T + 1]
        if token.item() == eos_id:
            break
    return ids[:, start:]


class PlainKVCache:
    """Keys and values of all tokens so far, for each layer: what attention would otherwise compute again."""

    def __init__(self):
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens stored, the same for every layer between two calls of the model."""
        return self.stored[0][0].shape[2] if self.stored else 0

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, T, d] of the new tokens; return those of all tokens, [B, H, past + T, d]."""
        if layer in self.stored:
            past_keys, past_values = self.stored[layer]
            keys = torch.cat([past_keys, keys], dim=2)  # [B, H, past, d], [B, H, T, d] -> [B, H, past + T, d]
            values = torch.cat([past_values, values], dim=2)
        self.stored[layer] = keys, values
        return keys, values


@torch.no_grad()
def greedy_cached(model: nn.Module, ids: Tensor, pixels: Tensor, max_new_tokens: int, eos_id: int) -> Tensor:
    """`greedy_decode` with a cache: the prompt and its image are read once, then one token at a time."""
    cache = PlainKVCache()
    embeds, new = model.embed(ids, pixels), []  # [1, T] -> [1, T, D]
    for _ in range(max_new_tokens):
        logits = model.decoder(embeds, cache=cache)  # [1, T, D], then [1, 1, D] -> [1, T or 1, V]
        token = logits[:, -1].argmax(dim=-1, keepdim=True)  # [1, V] -> [1, 1]
        new.append(token)
        if token.item() == eos_id:
            break
        embeds = model.decoder.embed(token)  # [1, 1] -> [1, 1, D]
    return torch.cat(new, dim=1)  # n x [1, 1] -> [1, n]
