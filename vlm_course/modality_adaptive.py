"""DocOwl 1.5's language model: visual tokens have norms, keys and values of their own, and share all the rest.

The queries, the output map and the feed-forward nets serve both kinds of token, so one softmax still weighs words and
image against each other; what differs is how each kind presents itself to it.
Sources: Ye et al. 2023 (mPLUG-Owl2, arXiv 2311.04257), the section on the modality-adaptive module; X-PLUG/mPLUG-DocOwl
at e5d9b44, DocOwl1.5/mplug_docowl/model/modeling_llama2.py, MultiwayNetwork, LlamaAttention and LlamaDecoderLayer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vlm_course.attention import attend
from vlm_course.decoder import DecoderConfig, RMSNorm, SwiGLU, apply_rotary
from vlm_course.validation import checks, counts, require_same_device, require_shape


def _check_by_kind(self: "ByKind", x: Tensor, is_image: Tensor) -> None:
    require_shape(x, "x", "B T D")
    require_shape(is_image, "is_image", "B T", floating=None, B=x.shape[0], T=x.shape[1])
    if is_image.dtype != torch.bool:
        raise ValueError(f"is_image is {is_image.dtype}, expected torch.bool: True marks a visual token")
    require_same_device(x=x, is_image=is_image)


@checks(_check_by_kind)
class ByKind(nn.Module):
    """One module for words and one for visual tokens, each made by `make`. forward: x [B, T, D], is_image [B, T]
    boolean -> [B, T, D'].

    Both run on every token and the wrong result is dropped: no value decides a shape, so the graph stays fixed.
    """

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.words = make()
        self.image = make()

    def forward(self, x: Tensor, is_image: Tensor) -> Tensor:
        return torch.where(is_image[..., None], self.image(x), self.words(x))  # [B, T, 1], 2 x [B, T, D'] -> [B, T, D']


def _check_config(self, config: DecoderConfig) -> None:
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"config is a {type(config).__name__}, expected a DecoderConfig")


def _check_tokens(self, x: Tensor, is_image: Tensor, phases: tuple[Tensor, Tensor], mask: Tensor | None = None) -> None:
    query = self.query if isinstance(self, ModalityAdaptiveAttention) else self.attention.query
    require_shape(x, "x", "B T D", D=query.in_features)
    require_same_device(x=x, **{"the module": query.weight})
    _check_by_kind(self, x, is_image)


@checks(_check_tokens, init=_check_config)
class ModalityAdaptiveAttention(nn.Module):
    """Causal self-attention with two maps for keys and two for values. forward: x [B, T, D], is_image [B, T], phases
    from `decoder.rotary_phases`, mask boolean (None means causal) -> [B, T, D]."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.kv_heads * config.head_dim
        self.query = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.key = ByKind(lambda: nn.Linear(config.width, inner, bias=False))
        self.value = ByKind(lambda: nn.Linear(config.width, inner, bias=False))
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, x: Tensor, is_image: Tensor, phases: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, T, H*d] -> [B, H, T, d]
            for y in (self.query(x), self.key(x, is_image), self.value(x, is_image))
        )
        q, k = apply_rotary(q, *phases), apply_rotary(k, *phases)
        mixed = attend(q, k, v, mask=mask, is_causal=mask is None)  # [B, H, T, d]
        return self.out(mixed.transpose(1, 2).flatten(2))  # [B, H, T, d] -> [B, T, D]


@checks(_check_tokens, init=_check_config)
class ModalityAdaptiveBlock(nn.Module):
    """A decoder block in which both norms exist twice, too; the feed-forward net is shared. forward: as the
    attention's, [B, T, D] -> [B, T, D]."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.attention_norm = ByKind(lambda: RMSNorm(config.width, config.norm_eps))
        self.attention = ModalityAdaptiveAttention(config)
        self.mlp_norm = ByKind(lambda: RMSNorm(config.width, config.norm_eps))
        self.mlp = SwiGLU(config.width, config.mlp_width)

    def forward(self, x: Tensor, is_image: Tensor, phases: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x, is_image), is_image, phases, mask)  # [B, T, D]
        return x + self.mlp(self.mlp_norm(x, is_image))


@counts(width=1, layers=1, kv_width=1)
def twin_parameters(*, width: int, layers: int, kv_width: int) -> int:
    """Parameters that the second norms, keys and values add to a decoder without biases."""
    return layers * (2 * width + 2 * width * kv_width)
