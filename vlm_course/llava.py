"""LLaVA: a vision tower, a bridge and a language model. One class from under ten million parameters to 13 billion."""

from dataclasses import dataclass

from torch import Tensor, nn

from vlm_course.attention import causal_mask, padding_mask
from vlm_course.bridges import LinearBridge, VisionProjection
from vlm_course.cache import KVCache
from vlm_course.decoder import Decoder, DecoderConfig
from vlm_course.fusion import splice_image_features
from vlm_course.validation import checks, counts
from vlm_course.vit import VisionTransformer, ViTConfig

_BRIDGES = {"mlp": VisionProjection, "linear": LinearBridge}


@counts(image_id=0, visual_tokens=1)
@dataclass(frozen=True)
class LlavaConfig:
    """A model's parts. `visual_tokens` is the number of placeholders an image takes (default: one per patch)."""

    vision: ViTConfig
    text: DecoderConfig
    image_id: int
    bridge: str = "mlp"
    feature_layer: int = -2
    visual_tokens: int | None = None

    def __post_init__(self):
        if self.bridge not in _BRIDGES:
            raise ValueError(f"bridge is {self.bridge!r}, known are {', '.join(_BRIDGES)}; or pass a module to Llava")
        states = self.vision.layers + 1
        if not -states <= self.feature_layer < states:
            raise ValueError(f"feature_layer is {self.feature_layer}, but the tower has {states} hidden states")
        if self.visual_tokens is None:
            object.__setattr__(self, "visual_tokens", self.vision.n_patches)
        if not 0 <= self.image_id < self.text.vocab_size:
            raise ValueError(
                f"image_id {self.image_id} is outside the vocabulary of {self.text.vocab_size}: "
                "was the embedding not enlarged for <image>?"
            )


# CLIP ViT-L/14 at 336 pixels: 24 x 24 = 576 patches.
_CLIP_LARGE_336 = ViTConfig(image_size=336, patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096)

LLAVA_7B = LlavaConfig(
    vision=_CLIP_LARGE_336,
    text=DecoderConfig(
        vocab_size=32064, width=4096, layers=32, heads=32, kv_heads=32, mlp_width=11008, max_positions=4096
    ),
    image_id=32000,
)
LLAVA_13B = LlavaConfig(
    vision=_CLIP_LARGE_336,
    text=DecoderConfig(
        vocab_size=32064, width=5120, layers=40, heads=40, kv_heads=40, mlp_width=13824, max_positions=4096
    ),
    image_id=32000,
)


@counts(vocab_size=1, image_id=0)
def small_config(vocab_size: int, *, image_id: int = 3) -> LlavaConfig:
    """The shipped model's architecture for a vocabulary of `vocab_size` words."""
    return LlavaConfig(
        vision=ViTConfig(image_size=96, patch_size=8, width=192, layers=6, heads=6, mlp_width=768),
        text=DecoderConfig(
            vocab_size=vocab_size, width=256, layers=6, heads=8, kv_heads=4, mlp_width=704, max_positions=1024
        ),
        image_id=image_id,
    )


SMALL = small_config(404)  # the words of WordTokenizer.small()


def _check_config(self, config, *, bridge=None):
    if not isinstance(config, LlavaConfig):
        raise ValueError(f"config is a {type(config).__name__}, expected a LlavaConfig")


def _check_inputs(self, ids, pixels=None, *, attention_mask=None, **rest):
    for name, value in (("pixels", pixels), ("attention_mask", attention_mask)):
        if value is not None and value.device != ids.device:
            raise ValueError(f"{name} is on {value.device}, but the ids are on {ids.device}")


@checks(_check_inputs, init=_check_config)
class Llava(nn.Module):
    """image -> vision tower -> bridge -> spliced at <image> into the token embeddings -> decoder -> logits.

    Give `bridge` to use a module of your own: [B, N, D_vision] -> [B, visual_tokens, D_llm].
    Source: LLaVA-1.5 (Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning"), section 3.
    """

    def __init__(self, config: LlavaConfig, *, bridge: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        if bridge is None:
            bridge = _BRIDGES[config.bridge](config.vision.width, config.text.width)
        self.bridge = bridge
        self.decoder = Decoder(config.text)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """[n_images, 3, H, W] -> [n_images, M, D_llm]"""
        patches = self.vision.patch_features(pixels, layer=self.config.feature_layer)  # [B, N, D_vision]
        return self.bridge(patches)  # [B, N, D_vision] -> [B, M, D_llm]

    def new_cache(self, *, capacity: int = 0) -> KVCache:
        """An empty cache for this model's decoder."""
        return self.decoder.new_cache(capacity=capacity)

    def forward(
        self,
        ids: Tensor,
        pixels: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        check: bool = True,
    ) -> Tensor:
        """ids [B, T], placeholders already expanded -> logits [B, T, V] (or of the last `logits_to_keep` positions).

        Give the images as `pixels` [n_images, 3, H, W] or, encoded before, as `image_features` [n_images, M, D_llm];
        with neither the ids are plain text, as they are in every step after the first of a cached generation.
        attention_mask [B, past + T], True for real tokens: needed for left padding. With right padding it may be
        None, since a causal model never looks to the right. `check=False` skips the comparison of placeholders with
        features, which waits for the device.
        """
        if pixels is not None and image_features is not None:
            raise ValueError("got both pixels and image_features: pass the images once")
        if pixels is not None:
            image_features = self.encode_images(pixels)
        embeds = self.decoder.embed(ids)  # [B, T] -> [B, T, D]
        if image_features is not None:
            embeds = splice_image_features(embeds, ids, image_features, self.config.image_id, check=check)
        mask = None
        if attention_mask is not None:
            mask, padded_positions = self._mask_and_positions(ids, attention_mask, cache)
            positions = padded_positions if positions is None else positions
        return self.decoder(embeds, mask=mask, positions=positions, cache=cache, logits_to_keep=logits_to_keep)

    @staticmethod
    def _mask_and_positions(ids: Tensor, attention_mask: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        past, length = cache.length if cache is not None else 0, ids.shape[1]
        if attention_mask.shape != (ids.shape[0], past + length):
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)} but there are {ids.shape[0]} rows of {past} cached "
                f"and {length} new tokens: it must cover both"
            )
        mask = padding_mask(attention_mask) & causal_mask(length, offset=past, device=ids.device)  # [B, 1, T, past + T]
        # Padding does not count: the first real token of every row stands at position 0.
        positions = attention_mask.long().cumsum(dim=1).sub(1).clamp(min=0)[:, past:]  # [B, T]
        return mask, positions
