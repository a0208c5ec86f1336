"""Flamingo's way of reading images: a language model with gated cross-attention before some of its blocks.

The images never enter the sequence. One <image> marks where each of them stands, and a text token reads the features of
the last one before it. Sources: Flamingo (Alayrac et al. 2022, arXiv 2204.14198), section 2; Llama 3.2 Vision, in
transformers as Mllama, reads all patch features in this way and has no resampler.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vlm_course.decoder import Decoder, DecoderConfig, rotary_phases
from vlm_course.fusion import GatedCrossAttention, media_mask
from vlm_course.validation import require_shape


class CrossAttentionDecoder(nn.Module):
    """A decoder with a `GatedCrossAttention` before every block whose number is in `at`.

    forward: ids [B, T] with one unexpanded <image> an image, media [B, n_images, M, D_media] -> logits [B, T, V].
    The states of the media depend on the images alone: text reads them, and nothing writes to them.

    `compress`, for example a `PerceiverResampler`, is applied to the features of every image first:
    [n, N, D] -> [n, M, D_media]. New blocks change nothing until their gates open, so a trained decoder that is put in
    (`decoder`) answers as before. Raises ValueError for a block number that the decoder does not have.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        image_id: int,
        media_dim: int,
        at: tuple[int, ...],
        heads: int,
        head_dim: int,
        compress: nn.Module | None = None,
        decoder: Decoder | None = None,
        activation: Callable[[], nn.Module] = nn.GELU,
    ):
        super().__init__()
        if not at or not all(0 <= number < config.layers for number in at):
            raise ValueError(
                f"cross-attention before blocks {at}, but the decoder has the blocks 0 .. {config.layers - 1}"
            )
        self.config, self.image_id, self.media_dim = config, image_id, media_dim
        self.decoder = Decoder(config) if decoder is None else decoder
        self.compress = nn.Identity() if compress is None else compress
        self.cross = nn.ModuleDict(
            {
                str(number): GatedCrossAttention(
                    dim=config.width, media_dim=media_dim, heads=heads, head_dim=head_dim, activation=activation
                )
                for number in at
            }
        )

    def read(self, features: Tensor) -> Tensor:
        """What the blocks will read: features [B, n_images, N, D] -> [B, n_images, M, D_media]."""
        require_shape(features, "features", "B I N D", hint="one image a row still needs its axis: features[:, None]")
        return self.compress(features.flatten(0, 1)).unflatten(0, features.shape[:2])

    def forward(self, ids: Tensor, media: Tensor, *, logits_to_keep: int = 0) -> Tensor:
        mask = media_mask(ids, self.image_id, media.shape[1])  # [B, T, n_images]
        x = self.decoder.embed(ids)  # [B, T] -> [B, T, D]
        positions = torch.arange(ids.shape[1], device=ids.device)
        phases = rotary_phases(positions, self.config.head_dim, self.config.rope_theta)
        for number, block in enumerate(self.decoder.blocks):
            if str(number) in self.cross:
                x = self.cross[str(number)](x, media, mask)  # [B, T, D]
            x = block(x, phases, None, None, number)  # [B, T, D]; None: causal, no cache
        return self.decoder.head(self.decoder.norm(x[:, -logits_to_keep:]))  # [B, T, D] -> [B, T, V]


def cross_attention_parameters(text_dim: int, media_dim: int, heads: int, head_dim: int) -> int:
    """Weights of the queries, keys, values and output of one cross-attention, without biases.

    Source: Flamingo (Alayrac et al. 2022, arXiv 2204.14198), section 2.2.
    """
    inner = heads * head_dim
    queries, output = text_dim * inner, inner * text_dim
    keys = values = media_dim * inner
    return queries + keys + values + output


def gated_block_parameters(text_dim: int, media_dim: int, heads: int, head_dim: int) -> int:
    """Parameters of a `GatedCrossAttention` with its feed-forward net of four times the width: all of them are new."""
    attention = cross_attention_parameters(text_dim, media_dim, heads, head_dim)
    feed_forward = 2 * text_dim * (4 * text_dim)
    norms = 2 * (text_dim + text_dim)
    gates = 2
    return attention + feed_forward + norms + gates
