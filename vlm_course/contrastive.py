"""Two towers that learn to agree: an image and its caption get the same direction.

Sources: Radford et al. 2021 (CLIP, arXiv 2103.00020), section 2.3 and figure 3; Zhai et al. 2023 (SigLIP,
arXiv 2303.15343), section 3.2.
"""

from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.validation import (
    checks,
    counts,
    method_checks,
    readable,
    require_divisible,
    require_number,
    require_one_of,
    require_same_device,
    require_shape,
)
from vlm_course.vit import ACTIVATIONS, TransformerBlock, VisionTransformer, init_transformer

MAX_LOGIT_SCALE = log(100)


@counts(vocab_size=1, width=1, layers=1, heads=1, mlp_width=1, max_length=1, eos_id=0)
@dataclass(frozen=True)
class TextTowerConfig:
    """Shape of CLIP's text tower. `eos_id` ends a caption; its position carries the caption's feature."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    max_length: int
    eos_id: int
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        require_divisible(self.width, self.heads, "width", "heads")
        if not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(f"eos_id is {self.eos_id}, outside the vocabulary of {self.vocab_size}")
        require_one_of(self.activation, "activation", ACTIVATIONS)
        require_number(self.norm_eps, "norm_eps", low=0)


def _check_ids(self: "TextTower", ids: torch.Tensor) -> None:
    require_shape(ids, "ids", "B T", floating=False)
    require_same_device(ids=ids, **{"the tower": self.positions})
    if ids.shape[1] > self.config.max_length:
        places = self.config.max_length
        raise ValueError(f"captions have {ids.shape[1]} tokens, but the tower has positions for {places}")
    if readable(ids) and ids.device.type == "cpu":  # elsewhere a look would wait for the device
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"ids run from {low} to {high}, expected 0 to {self.config.vocab_size - 1}")


def _check_text_config(self, config: TextTowerConfig) -> None:
    if not isinstance(config, TextTowerConfig):
        raise ValueError(f"config is a {type(config).__name__}, expected a TextTowerConfig")


@method_checks(hidden_states=_check_ids)
@checks(init=_check_text_config)
class TextTower(nn.Module):
    """CLIP's causal text transformer. forward: ids [B, T], right padded -> [B, D] at the first end-of-text token.

    Padding after that token needs no mask: a causal tower never looks ahead. Raises ValueError for captions longer
    than `max_length` and for a row without `eos_id` (not looked for inside torch.compile).
    """

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.randn(config.max_length, config.width) * 0.01)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                width=config.width,
                heads=config.heads,
                mlp_width=config.mlp_width,
                activation=config.activation,
                norm_eps=config.norm_eps,
            )
            for _ in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        init_transformer(self.blocks)

    def hidden_states(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """layers+1 tensors [B, T, D]: the embeddings, then every block's output, before the final LayerNorm."""
        T = ids.shape[1]
        states = [self.token_embedding(ids) + self.positions[:T]]  # [B, T] -> [B, T, D]
        for block in self.blocks:
            states.append(block(states[-1], is_causal=True))  # [B, T, D] -> [B, T, D]
        return states

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.hidden_states(ids)[-1]  # [B, T] -> [B, T, D]
        is_eos = ids == self.config.eos_id  # [B, T]
        if not torch.compiler.is_compiling() and not bool(is_eos.any(dim=1).all()):
            row = int(is_eos.any(dim=1).int().argmin())
            raise ValueError(f"caption {row} has no end token {self.config.eos_id} among its {ids.shape[1]} tokens")
        first_eos = is_eos.int().argmax(dim=1)  # [B, T] -> [B]
        x = x[torch.arange(len(x), device=x.device), first_eos]  # [B, T, D] -> [B, D]
        return self.final_norm(x)


def _check_pairs(images: torch.Tensor, captions: torch.Tensor, logit_scale: torch.Tensor) -> None:
    require_shape(images, "images", "images E")
    hint = "were both brought to the shared space by their projections?"
    require_shape(captions, "captions", "captions E", E=images.shape[1], hint=hint)
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale has shape {list(logit_scale.shape)}, expected [], one number for all pairs")
    require_same_device(images=images, captions=captions, logit_scale=logit_scale)


@checks(_check_pairs)
def contrastive_logits(images: torch.Tensor, captions: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Cosine of every image with every caption, times a learned temperature that stays at or below 100.

    Args: images [B, E], captions [B', E], projected but of any length; logit_scale [], the temperature's logarithm.
    Returns [B, B'], rows are images. Source: CLIP, section 2.5 (clipping) and figure 3.
    """
    images, captions = F.normalize(images, dim=-1), F.normalize(captions, dim=-1)
    scale = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    return scale * images @ captions.T  # [B, E] x [E, B'] -> [B, B']


def _check_batch(self: "ContrastiveModel", pixels: torch.Tensor, ids: torch.Tensor) -> None:
    require_shape(pixels, "pixels", "B C H W")
    require_shape(ids, "ids", "B T", floating=False, B=pixels.shape[0], hint="one caption for every image")
    require_same_device(pixels=pixels, ids=ids, **{"the model": self.logit_scale})


@counts(embed_dim=1)
@checks(_check_batch)
class ContrastiveModel(nn.Module):
    """CLIP: both towers, a linear map into a shared space for each, and a learned temperature.

    forward: pixels [B, 3, H, W], ids [B, T] -> logits [B, B], rows are images, columns are captions.
    """

    def __init__(self, vision: VisionTransformer, text: TextTower, embed_dim: int):
        super().__init__()
        self.vision = vision
        self.text = text
        self.image_projection = nn.Linear(vision.config.width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text.config.width, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [B, 3, H, W] -> unit vectors [B, E]."""
        return F.normalize(self.image_projection(self.vision.pooled(pixels)), dim=-1)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, T], right padded -> unit vectors [B, E]."""
        return F.normalize(self.text_projection(self.text(ids)), dim=-1)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        images = self.image_projection(self.vision.pooled(pixels))  # [B, 3, H, W] -> [B, E]
        captions = self.text_projection(self.text(ids))  # [B, T] -> [B, E]
        return contrastive_logits(images, captions, self.logit_scale)  # -> [B, B]


def _check_logits(logits: torch.Tensor) -> None:
    require_shape(logits, "logits", "images captions")
    if logits.shape[0] != logits.shape[1]:
        raise ValueError(f"logits has {logits.shape[0]} images and {logits.shape[1]} captions, expected as many")


@checks(_check_logits)
def contrastive_loss(logits: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy over a batch of pairs: pick the caption for each image and the image for each caption.

    Args: logits [B, B], rows images, already scaled by the temperature; pair i sits on the diagonal.
    Returns a scalar; ln(B) when all logits are equal. Source: CLIP, figure 3.
    """
    pairs = torch.arange(len(logits), device=logits.device)
    image_to_text = F.cross_entropy(logits, pairs)  # [B, B] -> []
    text_to_image = F.cross_entropy(logits.T, pairs)  # [B, B] -> []
    return (image_to_text + text_to_image) / 2


@checks(_check_logits)
def sigmoid_loss(logits: torch.Tensor) -> torch.Tensor:
    """SigLIP's loss: every image-caption pair is its own yes-or-no question, so no softmax over the batch.

    Args: logits [B, B] = scale * similarity + bias; pair i sits on the diagonal. Returns the sum over all pairs
    divided by B. Source: Zhai et al. 2023, equation 1.
    """
    sign = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1  # +1 on the diagonal, -1 off it
    return -F.logsigmoid(sign * logits).sum() / len(logits)
