"""A decoder-only language model in the Llama family: RMSNorm, rotary positions, grouped queries, SwiGLU, KV cache."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.attention import attend
from vlm_course.cache import KVCache
from vlm_course.validation import (
    checks,
    counts,
    method_checks,
    readable,
    require_count,
    require_number,
    require_same_device,
    require_shape,
    takes,
)


@counts(vocab_size=1, width=1, layers=1, heads=1, kv_heads=1, mlp_width=1, head_dim=2, max_positions=1)
@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder. `kv_heads` divides `heads`; `head_dim` defaults to width / heads."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    head_dim: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_positions: int = 2048

    def __post_init__(self):
        require_number(self.rope_theta, "rope_theta", above=0)
        require_number(self.norm_eps, "norm_eps", low=0)
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key heads: not a multiple")
        if self.head_dim is None:
            if self.width % self.heads:
                raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads: give head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but rotary positions turn pairs: it must be even")


def _last_axis(weight, width):
    """A rule for modules that take any axes before the last."""

    def rule(self, x):
        w = weight(self)
        if x.shape[-1:] != (width(self),) or x.device != w.device or 0 in x.shape:
            require_shape(x, "x", " ".join(f"axis{i}" for i in range(x.dim() - 1)) + " dim", dim=width(self))
            require_same_device(x=x, **{"the module": w})

    return rule


def _check_eps(self, dim, eps=1e-5):
    require_number(eps, "eps", low=0)


@counts(dim=1)
@checks(_last_axis(lambda self: self.weight, lambda self: self.weight.shape[0]), init=_check_eps)
class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis, computed in float32. Zhang & Sennrich 2019, equation 4."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]"""
        scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps)  # [..., 1]
        return self.weight * (x.float() * scale).to(x.dtype)


@counts(dim=1, hidden=1)
@checks(_last_axis(lambda self: self.gate.weight, lambda self: self.gate.in_features))
class SwiGLU(nn.Module):
    """Gated feed-forward layer, silu(gate(x)) * up(x), then down. Shazeer 2020, equation 6."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]"""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def _check_phases(positions, head_dim, theta=10000.0):
    if positions.dim() not in (1, 2) or 0 in positions.shape:
        shape = list(positions.shape)
        raise ValueError(
            f"positions has {positions.dim()} dimensions {shape}, expected 1 or 2, [T] or [B, T], none of size 0"
        )
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, but rotary positions turn pairs: expected an even number")
    require_number(theta, "theta", above=0)


@counts(head_dim=2)
@checks(_check_phases)
def rotary_phases(positions: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle: positions [T] or [B, T] -> two float32 tensors [T or B x 1 x T, head_dim / 2].

    Always float32: bfloat16 has 329 distinct values among the integers 0..399, so neighbours would share a phase.
    Source: RoFormer (Su et al. 2021), section 3.2.2.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * theta**-exponents  # [..., T] -> [..., T, head_dim / 2]
    if positions.dim() == 2:
        angles = angles[:, None]  # [B, T, d/2] -> [B, 1, T, d/2], to broadcast over heads
    return angles.cos(), angles.sin()


def _check_rotary(x, cos, sin):
    pairs = cos.shape[-1:]
    fits = x.dim() == 4 and cos.shape == sin.shape and 0 not in x.shape and (2 * sum(pairs) == x.shape[-1])
    for have, need in zip(reversed(cos.shape[:-1]), reversed(x.shape[:-1]), strict=False):
        fits = fits and have in (1, need)
    if not fits or cos.dim() > 4:
        shapes = f"x {tuple(x.shape)} of {x.dim()} dimensions, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        raise ValueError(
            f"{shapes}: expected x [B, H, T, d], no axis of size 0, and angles that broadcast to [B, H, T, d / 2]"
        )
    if not x.device == cos.device == sin.device:
        raise ValueError(f"x is on {x.device}, cos on {cos.device}, sin on {sin.device}: expected one device")


@checks(_check_rotary)
def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + head_dim / 2]) by their angles: [B, H, T, d] -> [B, H, T, d].

    The pairing is that of GPT-NeoX and of Llama's weights on the hub; Llama's first release paired neighbours.
    """
    first, second = x.float().chunk(2, dim=-1)  # [B, H, T, d] -> 2 x [B, H, T, d/2]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def _check_config(self, config):
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"config is a {type(config).__name__}, expected a DecoderConfig")


_EMBEDS = takes("B T D", lambda self: self.query.weight, width=lambda self: self.query.in_features)


@counts(layer=0)
def _check_layer(self, x, phases, mask, cache, layer):
    _EMBEDS(self, x)


@checks(_check_layer, init=_check_config)
class SelfAttention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries (Ainslie et al. 2023, section 2.2)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(
        self, x: Tensor, phases: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        q = self.query(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, T, D] -> [B, H, T, d]
        k = self.key(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, T, D] -> [B, H_kv, T, d]
        v = self.value(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k = apply_rotary(q, *phases), apply_rotary(k, *phases)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # [B, H_kv, T, d] -> [B, H_kv, past + T, d]
        mixed = attend(q, k, v, mask=mask, is_causal=mask is None)  # [B, H, T, d]
        return self.out(mixed.transpose(1, 2).flatten(2))  # [B, H, T, d] -> [B, T, D]


@counts(layer=0)
def _check_block(self, x, phases, mask, cache, layer):
    _EMBEDS(self.attention, x)


@checks(_check_block, init=_check_config)
class DecoderBlock(nn.Module):
    """Pre-norm block: attention, then the feed-forward layer, each added to the residual stream."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = SelfAttention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.mlp_width)

    def forward(self, x, phases, mask, cache, layer: int) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        x = x + self.attention(self.attention_norm(x), phases, mask, cache, layer)
        return x + self.mlp(self.mlp_norm(x))


def _check_ids(self, ids):
    require_shape(ids, "ids", "B T", floating=False)
    require_same_device(ids=ids, **{"the embedding": self.token_embedding.weight})
    if readable(ids) and ids.device.type == "cpu":  # elsewhere a look would wait for the device
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            words = self.config.vocab_size
            raise ValueError(
                f"ids run from {low} to {high}, expected 0 to {words - 1}: the vocabulary has {words} words"
            )


def _check_embeds(self, embeds, *, positions=None, logits_to_keep=0, phases=None, **rest):
    require_shape(embeds, "embeds", "B T D", D=self.config.width, hint="does the bridge end in another width?")
    require_same_device(embeds=embeds, **{"the decoder": self.norm.weight})
    require_count(logits_to_keep, "logits_to_keep", 0)
    if phases is not None:
        if positions is not None:
            raise ValueError("got both positions and phases: phases are the positions' own angles, pass one of the two")
        need, (cos, sin) = (embeds.shape[1], self.config.head_dim // 2), phases
        if cos.shape[-2:] != need or sin.shape[-2:] != need:
            raise ValueError(f"phases are {tuple(cos.shape)} and {tuple(sin.shape)}, expected {need} at their end")
    if positions is not None:
        if positions.shape not in (embeds.shape[1:2], embeds.shape[:2]):
            shape = tuple(positions.shape)
            raise ValueError(f"positions are {shape}, expected {tuple(embeds.shape[1:2])} or {tuple(embeds.shape[:2])}")
        require_same_device(embeds=embeds, positions=positions)


@method_checks(embed=_check_ids)
@checks(_check_embeds, init=_check_config)
class Decoder(nn.Module):
    """Token embeddings, blocks, a final norm and the head. Source: Llama (Touvron et al. 2023), section 2.2."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 0.02); layers that write to the residual stream divided by sqrt(2 * layers), as in GPT-2."""
        residual = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, residual if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02)

    def embed(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]"""
        return self.token_embedding(ids)

    def new_cache(self, *, capacity: int = 0) -> KVCache:
        """An empty cache for this decoder."""
        return KVCache(len(self.blocks), capacity=capacity)

    def forward(
        self,
        embeds: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        phases: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """embeds [B, T, D] -> logits [B, T, V], or only those of the last `logits_to_keep` positions when it is > 0.

        mask: boolean, broadcasts to [B, H, T, past + T] and is used as it stands (put the causal part in it);
        None means causal. positions: [T] or [B, T] integers, by default those after the tokens in the cache.
        phases: their `rotary_phases`, from a caller who uses the same ones again and again.
        """
        if embeds.dim() != 3 or embeds.shape[-1] != self.config.width:
            raise ValueError(
                f"the decoder takes [batch, tokens, {self.config.width}], got {tuple(embeds.shape)}: "
                "does the bridge end in another width?"
            )
        past = cache.length if cache is not None else 0
        if past + embeds.shape[1] > self.config.max_positions:
            raise ValueError(
                f"{past + embeds.shape[1]} tokens do not fit in max_positions={self.config.max_positions}: "
                "are there too many image tokens?"
            )
        if positions is None:
            positions = torch.arange(past, past + embeds.shape[1], device=embeds.device)  # [T]
        if phases is None:
            phases = rotary_phases(positions, self.config.head_dim, self.config.rope_theta)
        x = embeds
        for layer, block in enumerate(self.blocks):
            x = block(x, phases, mask, cache, layer)  # [B, T, D] -> [B, T, D]
        return self.head(self.norm(x[:, -logits_to_keep:]))  # [B, T, D] -> [B, T, V]
