"""A decoder-only language model in the Llama family: RMSNorm, rotary positions, grouped queries, SwiGLU, KV cache."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.attention import attend


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
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key heads: not a multiple")
        if self.head_dim is None:
            if self.width % self.heads:
                raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads: give head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but rotary positions turn pairs: it must be even")


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


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + head_dim / 2]) by their angles: [B, H, T, d] -> [B, H, T, d].

    The pairing is that of GPT-NeoX and of Llama's weights on the hub; Llama's first release paired neighbours.
    """
    first, second = x.float().chunk(2, dim=-1)  # [B, H, T, d] -> 2 x [B, H, T, d/2]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


class KVCache:
    """Keys and values of the tokens seen so far, one growing buffer per layer. For inference: writes are in place.

    `capacity` reserves room for that many tokens at once; without it the buffers double when they are full.
    """

    def __init__(self, layers: int, *, capacity: int = 0):
        self.capacity = capacity
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._lengths = [0] * layers

    @property
    def length(self) -> int:
        """Tokens stored. All layers agree between two calls of the model."""
        return self._lengths[-1]

    def select(self, rows: Tensor, *, room: int = 0) -> "KVCache":
        """A copy with the given rows of the batch, repeated where `rows` [n] repeats them, and room for more tokens.

        So that many questions can go on from one image that was read once.
        """
        copy = KVCache(len(self._buffers), capacity=self.length + room)
        for layer, buffers in enumerate(self._buffers):
            if buffers is not None:
                copy.update(layer, *(stored[rows, :, : self._lengths[layer]] for stored in buffers))
        return copy

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values [B, H, T, d] of the new tokens; returns those of all tokens, [B, H, past + T, d]."""
        start, end = self._lengths[layer], self._lengths[layer] + keys.shape[2]
        buffers = self._buffers[layer]
        if buffers is None or end > buffers[0].shape[2]:
            room = max(end, self.capacity, 2 * start)
            grown = tuple(new.new_empty(*new.shape[:2], room, new.shape[3]) for new in (keys, values))
            if buffers is not None:
                for old, new in zip(buffers, grown, strict=True):
                    new[:, :, :start] = old[:, :, :start]
            buffers = self._buffers[layer] = grown
        buffers[0][:, :, start:end] = keys
        buffers[1][:, :, start:end] = values
        self._lengths[layer] = end
        return buffers[0][:, :, :end], buffers[1][:, :, :end]


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
