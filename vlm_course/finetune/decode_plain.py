"""The state of a decoding step, and the step in plain torch: what `decode_kernels` computes, for any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_course.decoder import Decoder, DecoderConfig, rotary_phases
from vlm_course.finetune.fused import fuse, gate_up_parts, qkv_parts


@dataclass
class Weights:
    """One block's weights, fused: norms [D], qkv [(H + 2 H_kv) d, D], out [D, H d], gate_up [2 F, D], down [D, F]."""

    norm1: Tensor
    qkv: Tensor
    out: Tensor
    norm2: Tensor
    gate_up: Tensor
    down: Tensor


def block_weights(decoder: Decoder) -> list[Weights]:
    """The weights of every block; fuses them, so that no second copy is kept."""
    return [
        Weights(
            norm1=block.attention_norm.weight.detach(),
            qkv=fuse(qkv_parts(block)),
            out=block.attention.out.weight.detach(),
            norm2=block.mlp_norm.weight.detach(),
            gate_up=fuse(gate_up_parts(block)),
            down=block.mlp.down.weight.detach(),
        )
        for block in decoder.blocks
    ]


class State:
    """What a step reads and writes, always at the same addresses: the vectors of one token, the cache, the answer."""

    def __init__(self, decoder: Decoder, capacity: int, splits: int = 1):
        config: DecoderConfig = decoder.config
        like = {"device": decoder.head.weight.device}
        dtype, heads, d = decoder.head.weight.dtype, config.heads, config.head_dim
        self.config, self.capacity, self.splits = config, capacity, splits
        self.x = torch.zeros(config.width, **like)  # the residual stream, float32
        self.q = torch.zeros(heads, d, **like)
        self.mixed = torch.zeros(heads * d, dtype=dtype, **like)
        self.hidden = torch.zeros(config.mlp_width, dtype=dtype, **like)
        self.keys, self.values = (
            torch.zeros(config.layers, config.kv_heads, capacity, d, dtype=dtype, **like) for _ in range(2)
        )
        self.parts = torch.zeros(heads, splits, d, **like)
        self.tops, self.sums = (torch.zeros(heads, splits, **like) for _ in range(2))
        self.count = torch.zeros(config.kv_heads, dtype=torch.int32, **like)
        self.length = torch.zeros(1, dtype=torch.int32, **like)  # tokens in the cache
        self.written = torch.zeros(1, dtype=torch.int32, **like)  # tokens of the answer
        self.tokens = torch.zeros(capacity + 1, dtype=torch.long, **like)
        positions = torch.arange(capacity, **like)
        self.cos, self.sin = (p.contiguous() for p in rotary_phases(positions, d, config.rope_theta))  # [capacity, d/2]


class PlainStep:
    """One token: `state.x` through all blocks, the best word, its embedding back into `state.x`."""

    def __init__(self, decoder: Decoder, state: State, banned: int = -1):
        self.state, self.banned, self.blocks = state, banned, block_weights(decoder)
        self.norm, self.head = decoder.norm.weight.detach(), decoder.head.weight.detach()
        self.embedding = decoder.token_embedding.weight.detach()

    def _norm(self, weight: Tensor) -> Tensor:
        x = self.state.x
        return (x * torch.rsqrt(x.square().mean() + self.state.config.norm_eps) * weight.float()).to(weight.dtype)

    def qkv(self, layer: int) -> None:
        s, w = self.state, self.blocks[layer]
        heads, kv_heads, d = s.config.heads, s.config.kv_heads, s.config.head_dim
        q, k, v = (w.qkv @ self._norm(w.norm1)).float().view(-1, d).split([heads, kv_heads, kv_heads])  # [H, d]
        cos, sin = s.cos[s.length], s.sin[s.length]  # [1, d/2]

        def turned(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        s.q.copy_(turned(q))
        s.keys[layer].index_copy_(1, s.length.long(), turned(k)[:, None].to(s.keys.dtype))
        s.values[layer].index_copy_(1, s.length.long(), v[:, None].to(s.values.dtype))

    def attention(self, layer: int) -> None:
        s = self.state
        tokens = int(s.length) + 1
        keys, values = s.keys[layer, None, :, :tokens], s.values[layer, None, :, :tokens]  # [1, H_kv, S, d]
        q = s.q.to(keys.dtype).view(1, s.config.kv_heads, -1, s.config.head_dim)  # [1, H_kv, H / H_kv, d]
        s.mixed.copy_(F.scaled_dot_product_attention(q, keys, values).flatten())

    def out(self, layer: int) -> None:
        self.state.x += (self.blocks[layer].out @ self.state.mixed).float()

    def gate_up(self, layer: int) -> None:
        w = self.blocks[layer]
        gate, up = (w.gate_up @ self._norm(w.norm2)).float().chunk(2)
        self.state.hidden.copy_(F.silu(gate) * up)

    def down(self, layer: int) -> None:
        self.state.x += (self.blocks[layer].down @ self.state.hidden).float()

    def choose(self) -> None:
        """From the last residual stream to the next token, which becomes x."""
        s = self.state
        logits = self.head @ self._norm(self.norm)  # [V]
        if self.banned >= 0:
            logits[self.banned] = -torch.inf
        token = logits.argmax()
        s.tokens.index_copy_(0, s.written.long(), token[None])
        s.written += 1
        s.length += 1
        s.x.copy_(self.embedding[token])

    def __call__(self) -> None:
        for layer in range(len(self.blocks)):
            self.qkv(layer)
            self.attention(layer)
            self.out(layer)
            self.gate_up(layer)
            self.down(layer)
        self.choose()
